"""The wire format: every message round-trips, and everything else is refused with a WireError."""

from __future__ import annotations

import io
import json
import math
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from hypothesis import given, settings
from hypothesis import strategies as st

from tapfl import wire
from tapfl.data.images import is_plain
from tapfl.errors import WireError
from tapfl.wire import (
    Evaluate,
    EvaluateReply,
    Hello,
    HelloReply,
    Prune,
    PruneReply,
    Summarize,
    SummaryReply,
    Train,
    TrainReply,
)
from tapfl.wire_format import WireMessage

DIM, MIN_SUPPORT, LENGTH, ROUND = 2, 5.0, 3, 4
MESSAGES: list[WireMessage] = [
    Hello("a1b2"),
    HelloReply(2, "0.5", 4, 5e9, 1e6, 5e6, 0.9, train_samples=40, holds_backbone=True, class_names='["a", "b"]'),
    Summarize("a1b2", "{}", b"\x00\xff", np.zeros(3), np.ones((2, 3), np.float32), '["a", "b"]'),
    SummaryReply(
        weights=np.array([0.25, 0.75]),
        means=np.array([[0.0, 1.0], [2.0, 3.0]]),
        covariances=np.array([[1.0, 0.5], [2.0, 0.1]]),
        n=40,
        dense_accuracy=0.9,
        test_samples=10,
        classes=3,
        held_classes=np.array([1, 0, 1], np.float32),
    ),
    Prune("a1b2", "{}", b"\x00\xff", np.array([1.0, 2.0], np.float32)),
    PruneReply(params=100, macs=2000, pruned_accuracy=0.8),
    Train(ROUND, 2, np.array([1.0, 2.0, 3.0], np.float32)),
    TrainReply(
        ROUND, 0.5, 0.8, 0.9, np.array([0.7]), np.zeros(0), adapters=np.array([1.0, 2.0, 3.0], np.float32), loss=0.7
    ),
    Evaluate(ROUND, 2, np.array([1.0, 2.0, 3.0], np.float32)),
    EvaluateReply(ROUND, 0.5, 0.8, 0.9, np.array([0.7]), np.zeros(0)),
]
HELLO, SUMMARY, PRUNED, TRAINED, EVALUATED = MESSAGES[1::2]
IDS = [type(message).__name__ for message in MESSAGES]


def accept(kind: type[WireMessage], content: RecordDict) -> WireMessage:
    """Reads and checks a message as the server does."""
    message = kind.from_records(content)
    if isinstance(message, HelloReply):
        message.profile(devices=3, max_rank=8)
        message.named(asked=True)
    elif isinstance(message, SummaryReply):
        message.mixture(DIM, MIN_SUPPORT, train_samples=40)
        message.held(3, asked=True)
    elif isinstance(message, PruneReply):
        message.check(params=100, macs=2000)
    elif isinstance(message, TrainReply):
        message.check(ROUND, references=1, length=LENGTH)
    elif isinstance(message, EvaluateReply):
        message.check(ROUND, references=1)
    return message


def refuse(message: WireMessage, match: str, **changes: Any) -> None:
    """Asserts that `message` is accepted, and that it is refused with these changes to its fields."""
    accept(type(message), message.to_records())
    with pytest.raises(WireError, match=match):
        accept(type(message), replace(message, **changes).to_records())


# -- what survives the trip -------------------------------------------------------------------------------------------


def test_all_messages_are_tested() -> None:
    kinds = [kind for kind in vars(wire).values() if isinstance(kind, type) and issubclass(kind, WireMessage)]
    assert {type(message) for message in MESSAGES} == {kind for kind in kinds if "type" in vars(kind)}


@pytest.mark.parametrize("message", MESSAGES, ids=IDS)
def test_round_trip(message: WireMessage) -> None:
    content = recorddict_from_proto(recorddict_to_proto(message.to_records()))  # as in Flower's gRPC
    got = accept(type(message), content)
    for field in fields(message):
        value, want = getattr(got, field.name), getattr(message, field.name)
        assert type(value) is type(want)
        if isinstance(want, np.ndarray):
            assert value.dtype == want.dtype
            np.testing.assert_array_equal(value, want)
        else:
            assert value == want


