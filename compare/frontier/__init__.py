"""The reward-KL frontier: points, matched KL, the optimum."""
