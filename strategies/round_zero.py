"""The server's work from the summaries to the smaller models; pure functions of pool, backbone and a mixture."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import numpy as np
from torch import nn

from tapfl.config import MetricOptions, RunConfig, Scalar
from tapfl.data.sources import ImageSet
from tapfl.models.backbone import BackboneSpec, transform_of
from tapfl.pruning.basis import carried_energy, turned_on_pool
from tapfl.pruning.criteria.registry import resolved
from tapfl.pruning.pipeline import Pruned, fine_tune_set, labels_of, prune_model
from tapfl.pruning.planning import pruning_task
from tapfl.seeds import numpy_generator
from tapfl.summary.descriptors import Projection, image_features
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
    features = image_features(model, transform_of(model).batches(images.images))
    projection = Projection.fit(features, config.summary.dim)
    points = projection(features)
    drawn = int(numpy_generator(config.seed, "pool").integers(2**31))
    return PublicPool(images, points, fit_mixture(points, config.summary, drawn), projection)


def model_to_cut(config: RunConfig, pool: PublicPool, model: nn.Module) -> nn.Module:
    """Returns the model of which all devices' smaller models are parts: `model`, in the basis that the options name.

    The canonical basis is found on the whole pool, never for one device: adapters are aggregated by index, which means
    something only where a dim is the same dim on every device. A model that was turned before is returned as it is.
    """
    if resolved(config.pruning).basis == "canonical" and carried_energy(model) is None:
        return turned_on_pool(model, pool.images, transform_of(model), config.seed)
    return model


def task_images(
    pool: PublicPool, summary: GaussianSummary, options: MetricOptions, seed: int, partition_id: int, size: int = 0
) -> np.ndarray:
    """Returns the positions in the pool, int64, of the images that stand for a device's task, best first.

    Args:
        size: how many; 0: as many as the metric set has.
    """
    options = options.model_copy(update={"size": size or options.size})
    generator = numpy_generator(seed, "metric", partition_id)
    return pick_metric_set(summary, pool.mixture, pool.points, options, generator)


def device_model(
    config: RunConfig,
    pool: PublicPool,
    spec: BackboneSpec,
    model: nn.Module,
    summary: GaussianSummary,
    partition_id: int,
    budget: float,
) -> Pruned:
    """Returns the smaller model of one device and its plan: by the public images of its task, for its budget.

    Args:
        model: the dense backbone, or what `model_to_cut` made of it, which is then not made again.

    Raises:
        BudgetError: if this backbone cannot meet the budget.
    """
    model, transform, options = model_to_cut(config, pool, model), transform_of(model), config.pruning
    positions = partial(task_images, pool, summary, config.metric, config.seed, partition_id)
    metric = pool.images.subset(positions())
    best = pool.images.subset(positions(options.recovery_size)) if options.recovery_size else metric
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
    inputs, labels = transform(metric.images), labels_of(metric, options)
    task = pruning_task(model, inputs, budget, options, config.metric.batch, labels, config.seed)
    return prune_model(task, spec, fine_tune_set(best, transform, options), provenance, config.seed)
