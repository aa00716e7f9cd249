"""The forward pass of a backbone: its input format, its steps, its features and its heads.

This module knows the layout of timm's models, `tapfl.models.residual` that of their blocks, and `tapfl.models.units`
that of the branches of a block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import numpy as np
import timm.data
import torch
from timm.models import PoolingVisionTransformer, SwinTransformer, VisionTransformer
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from tapfl.config import ModelOptions
from tapfl.data.transform import Transform
from tapfl.errors import ModelError
from tapfl.models.backbone import ACCEPTED, build, input_shape, spec_of
from tapfl.progress import track

Step = tuple[str, Callable[[Any], Any]]  # its name, and a function from residual stream to residual stream
Grid = tuple[int, int]


def transform_of(model: Any) -> Transform:
    """Returns the preprocessing of `model`: timm's evaluation transform, for its image size and channels."""
    config, (channels, *size) = timm.data.resolve_model_data_config(model), input_shape(model)
    mean, std = (
        tuple(map(float, values * channels if len(values) == 1 else values[:channels]))
        for values in (config["mean"], config["std"])
    )
    return Transform(
        size=(size[0], size[1]),
        channels=channels,
        mean=mean,
        std=std,
        crop=float(config["crop_pct"]),
        crop_mode=config["crop_mode"],
        interpolation=config["interpolation"],
    )


@lru_cache(maxsize=16)
def input_transform(options: ModelOptions) -> Transform:
    """Returns the preprocessing of the backbone that the options name; it does not depend on the classes."""
    return transform_of(build(spec_of(options, ("any",))))


def full(x: Tensor) -> Tensor:
    """Returns a bfloat16 tensor as float32, and any other tensor unchanged."""
    return x.float() if x.dtype == torch.bfloat16 else x


def require_finite(values: Tensor, stage: str) -> None:
    """Raises ModelError, naming the stage of the work, if predictions, or values computed from them, are not finite."""
    if not bool(values.isfinite().all()):
        raise ModelError(f"{stage}: the backbone's prediction of an image is not finite; its weights are too large")


def example_input(model: nn.Module, batch: int = 1) -> Tensor:
    """Returns zeros in the input shape of `model`, on its device."""
    return torch.zeros(batch, *input_shape(model), device=next(model.parameters()).device)


@contextmanager
def hooked(handles: Iterable[RemovableHandle]) -> Iterator[None]:
    """Removes the hooks of these handles at the end of the context."""
    handles = list(handles)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def watch_example(model: nn.Module, hooks: Mapping[nn.Module, Callable[..., None]]) -> None:
    """Passes an example input through `model`, with a forward hook on each module in `hooks`."""
    with hooked(module.register_forward_hook(hook) for module, hook in hooks.items()):
        model(example_input(model))


def head_names(model: Any) -> tuple[str, ...]:
    """Returns the module names of the classifier (two for distilled DeiT)."""
    classifier = model.get_classifier()
    heads = classifier if isinstance(classifier, tuple) else (classifier,)
    return tuple(name for name, module in model.named_modules() if any(module is head for head in heads))


def segments(model: nn.Module) -> list[Step]:
    """Returns the forward pass as a chain of named steps; applying them in order equals ``model(x)``.

    A block's step has the block's module path as its name, so that a pass can be resumed at any block.
    """
    steps: list[Step]
    if isinstance(model, VisionTransformer):
        steps = [("stem", lambda x: model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(x)))))]
        steps.extend((f"blocks.{i}", block) for i, block in enumerate(model.blocks))
    elif isinstance(model, PoolingVisionTransformer):
        steps = _pit_steps(model)
    elif isinstance(model, SwinTransformer):
        steps = [("stem", model.patch_embed)]
        for s, stage in enumerate(model.layers):
            steps.append((f"layers.{s}.downsample", stage.downsample))
            steps.extend((f"layers.{s}.blocks.{i}", block) for i, block in enumerate(stage.blocks))
    else:
        raise ModelError(f"{type(model).__name__}: accepted are {ACCEPTED}")
    return [*steps, ("tail", lambda x: model.forward_head(model.norm(x)))]


def tokens_read(model: Any) -> int | None:
    """Returns the number of leading tokens that the head reads, or None if it reads all (pools over the image)."""
    if not isinstance(model, VisionTransformer) or model.global_pool != "token" or model.attn_pool is not None:
        return None
    return len(head_names(model))  # the class token, and the distillation token of a second head


@torch.no_grad()
def image_features(model: Any, inputs: Iterable[Tensor], first: int = 0) -> np.ndarray:
    """Returns pooled pre-logits features, float32 (n, width), of batches in the backbone's input format.

    Args:
        first: position of the first image, for the error message.

    Raises:
        ModelError: if they are not finite. It names the position of the first such image.
    """
    device = next(model.parameters()).device
    pooled = (
        model.forward_head(model.forward_features(x.to(device)), pre_logits=True).float().cpu()
        for x in track(inputs, "features")
    )
    features: np.ndarray = torch.cat(list(pooled)).numpy()
    finite = np.isfinite(features).all(axis=1)
    if not finite.all():
        raise ModelError(
            f"backbone: its features of image {first + int(finite.argmin())} are not finite ({int((~finite).sum())} of "
            f"{len(finite)} images); its weights are too large, or training it with model.learning-rate diverged"
        )
    return features


def _pit_steps(model: Any) -> list[Step]:
    """Returns the forward pass of a PiT (pooling-based ViT, arXiv 2103.16302) up to its last norm, as named steps.

    timm passes the grid and the class tokens separately. Here they form one sequence (n, class tokens + grid, width),
    as the blocks see it, so that a pass can be resumed at any block.
    """

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
