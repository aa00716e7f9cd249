"""A run's folder that was truncated, edited, exchanged or written by someone else: it is refused with one line."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from killing import copied_after
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_inprocess_run import content, tapfl

from tapfl.errors import PlanError, RunError, TapflError
from tapfl.store import read_about, read_tensors, seal, unseal, write_tensors

OPTIONS = [
    "devices.count=2",
    "data.public-share=0.9",
    "personalize.held-out-share=0.1",
    "devices.budgets=0.5",
    "devices.ranks=4",
]
CHECKPOINT = "server/round-0001.safetensors"


MOMENTS = {
    "after the summaries": ("strategies.preparation", "Preparation._store_summary", 2),
    "after the first round": ("strategies.server_app", "save_checkpoint", 2),
}


@pytest.fixture(scope="module")
def whole(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run in which all devices have the same budget; next to it, in `killed`, what it was at the moments."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    with copied_after(MOMENTS, folder, folder.parent / "killed"):
        assert tapfl("--out", str(folder), cache=cache, options=OPTIONS).exit_code == 0
    return folder


@pytest.fixture
def run(whole: Path, tmp_path: Path) -> Path:
    """The files of a run that was killed after its first round."""
    return Path(shutil.copytree(whole.parent / "killed" / "after the first round", tmp_path / "run"))


@pytest.fixture
def resume(run: Path, cache: Path) -> Callable[[], tuple[int, str]]:
    """Resumes the run as the command does; returns the exit code and the last line."""

    def go_on() -> tuple[int, str]:
        try:
            return tapfl("--resume", str(run), cache=cache, options=OPTIONS).exit_code, ""
        except RunError as error:
            return 1, str(error)
        except TapflError as error:
            return 2, str(error)

    return go_on


def half(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def pickled(file: Path) -> None:
    file.write_bytes(pickle.dumps({"x": 1}))


def nested(file: Path) -> None:
    file.write_text("[" * 100_000)


def a_bit(file: Path) -> None:
    """Flips a bit in the last tensor's values; the file remains a valid file of tensors."""
    data = bytearray(file.read_bytes())
    data[-3] ^= 64
    file.write_bytes(bytes(data))


def a_folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


def other_units(file: Path) -> None:
    plan = json.loads(file.read_text())
    kept, units = plan["layers"][0]["kept"], plan["layers"][0]["units"]
    plan["layers"][0]["kept"] = sorted({*kept[1:], next(u for u in range(units) if u not in kept)})
    file.write_text(json.dumps(plan))


def other_units_signed(file: Path) -> None:
    other_units(file)
    plan = json.loads(file.read_text())
    del plan["checksum"], plan["sha256"]
    file.write_text(json.dumps(plan))


def of_another_device(file: Path) -> None:
    shutil.copy(file.with_name("01.json"), file)


def other_records(file: Path) -> None:
    """Edits the records: the tensors stay, and a device claims more images."""
    with safe_open(file, "pt") as opened:
        about = json.loads(opened.metadata()["checkpoint"])
    about["records"][0]["train_samples"] += 1
    save_file(load_file(file), file, {"checkpoint": json.dumps(about)})


