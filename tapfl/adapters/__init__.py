"""LoRA on pruned backbones: the forward pass, the mapping of a device's adapters to the global ones, aggregation."""
