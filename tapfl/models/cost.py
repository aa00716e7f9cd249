"""The cost of a model: parameters, multiply-accumulates (MACs) for one image, and latency.

Latency is milliseconds of one image on the model's device. On a CPU it is the CPU time of one thread: time that other
processes take from the core would fall on long calls more than on short ones, and a model would then seem slower than
its branches together. On an idle core it is the time on the clock. On a GPU it is the time until the work is done, by
the GPU's own clock. It is measured, so no two runs give the same numbers; it enters a plan only where a budget names
latency.
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
from timm.layers import Attention
from timm.models.swin_transformer import WindowAttention
from torch import Tensor, nn

from tapfl.compute import HERE, Compute
from tapfl.models.forward import example_input, watch_example
from tapfl.models.merging import Merge
from tapfl.models.units import PrunableLayer, Shape
from tapfl.progress import track

WARM_UP = 2
POINTS = (1 / 8, 1 / 4, 1 / 2, 3 / 4, 1)  # widths, as shares of the dense one, at which a branch is timed


class Cost(BaseModel):
    """Parameters, and MACs an image."""

    model_config = ConfigDict(frozen=True)

    params: int
    macs: int


def measure_cost(model: nn.Module) -> Cost:
    """Returns the cost of `model` as it is, pruned or not: linears, convolutions, products of attention and of merging.

    Counted from the shapes of a real forward pass; norms, activations and additions are not counted, as usual.
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
        elif isinstance(module, Merge):
            stream, keys = inputs
            _, tokens, embed_dim = stream.x.shape
            macs += module.macs(tokens, embed_dim, keys.shape[-1])

    counted = (nn.Linear, nn.Conv2d, Attention, WindowAttention, Merge)
    watch_example(model, {module: count for module in model.modules() if isinstance(module, counted)})
    return Cost(params=sum(p.numel() for p in model.parameters()), macs=macs)


@dataclass(frozen=True, eq=False)
class Timings:
    """What a dense model takes, and each of its branches in any shape.

    Attributes:
        dense: milliseconds of the dense model.
        branches: by layer name, milliseconds (heads + 1, units a head + 1) by heads and dims that stay.
    """

    dense: float
    branches: Mapping[str, np.ndarray]


@torch.no_grad()
def timed_ms(calls: Sequence[Callable[[], object]], repeats: int, where: Compute = HERE) -> np.ndarray:
    """Returns (calls, repeats), the milliseconds of each call in each turn, by the clock of `where` they compute."""
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
    """Returns the median milliseconds of each call, all taking turns; see `timed_ms`."""
    return [float(value) for value in np.median(timed_ms(calls, repeats, where), axis=1)]


def latencies_ms(models: Sequence[nn.Module], repeats: int) -> list[float]:
    """Returns the median milliseconds of one image through each model, all on one device and taking turns."""
    where = Compute(next(models[0].parameters()).device)
    return median_ms([partial(model, example_input(model)) for model in models], repeats, where)


def measure_timings(model: nn.Module, layers: Sequence[PrunableLayer], align: int = 1, repeats: int = 15) -> Timings:
    """Returns timings of `model`, and of its branches at a few shapes, monotone in both sizes and interpolated between.

    Branches that differ in name alone are timed once. A branch is timed by itself, without what its block adds to it
    (norms, windows and their masks), which is in the model's own time and which no pruning saves.

    Args:
        align: dims at which branches are timed are multiples of it where they can be.
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
            kept = units[: shape.heads, : shape.dims].flatten()  # which ones makes no difference to the time
            places.append((key, shape))
            calls.append(partial(layer.shrink(branch, kept), example))
    dense, *found = median_ms(calls, repeats, Compute(next(model.parameters()).device))
    measured: dict[tuple[object, ...], dict[Shape, float]] = {key: {} for key in kinds}
    for (key, shape), milliseconds in zip(places, found, strict=True):
        measured[key][shape] = milliseconds
    tables = {key: interpolated(measured[key]) for key in kinds}
    return Timings(dense, {layer.name: tables[_likeness(layer)] for layer in layers})


def interpolated(measured: Mapping[Shape, float]) -> np.ndarray:
    """Returns (heads + 1, dims + 1) by linear interpolation, never falling with either size.

    Args:
        measured: the shape (0, 0), and a grid of heads by dims, of which the largest are the whole layer's.
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