def test_views_and_empty_vectors_round_trip() -> None:
    every_other = np.arange(6, dtype=np.float32)[::2]
    assert Train.from_records(Train(1, 0, every_other).to_records()).adapters.tolist() == [0, 2, 4]
    assert Train.from_records(Train(1, 0, every_other[:0]).to_records()).adapters.shape == (0,)


def test_requests_and_replies_share_their_type() -> None:
    requests, replies = MESSAGES[::2], MESSAGES[1::2]
    assert [message.type for message in requests] == [message.type for message in replies]
    assert len({message.type for message in requests}) == 5


def test_what_leaves_a_device() -> None:
    """docs/privacy.md lists these fields; a field added here must be added there."""
    assert {field.name for kind in map(type, MESSAGES[1::2]) for field in fields(kind)} == {
        *("partition_id", "budget", "rank", "compute", "upload", "download", "availability"),
        *("train_samples", "holds_backbone", "class_names"),
        *("weights", "means", "covariances", "n", "dense_accuracy", "test_samples", "classes", "held_classes"),
        *("params", "macs", "pruned_accuracy"),
        *("round", "adapters", "loss", "alpha", "global_accuracy", "personal_accuracy", "reference_accuracies"),
        "images",
    }


def test_bytes_are_counted_by_kind_and_weights_apart_from_the_plan() -> None:
    sizes = {type(message): message.bytes_by_kind.total() for message in MESSAGES}
    assert sizes[Hello] == 4
    assert sizes[HelloReply] == 8 * 8 + 3 + len('["a", "b"]')
    assert sizes[Summarize] == 4 + 2 + 2 + 3 * 8 + 6 * 4 + len('["a", "b"]')
    assert sizes[SummaryReply] == (2 + 4 + 4) * 8 + 4 * 8 + 3 * 4
    assert sizes[TrainReply] == 8 + 3 * 4 + 5 * 8
    assert Hello("λ").bytes_by_kind == {"hello": 2}
    assert Train(1, 0, np.zeros(3, np.float32)).bytes_by_kind == {"adapters": 2 * 8 + 12}
    assert Prune("a1b2", "{}", b"12345").bytes_by_kind == {"plan": 6, "weights": 5}
    assert Prune("a1b2", "{}").bytes_by_kind == {"plan": 6}
    assert Prune("a1b2", "{}", b"", np.zeros(3, np.float32)).bytes_by_kind == {"plan": 6, "adapters": 12}


# -- what any message is refused for ----------------------------------------------------------------------------------


def changed(message: WireMessage, *, arrays: dict[str, Array] | None = None, **config: Any) -> RecordDict:
    content = message.to_records()
    for name, array in (arrays or {}).items():
        content["arrays"][name] = array  # type: ignore[index]
    for name, value in config.items():
        content["config"][name] = value  # type: ignore[index]
    return content


@pytest.mark.parametrize("message", MESSAGES, ids=IDS)
def test_a_missing_field(message: WireMessage) -> None:
    for field in fields(message):
        content = message.to_records()
        record = "arrays" if isinstance(getattr(message, field.name), np.ndarray) else "config"
        del content[record][field.name]  # type: ignore[attr-defined]
        with pytest.raises(WireError, match=field.name):
            accept(type(message), content)


@pytest.mark.parametrize("message", MESSAGES, ids=IDS)
def test_an_unknown_field_or_record(message: WireMessage) -> None:
    one = Array(np.ones(1, np.float32))
    with pytest.raises(WireError, match="odd"):
        accept(type(message), changed(message, odd=1))
    with pytest.raises(WireError, match="odd"):
        accept(type(message), changed(message, arrays={"odd": one}))
    for record in ({"odd": MetricRecord({"x": 1.0})}, {"odd": ConfigRecord()}):
        with pytest.raises(WireError, match="odd"):
            accept(type(message), RecordDict({**dict(message.to_records()), **record}))
    for name in ("arrays", "config"):
        with pytest.raises(WireError):
            accept(type(message), RecordDict({**dict(message.to_records()), name: MetricRecord()}))


