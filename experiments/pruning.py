"""Functions of the pruning commands: prune a backbone, apply a plan to other weights, inspect and export the result.

A pruned model is a folder with `plan.json` and `model.safetensors`; each device's folder in a run contains one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from clients.storage import DeviceStorage
from experiments.feasible import require_budgets
from experiments.output import count
from tapfl.adapters.peft_format import merge_peft
from tapfl.compute import Compute
from tapfl.config import NEW_HEADS, ModelOptions, RunConfig
from tapfl.data.sources import load_images
from tapfl.errors import ConfigError, DataError, ModelError
from tapfl.models.backbone import BackboneSpec, build, spec_of
from tapfl.models.cost import latencies_ms, median_ms
from tapfl.models.dense import DenseCache, dense_backbone, dense_spec
from tapfl.models.forward import example_input, input_transform
from tapfl.models.merging import tokens_seen
from tapfl.models.prunable import prunable_layers
from tapfl.models.units import PrunableLayer
from tapfl.models.weights import load_hub_weights, load_weights
from tapfl.options import Scalar
from tapfl.progress import stage
from tapfl.pruning.basis import in_basis, turned_on_pool
from tapfl.pruning.budget import Budget
from tapfl.pruning.criteria.registry import resolved
from tapfl.pruning.export import export, load_exported
from tapfl.pruning.pipeline import prune_model, pruning_task
from tapfl.pruning.plan import PLAN_FILE, PruningPlan, load_plan, read_plan
from tapfl.pruning.recovery import fine_tune_set, labels_of
from tapfl.pruning.surgery import WEIGHTS_FILE, apply_plan, load_pruned, save_pruned
from tapfl.seeds import numpy_generator
from tapfl.store import cache_folder, content_hash

REFITTED = ("compensation", "recovery")  # entries of a plan's provenance that changed weights after the cut
REPEATS = 30  # forward passes; the latency of an exported model is their median


def prune(config: RunConfig, budget: Budget | float | str, out: Path) -> PruningPlan:
    """Prunes the backbone of `config` for the images of its `data.source`, saves it to `out`, and returns the plan.

    The metric set and the fine-tune set are random samples of these images.

    Raises:
        TapflError: if an option is not valid or the budget cannot be met; then nothing is written.
    """
    require_new(out)
    if config.model.head in NEW_HEADS:
        accepted = "accepted: train, rows, rows+train"
        raise ConfigError(f"model.head = {config.model.head!r}: needs the classes that devices report; {accepted}")
    if config.pruning.probe == "pool":
        raise ConfigError("pruning.probe = 'pool': here the only images are those of data.source; accepted: own, auto")
    compute = Compute.of(config.compute)
    compute.prepare()
    budget, options = Budget.parse(budget), resolved(config.pruning)
    cache, transform = cache_folder(config.cache), input_transform(config.model)
    images = load_images(config.data.source, transform, cache, config.data.ids, config.data.cache_gb)
    for name, size in (("metric.size", config.metric.size), ("pruning.recovery-size", options.recovery_size)):
        if size > len(images):
            raise DataError(f"{name} = {size}: {config.data.source!r} has {len(images)} images")
    outline = build(dense_spec(config.model, images))
    require_budgets(outline, prunable_layers(outline), options, [budget])  # before the backbone is trained
    _, spec, model = dense_backbone(config.model, images, config.seed, DenseCache(cache), compute)
    with stage(f"pruning by {options.criterion}"):
        dense = compute.put(model)
        model = in_basis(dense, options.basis, lambda: turned_on_pool(dense, images, transform, config.seed))
        drawn = images.subset(numpy_generator(config.seed, "metric").permutation(len(images)))
        metric = drawn.subset(np.arange(config.metric.size))
        inputs, labels = compute.put(transform(metric.read())), compute.put(labels_of(metric, options))
        batch, seed = config.metric.batch, config.seed
        task = pruning_task(model, inputs, budget, options, batch, labels, seed, compute=compute)
        fine_tune = fine_tune_set(lambda size: drawn.subset(np.arange(size)), transform, options)
        origin: dict[str, Scalar] = {"data": config.data.source, "metric-size": config.metric.size}
        pruned = prune_model(task, spec, fine_tune, origin | {"budget": str(budget)}, config.seed)
    save_pruned(pruned.model, pruned.plan, out)
    return pruned.plan


def reapply(source: Path, options: ModelOptions, names_backbone: bool, out: Path) -> list[str]:
    """Applies the plan in `source` to the weights in `options`, saves the model to `out`, and returns warnings.

    Args:
        source: a pruned model's folder, a device's folder in a run, or a plan's JSON file.
        names_backbone: whether the user gave the backbone's name or arguments; if so, they must match the plan.

    Raises:
        TapflError: if the weights and the plan do not fit together; then nothing is written.
    """
    require_new(out)
    plan = read_plan(pruned_folder(source))
    classes = tuple(map(str, range(plan.backbone.num_classes)))
    named = spec_of(options, classes)
    if names_backbone and (named.name, named.args) != (plan.backbone.name, plan.backbone.args):
        raise ConfigError(
            f"model.name = {named.name!r} with {named.args}: the plan is for {plan.backbone.name} "
            f"with {plan.backbone.args}; omit model.name and model.args"
        )
    model = _with_weights(plan.backbone, options, classes)
    small = apply_plan(plan, model)
    warnings = [
        f"the plan's model was changed after the cut by {key} = {plan.provenance[key]}, which is not repeated here"
        for key in REFITTED
        if plan.provenance.get(key, "none") not in ("none", "", False)
    ]
    kept = {key: value for key, value in plan.provenance.items() if key not in REFITTED}
    provenance = kept | {"plan": plan.checksum[:16], "weights": content_hash(model.state_dict())}
    save_pruned(small, plan.model_copy(update={"provenance": provenance}), out)
    return warnings


def _with_weights(spec: BackboneSpec, options: ModelOptions, classes: tuple[str, ...]) -> nn.Module:
    """Returns the backbone with the weights in `options`, including their head; nothing is trained."""
    if not options.weights:
        raise ConfigError("model.weights = '': --plan needs weights to prune; accepted: a .safetensors file, or hub")
    if options.head_rows:
        reason = "a plan has only the number of classes, not their names"
        raise ConfigError(f"model.head-rows = {options.head_rows!r}: {reason}")
    model = build(spec)
    if options.weights != "hub":
        load_weights(model, Path(options.weights), classes, None, needs_head=True)
        return model
    available = getattr(model, "pretrained_cfg", {}).get("num_classes")
    if available != spec.num_classes:
        raise ModelError(f"model.weights = 'hub': the head has {available} classes, but the plan {spec.num_classes}")
    load_hub_weights(model, spec, classes, None)
    return model


def require_new(out: Path) -> None:
    """Raises ConfigError if `out` exists."""
    if out.exists():
        raise ConfigError(f"out = {str(out)!r}: exists already; give a folder that does not exist")


def pruned_folder(folder: Path) -> Path:
    """Returns the pruned model's folder: `folder`, or the one inside it if `folder` is a device's folder in a run."""
    inner = DeviceStorage(folder).pruned
    return inner if not (folder / PLAN_FILE).exists() and inner.is_dir() else folder


def inspect(folder: Path, repeats: int = 20) -> dict[str, Any]:
    """Returns the layers of a pruned model, its costs and the dense model's, and both latencies on this machine.

    ``bytes`` is the size of the weights' file, ``bytes_dense`` the size of the dense model's tensors.

    Raises:
        PlanError: if a file is missing or damaged.
    """
    folder = pruned_folder(folder)
    plan, _ = load_plan(folder)
    small, dense = load_pruned(folder), build(plan.backbone)
    dense_ms, small_ms = latencies_ms([dense, small], repeats)
    return {
        "folder": str(folder),
        "backbone": plan.backbone.name,
        "provenance": plan.provenance,
        "params": plan.cost.params,
        "params_dense": plan.dense.params,
        "macs": plan.cost.macs,
        "macs_dense": plan.dense.macs,
        "bytes": (folder / WEIGHTS_FILE).stat().st_size,
        "bytes_dense": sum(tensor.numel() * tensor.element_size() for tensor in dense.state_dict().values()),
        "latency_ms": small_ms,
        "latency_ms_dense": dense_ms,
        "merges": plan.tokens,
        "layers": layers_of(prunable_layers(dense), plan),
    }


def layers_of(dense: Sequence[PrunableLayer], plan: PruningPlan) -> list[dict[str, Any]]:
    """Returns one row per layer of a plan: name, kind, stage, units, kept units, widths, importance and tokens.

    Args:
        dense: the prunable layers of the plan's backbone; their weights are not used.
    """
    return [
        {
            "name": layer.name,
            "kind": layer.kind,
            "stage": layer.block.rpartition(".")[0],
            "units": layer.units,
            "kept": len(part.kept),
            "width": _width(layer.kind, layer.shape_of(part.index()).heads, len(part.kept)),
            "width_dense": _width(layer.kind, layer.heads, layer.units),
            "importance": part.importance,
            "tokens": tokens,
            "tokens_dense": layer.tokens,
        }
        for layer, part, tokens in zip(dense, plan.layers, tokens_seen(dense, plan.tokens), strict=True)
    ]


def _width(kind: str, heads: int, units: int) -> str:
    """Returns ``heads x dimensions`` of an attention, whose heads are all equally wide, or the neurons of an FFN."""
    return f"{heads} x {units // heads}" if kind == "attention" and units else str(units)


def costs(found: Mapping[str, Any]) -> Sequence[tuple[str, str, str, float]]:
    """Returns name, dense value, pruned value (all as text) and share of each cost that `inspect` returned."""
    units = {"macs": "MACs", "params": "parameters", "bytes": "bytes of weights", "latency_ms": "ms per image"}
    show = {"latency_ms": "{:.3g}".format}
    pairs = {key: (found[f"{key}_dense"], found[key]) for key in units}
    return [(units[key], *map(show.get(key, count), pair), pair[1] / pair[0]) for key, pair in pairs.items()]


def export_folder(
    folder: Path, out: Path, format: str, batch: int | None, opset: int | None, personal: bool = False
) -> dict[str, Any]:
    """Exports a pruned model to the file `out`; returns what was written, the result of the check, and latencies.

    Latencies are milliseconds per forward pass of `batch` images (one if None) on one thread.

    Args:
        personal: `folder` is a device's folder; export the model that it uses at the end of the run.

    Raises:
        TapflError: if the folder or an argument is not valid, or if the exported model computes something else; then
            there is no file.
    """
    adapters, folder = DeviceStorage(folder).personal, pruned_folder(folder)
    if personal and not adapters.is_dir():
        raise ConfigError(f"--personal: there is no {adapters}; accepted: devices/NN of a run that has ended")
    model, (plan, _) = load_pruned(folder), load_plan(folder)
    model = merge_peft(model, adapters) if personal else model
    written = export(model, plan, out, format, batch, opset)
    exported, x = load_exported(out, format), example_input(model, batch or 1)
    exported_ms, torch_ms = median_ms([lambda: exported(x), lambda: model(x)], REPEATS)
    latencies = {"latency_batch": batch or 1, "latency_ms": exported_ms, "latency_ms_torch": torch_ms}
    return asdict(written) | {"file": str(written.file), "plan": plan.checksum} | latencies
