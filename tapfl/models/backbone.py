"""timm backbones by name: built, filled with weights, and described without layer names in the algorithms."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import numpy as np
import timm
import timm.data
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from timm.models import (
    PoolingVisionTransformer,
    SwinTransformer,
    VisionTransformer,
    pit,
    swin_transformer,
    vision_transformer,
)
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from tapfl.config import ModelOptions, Scalar
from tapfl.data.transform import Transform
from tapfl.errors import ModelError, PlanError, said
from tapfl.models.pit import Step, pit_steps
from tapfl.progress import track
from tapfl.store import read_tensors

_INITIALISING = threading.RLock()  # timm draws from torch's global generator, and runs may share a process

FAMILIES = VisionTransformer | SwinTransformer | PoolingVisionTransformer
ENTRY_POINTS = "tapfl.backbones"  # by which installed packages offer models: what is loaded registers itself with timm
ACCEPTED = "timm's ViT, DeiT, PiT and Swin"

LARGEST_ARGUMENT = 2**16  # of a backbone's constructor: no image, width or depth is larger
LARGEST_MODEL = 2**31  # parameters: 8.6 GB; timm's largest ViT has 1.8e9
LARGEST_BUFFER = 2**28  # elements of Swin's masks and indices, which no file holds: 1 GB

Argument = Scalar | tuple[int | float, ...]


class BackboneSpec(BaseModel):
    """What it takes to build a backbone again: timm's name, arguments of its constructor, number of classes.

    It may come from elsewhere: what would read weights or fetch them, or fill the memory, is refused.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    args: dict[str, Argument] = {}
    num_classes: int = Field(ge=0, le=LARGEST_ARGUMENT)

    @field_validator("args")
    @classmethod
    def _only_shapes(cls, args: dict[str, Argument]) -> dict[str, Argument]:
        for key, value in args.items():
            if key.startswith(("pretrained", "checkpoint", "device", "dtype")):
                raise ValueError(f"{key}: names neither a shape nor a layer; weights come by model.weights")
            for number in value if isinstance(value, tuple) else (value,):
                if isinstance(number, int | float) and not abs(number) <= LARGEST_ARGUMENT:
                    raise ValueError(f"{key} = {number!r:.40}: is beyond {LARGEST_ARGUMENT}")
        return args

    @classmethod
    def from_json(cls, text: str) -> BackboneSpec:
        """Returns what `model_dump_json` gave. Raises ModelError if it is none, or one that is refused."""
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            raise ModelError(f"backbone {text!r:.200}: {_said(error)}") from None


def parse_args(text: str) -> dict[str, Argument]:
    """Returns constructor arguments of ``"img_size=8,class_token=False,depths=2/2"``; ``2/2`` is the tuple (2, 2).

    Raises:
        ModelError: if a part is not key=value.
    """
    arguments: dict[str, Argument] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        key, equals, value = part.partition("=")
        if not equals:
            raise ModelError(f"model.args = {text!r}: {part!r} must have the form key=value (a tuple: depths=2/2)")
        arguments[key.strip()] = _argument(value.strip())
    return arguments


def _argument(value: str) -> Argument:
    numbers = tuple(_literal(part) for part in value.split("/") if part.strip())
    if "/" in value and numbers and all(type(number) in (int, float) for number in numbers):
        return numbers  # type: ignore[return-value]
    return _literal(value)


def _literal(text: str) -> Scalar:
    try:
        parsed = json.loads({"True": "true", "False": "false"}.get(text, text))
    except (ValueError, RecursionError):  # of thousands of digits or brackets too
        return text
    return parsed if isinstance(parsed, bool | int | float) else text


def build(spec: BackboneSpec, pretrained: bool = False, seed: int | None = None) -> nn.Module:
    """Returns the backbone in evaluation mode, with timm's initial weights, or those of its hub.

    Args:
        pretrained: fetch the weights that timm's hub has for it.
        seed: of the initial weights; None: they go on where torch's global generator is.

    Raises:
        ModelError: if timm has no such model, its arguments are off, it is of another family, or so large that it can
            only be a mistake, or meant to fill the memory, of which nothing is built; or if the hub has no weights.
    """
    _require_bounded(spec.model_dump_json())
    with _INITIALISING, torch.random.fork_rng(devices=[], enabled=seed is not None):
        if seed is not None:
            torch.manual_seed(seed)
        model = _create(spec)
    if pretrained:
        load_hub_weights(model, spec, (), None)
    return model


