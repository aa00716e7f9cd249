"""timm backbones by name. Their specs may come from messages or files, so sizes are limited before a model is built."""

from __future__ import annotations

import threading
import traceback
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from difflib import get_close_matches
from functools import lru_cache
from importlib.metadata import entry_points
from typing import Annotated, Any, Literal

import timm
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from timm.models import PoolingVisionTransformer, SwinTransformer, VisionTransformer
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from tapfl.arguments import Argument, is_list, parameters, parse_args, require_taken, written
from tapfl.config import ModelOptions
from tapfl.errors import ModelError, message_of

_INITIALISING = threading.RLock()  # timm draws from torch's global generator, and runs may share a process

FAMILIES = VisionTransformer | SwinTransformer | PoolingVisionTransformer
ENTRY_POINTS = "tapfl.backbones"  # group of entry points; loading one registers its models with timm
ACCEPTED = "timm's ViT, DeiT, PiT and Swin"
REFUSED = {  # why a similar family cannot be cut exactly
    "Eva": ", whose rotary position embeddings rotate pairs of a head's dims, or whose norm couples hidden units",
    "Beit": ", whose blocks have relative position biases, and biases of q and v outside of their linear",
}

UNSET: tuple[object, ...] = ((), 0.0, "auto")  # option values that stand for timm's own value
LARGEST_ARGUMENT = 2**16  # limit on numbers in a constructor's arguments: no image, width or depth is larger
LARGEST_MODEL = 2**31  # parameters, 8.6 GB; timm's largest ViT has 1.8e9
NOT_SHAPES = ("pretrained", "checkpoint_path", "device", "dtype", "num_classes")  # arguments that a user cannot set
LARGEST_BUFFER = 2**28  # elements of Swin's masks and indices, which are not in any file; 1 GB


class Preprocessing(BaseModel):
    """Overrides of timm's data configuration of a backbone, under timm's names. None keeps timm's value."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    mean: tuple[Annotated[float, Field(ge=0, le=1)], ...] | None = None
    std: tuple[Annotated[float, Field(gt=0, le=1)], ...] | None = None
    crop_pct: float | None = Field(None, gt=0, le=1)
    crop_mode: Literal["center", "squash", "border"] | None = None
    interpolation: Literal["bicubic", "bilinear", "lanczos", "nearest"] | None = None

    @field_validator("mean", "std")
    @classmethod
    def _one_a_channel(cls, values: tuple[float, ...] | None) -> tuple[float, ...] | None:
        if values is not None and len(values) not in (1, 3):
            raise ValueError(f"has {len(values)} values; accepted: 3, or 1 for all channels")
        return values


class BackboneSpec(BaseModel):
    """A backbone: timm's name, constructor arguments, number of classes and preprocessing.

    It may come from a message or a file, so arguments that would load weights or exhaust memory are refused.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    args: dict[str, Argument] = {}
    num_classes: int = Field(ge=0, le=LARGEST_ARGUMENT)
    preprocessing: Preprocessing = Preprocessing()

    @field_validator("args")
    @classmethod
    def _only_shapes(cls, args: dict[str, Argument]) -> dict[str, Argument]:
        for key, value in args.items():
            if key.startswith(("pretrained", "checkpoint", "device", "dtype")):
                raise ValueError(f"{key}: is not an argument of the architecture; for weights see model.weights")
            if key == "num_classes":
                raise ValueError(f"{key}: is set by the classes of the data")
            if key == "weight_init" and value == "skip":
                raise ValueError(f"{key}=skip: leaves the weights uninitialised; accepted: another value, or none")
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
            raise ModelError(f"backbone {text!r:.200}: {_first_message(error)}") from None


def spec_of(options: ModelOptions, classes: tuple[str, ...]) -> BackboneSpec:
    """Returns the spec of the options, with one output per class. Raises ModelError if its arguments are invalid."""
    try:
        args = parse_args(options.args)
    except ValueError as error:
        raise ModelError(f"model.args = {error}") from None
    if rates := {key: value for key, value in args.items() if "drop" in key and value}:
        raise ModelError(f"model.args = {written(rates)!r}: dropout is not supported, even in training; accepted: 0")
    values = {name: getattr(options, name) for name in Preprocessing.model_fields}
    try:
        preprocessing = Preprocessing(**{name: value for name, value in values.items() if value not in UNSET})
    except ValidationError as error:
        (option, *_), value = error.errors()[0]["loc"], error.errors()[0]["input"]
        raise ModelError(f"model.{option} = {value}: {_first_message(error)}") from None
    try:
        return BackboneSpec(name=options.name, args=args, num_classes=len(classes), preprocessing=preprocessing)
    except ValidationError as error:
        raise ModelError(f"model.args = {options.args!r:.200}: {_first_message(error)}") from None


def check_arguments(args: Mapping[str, Argument], name: str, kind: type) -> None:
    """Checks arguments against the annotations of timm's model `name`, which is a `kind`.

    timm itself checks few of its arguments. For example, it treats ``class_token=no`` as true, as any text, and
    ``kwargs_filter=depth`` or ``features_only=x`` never reach the model.

    Raises:
        ModelError: if the constructor has no such argument, if the argument has another type, or if lists differ in
            length.
    """
    constructors = (owner.__init__ for owner in kind.__mro__ if "__init__" in vars(owner))  # type: ignore[misc]
    taken = parameters([timm.models.model_entrypoint(name), *constructors], without=NOT_SHAPES)
    try:
        require_taken(args, taken, name)
    except ValueError as error:
        raise ModelError(f"model.args = {error}") from None
    lists = {key: value for key, value in args.items() if isinstance(value, tuple) and is_list(taken[key])}
    if len({len(value) for value in lists.values()}) > 1:
        why = "differ in length; accepted: one value per stage in each of them"
        raise ModelError(f"model.args = {written(lists)!r:.200}: {why}")


