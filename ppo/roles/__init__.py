"""Who takes part: policy, value model, reference, rewards."""
