"""Loads the weights of a checkpoint or of timm's hub into a backbone, which may have another image size or head."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import partial
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

from tapfl.config import ModelOptions
from tapfl.errors import ModelError, message_of
from tapfl.models.backbone import BackboneSpec, build
from tapfl.models.checkpoints import read_checkpoint
from tapfl.models.forward import head_names

_DIGITS = re.compile(r"(\d+)")


def fill_weights(
    model: nn.Module, options: ModelOptions, spec: BackboneSpec, classes: tuple[str, ...], seed: int | None = None
) -> list[str]:
    """Loads the weights that the options name, if any, into `model`. Returns notes for the user.

    Args:
        seed: with which `model` was built. Tensors that the weights do not have, such as a new head, stay as built.

    Raises:
        ModelError: if they are not available, do not fit, or do not have the required head.
    """
    takes_head = options.head in ("rows", "rows+train")
    rows = Path(options.head_rows) if takes_head and options.head_rows else None
    if options.weights == "hub":
        if takes_head and rows is None:
            raise ModelError(f"model.head = {options.head!r} with model.weights = 'hub': needs model.head-rows")
        load_hub_weights(model, spec, classes, rows, seed)
    elif options.weights:
        return load_weights(model, Path(options.weights), classes, rows, needs_head=takes_head)
    return []


def load_weights(
    model: nn.Module, file: Path, classes: tuple[str, ...], head_rows: Path | None, needs_head: bool = False
) -> list[str]:
    """Loads a checkpoint into `model`. Position embeddings are resampled to the model's image size.

    Args:
        classes: names of the federation's classes, in the order of its labels.
        head_rows: JSON file that maps class names to rows of the checkpoint's head. Without it, the checkpoint's head
            is loaded if it has one row per class; otherwise the model's head stays as initialised.
        needs_head: refuse weights without a head for these classes.

    Returns:
        Notes for the user: one if a head of another size was left out.

    Raises:
        ModelError: if weights do not fit. It names the first.
    """

    def refusal(why: object) -> ModelError:
        return ModelError(f"model.weights = {str(file)!r}: {why}")

    def unfit(error: Exception) -> ModelError:
        return refusal(f"do not fit {type(model).__name__} ({message_of(error)})")

    try:
        state = read_checkpoint(file)
    except ValueError as error:
        raise refusal(error) from None
    try:
        state = _resampled(state, model)
    except Exception as error:  # timm's filters assume names and shapes that these weights may not have
        raise unfit(error) from None
    heads, own = head_tensors(model), model.state_dict()
    if needs_head and head_rows is None:
        _require_one_order(classes)
    if head_rows is not None:
        take_rows(state, heads, read_head_rows(head_rows, classes), head_rows, file.name)
    for key in own.keys() & state.keys():
        if own[key].is_floating_point() and not state[key].is_floating_point():
            raise refusal(f"{key} is of type {state[key].dtype}; accepted: floating point of any precision")
    notes: list[str] = []
    for key in heads:
        if key in state and state[key].shape != own[key].shape:
            if key.endswith("weight"):
                theirs, mine = ("×".join(map(str, of[key].shape)) for of in (state, own))
                notes.append(f"model.weights = {str(file)!r}: {key} is {theirs}; a new one of {mine} is trained")
            del state[key]
        if needs_head and key not in state:
            raise refusal(
                f"has no {key} for {len(classes)} classes; "
                f"model.head-rows names the rows to take, model.head=train trains a new one"
            )
    try:
        missing, unexpected = model.load_state_dict(state, strict=False)
    except RuntimeError as error:  # another shape
        raise unfit(error) from None
    if missing := [key for key in missing if key not in heads]:
        theirs = f", and {unexpected[0]!r} is unexpected" if unexpected else ""
        raise refusal(f"do not fit the backbone: {missing[0]!r} is missing{theirs}; accepted: timm's names")
    if unexpected:
        raise refusal(f"do not fit the backbone: {unexpected[0]!r} is unexpected; accepted: timm's names")
    _require_finite(model, refusal)
    return notes


def rows_in_weights(options: ModelOptions) -> int:
    """Returns the number of classes of the head in the weights; 0 without weights or if they cannot be read."""
    if options.weights == "hub":
        config = timm.get_pretrained_cfg(options.name)
        return config.num_classes if config else 0
    try:
        state = read_checkpoint(Path(options.weights)) if options.weights else {}
    except ValueError:
        return 0  # `load_weights` raises the error
    return next((len(state[name]) for name in ("head.weight", "head.fc.weight") if name in state), 0)


def _require_one_order(classes: tuple[str, ...]) -> None:
    """Raises ModelError if the order of a head's classes is ambiguous: torchvision sorts 10 before 2, timm after it."""
    by_number = sorted(
        classes, key=lambda name: [int(part) if part.isdigit() else part for part in _DIGITS.split(name)]
    )
    if list(classes) == sorted(classes) != by_number:
        first = next(name for name, other in zip(classes, by_number, strict=True) if name != other)
        raise ModelError(
            f"model.head-rows = '': the head's rows may be in text order or in number order, which differ from class "
            f"{first!r} on; accepted: a JSON file, class name -> row"
        )