def _first_message(error: ValidationError) -> str:
    return error.errors()[0]["msg"].removeprefix("Value error, ")


def build(spec: BackboneSpec, pretrained: bool = False, seed: int | None = None) -> nn.Module:
    """Returns the backbone in evaluation mode, with timm's random initial weights or its pretrained ones.

    Args:
        pretrained: fetch the weights of timm's hub.
        seed: of the random initial weights; None uses torch's global generator.

    Raises:
        ModelError: if timm has no such model, its arguments are invalid, it belongs to another family, it does not
            classify images, it is too large, or the hub has no weights for it. A model that is too large is not built.
    """
    _require_usable(spec.model_dump_json())
    with _INITIALISING, torch.random.fork_rng(devices=[], enabled=seed is not None):
        if seed is not None:
            torch.manual_seed(seed)
        return _create(spec, pretrained)


def outline(spec: BackboneSpec, tensors: int = 2**14) -> nn.Module:
    """Returns the backbone on torch's meta device, which allocates no memory for its weights.

    Args:
        tensors: largest number of parameter tensors that it may have.

    Raises:
        ModelError: as for `build`.
    """
    with torch.device("meta"), _at_most(tensors), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Initializing zero-element tensors")  # `build` raises an error for these
        model = _create(spec)
    if (elements := sum(buffer.numel() for buffer in model.buffers())) > LARGEST_BUFFER:
        raise ModelError(f"{spec.name} with {spec.args} needs {elements:.2g} elements for its masks")
    return model


def input_shape(model: Any) -> tuple[int, int, int]:
    """Returns (channels, height, width) of the images that `model` takes."""
    size = model.patch_embed.img_size or model.pretrained_cfg["input_size"][1:]
    channels = next(module for module in model.modules() if isinstance(module, nn.Conv2d)).in_channels
    return channels, int(size[0]), int(size[1])


@lru_cache(maxsize=64)
def _require_usable(spec_as_json: str) -> None:
    spec = BackboneSpec.from_json(spec_as_json)
    try:
        model = outline(spec)
    except ModelError:
        default = outline(spec.model_copy(update={"args": {}}))
        check_arguments(spec.args, spec.name, type(default))  # raises a clearer error if an argument is to blame
        raise
    check_arguments(spec.args, spec.name, type(model))
    _require_logits(spec, model)


@torch.no_grad()
def _require_logits(spec: BackboneSpec, model: nn.Module) -> None:
    """Raises ModelError unless the model maps an image to one number per class, or to features if it has no classes."""
    option, shape = f"model.args = {written(spec.args)!r:.200}: {spec.name}", input_shape(model)
    if shape[0] not in (1, 3):
        raise ModelError(f"{option} takes images of in_chans={shape[0]} channels; accepted: 1 (grey) or 3 (colour)")
    if empty := [name for name, parameter in model.named_parameters() if not parameter.numel()]:
        raise ModelError(f"{option} has an empty {empty[0]}; accepted: sizes that leave no layer empty")
    try:
        logits = model(torch.zeros(1, *shape, device="meta"))
    except Exception as error:  # any layer may raise
        raise ModelError(f"{option} cannot take an image of {shape} ({message_of(error)})") from None
    want = (1, spec.num_classes or model.num_features)
    if not isinstance(logits, Tensor) or logits.shape != want:
        got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ModelError(f"{option} turns one image into {got}; accepted: {want}, a value for each class")


def _create(spec: BackboneSpec, pretrained: bool = False) -> nn.Module:
    if not timm.is_model(spec.name):
        for point in entry_points(group=ENTRY_POINTS, name=spec.name):
            point.load()  # registers its models with timm
    if ":" in spec.name:
        raise ModelError(
            f"model.name = {spec.name!r}: only the command `tapfl` resolves repositories; accepted here: a name of timm"
        )
    if not timm.is_model(spec.name):
        near = ", ".join(get_close_matches(spec.name, timm.list_models())) or "timm.list_models() has all names"
        raise ModelError(f"model.name = {spec.name!r}: timm has no such model; similar: {near}")
    try:
        model = timm.create_model(spec.name, pretrained, num_classes=spec.num_classes, **spec.args)
    except ModelError:
        raise
    except Exception as error:  # timm does not check arguments, and the hub's client raises many types
        if pretrained:
            raise ModelError(
                f"model.weights = 'hub': no weights for {spec.name} available ({message_of(error)})"
            ) from None
        raise ModelError(
            f"model.args = {written(spec.args)!r:.200}: timm cannot build {spec.name} with them ({_reason(error)})"
        ) from None
    if not isinstance(model, FAMILIES):
        why = REFUSED.get(type(model).__name__, "")
        raise ModelError(f"model.name = {spec.name!r}: is timm's {type(model).__name__}{why}; accepted: {ACCEPTED}")
    changed = spec.preprocessing.model_dump(exclude_none=True)
    model.pretrained_cfg = {**model.pretrained_cfg, **changed}  # timm reads the preprocessing from there
    return model.eval()


def _reason(error: Exception) -> str:
    """Returns the error's message, or the failing line of code if it is an assertion without a message."""
    if str(error):
        return message_of(error)
    return str(traceback.extract_tb(error.__traceback__)[-1].line)


@contextmanager
def _at_most(tensors: int) -> Iterator[None]:
    """Aborts the construction of a model with more than `tensors` parameter tensors or `LARGEST_MODEL` parameters."""
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
