"""Everything that a stage would refuse, before the first stage starts."""
