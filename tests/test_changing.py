"""Devices whose images change between rounds: images never change their part, and runs in which images come and go."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Context, Message, RecordDict
from hypothesis import given
from hypothesis import strategies as st
from killing import copied_after
from PIL import Image
from test_inprocess_run import SMALL, content

from clients.client_app import app as client_app
from clients.client_app import device_of
from clients.device import Device
from experiments.engines.local import run_inprocess
from experiments.preflight import resolve_run
from experiments.report.reading import read_run
from experiments.report.single import differences
from strategies.records import AbsenceLine, DeviceRecord, DriftLine, RoundLine, TrafficLine, read_metrics, read_summary
from strategies.server_app import app as server_app
from strategies.state import FederationState, present
from tapfl.adapters.rules import ServerState
from tapfl.config import DataOptions
from tapfl.data.changing import drawn, identified, split_changing
from tapfl.data.images import ImageSet
from tapfl.data.sources import load_images
from tapfl.errors import ConfigError, DataError, WireError
from tapfl.options import parse_assignment
from tapfl.profiles import DeviceProfile
from tapfl.wire import Hello, Train, TrainReply

DIGITS, HELLO = load_images("digits"), Hello("a1b2" * 4)

# -- parts of images that come and go ----------------------------------------------------------------------------------


def images(which: list[int]) -> ImageSet:
    """Some digits as a device's images, identified by their pixels."""
    array = DIGITS.read(np.array(which, dtype=np.int64))
    return identified(ImageSet.of(array, np.zeros(len(which), np.int64), "a"), Path("unused"))


def parts(which: list[int], evaluate: str = "test") -> dict[str, set[int]]:
    """Returns the training part, the test part and the held-out images as numbers of digits."""
    own, options = images(which), DataOptions(evaluate=evaluate)
    split = split_changing(own, options, seed=3)
    held = drawn(own.subset(split.train), 0.2, 3, "held-out")
    train, numbers = split.train, np.array(which, dtype=np.int64)
    found = {"trained": train[~held], "held out": train[held], "test": split.test}
    return {name: set(numbers[positions].tolist()) for name, positions in found.items()}


some = st.lists(st.integers(0, 299), min_size=1, max_size=40, unique=True)


@given(before=some, after=some, evaluate=st.sampled_from(["test", "validation"]))
def test_no_image_changes_its_part_when_others_join_or_vanish(
    before: list[int], after: list[int], evaluate: str
) -> None:
    first, second = parts(before, evaluate), parts(after, evaluate)
    both = {*before} & {*after}
    for name in first:
        assert first[name] & both == second[name] & both
    if evaluate == "test":
        assert set.union(*first.values()) == {*before}


@given(which=some)
def test_validation_images_are_neither_tested_nor_trained_on(which: list[int]) -> None:
    last, chosen = parts(which), parts(which, "validation")
    assert not chosen["test"] & last["test"] and not (chosen["trained"] | chosen["held out"]) & last["test"]
    assert not chosen["test"] & (chosen["trained"] | chosen["held out"])


def test_shares_are_met_on_average_and_copies_are_in_one_part() -> None:
    everything = list(range(1500))
    found = parts(everything)
    assert abs(len(found["test"]) / 1500 - 0.3) < 0.03 and abs(len(found["held out"]) / 1050 - 0.2) < 0.03
    twice = split_changing(images(everything[:50] + everything[:50]), DataOptions(), seed=3)
    assert {*(twice.test % 50)} == {*twice.test[twice.test < 50]} and len(twice.test) % 2 == 0
    other = split_changing(images(everything), DataOptions(), seed=4).test
    assert 0.15 < len({*other.tolist()} & found["test"]) / len(other) < 0.45


def test_identities_of_a_folder_are_kept_until_it_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = replace(images([1, 2, 3]), identity=None)
    named = replace(own, images=replace(own.images, key="as it is"))  # type: ignore[type-var]
    first = identified(named, tmp_path)
    assert first.identity is not None and first.identity.tolist() == images([1, 2, 3]).identity.tolist()
    monkeypatch.setattr(ImageSet, "read", lambda *_: pytest.fail("read again"))
    assert identified(named, tmp_path).identity.tolist() == first.identity.tolist()


# -- whole runs --------------------------------------------------------------------------------------------------------

WRITERS = ("ada", "bob", "cleo")
OPTIONS = [
    *(option for option in SMALL if not option.startswith(("devices.count", "train.rounds", "metric.size"))),
    *("data.public=digits", "data.partition=natural", "data.changing=true", "metric.size=64", "summary.dim=8"),
    *("adapters.head=class-rows", "summary.max-components=2"),
]


def write(folder: Path, writer: str, numbers: range) -> None:
    for number, pixels in zip(numbers, DIGITS.read(np.array(numbers)), strict=True):
        place = folder / writer / str(DIGITS.labels[number])
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels[..., 0]).save(place / f"{number}.png")


