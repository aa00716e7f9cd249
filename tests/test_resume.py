"""A run that was killed at any moment and resumed ends with the same bits as an uninterrupted one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from killing import copied_after, killed_after
from representatives import some_slow
from test_inprocess_run import THREE, content, tapfl

from clients.device import Device
from strategies.preparation import Preparation
from tapfl.errors import RunError
from tapfl.wire import Summarize, SummaryReply

OPTIONS = [
    "train.rounds=3",
    *THREE,
    "devices.participation=0.75",
    "devices.profiles=tiers",
    "adapters.server=adam",
    "adapters.start=metric-sets",
    "adapters.start-learning-rate=1e-4",
    "adapters.start-steps=4",
]

MOMENTS = {
    "while the devices sum up": ("clients.device", "Device.summarize", 2),
    "when a summary is kept": ("strategies.preparation", "Preparation._store_summary", 2),
    "while plans are made": ("strategies.preparation", "Preparation._plan", 2),
    "after the warm start": ("strategies.global_adapters", "write_sealed", 1),
    "before the first round": ("strategies.server_app", "save_checkpoint", 1),
    "when a device has kept its state": ("clients.storage", "DeviceStorage.save_state", 2),
    "in the second round": ("clients.storage", "DeviceStorage.save_state", 3),
    "between a round and its checkpoint": ("strategies.server_app", "Federation.aggregate", 2),
    "after the last round": ("strategies.server_app", "save_checkpoint", 4),
    "in the last evaluation": ("clients.device", "Device.evaluate", 2),
}
SLOW = {"while the devices sum up", "before the first round", "when a device has kept its state", "in the second round"}


@pytest.fixture(scope="module")
def uninterrupted(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run; next to it, in `killed`, the files that it would have left if killed at each of the moments."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    with copied_after(MOMENTS, folder, folder.parent / "killed"):
        done = tapfl("--out", str(folder), cache=cache, options=OPTIONS)
    assert done.exit_code == 0, done.output
    return folder


@pytest.mark.parametrize("moment", some_slow(MOMENTS, SLOW))
def test_a_killed_and_resumed_run_equals_an_uninterrupted_one(
    moment: str, uninterrupted: Path, cache: Path, tmp_path: Path
) -> None:
    folder = copy_of(uninterrupted, moment, tmp_path)
    assert not (folder / "summary.json").exists()
    done = tapfl("--resume", str(folder), cache=cache, options=OPTIONS)
    assert done.exit_code == 0, done.output
    assert content(folder) == content(uninterrupted)
    assert measures(folder) == measures(uninterrupted)


def copy_of(uninterrupted: Path, moment: str, folder: Path) -> Path:
    """Returns a run that was killed at the moment."""
    return Path(shutil.copytree(uninterrupted.parent / "killed" / moment, folder / "run"))


def test_killed_twice(uninterrupted: Path, cache: Path, tmp_path: Path) -> None:
    """The second time by a real signal."""
    folder = copy_of(uninterrupted, "after the warm start", tmp_path)
    killed_after(MOMENTS["in the second round"], "--resume", str(folder), cache=cache, options=OPTIONS)
    assert tapfl("--resume", str(folder), cache=cache, options=OPTIONS).exit_code == 0
    assert content(folder) == content(uninterrupted)


def test_a_device_that_sends_its_mixture_only_after_a_stop_gets_a_plan_of_its_own(
    uninterrupted: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not the generic plan that was stored before the stop, and the warm start is trained anew."""
    folder, summarize = tmp_path / "run", Device.summarize

    def fails(device: Device, message: Summarize) -> SummaryReply:
        if device.partition_id == 1:
            raise RunError("no mixture")
        return summarize(device, message)

    def stops(*_: object) -> None:
        raise RunError("stopped")

    with monkeypatch.context() as patched:
        patched.setattr(Device, "summarize", fails)
        patched.setattr(Preparation, "surgery", stops)
        with pytest.raises(RunError, match="stopped"):
            tapfl("--out", str(folder), cache=cache, options=OPTIONS)
    generic = (folder / "plans" / "01.json").read_bytes()
    done = tapfl("--resume", str(folder), cache=cache, options=OPTIONS)
    assert done.exit_code == 0, done.output
    assert (folder / "plans" / "01.json").read_bytes() != generic
    assert content(folder) == content(uninterrupted) and measures(folder) == measures(uninterrupted)


def test_a_run_may_be_continued_for_more_rounds(uninterrupted: Path, cache: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shorter = [*OPTIONS[1:], "train.rounds=1"]
    assert tapfl("--out", str(folder), cache=cache, options=shorter).exit_code == 0
    done = tapfl("--resume", str(folder), cache=cache, options=OPTIONS)
    assert done.exit_code == 0, done.output
    assert content(folder) == content(uninterrupted)


def test_a_finished_run_is_not_changed(uninterrupted: Path, cache: Path) -> None:
    before = {file: file.stat().st_mtime_ns for file in uninterrupted.rglob("*") if file.is_file()}
    done = tapfl("--resume", str(uninterrupted), "--json", cache=cache, options=OPTIONS)
    assert done.exit_code == 0 and json.loads(done.stdout.splitlines()[-1])["devices"] == 3
    after = {file: file.stat().st_mtime_ns for file in uninterrupted.rglob("*") if file.is_file()}
    assert {f: t for f, t in before.items() if f.name != ".lock"} == {
        f: t for f, t in after.items() if f.name != ".lock"
    }


def measures(folder: Path) -> dict[str, Any]:
    """Returns the summary without times."""
    summary: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    return {name: value for name, value in summary.items() if name != "seconds"}
