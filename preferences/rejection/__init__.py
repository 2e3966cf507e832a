"""Rejection sampling by a scorer: best-of-n, best against worst, statistical rejection sampling (RSO)."""
