"""LoRA on pruned backbones: what is trained, where it lies in the global adapters, and how it is averaged."""
