"""The rows and columns of the global adapters that a device has.

The global adapters have the shapes of the dense backbone and the largest rank. A device's tensor is described by its
values and one index vector per dimension: the units that its plan kept, and the first r positions of the rank axis. Two
primitives serve every aggregation rule: `gather`, and the overlap mean `scatter_mean`. HeteroFL, FedRolex and rank
truncation are special cases.

Example: an fc1 with 6 neurons and 4 inputs has global rank 2. A device of rank 1 kept neurons 1, 2 and 4. Its
``lora_A`` is at rows (0) and columns (0, 1, 2, 3) of the global one, its ``lora_B`` at rows (1, 2, 4) and columns (0).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from tapfl.errors import ConfigError
from tapfl.models.forward import head_names
from tapfl.models.units import PrunableLayer
from tapfl.pruning.plan import PruningPlan
from tapfl.training import Params

Shapes = dict[str, tuple[int, ...]]

Side = Literal["embed", "width", "whole"]

LORA_A, LORA_B = "lora_A", "lora_B"

OBJECT = 650  # approximate bytes of a torch tensor besides its values, including its share of the containers


@dataclass(frozen=True)
class Placement:
    """The position of a device's tensor in its global tensor.

    Attributes:
        index: for each dimension, the sorted global positions of the device's entries, int64.
        row_scale: scale of the device's rows relative to the global ones, or None. Pruning multiplies the rows of q by
            sqrt(k/d) (`tapfl.models.units`), so their adapters are on that scale as well.
        side: a linear is pruned on one side only. So one of its two factors has the embedding width, which is the same
            on every device (`embed`: A of qkv and fc1, B of proj and fc2). The other has the width that the device kept
            (`width`). Heads are `whole`.
    """

    index: tuple[Tensor, ...]
    row_scale: Tensor | None = None
    side: Side = "whole"

    @cached_property
    def shape(self) -> tuple[int, ...]:
        return tuple(axis.numel() for axis in self.index)

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes + OBJECT for tensor in (*self.index, self.row_scale) if tensor is not None)


Layout = dict[str, Placement]
Part = tuple[Tensor, Placement, float]  # a device's values of one tensor, their placement, its weight


@dataclass(frozen=True)
class Update:
    """The upload of one device in one round.

    Attributes:
        params: adapters in the device's own shapes.
        layout: their placements. Tensors that the rule does not upload are in neither.
        weight: number of training samples.
        classes: which classes its training samples have, bool (C,); None: all of them.
    """

    params: Params
    layout: Layout
    weight: float
    classes: Tensor | None = None


def last_blocks(layers: Sequence[PrunableLayer], count: int) -> list[PrunableLayer]:
    """Returns the layers that get adapters: those of the last `count` blocks, or of all blocks if it is 0.

    Raises:
        ConfigError: if the backbone has fewer blocks.
    """
    blocks = list(dict.fromkeys(layer.block for layer in layers))
    if count > len(blocks):
        has = f"the backbone has {len(blocks)}"
        raise ConfigError(f"adapters.blocks = {count}: {has}; accepted: at most that, or 0 for all")
    adapted = blocks[-count:]  # all if count is 0
    return [layer for layer in layers if layer.block in adapted]


def adapted_share(layers: Sequence[PrunableLayer], plan: PruningPlan, count: int) -> float:
    """Returns the fraction of the MACs of a pruned model's branches that is in branches with adapters, above 0.

    Token merging is not taken into account.

    Args:
        count: as for `last_blocks`.

    Raises:
        ConfigError: if nothing is left of the blocks that get adapters; such a model could not be trained.
    """
    macs = {layer.name: layer.macs(layer.shape_of(plan.layer(layer.name).index())) for layer in layers}
    if not (adapted := sum(macs[layer.name] for layer in last_blocks(layers, count))):
        gone = "pruning removed everything in these blocks of a device's model"
        raise ConfigError(f"adapters.blocks = {count}: {gone}; accepted: more blocks, or a larger budget")
    return adapted / sum(macs.values())


def global_shapes(model: nn.Module, layers: Sequence[PrunableLayer], rank: int) -> Shapes:
    """Returns the shape of every global tensor: A (rank, d_in) and B (d_out, rank) of each linear, and the heads."""
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


def device_layout(shapes: Shapes, layers: Sequence[PrunableLayer], plan: PruningPlan | None, rank: int) -> Layout:
    """Returns the placement of every tensor of a device with this plan and rank. Removed branches have none.

    Args:
        plan: the device's plan; None: its model is not pruned.
    """
    layout: Layout = {}
    for layer in layers:
        kept = plan.layer(layer.name).index() if plan else torch.arange(layer.units)
        if not len(kept):
            continue
        for cut in layer.cuts(kept):
            A, B = f"{layer.name}.{cut.linear}.{LORA_A}", f"{layer.name}.{cut.linear}.{LORA_B}"
            prefix, by_rows = torch.arange(rank), cut.side == "rows"
            rows = cut.index if by_rows else torch.arange(shapes[B][0])
            columns = torch.arange(shapes[A][1]) if by_rows else cut.index
            layout[A] = Placement((prefix, columns), side="embed" if by_rows else "width")
            layout[B] = Placement((rows, prefix), cut.scale, "width" if by_rows else "embed")
    for name, shape in shapes.items():
        if not name.endswith((LORA_A, LORA_B)):
            layout[name] = Placement(tuple(torch.arange(size) for size in shape))
    return layout


def gather(theta: Tensor, placement: Placement) -> Tensor:
    """Returns the part of a global tensor that a device has, on the device's scale."""
    part = theta
    for axis, index in enumerate(placement.index):
        part = part.index_select(axis, index)
    return part if placement.row_scale is None else part * placement.row_scale[:, None]


