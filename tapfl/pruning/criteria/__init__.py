"""Criteria: each chooses the units that stay, given a backbone, a metric set and a budget."""
