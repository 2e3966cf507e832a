"""From the command line to one resolved, checked configuration."""
