"""A language model that says which of two answers is better: `compare` reports it, PPO may be rewarded by it."""