@pytest.mark.parametrize("message", MESSAGES, ids=IDS)
def test_a_record_of_an_unknown_name_in_place_of_an_empty_one(message: WireMessage) -> None:
    content = dict(message.to_records())
    for name in ("arrays", "config"):
        others = {key: record for key, record in content.items() if key != name}
        with pytest.raises(WireError):
            accept(type(message), RecordDict({**others, "odd": MetricRecord()}))


@pytest.mark.parametrize("message", MESSAGES, ids=IDS)
def test_a_field_twice_or_in_the_wrong_record(message: WireMessage) -> None:
    for field in fields(message):
        content = message.to_records()
        if isinstance(getattr(message, field.name), np.ndarray):
            content["config"][field.name] = 1.0  # type: ignore[index]
            record = "arrays"
        else:
            content["arrays"][field.name] = Array(np.ones(1))  # type: ignore[index]
            record = "config"
        with pytest.raises(WireError, match=field.name):
            accept(type(message), content)
        del content[record][field.name]  # type: ignore[attr-defined]
        with pytest.raises(WireError, match=field.name):
            accept(type(message), content)


@pytest.mark.parametrize("value", [1, 1.0, True, "1", b"1", [1.0]], ids=repr)
@pytest.mark.parametrize("message", MESSAGES, ids=IDS)
def test_a_field_of_another_type(message: WireMessage, value: object) -> None:
    for field in fields(message):
        own = getattr(message, field.name)
        if not isinstance(own, np.ndarray) and type(own) is not type(value):
            with pytest.raises(WireError, match=field.name):
                accept(type(message), changed(message, **{field.name: value}))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf], ids=str)
@pytest.mark.parametrize("message", MESSAGES, ids=IDS)
def test_values_that_are_not_finite(message: WireMessage, value: float) -> None:
    for field in fields(message):
        own = getattr(message, field.name)
        if isinstance(own, float):
            refuse(message, f"{field.name}: is not finite", **{field.name: value})
        elif isinstance(own, np.ndarray) and own.size:
            spoilt = own.copy()
            spoilt.flat[-1] = value
            refuse(message, field.name, **{field.name: spoilt})


@pytest.mark.parametrize("dtype", ["int32", "float16", "complex64", "bool", ">f4", "S1"])
@pytest.mark.parametrize("message", MESSAGES, ids=IDS)
def test_arrays_of_another_dtype(message: WireMessage, dtype: str) -> None:
    for field in fields(message):
        own = getattr(message, field.name)
        if isinstance(own, np.ndarray):
            with pytest.raises(WireError, match=f"{field.name}: must be finite float32"):
                accept(type(message), replace(message, **{field.name: own.astype(dtype)}).to_records())


def npz() -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, x=np.zeros(3, np.float32))
    return buffer.getvalue()


def claims(shape: str) -> bytes:
    """Returns a file with three floats whose header claims more."""
    header = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode() + bytes(12)


@dataclass(frozen=True)
class MatrixMessage(WireMessage, type="train", kind="matrix", when="never"):
    values: np.ndarray


UNREADABLE = {
    "nothing": b"",
    "noise": b"\x80\x04noise",
    "an archive": npz(),
    "a damaged archive": npz()[:40],
    "half a file": claims("(3,)")[:-1],
    "a petabyte": claims(f"({10**15},)"),
    "a negative length": claims("(-3,)"),
    "no shape": claims("'x'"),
    "code": claims("__import__('os')"),
}


@pytest.mark.parametrize("data", UNREADABLE.values(), ids=UNREADABLE)
def test_bytes_that_are_not_an_array(data: bytes) -> None:
    assert Train.from_records(
        changed(MESSAGES[6], arrays={"adapters": Array("float32", (3,), "numpy.ndarray", claims("(3,)"))})
    ).adapters.tolist() == [0, 0, 0]
    array = Array("float32", (3,), "numpy.ndarray", data)
    with pytest.raises(WireError, match=r"TrainReply\.adapters"):
        accept(TrainReply, changed(TRAINED, arrays={"adapters": array}))


