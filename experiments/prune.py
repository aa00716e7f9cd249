"""One backbone, one data source, one budget: a smaller model in a folder."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from tapfl.config import RunConfig
from tapfl.data.sources import load_images
from tapfl.errors import ConfigError, DataError
from tapfl.models.dense import DenseCache, dense_backbone
from tapfl.models.forward import input_transform
from tapfl.options import Scalar
from tapfl.progress import stage
from tapfl.pruning.basis import turned_on_pool
from tapfl.pruning.budget import Budget
from tapfl.pruning.criteria.registry import resolved
from tapfl.pruning.pipeline import fine_tune_set, labels_of, prune_model
from tapfl.pruning.plan import PruningPlan
from tapfl.pruning.planning import pruning_task
from tapfl.pruning.surgery import save_pruned
from tapfl.seeds import numpy_generator
from tapfl.store import cache_folder


def prune(config: RunConfig, budget: Budget | float | str, out: Path) -> PruningPlan:
    """Prunes the backbone that `config` names for the images of its `data.source`, and saves it to `out`.

    The metric set and the fine-tune set are drawn evenly from those images: they are the task.

    Raises:
        TapflError: if an option is off or the budget cannot be met; nothing is written then.
    """
    torch.set_num_threads(1)  # the same bits whatever the machine has
    if out.exists():
        raise ConfigError(f"out = {str(out)!r}: exists already; give a folder that does not")
    budget, options = Budget.parse(budget), resolved(config.pruning)
    cache, transform = cache_folder(config.cache), input_transform(config.model)
    images = load_images(config.data.source, config.data.image_size or max(transform.size), cache)
    for name, size in (("metric.size", config.metric.size), ("pruning.recovery-size", options.recovery_size)):
        if size > len(images):
            raise DataError(f"{name} = {size}: {config.data.source!r} has {len(images)} images")
    _, spec, model = dense_backbone(config.model, images, config.seed, DenseCache(cache))
    with stage(f"pruning by {options.criterion}"):
        if options.basis == "canonical":
            model = turned_on_pool(model, images, transform, config.seed)
        drawn = images.subset(numpy_generator(config.seed, "metric").permutation(len(images)))
        metric = drawn.subset(np.arange(config.metric.size))
        task = pruning_task(
            model,
            transform(metric.images),
            budget,
            options,
            config.metric.batch,
            labels_of(metric, options),
            config.seed,
        )
        provenance: dict[str, Scalar] = {
            "data": config.data.source,
            "metric-size": config.metric.size,
            "budget": str(budget),
        }
        pruned = prune_model(
            task,
            spec,
            fine_tune_set(lambda size: drawn.subset(np.arange(size)), transform, options),
            provenance,
            config.seed,
        )
    save_pruned(pruned.model, pruned.plan, out)
    return pruned.plan
