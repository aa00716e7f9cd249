"""A device's parameters as one vector, and those of several devices as one set: stacked, zero-padded to the widest.

A set of parameters has tensors of one or two dims. A *stack* of K sets has the same names, and tensors of three dims,
(K, rows, columns); a bias is one row. Each device lies at the beginning of its slice, and the rest is 0. Whatever acts
on single elements acts on a stack as on each device by itself.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tapfl.adapters.layout import Shapes
from tapfl.training import Params


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
