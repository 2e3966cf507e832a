"""From a configuration to jobs, processes and a finished run folder."""