def load_hub_weights(
    model: nn.Module,
    spec: BackboneSpec,
    classes: tuple[str, ...],
    head_rows: Path | None,
    seed: int | None = None,
) -> None:
    """Loads the weights of timm's hub for `spec` into `model`.

    Args:
        seed: of the tensors that the hub's weights do not have; see `fill_weights`.

    Raises:
        ModelError: if the hub cannot be reached, has no weights under that name, or their head does not have a row.
    """
    rows = read_head_rows(head_rows, classes) if head_rows else None  # raises before anything is fetched
    if rows and (theirs := timm.get_pretrained_cfg(spec.name)):
        spec = spec.model_copy(update={"num_classes": theirs.num_classes})
    state = build(spec, pretrained=True, seed=seed).state_dict()
    if head_rows and rows:
        take_rows(state, head_tensors(model), rows, head_rows, f"the hub's {spec.name}")
    model.load_state_dict(state)
    _require_finite(model, lambda why: ModelError(f"model.weights = 'hub': {spec.name}: {why}"))


def _require_finite(model: nn.Module, refusal: Callable[[str], ModelError]) -> None:
    for key, tensor in model.state_dict().items():
        if not bool(tensor.isfinite().all()):
            raise refusal(f"{key} holds values that are not finite; accepted: values that are finite in float32")


def head_tensors(model: nn.Module) -> list[str]:
    """Returns the names of the weights and biases of a model's classifiers."""
    return [f"{name}.{part}" for name in head_names(model) for part in ("weight", "bias")]


def take_rows(state: dict[str, Tensor], heads: list[str], rows: list[int], named_by: Path, source: str) -> None:
    """Reduces the heads in `state` to these rows. Raises ModelError if a head does not have them."""
    for key in heads:
        if key not in state or not state[key].ndim or max(rows) >= len(state[key]):
            raise ModelError(f"model.head-rows = {str(named_by)!r}: row {max(rows)} is not in {key} of {source}")
        state[key] = state[key][rows]


def read_head_rows(file: Path, classes: tuple[str, ...]) -> list[int]:
    """Returns the row of the head for each class.

    Raises:
        ModelError: if the file cannot be read, or does not give every class a row of its own.
    """

    def refusal(why: object) -> ModelError:
        return ModelError(f"model.head-rows = {str(file)!r}: {why}")

    def each_once(pairs: list[tuple[str, object]]) -> dict[str, object]:
        table: dict[str, object] = {}
        for name, row in pairs:
            if name in table:
                raise ValueError(f"{name!r} occurs twice")
            table[name] = row
        return table

    try:
        table = json.loads(file.read_text(encoding="utf-8-sig"), object_pairs_hook=each_once)
    except (OSError, ValueError, RecursionError) as error:
        raise refusal(f"is not a readable JSON file ({error})") from None
    if not isinstance(table, dict):
        raise refusal("must map class names to rows")
    holder: dict[int, str] = {}
    for name in classes:
        row = table.get(name)
        if type(row) is not int or row < 0:
            raise refusal(f"has no row for class {name!r}; accepted: a whole number from 0")
        if row in holder:
            raise refusal(f"row {row} is given to {holder[row]!r} and {name!r}; accepted: a different row for each")
        holder[row] = name
    return list(holder)


def _resampled(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Returns `state` converted to the names and sizes of `model` by timm's own filter for its family."""
    deit3 = partial(vision_transformer.checkpoint_filter_fn, adapt_layer_scale=True)  # renames gamma_1 to ls1.gamma
    for family, filtered in (
        (SwinTransformer, swin_transformer.checkpoint_filter_fn),
        (PoolingVisionTransformer, pit.checkpoint_filter_fn),
        (VisionTransformer, deit3),
    ):
        if isinstance(model, family):
            state = filtered(state, model)
    return state
