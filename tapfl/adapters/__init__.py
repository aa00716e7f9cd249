"""LoRA on pruned backbones: the forward pass, the place of a device's adapters in the global ones, aggregation."""