def test_a_serialisation_other_than_numpys() -> None:
    array = Array("float32", (3,), "pickle", claims("(3,)"))
    with pytest.raises(WireError, match="cannot be read"):
        accept(TrainReply, changed(TRAINED, arrays={"adapters": array}))


def test_an_array_in_the_order_of_columns() -> None:
    array = Array(np.asfortranarray([[1.0, 2.0], [3.0, 4.0]], np.float32))
    received = MatrixMessage.from_records(RecordDict({"arrays": ArrayRecord({"values": array})}))
    assert received.values.tolist() == [[1, 2], [3, 4]] and received.values.flags.writeable


# -- what each answer is refused for ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("match", "changes"),
    [
        ("unknown device: partition 3 of 3", {"partition_id": 3}),
        ("unknown device", {"partition_id": -1}),
        ("budget", {"budget": "0"}),
        ("budget", {"budget": "1.5"}),
        ("latency", {"budget": "latency<=0.5"}),
        ("rank", {"rank": 0}),
        ("compute", {"compute": 0.0}),
        ("upload", {"upload": -1.0}),
        ("availability", {"availability": 1.5}),
        ("rank", {"rank": 9}),
        ("training samples", {"train_samples": 0}),
        ("training samples", {"train_samples": wire.MAX_SAMPLES + 1}),
    ],
)
def test_profiles(match: str, changes: dict[str, Any]) -> None:
    refuse(HELLO, match, **changes)


FULL = np.stack([np.eye(2), np.array([[2.0, 0.5], [0.5, 1.0]])])


@pytest.mark.parametrize(
    ("match", "changes"),
    [
        ("sum to 1", {"weights": np.array([0.25, 0.7])}),
        ("positive and sum", {"weights": np.array([-0.25, 1.25])}),
        ("positive and sum", {"weights": np.array([0.0, 1.0])}),
        ("shapes", {"weights": np.array([1.0])}),
        ("shapes", {"weights": np.zeros(0), "means": np.zeros((0, 2)), "covariances": np.zeros((0, 2))}),
        ("shape", {"weights": np.array([[0.25, 0.75]])}),
        ("shapes", {"means": np.zeros((2, 3)), "covariances": np.ones((2, 3))}),
        ("shapes", {"covariances": np.ones((2, 1))}),
        ("positive definite", {"covariances": np.array([[1.0, 0.0], [1.0, 1.0]])}),
        ("positive definite", {"covariances": np.array([[1.0, -1.0], [1.0, 1.0]])}),
        ("positive definite", {"covariances": FULL - 2 * np.eye(2)}),
        ("positive definite", {"covariances": FULL + np.array([[0, 0.3], [0, 0]])}),
        ("positive definite", {"covariances": np.stack([np.eye(2), np.ones((2, 2))])}),
        ("at least 5.0 needed", {"weights": np.array([0.1, 0.9])}),
        ("40 were announced", {"n": 41}),
        ("40 were announced", {"n": 0}),
        ("dense accuracy", {"dense_accuracy": 1.1}),
        ("test samples", {"test_samples": 0}),
        ("classes", {"classes": 0}),
    ],
)
def test_mixtures(match: str, changes: dict[str, Any]) -> None:
    refuse(SUMMARY, match, **changes)


def test_weights_without_an_axis() -> None:
    scalar = Array("float64", (), "numpy.ndarray", Array(np.array(1.0)).data)
    with pytest.raises(WireError):
        accept(SummaryReply, changed(SUMMARY, arrays={"weights": scalar}))


def test_full_covariances_and_single_precision_are_accepted() -> None:
    accept(SummaryReply, replace(SUMMARY, covariances=FULL).to_records())
    accept(SummaryReply, replace(SUMMARY, weights=np.array([0.3, 0.7], np.float32)).to_records())


