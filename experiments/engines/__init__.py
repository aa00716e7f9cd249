"""What runs under a federation: Flower's own simulation on Ray, or one process."""
