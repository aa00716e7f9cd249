"""Converts messages to Flower's records and back, and checks every field: name, type, size and finite values.

Arrays are sent in an ArrayRecord and all other fields in a ConfigRecord; nothing is pickled. This is the only module of
`tapfl` that imports Flower.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, fields
from functools import cache
from io import BytesIO
from typing import Any, ClassVar, Self, get_type_hints

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from tapfl.errors import WireError

NPY = "numpy.ndarray"  # Flower's name for the format of `np.save`


@dataclass(frozen=True)
class WireMessage:
    """Base class of all messages.

    Attributes:
        type: Flower's message type.
        kind: category in which its bytes are counted, except for fields with a kind of their own.
        when: when a device sends it.
    """

    type: ClassVar[str]
    kind: ClassVar[str]
    when: ClassVar[str]

    def __init_subclass__(cls, **attributes: str) -> None:
        for name, value in attributes.items():
            setattr(cls, name, value)

    def to_records(self) -> RecordDict:
        """Returns the message as Flower's records."""
        arrays, config = ArrayRecord(), ConfigRecord()
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, np.ndarray):
                arrays[field.name] = Array(np.ascontiguousarray(value))
            else:
                config[field.name] = value
        return RecordDict({"arrays": arrays, "config": config})

    @classmethod
    def from_records(cls, content: RecordDict, limit: float = math.inf) -> Self:
        """Returns the message in `content`.

        Args:
            limit: largest number of bytes of all arrays, texts and names together; larger messages are not parsed.

        Raises:
            WireError: if a field is missing, unknown, of another type, or not finite, or if it is too large.
        """
        arrays, config = content.get("arrays", ArrayRecord()), content.get("config", ConfigRecord())
        known = set(content) <= {"arrays", "config"}
        if not isinstance(arrays, ArrayRecord) or not isinstance(config, ConfigRecord) or not known:
            raise WireError(f"{cls.__name__}: records {sorted(content)!s:.80} are not `arrays` and `config`")
        size = sum(len(array.data) + len(array.dtype) + 8 * len(array.shape) for array in arrays.values())
        size += sum(map(_nbytes, (*config.values(), *config, *arrays)))
        if size > limit:
            raise WireError(f"{cls.__name__}: {size} bytes, at most {limit:.0f} are accepted")
        hints = _types(cls)  # type: ignore[arg-type]  # mypy takes the class of a dataclass as not hashable
        names = [field.name for field in fields(cls)]
        in_arrays = {name for name in names if hints[name] is np.ndarray}
        if different := sorted((set(arrays) ^ in_arrays) | (set(config) ^ (set(names) - in_arrays))):
            raise WireError(f"{cls.__name__}: fields differ: {', '.join(name[:40] for name in different[:5])}")
        values: dict[str, Any] = {}
        for name in names:
            if name in in_arrays:
                values[name] = _array(f"{cls.__name__}.{name}", arrays[name])
            elif type(config[name]) is not hints[name]:
                raise WireError(f"{cls.__name__}.{name}: must be {hints[name].__name__}, got {config[name]!r:.40}")
            else:
                values[name] = config[name]
        if bad := [n for n, v in values.items() if isinstance(v, float) and not math.isfinite(v)]:
            raise WireError(f"{cls.__name__}.{bad[0]}: is not finite")
        return cls(**values)

    @property
    def bytes_by_kind(self) -> Counter[str]:
        """Bytes of the fields by kind, without Flower's envelope. Kinds without bytes are left out."""
        counted: Counter[str] = Counter()
        for field in fields(self):
            counted[field.metadata.get("kind", self.kind)] += _nbytes(getattr(self, field.name))
        return +counted


@cache
def _types(message: type[WireMessage]) -> dict[str, Any]:
    return get_type_hints(message)


def _array(field: str, array: Array) -> np.ndarray:
    """Returns the values of an array. Allocates memory for the bytes that arrived, not for the shape in the header."""
    try:
        content = BytesIO(array.data)
        # (1, 0) is the only version that `np.save` writes for numbers
        if array.stype != NPY or np.lib.format.read_magic(content) != (1, 0):
            raise ValueError
        shape, by_columns, dtype = np.lib.format.read_array_header_1_0(content)
        if dtype not in (np.float32, np.float64):
            raise WireError(f"{field}: must be finite float32 or float64, got {dtype!s:.40}")
        if math.prod(shape) * dtype.itemsize != len(array.data) - content.tell():
            raise WireError(f"{field}: the shape {shape!s:.80} does not match its number of bytes")
        values = np.frombuffer(array.data, dtype, offset=content.tell())  # `array.numpy` would read the header again
        value = values.reshape(shape, order="F" if by_columns else "C").copy()
    except WireError:
        raise
    except Exception as error:  # numpy's reader can raise anything on foreign bytes
        raise WireError(f"{field}: cannot be read ({type(error).__name__})") from None
    if not np.isfinite(value).all():
        raise WireError(f"{field}: must be finite float32 or float64")
    return value


def _nbytes(value: object) -> int:
    if isinstance(value, np.ndarray):
        return int(value.nbytes)
    if isinstance(value, list):
        return sum(map(_nbytes, value))
    if isinstance(value, str | bytes):
        return len(value.encode(errors="surrogatepass") if isinstance(value, str) else value)
    return 8
