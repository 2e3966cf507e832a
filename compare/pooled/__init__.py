"""Several runs as one experiment."""
