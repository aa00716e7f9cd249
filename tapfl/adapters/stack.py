"""A device's parameters as one vector, and those of several devices as one set: stacked, zero-padded to the widest.

A set of parameters has tensors of one or two dims. A *stack* of K sets has the same names, and tensors of three dims,
(K, rows, columns); a bias is one row. Each device lies at the beginning of its slice, and the rest is 0. Whatever acts
on single elements acts on a stack as on each device by itself.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tapfl.adapters.layout import Shapes
from tapfl.training import Params

# elements to a multiple of which tensors begin in a vector: 64 bytes, as in a memory of their own; elsewhere the last
# bits of a product may differ
LINE = 16
Place = tuple[int, Tensor]  # an axis, and positions on it


def flat(params: Params, multiple: int = 1) -> Tensor:
    """Returns all tensors one after the other, (P,); of a stack (K, P).

    Args:
        multiple: zeros fill each tensor's place up to a multiple of this size.
    """
    pieces = []
    for theta in params.values():
        pieces.append(theta.reshape(*lead(theta), -1))
        if missing := -pieces[-1].shape[-1] % multiple:
            pieces.append(theta.new_zeros(1).expand(*lead(theta), missing))
    return torch.cat(pieces, -1)


def parts_of(vector: Tensor, shapes: Shapes, multiple: int = 1) -> Params:
    """Returns the parts of a vector that `flat` made of tensors with these names and shapes. They share its memory."""
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
    """Where the tensors of K devices lie in their stack.

    Attributes:
        shapes: rows and columns of each tensor of the stack, those of the widest device.
        own: of each device, the shapes of its tensors.
        places: of each device, by name, an axis, and where on it the tensor lies in the stack; on the other axis, and
            if it is not named, it lies at the beginning.
    """

    shapes: Shapes
    own: Sequence[Shapes]
    places: Sequence[Mapping[str, Place]]

    @classmethod
    def of(cls, own: Sequence[Shapes], places: Sequence[Mapping[str, Place]], wide: Shapes) -> Stacking:
        """Returns the stacking of tensors with these shapes; `wide` has least shapes, which follow from the places."""
        shapes: Shapes = {}
        for name in dict.fromkeys(name for each in own for name in each):
            rows, columns = zip(*(two_dims(each[name]) for each in own if name in each), strict=True)
            least = wide.get(name, (0, 0))
            shapes[name] = (max(*rows, least[0]), max(*columns, least[1]))
        return cls(shapes, own, places)

    def up(self, sets: Sequence[Params]) -> Params:
        """Returns the stack of a set of each device; names that a device lacks are 0 there."""
        like = next(iter(sets[0].values()))
        stack: Params = {}
        for name, shape in self.shapes.items():
            stack[name] = like.new_zeros((len(sets), *shape))
            for i, params in enumerate(sets):
                if name in params:
                    stack[name][i][self._place(i, name)] = params[name].detach().reshape(two_dims(params[name].shape))
        return stack

    def down(self, stack: Params, i: int) -> Params:
        """Returns a copy of what device `i` has in a stack."""
        found: Params = {}
        for name, shape in self.own[i].items():
            part = stack[name][i][self._place(i, name)].detach().reshape(shape)
            found[name] = part.clone(memory_format=torch.contiguous_format)
        return found

    def _place(self, i: int, name: str) -> tuple[Tensor | slice, ...]:
        index: list[Tensor | slice] = [slice(size) for size in two_dims(self.own[i][name])]
        if name in self.places[i]:
            axis, where = self.places[i][name]
            index[axis] = where
        return tuple(index)


def two_dims(shape: Sequence[int]) -> tuple[int, int]:
    """Returns rows and columns; a vector is a row."""
    return (1, shape[0]) if len(shape) == 1 else (shape[0], shape[1])
