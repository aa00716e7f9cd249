"""Images: their sources, their division among devices, and their conversion to tensors."""
