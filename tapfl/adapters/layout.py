"""Where a device's adapters lie in the global ones.

The global adapters have the shapes of the dense backbone and the largest rank. A device's tensor is its values and one
index vector a dimension: the units that its plan kept, and the prefix 0..r-1 of the rank axis. Two primitives serve
every aggregation rule: `gather`, and the overlap mean `scatter_mean`. HeteroFL, FedRolex and rank truncation are
special cases.

Example, one fc1 with 6 neurons on 4 inputs, global rank 2; a device of rank 1 kept neurons 1, 2, 4: its ``lora_A`` lies
at rows (0), columns (0, 1, 2, 3), its ``lora_B`` at rows (1, 2, 4), columns (0).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from tapfl.models.backbone import head_names
from tapfl.models.units import PrunableLayer
from tapfl.pruning.plan import PruningPlan

Params = dict[str, Tensor]
Shapes = dict[str, tuple[int, ...]]

LORA_A, LORA_B = "lora_A", "lora_B"


@dataclass(frozen=True)
class Placement:
    """Where one tensor lies in its global tensor: an int64 index vector a dimension.

    `row_scale`, if given, is what the device's rows are multiplied with against the global ones: pruning multiplies
    the rows of q by sqrt(k/d) (`tapfl.models.units`), so their adapters live on that scale as well.
    """

    index: tuple[Tensor, ...]
    row_scale: Tensor | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(len(axis) for axis in self.index)


Layout = dict[str, Placement]


@dataclass(frozen=True)
class Update:
    """What a device sent: its adapters in its own shapes, where they lie, and its weight (training samples)."""

    params: Params
    layout: Layout
    weight: float


def global_shapes(model: nn.Module, layers: Sequence[PrunableLayer], rank: int) -> Shapes:
    """Returns the shape of every global tensor: A (rank, d_in) and B (d_out, rank) of each linear, and the head's."""
    shapes: Shapes = {}
    for layer in layers:
        for cut in layer.cuts(torch.arange(layer.units)):
            name = f"{layer.name}.{cut.linear}"
            linear: nn.Linear = model.get_submodule(name)  # type: ignore[assignment]
            shapes[f"{name}.{LORA_A}"] = (rank, linear.in_features)
            shapes[f"{name}.{LORA_B}"] = (linear.out_features, rank)
    for head in head_names(model):
        for name, parameter in model.get_submodule(head).named_parameters():
            shapes[f"{head}.{name}"] = tuple(parameter.shape)
    return shapes


def device_layout(shapes: Shapes, layers: Sequence[PrunableLayer], plan: PruningPlan, rank: int) -> Layout:
    """Returns where the tensors of a device with this plan and rank lie; a branch that is gone has none."""
    layout: Layout = {}
    for layer in layers:
        kept = plan.layer(layer.name).index()
        if not len(kept):
            continue
        for cut in layer.cuts(kept):
            name = f"{layer.name}.{cut.linear}"
            prefix = torch.arange(rank)
            rows = cut.index if cut.side == "rows" else torch.arange(shapes[f"{name}.{LORA_B}"][0])
            columns = cut.index if cut.side == "columns" else torch.arange(shapes[f"{name}.{LORA_A}"][1])
            layout[f"{name}.{LORA_A}"] = Placement((prefix, columns))
            layout[f"{name}.{LORA_B}"] = Placement((rows, prefix), cut.scale)
    for name, shape in shapes.items():
        if not name.endswith((LORA_A, LORA_B)):
            layout[name] = Placement(tuple(torch.arange(size) for size in shape))
    return layout


def initial_adapters(shapes: Shapes, model: nn.Module, generator: torch.Generator) -> Params:
    """Returns the adapters before the first round: A uniform as in peft (±1/√d_in), B zero, the head as it is."""
    params: Params = {}
    for name, shape in shapes.items():
        if name.endswith(LORA_A):
            params[name] = (torch.rand(shape, generator=generator) * 2 - 1) / shape[1] ** 0.5
        elif name.endswith(LORA_B):
            params[name] = torch.zeros(shape)
        else:
            params[name] = model.get_parameter(name).detach().clone()
    return params


def gather(theta: Tensor, placement: Placement) -> Tensor:
    """Returns the part of a global tensor that a device holds, on the device's scale."""
    part = theta[torch.meshgrid(*placement.index, indexing="ij")]
    return part if placement.row_scale is None else part * placement.row_scale[:, None]


def gather_all(params: Mapping[str, Tensor], layout: Layout) -> Params:
    """Returns a device's part of the global adapters."""
    return {name: gather(params[name], placement) for name, placement in layout.items()}


def to_global_scale(theta: Tensor, placement: Placement) -> Tensor:
    """Returns a device's tensor on the scale of the global one, in float64."""
    values = theta.double()
    return values if placement.row_scale is None else values / placement.row_scale.double()[:, None]


def scatter_mean(previous: Tensor, parts: Iterable[tuple[Tensor, Placement, float]]) -> Tensor:
    """Returns θ[j] = Σ_{i: j∈S_i} n_i θ_i[j] / Σ_{i: j∈S_i} n_i; where nobody holds j, the previous θ[j] stays.

    Args:
        previous: the global tensor.
        parts: (values, placement, weight) of each device, in an order that does not depend on their arrival: sums are
            in float64 and in the order given.
    """
    total = torch.zeros(previous.shape, dtype=torch.float64)
    weight = torch.zeros(previous.shape, dtype=torch.float64)
    for values, placement, n in parts:
        where = torch.meshgrid(*placement.index, indexing="ij")
        total[where] += n * to_global_scale(values, placement)
        weight[where] += n
    return torch.where(weight > 0, total / weight.clamp(min=torch.finfo(torch.float64).tiny), previous.double()).to(
        previous.dtype
    )


def pack(params: Mapping[str, Tensor], layout: Layout) -> np.ndarray:
    """Returns all tensors as one flat float32 vector, in the order of the layout."""
    return torch.cat([params[name].detach().reshape(-1) for name in layout]).float().numpy()


def unpack(vector: np.ndarray, layout: Layout) -> Params:
    """Returns the tensors of a flat vector; the inverse of `pack`."""
    sizes = [int(np.prod(placement.shape)) for placement in layout.values()]
    parts = torch.from_numpy(np.array(vector, dtype=np.float32)).split(sizes)
    return {name: part.view(place.shape).clone() for (name, place), part in zip(layout.items(), parts, strict=True)}


def packed_size(layout: Layout) -> int:
    """Returns the length of the flat vector of a layout."""
    return sum(int(np.prod(placement.shape)) for placement in layout.values())
