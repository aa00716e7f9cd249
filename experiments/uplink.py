"""Everything that leaves a device, read from the message classes."""

from __future__ import annotations

from dataclasses import fields
from types import ModuleType
from typing import Annotated, get_args, get_origin, get_type_hints

import numpy as np

from tapfl import wire


def uplink(messages: ModuleType = wire) -> list[dict[str, str]]:
    """Returns one row per field of every class of `messages` with Reply in its name, in the order of definition.

    Raises:
        TypeError: if a class is no message or lacks `when`, or a field lacks the description in its annotation.
    """
    replies = [value for name, value in vars(messages).items() if isinstance(value, type) and "Reply" in name]
    return [row for reply in replies for row in _rows(reply)]


def _rows(reply: type) -> list[dict[str, str]]:
    if not issubclass(reply, wire.WireMessage) or not hasattr(reply, "when"):
        raise TypeError(f"{reply.__name__}: is no message, or has no `when`")
    hints = get_type_hints(reply, include_extras=True)
    rows = []
    for each in fields(reply):
        hint = hints[each.name]
        base, *notes = get_args(hint) if get_origin(hint) is Annotated else (hint,)
        if len(notes) != (2 if base is np.ndarray else 1):
            raise TypeError(f"{reply.__name__}.{each.name}: must be annotated with what it is, an array with its shape")
        rows.append(
            {
                "message": reply.__name__.removesuffix("Reply").lower(),
                "when": reply.when,
                "field": each.name,
                "type": f"array ({notes[1]})" if base is np.ndarray else base.__name__,
                "what": notes[0],
                "bytes": each.metadata.get("kind", reply.kind),
            }
        )
    return rows
