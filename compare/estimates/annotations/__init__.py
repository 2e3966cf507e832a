"""Judgements made elsewhere, in AlpacaEval's format, put through the same statistics."""
