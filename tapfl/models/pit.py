"""PiT (pooling-based ViT, arXiv 2103.16302): timm's blocks in stages, between which the tokens' grid is pooled.

timm passes the grid and the class tokens side by side. Here they travel as the one sequence (n, class tokens + grid,
width) that the blocks see, so that a pass can be resumed from the input of any block.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Grid = tuple[int, int]
Step = tuple[str, Callable[[Tensor], Tensor]]


def pit_steps(model: Any) -> list[Step]:
    """Returns the forward pass of a `PoolingVisionTransformer` up to its last norm, as named steps."""

    def stem(x: Tensor) -> Tensor:
        x = model.pos_drop(model.patch_embed(x) + model.pos_embed)
        return _sequence(model.cls_token.expand(len(x), -1, -1), x)

    steps: list[Step] = [("stem", stem)]
    grid: Grid = model.patch_embed.grid_size
    for s, stage in enumerate(model.transformers):
        steps.append((f"transformers.{s}.pool", _entrance(stage, grid, model.num_tokens)))
        steps.extend((f"transformers.{s}.blocks.{i}", block) for i, block in enumerate(stage.blocks))
        grid = grid if stage.pool is None else _pooled(grid, stage.pool.conv)
    steps.append(("class_tokens", lambda x: x[:, : model.num_tokens]))
    return steps


def _entrance(stage: Any, grid: Grid, class_tokens: int) -> Callable[[Tensor], Tensor]:
    def enter(x: Tensor) -> Tensor:
        if stage.pool is not None:
            image = x[:, class_tokens:].transpose(1, 2).unflatten(2, grid)
            image, own = stage.pool(image, x[:, :class_tokens])
            x = _sequence(own, image)
        return stage.norm(x)

    return enter


def _sequence(class_tokens: Tensor, image: Tensor) -> Tensor:
    return torch.cat([class_tokens, image.flatten(2).transpose(1, 2)], dim=1)


def _pooled(grid: Grid, conv: Any) -> Grid:
    height, width = (
        (side + 2 * pad - kernel) // stride + 1
        for side, pad, kernel, stride in zip(grid, conv.padding, conv.kernel_size, conv.stride, strict=True)
    )
    return height, width
