"""The cost of a model: parameters, multiply-accumulates (MACs) for one image, and latency.

Latency is the time for one image on the model's device, in milliseconds. On a CPU it is the CPU time of one thread,
which equals wall-clock time on an idle core. Wall-clock time would include what other processes take from the core;
that affects long calls more than short ones, and a model would then seem slower than its branches together. On a GPU it
is the time until the work is done, by the GPU's own clock. Latency is measured and differs from run to run. It affects
a plan only if the budget limits latency.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict
from timm.layers import Attention, AttentionPoolLatent, AttentionPoolPrr
from timm.models.swin_transformer import WindowAttention
from torch import Tensor, nn

from tapfl.compute import HERE, Compute
from tapfl.models.forward import example_input, watch_example
from tapfl.models.merging import Merge
from tapfl.models.units import PrunableLayer, Shape
from tapfl.progress import track

WARM_UP = 2
POINTS = (1 / 8, 1 / 4, 1 / 2, 3 / 4, 1)  # widths at which a branch is timed, relative to the dense width


class Cost(BaseModel):
    """Number of parameters, and MACs per image."""

    model_config = ConfigDict(frozen=True)

    params: int
    macs: int


def measure_cost(model: nn.Module) -> Cost:
    """Returns the cost of `model`, pruned or not.

    MACs are counted from the shapes of a real forward pass: of linears, convolutions, and the matrix products of
    attention and of token merging. Norms, activations and additions are not counted, as is usual.
    """
    macs = 0

    def count(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        nonlocal macs
        x = inputs[0]
        if isinstance(module, nn.Linear):
            macs += math.prod(x.shape[:-1]) * module.in_features * module.out_features
        elif isinstance(module, nn.Conv2d):
            macs += output.numel() * module.weight[0].numel()
        elif isinstance(module, Attention | WindowAttention):
            macs += 2 * math.prod(x.shape[:-1]) * x.shape[-2] * module.proj.in_features
        elif isinstance(module, AttentionPoolLatent | AttentionPoolPrr):
            queries = module.latent_len if isinstance(module, AttentionPoolLatent) else x.shape[-2]
            macs += 2 * math.prod(x.shape[:-1]) * queries * module.num_heads * module.head_dim
        elif isinstance(module, Merge):
            stream, keys = inputs
            _, tokens, embed_dim = stream.x.shape
            macs += module.macs(tokens, embed_dim, keys.shape[-1])

    counted = (nn.Linear, nn.Conv2d, Attention, WindowAttention, AttentionPoolLatent, AttentionPoolPrr, Merge)
    watch_example(model, {module: count for module in model.modules() if isinstance(module, counted)})
    return Cost(params=sum(p.numel() for p in model.parameters()), macs=macs)


@dataclass(frozen=True, eq=False)
class Timings:
    """The latency of a dense model, and of each of its branches in every shape.

    Attributes:
        dense: milliseconds of the dense model.
        branches: by layer name, milliseconds by number of heads and dims that stay (heads + 1, units per head + 1).
    """

    dense: float
    branches: Mapping[str, np.ndarray]


@torch.no_grad()
def timed_ms(calls: Sequence[Callable[[], object]], repeats: int, where: Compute = HERE) -> np.ndarray:
    """Returns the milliseconds of each call in each repetition (calls, repeats), by the clock of the device `where`."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    seconds = np.zeros((repeats + WARM_UP, len(calls)))
    try:
        for turn in track(seconds, "latency"):
            for i, call in enumerate(calls):
                turn[i] = where.seconds(call)
    finally:
        torch.set_num_threads(threads)
    return seconds[WARM_UP:].T * 1e3


def median_ms(calls: Sequence[Callable[[], object]], repeats: int, where: Compute = HERE) -> list[float]:
    """Returns the median milliseconds of each call. The calls take turns; see `timed_ms`."""
    return [float(value) for value in np.median(timed_ms(calls, repeats, where), axis=1)]


def latencies_ms(models: Sequence[nn.Module], repeats: int) -> list[float]:
    """Returns the median milliseconds of one image through each model. All are on one device and take turns."""
    where = Compute(next(models[0].parameters()).device)
    return median_ms([partial(model, example_input(model)) for model in models], repeats, where)


def measure_timings(model: nn.Module, layers: Sequence[PrunableLayer], align: int = 1, repeats: int = 15) -> Timings:
    """Returns timings of `model` and of its branches.

    A branch is timed at a few shapes. Its table is interpolated between them and non-decreasing in both sizes. Branches
    that differ only in their name are timed once. A branch is timed on its own, without the rest of its block (norms,
    window partition and masks). That rest is part of the model's time, and pruning does not reduce it.

    Args:
        align: branches are timed at dims that are multiples of it, where possible.
    """
    kinds: dict[tuple[object, ...], PrunableLayer] = {}
    for layer in layers:
        kinds.setdefault(_likeness(layer), layer)
    calls: list[Callable[[], object]] = [partial(model, example_input(model))]
    places: list[tuple[tuple[object, ...], Shape]] = []
    for key, layer in kinds.items():
        branch, span = model.get_submodule(layer.name), layer.span or layer.tokens
        units = torch.arange(layer.units).view(layer.heads, -1)
        example = layer.output_of(model).weight.new_zeros(layer.tokens // span, span, layer.embed_dim)
        heads = sorted({1, -(-layer.heads // 2), layer.heads})
        for shape in [Shape(0, 0), *(Shape(h, d) for h in heads for d in _dims(layer, align))]:
            kept = units[: shape.heads, : shape.dims].flatten()  # which units stay does not affect the time
            places.append((key, shape))
            calls.append(partial(layer.shrink(branch, kept), example))
    dense, *branches = median_ms(calls, repeats, Compute(next(model.parameters()).device))
    measured: dict[tuple[object, ...], dict[Shape, float]] = {key: {} for key in kinds}
    for (key, shape), milliseconds in zip(places, branches, strict=True):
        measured[key][shape] = milliseconds
    tables = {key: interpolated(measured[key]) for key in kinds}
    return Timings(dense, {layer.name: tables[_likeness(layer)] for layer in layers})


def interpolated(measured: Mapping[Shape, float]) -> np.ndarray:
    """Returns a table (heads + 1, dims + 1) by linear interpolation, made non-decreasing in both sizes.

    Args:
        measured: values at the shape (0, 0) and on a grid of heads × dims that includes the full layer.
    """
    heads, dims = (sorted({0, *sizes}) for sizes in zip(*measured, strict=True))
    grid = np.array([[measured[Shape(h, d) if h * d else Shape(0, 0)] for d in dims] for h in heads])
    grid = np.maximum.accumulate(np.maximum.accumulate(grid, axis=0), axis=1)
    by_dims = np.stack([np.interp(np.arange(dims[-1] + 1), dims, row) for row in grid])
    return np.stack([np.interp(np.arange(heads[-1] + 1), heads, column) for column in by_dims.T], axis=1)


def _likeness(layer: PrunableLayer) -> tuple[object, ...]:
    return layer.kind, layer.embed_dim, layer.tokens, layer.span, layer.heads, layer.units


def _dims(layer: PrunableLayer, align: int) -> list[int]:
    full = layer.units_per_head
    return sorted({min(max(round(share * full / align), 1) * align, full) if share < 1 else full for share in POINTS})
