"""Runs several long calls at once: a job is a function with its arguments, and a pool executes jobs."""
