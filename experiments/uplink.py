"""Everything that leaves a device, read from the message classes."""

from __future__ import annotations

from dataclasses import fields
from types import ModuleType
from typing import Annotated, get_args, get_origin, get_type_hints

import numpy as np

from tapfl import wire
from tapfl.wire_format import WireMessage


def uplink(messages: ModuleType = wire) -> list[dict[str, str]]:
    """Returns one row per field of every class of `messages` with Reply in its name, in the order of definition.

    Raises:
        TypeError: if a class is not a message or has no `when`, or a field's annotation has no description.
    """
    rows = []
    for reply in [value for name, value in vars(messages).items() if isinstance(value, type) and "Reply" in name]:
        if not issubclass(reply, WireMessage) or not hasattr(reply, "when"):
            raise TypeError(f"{reply.__name__}: is not a message, or has no `when`")
        message = {"message": reply.__name__.removesuffix("Reply").lower(), "when": reply.when}
        hints = get_type_hints(reply, include_extras=True)
        for part in fields(reply):
            hint = hints[part.name]
            base, *notes = get_args(hint) if get_origin(hint) is Annotated else (hint,)
            if len(notes) != (2 if base is np.ndarray else 1):
                asked = "must be annotated with a description, and an array with its shape too"
                raise TypeError(f"{reply.__name__}.{part.name}: {asked}")
            kind = f"array ({notes[1]})" if base is np.ndarray else base.__name__
            row = {"field": part.name, "type": kind, "what": notes[0], "bytes": part.metadata.get("kind", reply.kind)}
            rows.append(message | row)
    return rows