def gather_all(params: Mapping[str, Tensor], layout: Layout) -> Params:
    """Returns a device's part of the global adapters."""
    return {name: gather(params[name], placement) for name, placement in layout.items()}


def to_global_scale(theta: Tensor, placement: Placement) -> Tensor:
    """Returns a device's tensor on the global scale, as float64."""
    values = theta.double()
    return values if placement.row_scale is None else values / placement.row_scale.double()[:, None]


def whole_rank(update: Update, previous: Mapping[str, Tensor], *sides: Side) -> Update:
    """Returns the update with the factors of these sides padded with zeros from the device's rank to the global rank.

    If all devices have the same embed-side factor, the overlap mean of the padded factors equals that of the products:
    the product of a device of rank r is 0 in all further directions, so the device contributes a 0 there for every unit
    that it has.
    """
    params, layout = dict(update.params), dict(update.layout)
    for name, placement in update.layout.items():
        if placement.side not in sides:
            continue
        axis = 0 if name.endswith(LORA_A) else 1
        index, shape = list(placement.index), list(placement.shape)
        shape[axis] = previous[name].shape[axis]
        whole = torch.zeros(shape, dtype=params[name].dtype)
        whole.index_copy_(axis, index[axis], params[name])
        index[axis] = torch.arange(shape[axis])
        params[name], layout[name] = whole, replace(placement, index=tuple(index))
    return replace(update, params=params, layout=layout)


def positions(placement: Placement, shape: Sequence[int]) -> Tensor:
    """Returns the positions of a device's values in the flattened global tensor of shape `shape`, int64, in order."""
    flat = placement.index[0]
    for axis, size in zip(placement.index[1:], shape[1:], strict=True):
        flat = (flat[:, None] * size + axis).view(-1)
    return flat


def overlap_sums(shape: Sequence[int], parts: Iterable[Part]) -> tuple[Tensor, Tensor]:
    """Returns Σ n_i θ_i[j] and Σ n_i over the devices that have entry j, float64 in the global shape."""
    total, weight = (torch.zeros(tuple(shape), dtype=torch.float64) for _ in range(2))
    for values, placement, n in parts:
        where = positions(placement, shape)
        total.view(-1).index_add_(0, where, n * to_global_scale(values, placement).reshape(-1))
        weight.view(-1).index_add_(0, where, torch.full((), n, dtype=torch.float64).expand(len(where)))
    return total, weight


def scatter_mean(previous: Tensor, parts: Iterable[Part]) -> Tensor:
    """Returns θ[j] = Σ_{i: j∈S_i} n_i θ_i[j] / Σ_{i: j∈S_i} n_i. If no device has j, θ[j] keeps its previous value.

    Args:
        previous: the global tensor.
        parts: (values, placement, weight) of each device. Sums are float64 and in this order, so it must not depend on
            arrival.
    """
    return quotient(*overlap_sums(previous.shape, parts), previous)


def quotient(total: Tensor, weight: Tensor, previous: Tensor) -> Tensor:
    """Returns total / weight where the weight is positive, and the previous value elsewhere."""
    mean = total / weight.clamp(min=torch.finfo(torch.float64).tiny)
    return torch.where(weight > 0, mean, previous.double()).to(previous.dtype)


def pack(params: Mapping[str, Tensor], layout: Layout) -> np.ndarray:
    """Returns all tensors as one flat float32 vector, in the order of the layout."""
    return torch.cat([params[name].detach().reshape(-1) for name in layout]).float().numpy()


def unpack(vector: np.ndarray, layout: Layout) -> Params:
    """Returns the tensors of a flat vector; the inverse of `pack`."""
    sizes = [math.prod(placement.shape) for placement in layout.values()]
    parts = torch.from_numpy(np.array(vector, dtype=np.float32)).split(sizes)
    return {name: part.view(place.shape).clone() for (name, place), part in zip(layout.items(), parts, strict=True)}


def packed_size(layout: Layout) -> int:
    """Returns the length of the flat vector of a layout."""
    return sum(math.prod(placement.shape) for placement in layout.values())
