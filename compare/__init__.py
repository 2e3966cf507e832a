"""The verdict: completions, judges, win rates, KL, the reward-KL frontier, and one report of what was measured."""
