"""PPO: `trainer` calls the steps in order; what they do is in `rollouts` (1 to 6) and `updates` (7, 8)."""
