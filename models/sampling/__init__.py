"""Sampling completions: our own loop, and the engines that may take its place."""
