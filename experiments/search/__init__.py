"""Search over the options of a run: budgets are federated rounds, and a rung goes on from the checkpoint before."""
