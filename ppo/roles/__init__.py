"""The four models of PPO."""
