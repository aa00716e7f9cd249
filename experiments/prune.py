"""One backbone, one data source, one budget: a smaller model in a folder, and a look at what is in such a folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from tapfl.config import RunConfig, Scalar
from tapfl.data.sources import load_images
from tapfl.errors import ConfigError, DataError
from tapfl.models.backbone import build, input_transform
from tapfl.models.dense import DenseCache, dense_backbone
from tapfl.models.latency import latencies_ms
from tapfl.pruning.budget import Budget
from tapfl.pruning.compensation import compensated
from tapfl.pruning.criteria.registry import criterion_of
from tapfl.pruning.plan import PruningPlan
from tapfl.pruning.planning import plan_of, pruning_task
from tapfl.pruning.surgery import load_plan, load_pruned, save_pruned
from tapfl.seeds import numpy_generator
from tapfl.store import cache_folder


def prune(config: RunConfig, budget: Budget | float | str, compensation: str, out: Path) -> PruningPlan:
    """Prunes the backbone that `config` names for the images of its `data.source`, and saves it to `out`.

    The metric set is drawn evenly from those images: they are the task.

    Raises:
        TapflError: if an option is off or the budget cannot be met; nothing is written then.
    """
    if out.exists():
        raise ConfigError(f"out = {str(out)!r}: exists already; give a folder that does not")
    budget = Budget.parse(budget)
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
        "budget": str(budget),
        "criterion": config.pruning.criterion,
        "compensation": compensation,
        "seed": config.seed,
    }
    plan = plan_of(task, selection, spec, provenance)
    weights = selection.model or model
    small = compensated(weights, selection.kept, task.layers, inputs, config.metric.batch, compensation)
    save_pruned(small, plan, out)
    return plan


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
