"""The server's work between the summaries and the plans; pure functions of its pool, its backbone and a mixture."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import nn

from tapfl.config import RunConfig, Scalar
from tapfl.data.sources import ImageSet
from tapfl.models.backbone import BackboneSpec, transform_of
from tapfl.pruning.pipeline import prune_model
from tapfl.pruning.plan import PruningPlan
from tapfl.pruning.planning import pruning_task
from tapfl.seeds import numpy_generator
from tapfl.store import cache_folder
from tapfl.summary.descriptors import Projection, cached_features
from tapfl.summary.metric_set import pick_metric_set
from tapfl.summary.mixture import GaussianSummary, fit_mixture


@dataclass(frozen=True)
class PublicPool:
    """The pool as every device's plan needs it; computed once a run.

    Attributes:
        images: the public images.
        points: their descriptors, float64 (n, d).
        mixture: a mixture fitted on all of them.
        projection: from features to descriptors; devices use the same.
    """

    images: ImageSet
    points: np.ndarray
    mixture: GaussianSummary
    projection: Projection


def describe_pool(config: RunConfig, images: ImageSet, model: nn.Module) -> PublicPool:
    """Returns the pool with its descriptors and mixture."""
    features = cached_features(model, images, transform_of(model), cache_folder(config.cache))
    projection = Projection.fit(features, config.summary.dim)
    points = projection(features)
    drawn = int(numpy_generator(config.seed, "pool").integers(2**31))
    return PublicPool(images, points, fit_mixture(points, config.summary, drawn), projection)


def device_plan(
    config: RunConfig,
    pool: PublicPool,
    spec: BackboneSpec,
    model: nn.Module,
    summary: GaussianSummary,
    partition_id: int,
    budget: float,
) -> PruningPlan:
    """Returns the plan of one device: its metric set, the importance measured on it, its budget.

    Raises:
        BudgetError: if this backbone cannot meet the budget.
    """
    generator = numpy_generator(config.seed, "metric", partition_id)
    chosen = pick_metric_set(summary, pool.mixture, pool.points, config.metric, generator)
    inputs = transform_of(model)(pool.images.images[chosen])
    provenance: dict[str, Scalar] = {
        "device": partition_id,
        "budget": budget,
        "metric-rule": config.metric.rule,
        "metric-size": config.metric.size,
        "criterion": config.pruning.criterion,
        "ratio": config.pruning.ratio,
        "tau": config.pruning.tau,
        "align": config.pruning.align,
        "seed": config.seed,
    }
    task = pruning_task(model, inputs, budget, config.pruning, config.metric.batch, seed=config.seed)
    return prune_model(task, spec, provenance=provenance, seed=config.seed).plan
