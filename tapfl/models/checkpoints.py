"""Reads checkpoints (torch or safetensors), and resolves models of timm's hub and local copies of them."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from timm.models import clean_state_dict, load_state_dict
from torch import Tensor

from tapfl.arguments import Argument, parse_args, written
from tapfl.config import ModelOptions
from tapfl.errors import ConfigError, ModelError, PlanError, TapflError, message_of
from tapfl.models.backbone import Preprocessing
from tapfl.options import validated
from tapfl.store import read_tensors

TORCH = (".pth", ".pt", ".bin", ".ckpt", ".tar")  # file name suffixes of torch.save
ACCEPTED = f"a .safetensors file, a file of torch.save ({', '.join(TORCH)}), or hub"
SOURCES = ("hf-hub:", "local-dir:")  # timm's prefixes for a repository and for a local copy of one
FILES = ("model.safetensors", "pytorch_model.bin")  # the weights in a timm repository


def read_checkpoint(file: Path) -> dict[str, Tensor]:
    """Returns the tensors of a checkpoint by name.

    If the file is a training checkpoint, the weights are the first of `state_dict_ema`, `model_ema`, `state_dict` and
    `model` that exists. The prefixes of data-parallel and compiled models are removed. No object is unpickled.

    Raises:
        ValueError: if it is missing or damaged, has no known suffix, or holds something other than tensors.
    """
    if not file.is_file():
        raise ValueError(f"there is no such file; accepted: {ACCEPTED}")
    if file.suffix.lower() == ".safetensors":
        try:
            return dict(clean_state_dict(read_tensors(file)))
        except PlanError as error:
            raise ValueError(f"{error}; accepted: {ACCEPTED}") from None
    if file.suffix.lower() not in TORCH:
        raise ValueError(f"has an unknown suffix; accepted: {ACCEPTED}")
    try:
        with warnings.catch_warnings(action="ignore"):  # about the pickle protocol
            state = load_state_dict(str(file), weights_only=True)
    except Exception as error:  # torch and its unpickler raise many types
        if names := _objects(file, error):
            accepted = "tensors, as of torch.save(model.state_dict(), FILE)"
            raise ValueError(f"holds objects other than tensors ({names}); accepted: {accepted}") from None
        raise ValueError(f"is not a complete file of torch.save ({message_of(error)}); accepted: {ACCEPTED}") from None
    for name, value in state.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            kind = type(value).__name__
            raise ValueError(f"holds a {kind} under {name!r:.80}; accepted: tensors by name, or these under `model`")
    return state


def _objects(file: Path, error: Exception) -> str:
    """Returns the names of classes and functions that the pickle refers to, if the file was refused because of them."""
    if "weights_only" not in str(error):
        return ""
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(file)
    except Exception:  # the file is older than torch 1.6
        names = []
    return ", ".join(sorted(names)[:3]) or "of no name"


def of_hub(options: ModelOptions) -> ModelOptions:
    """Returns the options with a repository of timm's hub, or a local copy of one, replaced by the model in it.

    Its config.json provides the architecture, the arguments and the preprocessing, unless the options set them.
    ``weights = "hub"`` becomes the path of the repository's weights. Other options are returned unchanged.

    Raises:
        ModelError: if the repository cannot be read, or was not written by timm.
    """
    if not options.name.startswith(SOURCES):
        return options
    try:
        config = json.loads(_file(options.name, "config.json").read_text(encoding="utf-8"))
        name, pretrained = config["architecture"], config.get("pretrained_cfg", config)
        arguments = _arguments(options, pretrained, config.get("model_args", {}))
    except TapflError:
        raise
    except Exception as error:  # of the file system, the hub's client or JSON, or the file is from another library
        why = f"has no config.json that timm wrote ({message_of(error)})"
        raise ModelError(f"model.name = {options.name!r}: {why}; accepted: a repository or folder of timm") from None
    update: dict[str, Any] = {"name": name, "args": arguments}
    if options.weights == "hub":
        update["weights"] = str(_weights(options.name))
    for key in Preprocessing.model_fields:
        if getattr(options, key) == ModelOptions.model_fields[key].default and pretrained.get(key) is not None:
            update[key] = pretrained[key]
    try:
        return validated(ModelOptions, options.model_dump() | update)
    except ConfigError as error:
        raise ModelError(f"model.name = {options.name!r}: its config.json: {error}") from None


def _arguments(options: ModelOptions, pretrained: Mapping[str, Any], stored: Mapping[str, Any]) -> str:
    """Returns the arguments of the stored model, overridden by those of the options."""
    arguments: dict[str, Argument] = {}
    channels, *size = pretrained.get("input_size", (3,))
    if size and pretrained.get("fixed_input_size"):
        arguments["img_size"] = size[0] if len(set(size)) == 1 else tuple(size)
    if channels != 3:
        arguments["in_chans"] = channels
    for key, value in stored.items():
        if key == "num_classes":  # the spec takes it from the classes of the data
            continue
        argument = tuple(value) if isinstance(value, list) else value
        if not isinstance(argument, bool | int | float | str | tuple):
            raise ModelError(f"model.name = {options.name!r}: its config.json gives {key} the value {value!r:.80}")
        arguments[key] = argument
    try:
        return written(arguments | parse_args(options.args))
    except ValueError as error:
        raise ModelError(f"model.args = {error}") from None


def _weights(name: str) -> Path:
    """Returns the file of the weights: in the local copy, or fetched into the hub's cache."""
    for file in FILES:
        with suppress(Exception):  # the hub's client raises if there is no such file or no connection
            if (path := _file(name, file)).is_file():
                return path
    raise ModelError(f"model.weights = 'hub': {name} has none of {', '.join(FILES)} that can be read")


def _file(name: str, file: str) -> Path:
    """Returns the path of a file in a local copy, or in the hub's cache, fetching it from the repository if needed."""
    source, _, place = name.partition(":")
    if source == "local-dir":
        return Path(place).expanduser().absolute() / file
    from huggingface_hub import hf_hub_download

    repository, _, revision = place.partition("@")
    return Path(hf_hub_download(repository, file, revision=revision or None))
