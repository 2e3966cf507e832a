"""The exact state of a run, kept and gone on from."""
