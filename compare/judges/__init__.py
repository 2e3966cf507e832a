"""Judges: whatever says which of two completions is better. All give the same typed judgement."""
