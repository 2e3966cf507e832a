"""From names and folders to models and tokenizers."""
