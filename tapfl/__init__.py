"""tapfl: task-adaptive pruning of Vision Transformers, and federated learning of what remains.

The method without Flower, a name at a time: ``import tapfl`` costs nothing until a name is used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tapfl.config import MetricOptions, PruningOptions, SummaryOptions
    from tapfl.data.sources import ImageSet, load_images
    from tapfl.errors import TapflError
    from tapfl.models.backbone import BackboneSpec, build
    from tapfl.models.cost import Cost, measure_cost
    from tapfl.models.forward import image_features, transform_of
    from tapfl.models.prunable import prunable_layers
    from tapfl.pruning.budget import Budget
    from tapfl.pruning.export import export
    from tapfl.pruning.pipeline import prune_model, pruning_task
    from tapfl.pruning.plan import PruningPlan, load_plan, read_plan
    from tapfl.pruning.surgery import apply_plan, load_pruned, save_pruned, shrink
    from tapfl.summary.descriptors import Projection
    from tapfl.summary.metric_set import pick_metric_set
    from tapfl.summary.mixture import GaussianSummary, fit_mixture

_HOMES = {
    "BackboneSpec": "tapfl.models.backbone",
    "Budget": "tapfl.pruning.budget",
    "Cost": "tapfl.models.cost",
    "GaussianSummary": "tapfl.summary.mixture",
    "ImageSet": "tapfl.data.sources",
    "MetricOptions": "tapfl.config",
    "Projection": "tapfl.summary.descriptors",
    "PruningOptions": "tapfl.config",
    "PruningPlan": "tapfl.pruning.plan",
    "SummaryOptions": "tapfl.config",
    "TapflError": "tapfl.errors",
    "apply_plan": "tapfl.pruning.surgery",
    "build": "tapfl.models.backbone",
    "export": "tapfl.pruning.export",
    "fit_mixture": "tapfl.summary.mixture",
    "image_features": "tapfl.models.forward",
    "load_images": "tapfl.data.sources",
    "load_plan": "tapfl.pruning.plan",
    "load_pruned": "tapfl.pruning.surgery",
    "measure_cost": "tapfl.models.cost",
    "pick_metric_set": "tapfl.summary.metric_set",
    "prune_model": "tapfl.pruning.pipeline",
    "prunable_layers": "tapfl.models.prunable",
    "pruning_task": "tapfl.pruning.pipeline",
    "read_plan": "tapfl.pruning.plan",
    "save_pruned": "tapfl.pruning.surgery",
    "shrink": "tapfl.pruning.surgery",
    "transform_of": "tapfl.models.forward",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'tapfl' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
