"""``evaluate.load``: expected calibration error and Brier score."""
