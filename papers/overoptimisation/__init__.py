"""Papers on rewards that are optimised too far."""