def test_covariances_that_are_singular_to_machine_precision() -> None:
    """Their smallest computed eigenvalue may be positive although Cholesky, which the densities need, fails."""
    generator, refused = np.random.default_rng(0), 0
    for exponent in range(-18, -10):
        for _ in range(20):
            root = generator.standard_normal((2, 4, 3))
            covariances = root @ root.swapaxes(1, 2) + 10.0**exponent * np.eye(4)
            message = replace(SUMMARY, means=np.zeros((2, 4)), covariances=covariances)
            try:
                mixture = message.mixture(4, MIN_SUPPORT, 40)
            except WireError:
                refused += 1
            else:
                assert np.isfinite(mixture.log_likelihood(np.zeros((1, 4)))).all()
    assert 0 < refused < 160


@pytest.mark.filterwarnings("ignore:overflow")
@pytest.mark.parametrize("largest", [1e150, 1e300, 1.7e308])
def test_an_accepted_mixture_has_densities(largest: float) -> None:
    for covariances in (np.full((2, 2), largest), FULL * largest, np.full((2, 2, 2), largest)):
        for means in (np.zeros((2, 2)), np.full((2, 2), largest)):
            message = replace(SUMMARY, covariances=covariances, means=means)
            try:
                mixture = message.mixture(DIM, MIN_SUPPORT, 40)
            except WireError:
                continue
            assert not np.isnan(mixture.log_likelihood(np.zeros((1, 2)))).any()


@pytest.mark.parametrize(
    ("match", "changes"),
    [
        ("model of 101 parameters", {"params": 101}),
        ("2001 MACs", {"macs": 2001}),
        ("pruned accuracy", {"pruned_accuracy": -0.1}),
    ],
)
def test_costs(match: str, changes: dict[str, Any]) -> None:
    refuse(PRUNED, match, **changes)


@pytest.mark.parametrize(
    ("match", "changes"),
    [
        ("answers round 3, not 4", {"round": 3}),
        ("answers round 5, not 4", {"round": 5}),
        (r"shape \(2,\), not \(3,\)", {"adapters": np.zeros(2, np.float32)}),
        (r"shape \(4,\), not \(3,\)", {"adapters": np.zeros(4, np.float32)}),
        (r"shape \(0,\), not \(3,\)", {"adapters": np.zeros(0, np.float32)}),
        (r"shape \(3, 1\), not \(3,\)", {"adapters": np.zeros((3, 1), np.float32)}),
        ("float32", {"adapters": np.zeros(3, np.float64)}),
        ("alpha", {"alpha": 1.01}),
        ("global", {"global_accuracy": -0.01}),
        ("personal", {"personal_accuracy": 1.01}),
        ("references must lie", {"reference_accuracies": np.array([1.01])}),
        (r"references have shape \(2,\), not \(1,\)", {"reference_accuracies": np.zeros(2)}),
    ],
)
def test_trained_adapters(match: str, changes: dict[str, Any]) -> None:
    refuse(TRAINED, match, **changes)


@pytest.mark.parametrize("value", [1e300, 3e38, -3e38, 1e12])
def test_adapters_that_would_overflow(value: float) -> None:
    """They are finite, but the next round's adapters or their products would not be."""
    dtype = np.float64 if abs(value) > 3.4e38 else np.float32
    refuse(TRAINED, "adapters", adapters=np.array([0, 0, value], dtype))


def test_a_device_that_trains_for_itself_sends_nothing() -> None:
    assert isinstance(TRAINED, TrainReply)
    replace(TRAINED, adapters=np.zeros(0, np.float32)).check(ROUND, references=1)
    with pytest.raises(WireError, match="shape"):
        TRAINED.check(ROUND, references=1)


@pytest.mark.parametrize(
    ("match", "changes"),
    [("answers round 3", {"round": 3}), ("alpha", {"alpha": -0.1}), ("personal", {"personal_accuracy": 2.0})],
)
def test_evaluations(match: str, changes: dict[str, Any]) -> None:
    refuse(EVALUATED, match, **changes)


