"""Steps 1 to 6 of an update: from prompts to advantages."""
