"""What leaves a device, read off the messages themselves; and what the devices of one run sent."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import numpy as np

from tapfl import wire
from tapfl.errors import ConfigError


def uplink(messages: ModuleType = wire) -> list[dict[str, str]]:
    """Returns a row a field of every class of `messages` with the word Reply in its name, in the order of their text.

    Raises:
        TypeError: if one of them is no message, does not say when it is sent, or has a field that says not what it is.
    """
    replies = [value for name, value in vars(messages).items() if isinstance(value, type) and "Reply" in name]
    return [row for reply in replies for row in _rows(reply)]


def _rows(reply: type) -> list[dict[str, str]]:
    if not issubclass(reply, wire.WireMessage) or not hasattr(reply, "when"):
        raise TypeError(f"{reply.__name__}: is no message, or does not say when it is sent")
    hints = get_type_hints(reply, include_extras=True)
    rows = []
    for each in fields(reply):
        hint = hints[each.name]
        base, *said = get_args(hint) if get_origin(hint) is Annotated else (hint,)
        if len(said) != (2 if base is np.ndarray else 1):
            raise TypeError(f"{reply.__name__}.{each.name}: must be annotated with what it is, an array with its shape")
        rows.append(
            {
                "message": reply.__name__.removesuffix("Reply").lower(),
                "when": reply.when,
                "field": each.name,
                "type": f"array ({said[1]})" if base is np.ndarray else base.__name__,
                "what": said[0],
                "bytes": each.metadata.get("kind", reply.kind),
            }
        )
    return rows


def bytes_sent(run: Path) -> list[dict[str, Any]]:
    """Returns device and bytes by kind for every device of a finished run.

    Raises:
        ConfigError: if `run` is not the folder of one.
    """
    try:
        devices = json.loads((run / "summary.json").read_text("utf-8"))["devices"]
        return [{"device": device["device"], **device["bytes_up"]} for device in devices]
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        raise ConfigError(
            f"inspect {run} --uplink: is not the folder of a finished run, with its summary.json"
        ) from None
