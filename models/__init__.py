"""What a model is: loading, prompts, generation, log-probabilities, values and scores."""
