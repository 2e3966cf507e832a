"""``evaluate.load``: how often a pair is ranked as its label does."""