DAMAGE = {
    "half the options": ("config.json", half, "is not a run's folder"),
    "pickled options": ("config.json", pickled, "is not a run's folder"),
    "nested options": ("config.json", nested, "is not a run's folder"),
    "half a checkpoint": (CHECKPOINT, half, "is not a complete safetensors file"),
    "a pickled checkpoint": (CHECKPOINT, pickled, "is not a complete safetensors file"),
    "a bit of a checkpoint": (CHECKPOINT, a_bit, "its checksum differs); without this file the run continues from"),
    "a checkpoint with other records": (CHECKPOINT, other_records, "its checksum differs"),
    "a checkpoint of another round": (
        CHECKPOINT,
        lambda file: file.rename(file.with_stem("round-0002")),
        "of round 1, not",
    ),
    "a folder for a checkpoint": (CHECKPOINT, a_folder, "cannot be read"),
    "half a plan": ("plans/00.json", half, "is not a plan"),
    "a pickled plan": ("plans/00.json", pickled, "is not a plan"),
    "a plan of other units": ("plans/00.json", other_units, "was edited or damaged"),
    "a plan of other units, from elsewhere": ("plans/00.json", other_units_signed, "is not the plan by which"),
    "another device's plan": ("plans/00.json", of_another_device, "is the plan of device 1, not of 0"),
    "no plan": ("plans/00.json", Path.unlink, "is missing"),
    "half the metrics": ("metrics.jsonl", half, "it was truncated since"),
    "no metrics": ("metrics.jsonl", Path.unlink, "it was truncated since"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_run_is_not_resumed_from_damaged_files(case: str, run: Path, resume: Callable[[], tuple[int, str]]) -> None:
    name, damage, reason = DAMAGE[case]
    damage(run / name)
    before = {file: file.read_bytes() for file in run.rglob("*") if file.is_file() and name != "config.json"}
    code, said = resume()
    assert code == 2 and "\n" not in said and reason in said and name.split("/")[0] in said
    kept = {"server", "plans", "state", "pruned", "summaries"}
    assert all(file.read_bytes() == data for file, data in before.items() if file.parent.name in kept)


def test_a_damaged_checkpoint_may_be_deleted(run: Path, whole: Path, resume: Callable[[], tuple[int, str]]) -> None:
    (run / CHECKPOINT).unlink()
    assert resume()[0] == 0
    assert content(run) == content(whole)


NO_LONGER_NEEDED: dict[str, Callable[[Path], None]] = {
    "timing.json": nested,
    "versions.json": pickled,
    "metric-sets/00.json": half,
    "summaries/00.safetensors": Path.unlink,
}


def test_damage_to_files_no_longer_needed_does_not_stop_a_run(
    run: Path, whole: Path, resume: Callable[[], tuple[int, str]]
) -> None:
    shutil.copy(whole / "timing.json", run / "timing.json")
    for name, damage in NO_LONGER_NEEDED.items():
        damage(run / name)
    assert resume()[0] == 0
    computed, again = (
        {file: data for file, data in content(folder).items() if file not in NO_LONGER_NEEDED}
        for folder in (whole, run)
    )
    assert again == computed


def of_device_0(file: Path) -> None:
    """The file is intact and fits, because all devices of this run have the same budget and rank."""
    first = Path(str(file).replace("devices/01", "devices/00"))
    shutil.copytree(first, file, dirs_exist_ok=True) if first.is_dir() else shutil.copy(first, file)


@pytest.mark.parametrize(
    ("name", "damage", "reason"),
    [
        pytest.param("state/round-0001.safetensors", a_bit, "its checksum differs", marks=pytest.mark.slow),
        ("state/round-0001.safetensors", of_device_0, "is that of device 0, not of device 1"),
        ("pruned", of_device_0, "is the model of device 0, not of 1"),
    ],
)
def test_a_device_with_damaged_storage_fails_and_is_named(
    name: str, damage: Callable[[Path], None], reason: str, run: Path, resume: Callable[[], tuple[int, str]]
) -> None:
    damage(run / "devices/01" / name)
    assert resume()[0] == 0
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    failures = [line for line in lines if line["kind"] == "failure"]
    assert {line["device"] for line in failures} == {1}
    assert all(reason in line["reason"] for line in failures)


def of_device_1(file: Path) -> None:
    shutil.copy(file.with_name("01.safetensors"), file)


@pytest.mark.parametrize("damages", [{"00": half, "01": a_bit}, {"00": of_device_1}])
def test_a_damaged_summary_is_requested_again(
    damages: dict[str, Callable[[Path], None]], whole: Path, cache: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(whole.parent / "killed" / "after the summaries", tmp_path / "run"))
    for device, damage in damages.items():
        damage(folder / "summaries" / f"{device}.safetensors")
    assert tapfl("--resume", str(folder), cache=cache, options=OPTIONS).exit_code == 0
    assert content(folder) == content(whole)


def test_weights_must_match_the_plan_they_were_written_with(cache: Path, tmp_path: Path) -> None:
    options, moment = [*OPTIONS, "pruning.send=weights"], ("strategies.preparation", "Preparation._plan", 2)
    with copied_after({"killed": moment}, tmp_path / "run", tmp_path / "copies"):
        assert tapfl("--out", str(tmp_path / "run"), cache=cache, options=options).exit_code == 0
    folder = tmp_path / "copies" / "killed"
    a_bit(folder / "plans" / "00.safetensors")
    with pytest.raises(PlanError, match=r"00\.safetensors: is not the file that 00\.json was written with"):
        tapfl("--resume", str(folder), cache=cache, options=options)


def test_a_sealed_file_that_was_changed_is_detected(tmp_path: Path) -> None:
    import torch

    tensors, file = {"x": torch.arange(3.0)}, tmp_path / "a.safetensors"
    write_tensors(file, tensors, {"about": seal({"n": 1.5, "ü": [None]}, tensors)})
    assert unseal(read_about(file)["about"], read_tensors(file), "a") == {"n": 1.5, "ü": [None]}
    assert unseal('{"n": 1}', tensors, "an older file") == {"n": 1}
    sealed = read_about(file)["about"]
    with pytest.raises(PlanError, match=r"a: is that of n 1\.5, not of n 2"):
        unseal(sealed, tensors, "a", n=2)
    assert unseal(sealed, tensors, "a", n=1.5, m=1)["n"] == 1.5
    for text, values in ((sealed, {"x": torch.arange(4.0)}), (sealed.replace("1.5", "1.6"), tensors)):
        with pytest.raises(PlanError, match="a: was changed or damaged"):
            unseal(text, values, "a")
    for text in ("", "[]", "[" * 100_000, "7"):
        with pytest.raises(PlanError, match="a: is damaged"):
            unseal(text, tensors, "a")
