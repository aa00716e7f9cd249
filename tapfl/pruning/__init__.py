"""Importance, allocation, plans and surgery: from a backbone and a metric set to a smaller plain timm model."""
