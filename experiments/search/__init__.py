"""Search over the options of a run. Budgets are federated rounds, and each rung continues from the last checkpoint."""
