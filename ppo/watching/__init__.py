"""What a run shows of itself: figures, diagnosis, evaluation, cost."""
