"""Worlds small enough to be known exactly, and what methods do in them."""
