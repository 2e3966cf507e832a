"""Whose completions are compared: policies, draws, contenders."""
