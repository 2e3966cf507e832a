"""``evaluate.load``: AlpacaEval 2's length-controlled win rate."""
