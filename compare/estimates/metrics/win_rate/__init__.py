"""``evaluate.load``: win rate with its interval and test."""
