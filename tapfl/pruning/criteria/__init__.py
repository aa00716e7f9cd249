"""Criteria: which units stay, given a backbone, a metric set and a budget. One file each, one signature."""
