"""One backbone, one data source, one budget: a smaller model in a folder, and a look at what is in such a folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tapfl.config import RunConfig
from tapfl.data.sources import load_images
from tapfl.errors import ConfigError, DataError
from tapfl.models.backbone import build, input_transform
from tapfl.models.dense import DenseCache, dense_backbone
from tapfl.models.latency import latencies_ms
from tapfl.pruning.basis import turned_on_pool
from tapfl.pruning.budget import Budget
from tapfl.pruning.criteria.registry import resolved
from tapfl.pruning.pipeline import fine_tune_set, labels_of, prune_model
from tapfl.pruning.plan import PruningPlan
from tapfl.pruning.planning import pruning_task
from tapfl.pruning.surgery import load_plan, load_pruned, save_pruned
from tapfl.seeds import numpy_generator
from tapfl.store import cache_folder


def prune(config: RunConfig, budget: Budget | float | str, out: Path) -> PruningPlan:
    """Prunes the backbone that `config` names for the images of its `data.source`, and saves it to `out`.

    The metric set and the fine-tune set are drawn evenly from those images: they are the task.

    Raises:
        TapflError: if an option is off or the budget cannot be met; nothing is written then.
    """
    if out.exists():
        raise ConfigError(f"out = {str(out)!r}: exists already; give a folder that does not")
    budget, options = Budget.parse(budget), resolved(config.pruning)
    cache, transform = cache_folder(config.cache), input_transform(config.model)
    images = load_images(config.data.source, config.data.image_size or max(transform.size), cache)
    for name, size in (("metric.size", config.metric.size), ("pruning.recovery-size", options.recovery_size)):
        if size > len(images):
            raise DataError(f"{name} = {size}: {config.data.source!r} has {len(images)} images")
    _, spec, model = dense_backbone(config.model, images, config.seed, DenseCache(cache))
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
    provenance = {"data": config.data.source, "metric-size": config.metric.size, "budget": str(budget)}
    pruned = prune_model(task, spec, fine_tune_set(drawn, transform, options), provenance, config.seed)
    save_pruned(pruned.model, pruned.plan, out)
    return pruned.plan


def inspect(folder: Path, repeats: int = 20) -> dict[str, Any]:
    """Returns what a pruned model's folder holds: layers, cost before and after, latency measured here and now.

    Raises:
        PlanError: if the folder lacks a file or was damaged.
    """
    plan, _ = load_plan(folder)
    small = load_pruned(folder)
    dense_ms, small_ms = latencies_ms([build(plan.backbone), small], repeats)
    return {
        "backbone": plan.backbone.name,
        "provenance": plan.provenance,
        "params": plan.cost.params,
        "params_dense": plan.dense.params,
        "macs": plan.cost.macs,
        "macs_dense": plan.dense.macs,
        "latency_ms": small_ms,
        "latency_ms_dense": dense_ms,
        "layers": [
            {
                "name": layer.name,
                "kind": layer.kind,
                "units": layer.units,
                "kept": len(layer.kept),
                "importance": layer.importance,
            }
            for layer in plan.layers
        ],
    }


def picture(found: Mapping[str, Any], file: Path) -> None:
    """Draws the kept share of every layer, and its importance where the plan has one."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    kinds = {kind: [layer for layer in found["layers"] if layer["kind"] == kind] for kind in ("attention", "ffn")}
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.2), sharey=True, layout="constrained")
    for axis, (kind, layers) in zip(axes, kinds.items(), strict=True):
        axis.bar(range(len(layers)), [layer["kept"] / layer["units"] for layer in layers], color="#4477aa")
        axis.set(title=kind, xlabel="block", ylim=(0, 1.02), xticks=range(len(layers)))
        importance = [layer["importance"] for layer in layers]
        if any(value is not None for value in importance):
            right = axis.twinx()
            right.plot(range(len(layers)), importance, "o-", color="#ee6677", markersize=3, linewidth=1)
            right.set_ylabel("importance: KL (nats)", color="#ee6677")
            right.set_ylim(bottom=0)
    axes[0].set_ylabel("share of units kept")
    share = found["macs"] / found["macs_dense"]
    figure.suptitle(f"{found['backbone']}: {share:.1%} of the MACs, {found['macs'] / 1e6:.3g}M")
    figure.savefig(file, dpi=120)
    plt.close(figure)
