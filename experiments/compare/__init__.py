"""Criteria side by side: the same metric sets, budgets, alignment, cost meter and test images for all of them."""
