"""Benchmarks: variants take turns in one run, and results are ratios rather than absolute times."""