def outline(spec: BackboneSpec, tensors: int = 2**14) -> nn.Module:
    """Returns the backbone without memory for its weights, on torch's meta device, whatever is asked for.

    Args:
        tensors: of more parameter tensors it is not built to the end.

    Raises:
        ModelError: as `build` does.
    """
    with torch.device("meta"), _at_most(tensors):
        model = _create(spec)
    if (elements := sum(buffer.numel() for buffer in model.buffers())) > LARGEST_BUFFER:
        raise ModelError(f"{spec.name} with {spec.args} needs {elements:.2g} elements for its masks")
    return model


@lru_cache(maxsize=64)
def _require_bounded(spec: str) -> None:
    outline(BackboneSpec.from_json(spec))


def _create(spec: BackboneSpec) -> nn.Module:
    if not timm.is_model(spec.name):
        for point in entry_points(group=ENTRY_POINTS, name=spec.name):
            point.load()  # registers itself with timm
    if not timm.is_model(spec.name):
        near = ", ".join(timm.list_models(f"*{spec.name.split('_')[0]}*")[:5]) or "see timm.list_models()"
        raise ModelError(f"model.name = {spec.name!r}: timm has no such model; for instance {near}")
    try:
        model = timm.create_model(spec.name, num_classes=spec.num_classes, **spec.args)
    except ModelError:
        raise
    except Exception as error:  # timm does not check what it is given, and fails as it happens
        raise ModelError(f"model.args = {spec.args}: timm cannot build {spec.name} with them ({said(error)})") from None
    if not isinstance(model, FAMILIES):
        raise ModelError(f"model.name = {spec.name!r}: is a {type(model).__name__}; accepted: {ACCEPTED}")
    return model.eval()


@contextmanager
def _at_most(tensors: int) -> Iterator[None]:
    """Stops the construction of a model at so many parameter tensors, or at `LARGEST_MODEL` elements in them."""
    thread, registered, elements = threading.get_ident(), 0, 0

    def count_up(_module: nn.Module, _name: str, parameter: nn.Parameter | None) -> None:
        nonlocal registered, elements
        if threading.get_ident() != thread or parameter is None:
            return
        registered, elements = registered + 1, elements + parameter.numel()
        if registered > tensors:
            raise ModelError(f"the backbone has more than {tensors} parameter tensors, far more than it can need")
        if elements > LARGEST_MODEL:
            raise ModelError(f"the backbone has more than {LARGEST_MODEL} parameters")

    handle = register_module_parameter_registration_hook(count_up)
    try:
        yield
    finally:
        handle.remove()


def transform_of(model: Any) -> Transform:
    """Returns how images become the input of `model`: its size, channels, mean and standard deviation."""
    config = timm.data.resolve_data_config(model=model)
    size = model.patch_embed.img_size or config["input_size"][1:]
    channels = next(module for module in model.modules() if isinstance(module, nn.Conv2d)).in_channels
    mean, std = (tuple(float(v) for v in config[key])[:channels] for key in ("mean", "std"))
    return Transform((int(size[0]), int(size[1])), channels, mean, std)


@lru_cache(maxsize=16)
def input_transform(options: ModelOptions) -> Transform:
    """Returns how images become the input of the backbone that the options name, whatever its classes."""
    return transform_of(build(spec_of(options, ("any",))))


def example_input(model: nn.Module, batch: int = 1) -> Tensor:
    """Returns zeros in the shape that `model` takes, on its device."""
    transform = transform_of(model)
    return torch.zeros(batch, transform.channels, *transform.size, device=next(model.parameters()).device)


@torch.no_grad()
def watch_example(model: nn.Module, hooks: Mapping[nn.Module, Callable[..., None]]) -> None:
    """Lets an example input pass through `model`, with a forward hook on each of these modules."""
    handles = [module.register_forward_hook(hook) for module, hook in hooks.items()]
    try:
        model(example_input(model))
    finally:
        for handle in handles:
            handle.remove()


def head_names(model: Any) -> tuple[str, ...]:
    """Returns the module names of the classifier (two for distilled DeiT)."""
    classifier = model.get_classifier()
    heads = classifier if isinstance(classifier, tuple) else (classifier,)
    return tuple(name for name, module in model.named_modules() if any(module is head for head in heads))


