"""Compares pruning criteria with the same metric sets, budgets, alignment, cost model and test images."""
