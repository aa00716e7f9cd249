"""One backbone, one data source, one budget: a smaller model in a folder."""

from __future__ import annotations

from pathlib import Path

import torch

from tapfl.config import RunConfig, Scalar
from tapfl.data.sources import load_images
from tapfl.errors import ConfigError, DataError
from tapfl.models.backbone import input_transform
from tapfl.models.dense import DenseCache, dense_backbone
from tapfl.pruning.compensation import compensated
from tapfl.pruning.criteria.registry import criterion_of
from tapfl.pruning.plan import PruningPlan
from tapfl.pruning.planning import plan_of, pruning_task
from tapfl.pruning.surgery import save_pruned
from tapfl.seeds import numpy_generator
from tapfl.store import cache_folder


def prune(config: RunConfig, budget: float, compensation: str, out: Path) -> PruningPlan:
    """Prunes the backbone that `config` names for the images of its `data.source`, and saves it to `out`.

    The metric set is drawn evenly from those images: they are the task.

    Raises:
        TapflError: if an option is off or the budget cannot be met; nothing is written then.
    """
    if out.exists():
        raise ConfigError(f"out = {str(out)!r}: exists already; give a folder that does not")
    if not 0 < budget <= 1:
        raise ConfigError(f"budget = {budget:g}: is a share of the MACs and must lie in (0, 1]")
    criterion = criterion_of(config.pruning.criterion)
    cache, transform = cache_folder(config.cache), input_transform(config.model)
    images = load_images(config.data.source, config.data.image_size or max(transform.size), cache)
    size = config.metric.size
    if size > len(images):
        raise DataError(f"metric.size = {size}: {config.data.source!r} has {len(images)} images")
    _, spec, model = dense_backbone(config.model, images, config.seed, DenseCache(cache))
    chosen = numpy_generator(config.seed, "metric").choice(len(images), size, replace=False)
    inputs, labels = transform(images.images[chosen]), torch.from_numpy(images.labels[chosen])
    task = pruning_task(model, inputs, budget, config.pruning, config.metric.batch, labels, config.seed)
    selection = criterion(task)
    provenance: dict[str, Scalar] = {
        "data": config.data.source,
        "metric-size": size,
        "budget": budget,
        "criterion": config.pruning.criterion,
        "compensation": compensation,
        "seed": config.seed,
    }
    plan = plan_of(task, selection, spec, provenance)
    weights = selection.model or model
    small = compensated(weights, selection.kept, task.layers, inputs, config.metric.batch, compensation)
    save_pruned(small, plan, out)
    return plan
