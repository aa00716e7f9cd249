"""timm backbones by name: described by a spec that may come from a message or a file, and built within bounds."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from importlib.metadata import entry_points

import timm
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from timm.models import PoolingVisionTransformer, SwinTransformer, VisionTransformer
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from tapfl.config import ModelOptions
from tapfl.errors import ModelError, message_of
from tapfl.options import Scalar

_INITIALISING = threading.RLock()  # timm draws from torch's global generator, and runs may share a process

FAMILIES = VisionTransformer | SwinTransformer | PoolingVisionTransformer
ENTRY_POINTS = "tapfl.backbones"  # of installed packages; loading one registers its models with timm
ACCEPTED = "timm's ViT, DeiT, PiT and Swin"

LARGEST_ARGUMENT = 2**16  # of a backbone's constructor: no image, width or depth is larger
LARGEST_MODEL = 2**31  # parameters: 8.6 GB; timm's largest ViT has 1.8e9
LARGEST_BUFFER = 2**28  # elements of Swin's masks and indices, which no file holds: 1 GB

Argument = Scalar | tuple[int | float, ...]


class BackboneSpec(BaseModel):
    """A backbone: timm's name, arguments of its constructor, number of classes.

    It may come from a message or a file, so arguments that would load weights or fill the memory are refused.
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
        """Returns the spec of `model_dump_json`. Raises ModelError if it is not valid."""
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            raise ModelError(f"backbone {text!r:.200}: {_said(error)}") from None


def spec_of(options: ModelOptions, classes: tuple[str, ...]) -> BackboneSpec:
    """Returns the backbone of the options, with one output a class. Raises ModelError if its arguments are invalid."""
    try:
        return BackboneSpec(name=options.name, args=parse_args(options.args), num_classes=len(classes))
    except ValidationError as error:
        raise ModelError(f"model.args = {options.args!r:.200}: {_said(error)}") from None


def _said(error: ValidationError) -> str:
    return error.errors()[0]["msg"].removeprefix("Value error, ")


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
        seed: of the initial weights; None: uses torch's global generator.

    Raises:
        ModelError: if timm has no such model, its arguments are invalid, it is of another family, it is too large (then
            nothing is built), or the hub has no weights.
    """
    _require_bounded(spec.model_dump_json())
    with _INITIALISING, torch.random.fork_rng(devices=[], enabled=seed is not None):
        if seed is not None:
            torch.manual_seed(seed)
        return _create(spec, pretrained)


def outline(spec: BackboneSpec, tensors: int = 2**14) -> nn.Module:
    """Returns the backbone on torch's meta device, without memory for its weights, however large it is.

    Args:
        tensors: most parameter tensors that it may have.

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


def _create(spec: BackboneSpec, pretrained: bool = False) -> nn.Module:
    if not timm.is_model(spec.name):
        for point in entry_points(group=ENTRY_POINTS, name=spec.name):
            point.load()  # registers itself with timm
    if not timm.is_model(spec.name):
        near = ", ".join(timm.list_models(f"*{spec.name.split('_')[0]}*")[:5]) or "see timm.list_models()"
        raise ModelError(f"model.name = {spec.name!r}: timm has no such model; for instance {near}")
    try:
        model = timm.create_model(spec.name, pretrained, num_classes=spec.num_classes, **spec.args)
    except ModelError:
        raise
    except Exception as error:  # timm does not check arguments, and its hub's client raises many types
        if pretrained:
            raise ModelError(
                f"model.weights = 'hub': no weights for {spec.name} available ({message_of(error)})"
            ) from None
        raise ModelError(
            f"model.args = {spec.args}: timm cannot build {spec.name} with them ({message_of(error)})"
        ) from None
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
