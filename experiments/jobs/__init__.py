"""Long calls, several at once: a job is a function and its arguments, a pool carries out jobs."""
