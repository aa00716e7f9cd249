"""The parameters of a device as one vector, and those of several devices as one stack, zero-padded to the widest.

A set of parameters has tensors of one or two dims. A *stack* of K sets has the same names, and tensors of three dims
(K, rows, columns); a bias has one row. A device's values are at the beginning of its slice, or where `Stacking.places`
says, and the rest is 0. Elementwise operations on a stack equal those on each device.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tapfl.adapters.layout import Shapes
from tapfl.training import Params

# tensors in a vector begin at multiples of so many elements (64 bytes), as tensors with memory of their own do; with
# another alignment, the last bits of a product may differ
LINE = 16
Place = tuple[int, Tensor]  # an axis, and positions on it


def flat(params: Params, multiple: int = 1) -> Tensor:
    """Returns all tensors flattened and concatenated, (P,), or for a stack (K, P).

    Args:
        multiple: each tensor is padded with zeros to a multiple of this size.
    """
    pieces = []
    for theta in params.values():
        pieces.append(theta.reshape(*lead(theta), -1))
        if missing := -pieces[-1].shape[-1] % multiple:
            pieces.append(theta.new_zeros(1).expand(*lead(theta), missing))
    return torch.cat(pieces, -1)


def parts_of(vector: Tensor, shapes: Shapes, multiple: int = 1) -> Params:
    """Returns the tensors of a vector that `flat` made, given their names and shapes. They are views of the vector."""
    sizes = [math.prod(shape[-2:]) for shape in shapes.values()]
    parts = vector.split([size + -size % multiple for size in sizes], -1)
    return {
        name: (part[..., :size] if multiple > 1 else part).view(shape)
        for (name, shape), size, part in zip(shapes.items(), sizes, parts, strict=True)
    }


def shapes_of(params: Params) -> Shapes:
    """Returns the shapes of all tensors."""
    return {name: tuple(theta.shape) for name, theta in params.items()}


def lead(theta: Tensor) -> torch.Size:
    """Returns the leading axis of a tensor: (K,) in a stack, otherwise ()."""
    return theta.shape[:-2] if theta.dim() == 3 else torch.Size()


@dataclass(frozen=True)
class Stacking:
    """The positions of K devices' tensors in their stack.

    Attributes:
        shapes: rows and columns of each tensor of the stack, those of the widest device.
        own: for each device, the shapes of its tensors.
        places: for each device, by tensor name, an axis and the positions of the tensor on it. On the other axis, and
            for tensors that are not named, the positions are the first ones.
    """

    shapes: Shapes
    own: Sequence[Shapes]
    places: Sequence[Mapping[str, Place]]

    @classmethod
    def of(cls, own: Sequence[Shapes], places: Sequence[Mapping[str, Place]], wide: Shapes) -> Stacking:
        """Returns the stacking of tensors with the shapes `own`; `wide` has the least shapes that `places` needs."""
        shapes: Shapes = {}
        for name in dict.fromkeys(name for device in own for name in device):
            rows, columns = zip(*(two_dims(device[name]) for device in own if name in device), strict=True)
            least = wide.get(name, (0, 0))
            shapes[name] = (max(*rows, least[0]), max(*columns, least[1]))
        return cls(shapes, own, places)

    def up(self, sets: Sequence[Params]) -> Params:
        """Returns the stack of one set per device; tensors that a device does not have are 0."""
        like = next(iter(sets[0].values()))
        stack: Params = {}
        for name, shape in self.shapes.items():
            stack[name] = like.new_zeros((len(sets), *shape))
            for i, params in enumerate(sets):
                if name in params:
                    stack[name][i][self._place(i, name)] = params[name].detach().reshape(two_dims(params[name].shape))
        return stack

    def down(self, stack: Params, i: int) -> Params:
        """Returns a copy of the tensors of device `i` from a stack."""
        params: Params = {}
        for name, shape in self.own[i].items():
            part = stack[name][i][self._place(i, name)].detach().reshape(shape)
            params[name] = part.clone(memory_format=torch.contiguous_format)
        return params

    def _place(self, i: int, name: str) -> tuple[Tensor | slice, ...]:
        index: list[Tensor | slice] = [slice(size) for size in two_dims(self.own[i][name])]
        if name in self.places[i]:
            axis, positions = self.places[i][name]
            index[axis] = positions
        return tuple(index)


def two_dims(shape: Sequence[int]) -> tuple[int, int]:
    """Returns (rows, columns); a vector is one row."""
    return (1, shape[0]) if len(shape) == 1 else (shape[0], shape[1])
