"""The command: configuration, stages in order, the run folder, launching."""
