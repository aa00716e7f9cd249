"""Latency of shrunk models: dense against about 75, 50 and 25 % of the MACs, in torch and in onnxruntime.

The cut is even over the layers and by random units: how fast a model is depends on its shapes, not on which units they
are. All models take turns on one thread, and the median of the thread's own time counts. The
speed-up stands next to the ratio of the MACs, which is what it could be at best if all operations cost the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

import torch

from tapfl.config import PruningOptions
from tapfl.models.backbone import BackboneSpec, build
from tapfl.models.forward import example_input
from tapfl.models.latency import median_ms
from tapfl.pruning.export import export, load_exported
from tapfl.pruning.pipeline import prune_model
from tapfl.pruning.planning import pruning_task


def bench_latency(
    name: str,
    image_size: int,
    shares: Sequence[float],
    batches: Sequence[int],
    repeats: int,
    align: int = 8,
    unit_shape: Literal["head-dims", "heads", "both"] = "head-dims",
) -> list[Mapping[str, str]]:
    """Returns a row for the dense model and for every share of its MACs, with random weights."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    spec = BackboneSpec(name=name, args={"img_size": image_size}, num_classes=1000)
    dense = build(spec).requires_grad_(False)
    options = PruningOptions(criterion="random", ratio="uniform", align=align, unit_shape=unit_shape)
    inputs = example_input(dense, 1)
    macs: dict[float, float] = {}
    runs: dict[tuple[str, int, float], Callable[[], object]] = {}
    for share in (1.0, *shares):
        pruned = prune_model(pruning_task(dense, inputs, share, options, batch=1), spec)
        macs[share] = pruned.plan.cost.macs / pruned.plan.dense.macs
        with TemporaryDirectory() as folder:
            file = Path(folder) / "model.onnx"
            export(pruned.model, pruned.plan, file, "onnx")
            session = load_exported(file, "onnx")
        for batch in batches:
            images = torch.randn(example_input(dense, batch).shape)
            runs["torch", batch, share] = partial(pruned.model, images)
            runs["onnxruntime", batch, share] = partial(session, images)
    milliseconds = dict(zip(runs, median_ms(list(runs.values()), repeats), strict=True))
    rows: list[Mapping[str, str]] = []
    for share, achieved in macs.items():
        row = {
            "model": f"{name.removesuffix('_patch16_224')} {image_size} px",
            "MACs": f"{achieved:.1%}",
            "MACs ratio": f"{1 / achieved:.2f}",
        }
        for engine in ("torch", "onnxruntime"):
            for batch in batches:
                now = milliseconds[engine, batch, share]
                row[f"{engine} ×{batch}"] = f"{milliseconds[engine, batch, 1.0] / now:.2f}, {now:.1f} ms"
        rows.append(row)
    return rows
