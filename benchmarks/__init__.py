"""Commands that print the figures the docs quote."""