# -- anything at all --------------------------------------------------------------------------------------------------

scalars = st.one_of(
    st.integers(-(2**63), 2**63 - 1),
    st.integers(0, 5),
    st.floats(),
    st.floats(0, 1),
    st.booleans(),
    st.text(max_size=5),
    st.binary(max_size=5),
    st.lists(st.floats(), max_size=2),
)
shapes = st.lists(st.integers(0, 3), max_size=3).map(tuple)
dtypes = st.sampled_from(["float32", "float64", "float16", "int64", "bool", "complex64", "S3", ">f8"])
numbers = st.sampled_from([0.0, 0.25, 0.5, 1.0, -1.0, 1e-320, 1e300, math.inf, math.nan])


@st.composite
def arrays(draw: st.DrawFn) -> Array:
    kind = draw(st.sampled_from(["values", "values", "damaged", "noise"]))
    if kind == "noise":
        return Array("float32", (3,), draw(st.sampled_from(["numpy.ndarray", "x"])), draw(st.binary(max_size=200)))
    shape = draw(shapes)
    if draw(st.booleans()):  # numbers that can be a valid mixture
        size = math.prod(shape)
        value = np.array(draw(st.lists(numbers, min_size=size, max_size=size))).reshape(shape)
    else:
        value = np.ones(shape).astype(draw(dtypes))
    array = Array(value)
    if kind == "damaged":
        data = bytearray(array.data)
        for place in draw(st.lists(st.integers(0, len(data) - 1), min_size=1, max_size=4)):
            data[place] = draw(st.integers(0, 255))
        array = Array(array.dtype, array.shape, array.stype, bytes(data[: draw(st.integers(0, len(data)))]))
    return array


@st.composite
def contents(draw: st.DrawFn) -> tuple[type[WireMessage], RecordDict]:
    """Returns the records of a message with a few changes, or arbitrary records."""
    message = draw(st.sampled_from(MESSAGES))
    content = message.to_records() if draw(st.booleans()) else RecordDict()
    names = st.sampled_from([*(field.name for field in fields(message)), "odd"])
    for _ in range(draw(st.integers(0, 4))):
        if draw(st.booleans()):
            record: Any = content.setdefault("arrays", ArrayRecord())
            record[draw(names)] = draw(arrays())
        else:
            record = content.setdefault("config", ConfigRecord())
            record[draw(names)] = draw(scalars)
    if draw(st.integers(0, 9)) == 0:
        content[draw(st.sampled_from(["arrays", "config", "odd"]))] = draw(
            st.sampled_from([MetricRecord({"x": 1.0}), ConfigRecord({"x": 1}), ArrayRecord()])
        )
    return type(message), content


@settings(max_examples=300)
@given(sent=contents())
@pytest.mark.filterwarnings("ignore")  # numpy's warnings about odd headers and overflows
def test_whatever_arrives_is_accepted_or_refused(sent: tuple[type[WireMessage], RecordDict]) -> None:
    kind, content = sent
    try:
        message = accept(kind, content)
    except WireError:
        return
    for field in fields(message):
        value = getattr(message, field.name)
        assert not isinstance(value, float | np.ndarray) or np.isfinite(value).all()


@pytest.mark.parametrize("name", ["no\u00a0break", "می\u200cخواهم", "👩\u200d🚀", "名前"])
def test_class_names_that_can_be_loaded_are_accepted_from_a_device(name: str) -> None:
    assert is_plain(name)
    assert isinstance(HELLO, HelloReply)
    assert replace(HELLO, class_names=json.dumps([name])).named(asked=True) == (name,)


@pytest.mark.parametrize("name", ["", "x" * 201, "red\x1b[31m", "\u202eback"])
def test_class_names_that_cannot_be_shown_are_refused(name: str) -> None:
    assert isinstance(HELLO, HelloReply)
    with pytest.raises(WireError, match="class names must be plain text"):
        replace(HELLO, class_names=json.dumps([name])).named(asked=True)