@pytest.fixture
def writers(tmp_path: Path) -> Path:
    for place, writer in enumerate(WRITERS):
        write(tmp_path / "writers", writer, range(60 * place, 60 * place + 50))
    return tmp_path / "writers"


def change(folder: Path) -> None:
    """Ada gets images, also of an unknown class; bob has hardly any left; cleo loses some; dora is new."""
    write(folder, "ada", range(200, 260))
    shutil.copytree(folder / "ada" / "3", folder / "ada" / "three")
    shutil.rmtree(folder / "bob")
    write(folder, "bob", range(60, 65))
    shutil.rmtree(folder / "cleo" / "1")
    write(folder, "dora", range(300, 350))


class Changing:
    """A ClientApp whose images change before the second round and return before the third; then bob loses all."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.round = folder, 1

    def __call__(self, message: Message, context: Context) -> Message:
        if message.metadata.message_type == "train":
            asked = Train.from_records(message.content).round
            if asked > self.round:
                self.round = asked
                if asked == 2:
                    change(self.folder)
                else:
                    write(self.folder, "bob", range(60, 100))
        elif message.metadata.message_type == "evaluate":
            for place in (self.folder / "bob").iterdir():
                shutil.rmtree(place)
        return client_app(message, context)


def carry_out(run: Path, writers: Path, cache: Path, app: object, *options: str, resume: bool = False) -> None:
    settings = [*OPTIONS, f"data.source={writers}", f"cache={cache}", *options]
    config = resolve_run(dict(map(parse_assignment, settings)), run, resume)
    run_inprocess(server_app, app, config.flat(), config.devices.count)  # type: ignore[arg-type]


def test_images_come_and_go_between_rounds_and_a_killed_run_resumes(writers: Path, cache: Path, tmp_path: Path) -> None:
    at_first, whole, killed = (tmp_path / name for name in ("at first", "whole", "copies/killed"))
    shutil.copytree(writers, at_first)
    with copied_after({"killed": ("strategies.server_app", "save_checkpoint", 2)}, whole, killed.parent):
        carry_out(whole, writers, cache, Changing(writers), "train.rounds=3", "summary.refresh=2")

    lines, summary = read_metrics(whole).lines, read_summary(whole)
    absent = [line for line in lines if isinstance(line, AbsenceLine)]
    assert [(line.round, line.device, line.reason) for line in absent] == [
        *((round, 1, "too few images") for round in (2, 4))
    ]
    assert [line.devices for line in lines if isinstance(line, RoundLine)] == [3, 2, 3, 2]
    ada, bob, cleo = summary.devices
    assert [device.rounds for device in summary.devices] == [3, 2, 3] and bob.last_round == 3
    assert ada.train_samples + ada.test_samples == 110  # not those of the unknown class
    assert bob.train_samples + bob.test_samples == 40 and 30 < cleo.train_samples + cleo.test_samples < 50
    assert [device.failures for device in summary.devices] == [0, 1, 0]  # because bob has no mixture to send
    drifts = {line.device: line.drift for line in lines if isinstance(line, DriftLine)}
    assert drifts.keys() == {0, 2} and min(drifts.values()) > 0 and bob.drift is None  # bob could not be asked
    assert "their mixtures have moved by" in differences(read_run(whole))
    assert summary.drift == pytest.approx(np.mean([*drifts.values()]))
    noted = json.loads((whole / "devices" / "00" / "images.json").read_text())
    assert set(noted["left_out"]) == {"three"} and sum(noted["train"]) + sum(noted["test"]) == 110
    for i, writer in enumerate(WRITERS):
        assert json.loads((whole / "devices" / f"{i:02d}" / "source.json").read_text()) == {"folder": writer}
    asked = [line.phase for line in lines if isinstance(line, TrafficLine) and line.phase.startswith("mixtures")]
    assert asked == ["mixtures after round 2"] * 2

    shutil.rmtree(writers)
    shutil.copytree(at_first, writers)
    change(writers)
    app = Changing(writers)
    app.round = 2
    carry_out(killed, writers, cache, app, "train.rounds=3", "summary.refresh=2", resume=True)
    assert content(killed) == content(whole)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["data.partition=iid", "devices.count=2"], "data.changing = true: needs devices with images of their own"),
        (["data.public="], "data.changing = true: needs devices with images of their own"),
        (["devices.count=2"], "devices.count = 2: data.source has 3 folders; accepted: 3"),
        (["personalize.method=pooled"], "data.changing=true cannot be combined with pooled, which needs"),
        (["data.changing=false", "summary.refresh=2"], "summary.refresh=2 would fit the mixtures to the same images"),
        (["summary.refresh=2", "summary.clip=1", "summary.noise=1"], "refresh=2 uploads further mixtures"),
        (["data.min-images=70"], "min-images = 70"),
    ],
)
def test_options_that_need_fixed_images_are_refused(
    options: list[str], said: str, writers: Path, cache: Path, tmp_path: Path
) -> None:
    with pytest.raises((ConfigError, DataError), match=said):
        carry_out(tmp_path / "run", writers, cache, client_app, *options)
    assert not (tmp_path / "run").exists()


def test_a_node_with_its_own_images_begins_with_enough_and_continues_with_few(tmp_path: Path) -> None:
    """Its array is written again; images of unknown classes are left out of both parts."""
    file = tmp_path / "mine.npz"

    def device(count: int, classes: str = "0123456789", **options: str) -> Device:
        chosen = np.arange(count)
        np.savez(file, images=DIGITS.read(chosen), labels=DIGITS.labels[chosen], classes=np.array(list(classes)))
        node = {"partition-id": 0, "num-partitions": 1, "data": str(file), "storage": str(tmp_path / "node")}
        return device_of(Context(1, 2, node, RecordDict(), {"data.changing": True, "data.min-images": 20} | options))

    with pytest.raises(DataError, match="3 training and 1 test images, it needs 8 and 2"):
        device(4).hello(HELLO)
    first = device(100).hello(HELLO).train_samples
    assert 55 < first < 85 and (tmp_path / "node" / "source.json").exists()
    device(100).storage.save_classes(DIGITS.classes)
    assert device(4).hello(HELLO).train_samples == 3 and device(4)._images.too_few
    assert device(19)._images.too_few and not device(40)._images.too_few  # of data.min-images
    validated = device(20, **{"data.evaluate": "validation", "data.test-share": 0.25})._images
    assert 0 < validated.present.sum() < 20  # counted at the start too: images of the test part, which is not used
    odd = device(100, classes="abc3456789")
    assert odd._images.present.sum() == (DIGITS.labels[:100] > 2).sum()
    assert {*odd._images.part("test").labels.tolist()} <= {*range(3, 10)}


def test_a_device_may_have_one_class_with_folders_of_images(tmp_path: Path) -> None:
    """In a source without devices they would be taken for the classes, and refused."""
    for number, pixels in enumerate(DIGITS.read(np.arange(60))):
        place = tmp_path / "writers" / "ada" / "7" / str(2019 + number % 2)
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels[..., 0]).save(place / f"{number}.png")
    run = {"data.source": str(tmp_path / "writers"), "data.partition": "natural"}
    run |= {"data.changing": True, "data.public": "digits"}
    node = {"partition-id": 0, "num-partitions": 1, "storage": str(tmp_path / "node")}
    assert 25 < device_of(Context(1, 2, node, RecordDict(), run)).hello(HELLO).train_samples < 60


# -- what the server makes of it ---------------------------------------------------------------------------------------


def reply(*images: float, adapters: int = 0) -> TrainReply:
    return TrainReply(3, 0.0, 0.5, 0.5, np.zeros(0), np.array(images), np.zeros(adapters, np.float32), 0.0)


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (reply(adapters=4), r"numbers of images have shape \(0,\), not \(2,\)"),
        (reply(20.5, 4, adapters=4), "must be whole"),
        (reply(-1, 4, adapters=4), "must be whole"),
        (reply(0, 4, adapters=4), "both from 1"),
        (reply(1e12, 4, adapters=4), "both from 1 to 1000000000"),
        (reply(0, 0, adapters=4), r"adapters have shape \(4,\), not \(0,\)"),
    ],
)
def test_invalid_numbers_of_images_are_refused(answer: TrainReply, said: str) -> None:
    with pytest.raises(WireError, match=said):
        answer.check(3, changing=True, length=4)


def test_numbers_of_images_are_accepted_only_if_requested() -> None:
    reply(20, 4, adapters=4).check(3, changing=True, length=4)
    reply(0, 0).check(3, changing=True, length=4)
    reply(adapters=4).check(3, length=4)
    with pytest.raises(WireError, match="numbers of images have shape"):
        reply(20, 4, adapters=4).check(3, length=4)


def test_the_present_numbers_are_the_weights_of_a_round() -> None:
    records = {i: DeviceRecord(device=i, profile=DeviceProfile(budget=0.5, rank=4), train_samples=50) for i in range(3)}
    state = FederationState(2, ServerState({}), records, plans={})
    state, here, lines = present(state, {0: reply(80, 30), 1: reply(0, 0)}, 3)
    assert [record.train_samples for record in state.devices.values()] == [80, 50, 50]
    assert state.devices[0].test_samples == 30 and [*here] == [0]
    assert lines == [AbsenceLine(round=3, device=1, reason="too few images")]
    unchanged, everybody, lines = present(state, {0: reply(), 1: reply()}, 4)
    assert unchanged.devices == state.devices and [*everybody] == [0, 1] and not lines
