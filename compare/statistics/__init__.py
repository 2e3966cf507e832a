"""Intervals, tests and bounds in closed form: arrays in, figures out; knows no policy and no judge."""
