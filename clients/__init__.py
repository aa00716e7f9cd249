"""A device's side of one federation."""
