"""tapfl: task-adaptive pruning of Vision Transformers, and federated learning of the pruned models.

These names are the method without Flower. Each is imported when it is first used, so ``import tapfl`` is fast.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_NAMES = {
    "config": "MetricOptions PruningOptions SummaryOptions",
    "data.images": "ImageSet",
    "data.sources": "load_images",
    "errors": "TapflError",
    "models.backbone": "BackboneSpec build",
    "models.cost": "Cost measure_cost",
    "models.forward": "image_features transform_of",
    "models.prunable": "prunable_layers",
    "pruning.budget": "Budget",
    "pruning.export": "export",
    "pruning.pipeline": "prune_model pruning_task",
    "pruning.plan": "PruningPlan load_plan read_plan",
    "pruning.surgery": "apply_plan load_pruned save_pruned shrink",
    "summary.metric_set": "Projection pick_metric_set",
    "summary.mixture": "GaussianSummary fit_mixture",
}
_HOMES = {name: f"tapfl.{module}" for module, names in _NAMES.items() for name in names.split()}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'tapfl' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
