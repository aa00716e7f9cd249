"""Arbitrary messages are accepted or refused, with memory bounded by their size."""

from __future__ import annotations

import inspect
import io
import tracemalloc
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
from flwr.app import Array, RecordDict
from fuzz_wire import attempt, npy
from hypothesis import given, settings
from hypothesis import strategies as st
from test_wire import MESSAGES, TRAINED, accept, changed

from tapfl import wire
from tapfl.errors import WireError
from tapfl.wire import TrainReply
from tapfl.wire_format import WireMessage

MB = 2**20
CHECKS = {"profile", "named", "mixture", "held", "check"}  # the checks of `accept` for a message that could be read


@contextmanager
def within(nbytes: int) -> Iterator[None]:
    """Asserts that the block never allocates more than this."""
    tracemalloc.start()
    try:
        yield
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak <= nbytes, f"{peak} bytes"


def test_every_message_and_every_check_is_attacked() -> None:
    classes = [kind for kind in vars(wire).values() if isinstance(kind, type) and issubclass(kind, WireMessage)]
    kinds = [kind for kind in classes if "type" in vars(kind)]
    assert {type(message) for message in MESSAGES} == set(kinds)
    methods = {name for kind in kinds for name, value in vars(kind).items() if inspect.isfunction(value)}
    assert {name for name in methods if not name.startswith("_")} == CHECKS


@settings(max_examples=1000)
@given(data=st.binary(max_size=300))
@pytest.mark.filterwarnings("ignore")  # numpy's warnings about odd headers and overflows
def test_any_bytes(data: bytes) -> None:
    with within(8 * MB):
        attempt(data)


def zip_bomb() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("adapters.npy", npy("'<f4'", f"({2**24},)", bytes(2**26)))
    return buffer.getvalue()


def pickled() -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.array([{"x": print}], object), allow_pickle=True)
    return buffer.getvalue()


HEADERS = {
    "20 GB": npy("'<f4'", "(5000000000,)", bytes(12)),
    "a terabyte": npy("'<f8'", "(2, 65536, 1000000)", bytes(12)),
    "a terabyte, by column": npy("'<f8'", "(2, 65536, 1000000)", bytes(12)).replace(b"False", b"True "),
    "more than 64 bits": npy("'<f4'", "(4294967296, 4294967296, 4)", bytes(12)),
    "less than nothing": npy("'<f4'", "(-1, -3)", bytes(12)),
    "values of no size": npy("'<U0'", "(1000000000000,)", b""),
    "values of a gigabyte": npy("'|S1000000000'", "(1,)", b""),
    "arrays in arrays": npy("('<f4', (1000000000,))", "(1,)", bytes(12)),
    "objects": pickled(),
    "an archive that grows": zip_bomb(),
    "brackets": npy("'<f4'", "(" * 9000, b""),
    "signs": npy("'<f4'", "(" + "-" * 9000 + "3,)", bytes(12)),
    "a header of 4 GB": b"\x93NUMPY\x02\x00\xff\xff\xff\xff{",
    "a later format": npy("'<f4'", "(3,)", bytes(12), (3, 0)),
    "more than it says": npy("'<f4'", "(3,)", bytes(100_000)),
    "less than it says": npy("'<f4'", "(3,)", bytes(11)),
}


@pytest.mark.parametrize("data", HEADERS.values(), ids=HEADERS)
@pytest.mark.filterwarnings("ignore")
def test_a_lying_header_takes_no_memory(data: bytes) -> None:
    content = changed(TRAINED, arrays={"adapters": Array("float32", (3,), "numpy.ndarray", data)})
    with within(4 * MB + 2 * len(data)), pytest.raises(WireError, match=r"TrainReply\.adapters"):
        accept(TrainReply, content)


def test_names_count_as_bytes_and_do_not_flood_the_log() -> None:
    for content in (
        changed(TRAINED, **{"n" * 100_000: 1}),
        changed(TRAINED, arrays={"n" * 100_000: Array(np.zeros(0, np.float32))}),
        changed(TRAINED, arrays={"adapters": Array("x" * 100_000, (3,), "numpy.ndarray", b"")}),
        changed(TRAINED, arrays={"adapters": Array("float32", (1,) * 100_000, "numpy.ndarray", b"")}),
    ):
        with pytest.raises(WireError, match="at most 4096 are accepted"):
            TrainReply.from_records(content, 4096)
    for content in (
        changed(TRAINED, **{"n" * 100_000: 1}),
        RecordDict({"n" * 100_000: TRAINED.to_records()["config"]}),
    ):
        with pytest.raises(WireError) as refused:
            TrainReply.from_records(content)
        assert len(str(refused.value)) < 400


def test_text_that_cannot_be_encoded() -> None:
    """Within one process messages do not go through protobuf, which would refuse it."""
    with pytest.raises(WireError):
        TrainReply.from_records(changed(TRAINED, loss="\ud800"))
