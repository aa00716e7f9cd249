"""Backbones from timm, what can be pruned in them, and what they cost."""
