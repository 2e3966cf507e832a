"""``evaluate.load``: KL of completions to a reference."""