def segments(model: nn.Module) -> list[Step]:
    """Returns the forward pass as a chain of named steps; applying them in turn equals ``model(x)``.

    The names of blocks are their module paths, so that a pass can be resumed from the input of any block. This,
    `tapfl.models.pit` and `tapfl.models.units` are the only places that know how timm lays a backbone out.
    """
    steps: list[Step]
    if isinstance(model, VisionTransformer):
        steps = [("stem", lambda x: model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(x)))))]
        steps.extend((f"blocks.{i}", block) for i, block in enumerate(model.blocks))
    elif isinstance(model, PoolingVisionTransformer):
        steps = pit_steps(model)
    elif isinstance(model, SwinTransformer):
        steps = [("stem", model.patch_embed)]
        for s, stage in enumerate(model.layers):
            steps.append((f"layers.{s}.downsample", stage.downsample))
            steps.extend((f"layers.{s}.blocks.{i}", block) for i, block in enumerate(stage.blocks))
    else:
        raise ModelError(f"{type(model).__name__}: accepted are {ACCEPTED}")
    return [*steps, ("tail", lambda x: model.forward_head(model.norm(x)))]


def tokens_read(model: Any) -> int | None:
    """Returns how many of the first tokens the head reads, if it reads no others; None if it pools over the image."""
    if not isinstance(model, VisionTransformer) or model.global_pool != "token" or model.attn_pool is not None:
        return None
    return len(head_names(model))  # the class token, and the distillation token of a second head


@torch.no_grad()
def image_features(model: Any, inputs: Iterable[Tensor]) -> np.ndarray:
    """Returns pooled pre-logits features, float32 (n, width), of batches in the backbone's input format."""
    pooled = (model.forward_head(model.forward_features(x), pre_logits=True) for x in track(inputs, "features"))
    return torch.cat(list(pooled)).numpy()


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
    heads = [f"{name}.{part}" for name in head_names(model) for part in ("weight", "bias")]
    if head_rows is not None:
        rows = read_head_rows(head_rows, classes)
        for key in heads:
            if key not in state or max(rows) >= len(state[key]):
                raise ModelError(
                    f"model.head-rows = {str(head_rows)!r}: row {max(rows)} is not in {key} of {file.name}"
                )
            state[key] = state[key][rows]
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
        raise ModelError(f"model.weights = {str(file)!r}: do not fit {type(model).__name__} ({said(error)})") from None
    lacking = [key for key in missing if key not in heads]
    if lacking or unexpected:
        what = f"lack {lacking[0]!r}" if lacking else f"hold {unexpected[0]!r}, which the backbone has not"
        raise ModelError(f"model.weights = {str(file)!r}: do not fit the backbone: they {what}")


def load_hub_weights(model: nn.Module, spec: BackboneSpec, classes: tuple[str, ...], head_rows: Path | None) -> None:
    """Fills `model` with the weights that timm's hub has for `spec`.

    Raises:
        ModelError: if the hub cannot be reached or has no weights under that name.
    """
    try:
        rows = read_head_rows(head_rows, classes) if head_rows else None
        arguments = {"num_classes": None} if rows else {"num_classes": spec.num_classes}
        source = timm.create_model(
            spec.name, pretrained=True, **spec.args, **{k: v for k, v in arguments.items() if v is not None}
        )
    except ModelError:
        raise
    except Exception as error:  # the hub's client raises many types; whatever it is, there are no weights
        raise ModelError(f"model.weights = 'hub': no weights for {spec.name} to be had ({said(error)})") from None
    state = source.state_dict()
    for name in head_names(model) if rows else ():
        for part in ("weight", "bias"):
            state[f"{name}.{part}"] = state[f"{name}.{part}"][rows]
    model.load_state_dict(state)


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


def spec_of(options: ModelOptions, classes: tuple[str, ...]) -> BackboneSpec:
    """Returns the backbone that the options name, one output a class. Raises ModelError if its arguments are off."""
    try:
        return BackboneSpec(name=options.name, args=parse_args(options.args), num_classes=len(classes))
    except ValidationError as error:
        raise ModelError(f"model.args = {options.args!r:.200}: {_said(error)}") from None


def _said(error: ValidationError) -> str:
    return error.errors()[0]["msg"].removeprefix("Value error, ")


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
