"""A look at a pruned model on disk: what stays of every layer, and what it costs before and after."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from clients.storage import DeviceStorage
from experiments.output import count
from tapfl.models.backbone import build
from tapfl.models.latency import latencies_ms
from tapfl.models.prunable import prunable_layers
from tapfl.models.units import PrunableLayer
from tapfl.pruning.plan import PLAN_FILE, LayerPlan, PruningPlan, load_plan
from tapfl.pruning.surgery import WEIGHTS_FILE, load_pruned


def pruned_folder(folder: Path) -> Path:
    """Returns the pruned model's folder: `folder`, or what lies in it if it is a device's of a run."""
    inner = DeviceStorage(folder).pruned
    return inner if not (folder / PLAN_FILE).exists() and inner.is_dir() else folder


def inspect(folder: Path, repeats: int = 20) -> dict[str, Any]:
    """Returns what a pruned model's folder holds: layers, cost before and after, latency measured here and now.

    Bytes are those of the weights' file, and dense those of the weights it would hold.

    Raises:
        PlanError: if the folder lacks a file or was damaged.
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
        "layers": layers_of(prunable_layers(dense), plan),
    }


def layers_of(dense: Sequence[PrunableLayer], plan: PruningPlan) -> list[dict[str, Any]]:
    """Returns a row a layer of a plan: what it is called, what of it stays, and how wide it was and is.

    Args:
        dense: the prunable layers of the plan's backbone, whatever its weights.
    """
    return [_layer(layer, part) for layer, part in zip(dense, plan.layers, strict=True)]


def _layer(layer: PrunableLayer, part: LayerPlan) -> dict[str, Any]:
    heads = layer.shape_of(part.index()).heads
    return {
        "name": layer.name,
        "kind": layer.kind,
        "stage": layer.block.rpartition(".")[0],
        "units": layer.units,
        "kept": len(part.kept),
        "width": _width(layer.kind, heads, len(part.kept)),
        "width_dense": _width(layer.kind, layer.heads, layer.units),
        "importance": part.importance,
    }


def _width(kind: str, heads: int, units: int) -> str:
    """Returns heads x dims of an attention, hidden neurons of an FFN; all heads that stay are equally wide."""
    return f"{heads} x {units // heads}" if kind == "attention" and units else str(units)


def costs(found: Mapping[str, Any]) -> Sequence[tuple[str, str, str, float]]:
    """Returns (name, dense, pruned, share) of each cost, in words."""
    units = (("macs", "MACs"), ("params", "parameters"), ("bytes", "bytes of weights"), ("latency_ms", "ms an image"))
    rows = []
    for key, name in units:
        dense, small = found[f"{key}_dense"], found[key]
        show = (lambda value: f"{value:.3g}") if key == "latency_ms" else count
        rows.append((name, show(dense), show(small), small / dense))
    return rows
