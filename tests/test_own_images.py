"""Nodes with their own folders: images, storage and cache from the node configuration, nothing from the server."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from flwr.app import Context, Message, RecordDict
from test_inprocess_run import SMALL

from clients.caches import Owner, part
from clients.client_app import app as client_app
from clients.client_app import device_of
from experiments.engines.local import run_inprocess
from strategies.server_app import app as server_app
from tapfl.compute import HERE
from tapfl.config import RunConfig
from tapfl.data.federated import labels_among
from tapfl.data.images import ImageSet
from tapfl.data.sources import load_images
from tapfl.errors import ConfigError, DataError
from tapfl.options import parse_assignment
from tapfl.wire import Hello

NAMES = ("7", "5", "9")  # in the device's own order, and not all classes of the pool


def write_own(file: Path, names: tuple[str, ...] = NAMES, count: int = 60) -> ImageSet:
    digits = load_images("digits")
    chosen = np.flatnonzero(np.isin(digits.labels, [int(name) for name in NAMES]))[:count]
    labels = np.array([NAMES.index(str(label)) for label in digits.labels[chosen]])
    np.savez(file, images=digits.read(chosen), labels=labels, classes=np.array(names))
    return digits.subset(chosen)


@dataclass
class Nodes:
    """Device 1 has its own configuration; device 0 is as in a simulation."""

    own: dict[str, str]

    def __call__(self, message: Message, context: Context) -> Message:
        if context.node_config["partition-id"] == 1:
            context.node_config |= self.own
        return client_app(message, context)


def carry_out(folder: Path, own: dict[str, str], *options: str) -> dict[str, object]:
    settings = [*SMALL, "devices.count=2", "train.rounds=1", f"out={folder / 'run'}", f"cache={folder / 'cache'}"]
    config = RunConfig.from_flat(dict(map(parse_assignment, [*settings, *options])))
    run_inprocess(server_app, Nodes(own), config.flat(), 2)  # type: ignore[arg-type]
    summary: dict[str, object] = json.loads((folder / "run" / "summary.json").read_text())
    return summary


def test_a_node_uses_only_its_own_folders_and_trains_on_its_own_images(tmp_path: Path) -> None:
    node = tmp_path / "node"
    node.mkdir()
    write_own(node / "mine.npz")
    own = {"storage": str(node / "storage"), "cache": str(node / "cache"), "data": str(node / "mine.npz")}
    summary = carry_out(tmp_path, own, "pruning.send=weights")
    first, second = summary["devices"]
    assert (second["train_samples"], second["test_samples"], second["classes"]) == (42, 18, 3)
    assert {path.name for path in (tmp_path / "run" / "devices").iterdir()} == {"00"}
    kept = {path.name for path in (node / "storage").iterdir()}
    assert kept == {"pruned", "state", "personal", "alphas.json", "classes.json", "images.json", "source.json"}
    assert json.loads((node / "storage" / "classes.json").read_text()) == [str(digit) for digit in range(10)]
    images = json.loads((node / "storage" / "images.json").read_text())
    assert sum(images["train"]) == 42 and sum(images["test"]) == 18 and len(images["classes"]) == 10
    assert {name for name, count in zip(images["classes"], images["train"], strict=True) if count} == set(NAMES)
    (backbone,) = (node / "cache" / "backbones").iterdir()
    assert backbone.read_bytes() == (tmp_path / "cache" / "backbones" / backbone.name).read_bytes()
    for record in (first, second):
        assert record["bytes_down"]["weights"] > 4 * record["params"] and record["failures"] == 0


def test_a_node_with_a_storage_uses_no_folder_of_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = {"out": "/server/run", "cache": "/server/cache"}
    here = {"partition-id": 0, "num-partitions": 1}

    def device(**node: str) -> tuple[str, Path]:
        found = device_of(Context(1, 2, {**here, **node}, RecordDict(), dict(run)))
        return found.config.cache, found.storage.folder

    assert device() == ("/server/cache", Path("/server/run/devices/00"))
    assert device(storage="/node/storage") == ("", Path("/node/storage"))  # its cache is TAPFL_CACHE, or in its home
    assert device(storage="/node/storage", cache="/node/cache") == ("/node/cache", Path("/node/storage"))
    with pytest.raises(ConfigError, match=r"storage = 'here' of the node's configuration: must be an absolute path"):
        device(storage="here")


def test_classes_are_the_same_by_name(tmp_path: Path) -> None:
    digits = write_own(tmp_path / "mine.npz")
    mine = load_images(str(tmp_path / "mine.npz"))
    assert labels_among(digits.classes, mine, "mine.npz").tolist() == digits.labels.tolist()


def test_a_device_with_a_class_that_the_pool_lacks_fails_alone(tmp_path: Path) -> None:
    write_own(tmp_path / "mine.npz", names=("7", "five", "9"))
    own = {"storage": str(tmp_path / "storage"), "data": str(tmp_path / "mine.npz"), "cache": str(tmp_path / "own")}
    first, second = carry_out(tmp_path, own)["devices"]
    assert first["params"] > 0 and second["params"] == 0 and second["generic"]
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    lost = [line for line in lines if line["kind"] == "failure"]
    assert lost and all(line["device"] == 1 for line in lost)
    assert all("the public pool has no class five; it has 0, 1, 2" in line["reason"] for line in lost)


def test_only_a_simulation_knows_the_images_of_all_devices(tmp_path: Path) -> None:
    config = RunConfig.from_flat(dict(map(parse_assignment, [*SMALL, f"cache={tmp_path}"])))
    pooled = part(Owner(config, 4, 0), "pooled", (), HERE)
    each = [part(Owner(config, 4, i), "train", (), HERE) for i in range(4)]
    assert torch.equal(torch.cat(list(pooled.split(50))), torch.cat([one.batch(np.arange(len(one))) for one in each]))
    write_own(tmp_path / "mine.npz")
    node = {"partition-id": 0, "num-partitions": 1, "data": str(tmp_path / "mine.npz"), "storage": str(tmp_path)}
    device = device_of(Context(1, 2, node, RecordDict(), {"personalize.method": "pooled"}))
    with pytest.raises(ConfigError, match="'pooled': needs the images of all devices, which only a simulation has"):
        device._images.part("pooled")


def test_too_few_images_are_refused(tmp_path: Path) -> None:
    write_own(tmp_path / "mine.npz", count=6)
    node = {"partition-id": 0, "num-partitions": 1, "data": str(tmp_path / "mine.npz"), "storage": str(tmp_path)}
    device = device_of(Context(1, 2, node, RecordDict(), {}))
    with pytest.raises(DataError, match=r"training and .* test images, it needs 8 and 2: .* or more images"):
        device.hello(Hello("a1b2"))
