"""Fuzzes messages: arbitrary bytes become the records of a message, which are read and checked like a device's.

Run it forever, or for some time, with atheris, which is not a dependency of the project:

    python -m pip install --target /tmp/atheris atheris
    PYTHONPATH=.:tests:/tmp/atheris python tests/fuzz_wire.py -max_total_time=300 -rss_limit_mb=2048

Any exception except WireError ends it and leaves the input in a file `crash-…`; pass this file to reproduce it.
"""

from __future__ import annotations

import inspect
import math
import sys
import warnings
from dataclasses import fields

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from flwr.common.serde import recorddict_from_proto
from flwr.proto.recorddict_pb2 import RecordDict as Proto
from test_wire import MESSAGES, accept

from tapfl import profiles, wire, wire_format
from tapfl.errors import WireError
from tapfl.pruning import budget
from tapfl.summary import mixture
from tapfl.wire_format import WireMessage

NUMBERS = (
    0.0,
    -0.0,
    0.5,
    1.0,
    -1.0,
    5e-324,
    1e300,
    math.inf,
    -math.inf,
    math.nan,
    0,
    1,
    -1,
    2**63 - 1,
    -(2**63),
    10**40,
)
TEXTS = ("", "0.5", "macs<=0.5", "params<=1e308", "latency<=1ms", "\ud800", "\x1b[2J\n", "[" * 3000, "٠.٥", "a" * 5000)
SHAPES = ("(3,)", "(2, 2)", "(3, -1)", "(-1, -3)", "()", "(0,)", "(0, 9999999999999999999)", "(5000000000,)", "(True,)")
DESCRS = ("<f4", "<f8", ">f8", "|O", "<U0", "|V0", "<f4,<f4", "<M8[ns]", "|S9999999", "x")


class Bytes:
    """A sequence of decisions from a fuzzer's bytes; zeros after the last byte."""

    def __init__(self, data: bytes) -> None:
        self.data, self.place = data, 0

    def number(self, below: int) -> int:
        """Returns a number in 0..below-1."""
        self.place += 1
        return (self.data[self.place - 1] if self.place <= len(self.data) else 0) % below

    def some(self) -> bytes:
        """Returns up to 255 of the bytes."""
        length = self.number(256)
        self.place += length
        return self.data[self.place - length : self.place]


def npy(descr: str, shape: str, body: bytes, version: tuple[int, int] = (1, 0)) -> bytes:
    """Returns a numpy file with an arbitrary header."""
    header = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}\n".encode(errors="replace")
    length = len(header).to_bytes(2 if version == (1, 0) else 4, "little")
    return b"\x93NUMPY" + bytes(version) + length + header + body


def array(given: Bytes) -> Array:
    """Returns a valid array, one with a lying header, or noise."""
    kind, values = given.number(4), [NUMBERS[given.number(10)] for _ in range(given.number(5))]
    if kind == 0:
        return Array(np.array(values, np.float32 if given.number(2) else np.float64))
    if kind == 1:
        side = max(1, math.isqrt(len(values)))
        return Array(np.resize(np.array(values or [1.0]), (side, side)))
    stype = "numpy.ndarray" if given.number(8) else "pickle"
    if kind == 2:
        return Array("float32", (3,), stype, given.some())
    descr, shape = DESCRS[given.number(len(DESCRS))], SHAPES[given.number(len(SHAPES))]
    text = given.some().decode("latin-1") if given.number(4) == 0 else repr(descr)
    return Array("float32", (10**18,), stype, npy(text, shape, given.some(), ((1, 0), (2, 0), (3, 0))[given.number(3)]))


def scalar(given: Bytes) -> object:
    """Returns any value that a ConfigRecord can have."""
    kind = given.number(7)
    if kind == 0:
        return TEXTS[given.number(len(TEXTS))]
    if kind == 1:
        return given.some()
    if kind == 2:
        return bool(given.number(2))
    if kind == 3:
        return [float(given.number(3))] * given.number(9)
    if kind == 4:
        return given.some().decode("latin-1")
    return NUMBERS[given.number(len(NUMBERS))]


def content(message: WireMessage, given: Bytes) -> RecordDict:
    """Returns the records of a message with a few changes, arbitrary records, or whatever protobuf parses."""
    start = given.number(8)
    if start == 0:
        try:
            return recorddict_from_proto(Proto.FromString(given.data[given.place :]))
        except Exception:  # refused by Flower itself
            return RecordDict()
    records = RecordDict() if start == 1 else message.to_records()
    names = [*(each.name for each in fields(message)), "odd", "\x1b[31m" + "n" * 5000]
    for _ in range(given.number(5)):
        name, target = names[given.number(len(names))], given.number(8)
        if target == 0:
            where = ("arrays", "config", name)[given.number(3)]
            records.pop(where, None)  # Flower warns when it overwrites
            records[where] = MetricRecord({"x": 1.0})
        elif target == 1:
            for record in records.values():
                record.pop(name, None)
        elif target < 5:
            if isinstance(found := records.setdefault("arrays", ArrayRecord()), ArrayRecord):
                found[name] = array(given)
        elif isinstance(found := records.setdefault("config", ConfigRecord()), ConfigRecord):
            found[name] = scalar(given)  # type: ignore[assignment]
    return records


def attempt(data: bytes) -> WireMessage | None:
    """Returns the message that the bytes describe, if it is accepted. Raises any exception that is not a refusal."""
    given = Bytes(data)
    message = MESSAGES[given.number(len(MESSAGES))]
    try:
        return accept(type(message), content(message, given))
    except WireError as error:
        if len(str(error)) > 6000:  # because it becomes a line of the log
            raise AssertionError(f"a refusal of {len(str(error))} characters") from None
        return None


if __name__ == "__main__":
    import atheris

    warnings.simplefilter("ignore")  # numpy's warnings about odd headers and overflows
    for module in (wire, wire_format, mixture, profiles, budget, np.lib._format_impl):
        for owner in (module, *(kind for kind in vars(module).values() if inspect.isclass(kind))):
            for function in vars(owner).values():
                function = getattr(function, "__func__", function)
                if inspect.isfunction(function) and function.__module__ == module.__name__:
                    atheris.instrument_func(function)  # in place, because the modules are imported already
    atheris.Setup(sys.argv, lambda data: attempt(data) and None)
    atheris.Fuzz()
