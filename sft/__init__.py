"""Supervised fine-tuning, where every other stage starts from."""
