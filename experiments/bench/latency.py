"""Latency of shrunk models: dense against about 75, 50 and 25 % of the MACs, in torch and in onnxruntime.

The cut is even over the layers and by random units: how fast a model is depends on its shapes, not on which units they
are. All models take turns on one thread, so that a busy machine is busy for all, and the median wall time counts. The
speed-up stands next to the ratio of the MACs, which is what it could be at best if all operations cost the same.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from tapfl.config import PruningOptions
from tapfl.models.backbone import BackboneSpec, build, example_input
from tapfl.pruning.planning import plan_pruning
from tapfl.pruning.surgery import shrink

NOT_INSTALLED = "onnxruntime is not installed"


def onnx_session(model: nn.Module) -> Callable[[np.ndarray], Any] | None:
    """Returns `model` as a function of a batch of images, run by onnxruntime on one thread; None if it is not there."""
    try:
        import onnxruntime
    except ImportError:
        return None
    program = torch.onnx.export(
        model,
        (example_input(model, 2),),
        dynamo=True,
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        input_names=["images"],
        verbose=False,
    )
    assert program is not None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(
        program.model_proto.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return lambda images: session.run(None, {"images": images})


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
    models, achieved = {1.0: dense}, {1.0: 1.0}
    for share in shares:
        plan = plan_pruning(dense, spec, inputs, share, options, batch=1)
        models[share], achieved[share] = shrink(dense, plan), plan.cost.macs / plan.dense.macs
    runs: dict[tuple[str, int, float], Callable[[], object]] = {}
    for share, model in models.items():
        session = onnx_session(model)
        for batch in batches:
            images = torch.randn(example_input(dense, batch).shape)
            runs["torch", batch, share] = _call(model, images)
            if session is not None:
                runs["onnxruntime", batch, share] = _call(session, images.numpy())
    seconds = median_seconds(runs, repeats)
    rows: list[Mapping[str, str]] = []
    for share in models:
        row = {
            "model": f"{name.removesuffix('_patch16_224')} {image_size} px",
            "MACs": f"{achieved[share]:.1%}",
            "MACs ratio": f"{1 / achieved[share]:.2f}",
        }
        for engine in ("torch", "onnxruntime"):
            for batch in batches:
                now = seconds.get((engine, batch, share))
                row[f"{engine} ×{batch}"] = (
                    NOT_INSTALLED if now is None else f"{now * 1e3:.1f} ms, {seconds[engine, batch, 1.0] / now:.2f}"
                )
        rows.append(row)
    return rows


def median_seconds(runs: Mapping[Any, Callable[[], object]], repeats: int) -> dict[Any, float]:
    """Returns the median wall seconds of each run, after one that does not count; they take turns."""
    seconds: dict[Any, list[float]] = {key: [] for key in runs}
    with torch.inference_mode():
        for _ in range(repeats + 1):
            for key, run in runs.items():
                start = time.perf_counter()
                run()
                seconds[key].append(time.perf_counter() - start)
    return {key: float(np.median(values[1:])) for key, values in seconds.items()}


def _call(work: Callable[[Any], object], argument: Any) -> Callable[[], object]:
    return lambda: work(argument)
