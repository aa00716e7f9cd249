"""Weights and models as people have them: checkpoints of torch and safetensors, names and folders of timm's hub."""

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

TORCH = (".pth", ".pt", ".bin", ".ckpt", ".tar")  # endings of files of torch.save
ACCEPTED = f"a .safetensors file, one of torch.save ({', '.join(TORCH)}), or hub"
SOURCES = ("hf-hub:", "local-dir:")  # timm's marks of a repository and of a copy of one
FILES = ("model.safetensors", "pytorch_model.bin")  # in which a repository of timm has its weights


def read_checkpoint(file: Path) -> dict[str, Tensor]:
    """Returns the tensors of a checkpoint under the names that its model has for them.

    Those of training lie in `state_dict_ema`, `model_ema`, `state_dict` or `model`; the first that is there is taken.
    The prefixes of data-parallel and of compiled models are taken off. No object of a pickle is made.

    Raises:
        ValueError: if it is missing, damaged, of no known ending, or holds something else.
    """
    if not file.is_file():
        raise ValueError(f"there is no such file; accepted: {ACCEPTED}")
    if file.suffix.lower() == ".safetensors":
        try:
            return dict(clean_state_dict(read_tensors(file)))
        except PlanError as error:
            raise ValueError(f"{error}; accepted: {ACCEPTED}") from None
    if file.suffix.lower() not in TORCH:
        raise ValueError(f"has no known ending; accepted: {ACCEPTED}")
    try:
        with warnings.catch_warnings(action="ignore"):  # of a pickle's protocol
            state = load_state_dict(str(file), weights_only=True)
    except Exception as error:  # of torch, of its unpickler, or of what is in the file
        if found := _objects(file, error):
            accepted = "tensors, as of torch.save(model.state_dict(), FILE)"
            raise ValueError(f"holds objects other than tensors ({found}); accepted: {accepted}") from None
        raise ValueError(f"is not a complete file of torch.save ({message_of(error)}); accepted: {ACCEPTED}") from None
    for name, value in state.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            kind = type(value).__name__
            raise ValueError(f"holds a {kind} under {name!r:.80}; accepted: tensors by name, or these under `model`")
    return state


def _objects(file: Path, error: Exception) -> str:
    """Returns the names of what a pickle would make or call, if that is why it was refused."""
    if "weights_only" not in str(error):
        return ""
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(file)
    except Exception:  # of a file from before torch 1.6
        names = []
    return ", ".join(sorted(names)[:3]) or "of no name"


def of_hub(options: ModelOptions) -> ModelOptions:
    """Returns options that name a model of timm, where they name a repository of its hub or a local copy of one.

    Its config.json gives the architecture, its arguments and the preprocessing, as far as the options leave them open;
    ``weights = "hub"`` becomes the file of its weights.

    Raises:
        ModelError: if it is not there, or was not written by timm.
    """
    if not options.name.startswith(SOURCES):
        return options
    try:
        config = json.loads(_file(options.name, "config.json").read_text(encoding="utf-8"))
        name, pretrained = config["architecture"], config.get("pretrained_cfg", config)
        arguments = _arguments(options, pretrained, config.get("model_args", {}))
    except TapflError:
        raise
    except Exception as error:  # of the system, of the hub's client, of JSON, or of a file of another library
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
    """Returns the arguments of the stored model, and over them those of the options."""
    arguments: dict[str, Argument] = {}
    channels, *size = pretrained.get("input_size", (3,))
    if size and pretrained.get("fixed_input_size"):
        arguments["img_size"] = size[0] if len(set(size)) == 1 else tuple(size)
    if channels != 3:
        arguments["in_chans"] = channels
    for key, value in stored.items():
        kept = tuple(value) if isinstance(value, list) else value
        if not isinstance(kept, bool | int | float | str | tuple):
            raise ModelError(f"model.name = {options.name!r}: its config.json gives {key} the value {value!r:.80}")
        arguments[key] = kept
    try:
        return written(arguments | parse_args(options.args))
    except ValueError as error:
        raise ModelError(f"model.args = {error}") from None


def _weights(name: str) -> Path:
    """Returns the file of the weights in a folder, or in the hub's cache after it was fetched."""
    for file in FILES:
        with suppress(Exception):  # of the hub's client: no such file, or no connection
            if (found := _file(name, file)).is_file():
                return found
    raise ModelError(f"model.weights = 'hub': {name} has none of {', '.join(FILES)} that can be read")


def _file(name: str, file: str) -> Path:
    """Returns a file of a local copy, or of a repository, from which it is fetched if it is not in the hub's cache."""
    source, _, place = name.partition(":")
    if source == "local-dir":
        return Path(place).expanduser().absolute() / file
    from huggingface_hub import hf_hub_download

    repository, _, revision = place.partition("@")
    return Path(hf_hub_download(repository, file, revision=revision or None))
