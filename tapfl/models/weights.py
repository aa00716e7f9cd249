"""Weights from a file or from timm's hub, into a backbone that is there."""

from __future__ import annotations

import json
from pathlib import Path

import timm
from timm.models import (
    PoolingVisionTransformer,
    SwinTransformer,
    VisionTransformer,
    pit,
    swin_transformer,
    vision_transformer,
)
from torch import Tensor, nn

from tapfl.errors import ModelError, PlanError, message_of
from tapfl.models.backbone import BackboneSpec, build
from tapfl.models.forward import head_names
from tapfl.store import read_tensors


def load_weights(
    model: nn.Module, file: Path, classes: tuple[str, ...], head_rows: Path | None, needs_head: bool = False
) -> None:
    """Fills `model` with the weights of a safetensors file; position embeddings are resampled to the model's size.

    Args:
        classes: names of the federation's classes, in the order of its labels.
        head_rows: JSON file of class name -> row of the file's head. Without it the file's head is used if it has one
            row a class, and left as initialised if not.
        needs_head: refuse weights without a head for these classes, because none will be trained.

    Raises:
        ModelError: naming the first weights that do not fit.
    """
    if not file.is_file():
        raise ModelError(f"model.weights = {str(file)!r}: there is no such file; accepted: a .safetensors file, or hub")
    try:
        state = read_tensors(file)
    except PlanError as error:
        raise ModelError(f"model.weights = {str(file)!r}: {error}") from None
    heads = _head_tensors(model)
    if head_rows is not None:
        _take_rows(state, heads, read_head_rows(head_rows, classes), head_rows, file.name)
    own = model.state_dict()
    for key in heads:
        if key in state and state[key].shape != own[key].shape:
            del state[key]
        if needs_head and key not in state:
            raise ModelError(
                f"model.weights = {str(file)!r}: has no {key} for {len(classes)} classes; "
                f"model.head-rows names the rows to take, model.head=train trains a new one"
            )
    try:
        filtered = _resampled(state, model)
        missing, unexpected = model.load_state_dict(filtered, strict=False)
    except (RuntimeError, KeyError, AttributeError) as error:
        raise ModelError(
            f"model.weights = {str(file)!r}: do not fit {type(model).__name__} ({message_of(error)})"
        ) from None
    lacking = [key for key in missing if key not in heads]
    if lacking or unexpected:
        what = f"lack {lacking[0]!r}" if lacking else f"hold {unexpected[0]!r}, which the backbone has not"
        raise ModelError(f"model.weights = {str(file)!r}: do not fit the backbone: they {what}")


def load_hub_weights(model: nn.Module, spec: BackboneSpec, classes: tuple[str, ...], head_rows: Path | None) -> None:
    """Fills `model` with the weights that timm's hub has for `spec`.

    Raises:
        ModelError: if the hub cannot be reached, has no weights under that name, or their head lacks a row.
    """
    rows = read_head_rows(head_rows, classes) if head_rows else None  # refused before anything is fetched
    if rows and (theirs := timm.get_pretrained_cfg(spec.name)):
        spec = spec.model_copy(update={"num_classes": theirs.num_classes})
    state = build(spec, pretrained=True).state_dict()
    if head_rows and rows:
        _take_rows(state, _head_tensors(model), rows, head_rows, f"the hub's {spec.name}")
    model.load_state_dict(state)


def _head_tensors(model: nn.Module) -> list[str]:
    return [f"{name}.{part}" for name in head_names(model) for part in ("weight", "bias")]


def _take_rows(state: dict[str, Tensor], heads: list[str], rows: list[int], named_by: Path, source: str) -> None:
    """Reduces the heads in `state` to these rows. Raises ModelError if one lacks them."""
    for key in heads:
        if key not in state or max(rows) >= len(state[key]):
            raise ModelError(f"model.head-rows = {str(named_by)!r}: row {max(rows)} is not in {key} of {source}")
        state[key] = state[key][rows]


def read_head_rows(file: Path, classes: tuple[str, ...]) -> list[int]:
    """Returns the row of the head for each class. Raises ModelError if the file or a class is missing."""
    try:
        table = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"model.head-rows = {str(file)!r}: is not a readable JSON file ({error})") from None
    if not isinstance(table, dict):
        raise ModelError(f"model.head-rows = {str(file)!r}: must map class names to rows")
    if lacking := [name for name in classes if type(table.get(name)) is not int or table[name] < 0]:
        raise ModelError(f"model.head-rows = {str(file)!r}: names no row for class {lacking[0]!r}")
    return [table[name] for name in classes]


def _resampled(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Returns `state` under the names and in the sizes of `model`, as timm's own filter of its family has them."""
    for family, module in (
        (SwinTransformer, swin_transformer),
        (PoolingVisionTransformer, pit),
        (VisionTransformer, vision_transformer),
    ):
        if isinstance(model, family):
            state = module.checkpoint_filter_fn(state, model)
    return state
