"""Forward passes over given tokens: log-probabilities, values, scores."""
