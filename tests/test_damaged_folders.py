"""Commands that read the folder of a run or pruned model that may be damaged or malicious: one line, or what is intact.

Nothing outside of the folder gets into a report, and nothing outside is written.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from test_damaged_run import a_bit, half, nested, pickled
from test_inprocess_run import tapfl
from typer.testing import CliRunner

from experiments import cli
from experiments.bench import latency
from experiments.figures.page import render
from experiments.report.reading import read_run
from experiments.report.single import page_of
from tapfl.errors import ConfigError, TapflError

Damage = Callable[[Path], None]


@pytest.fixture(scope="module")
def whole(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "whole"
    options = ["devices.count=2", "data.public-share=0.9", "train.rounds=1", "personalize.method=apfl"]
    assert tapfl("--out", str(folder), cache=cache, options=options).exit_code == 0
    return folder


@pytest.fixture
def run(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "run"))


def empty(file: Path) -> None:
    file.write_bytes(b"")


def not_utf8(file: Path) -> None:
    file.write_bytes(b"\xff\xfe" + file.read_bytes())


def a_link_to_itself(file: Path) -> None:
    file.unlink()
    file.symlink_to(file)


def a_link_out(file: Path) -> None:
    outside = file.parents[1] / "outside"
    shutil.move(file, outside)
    file.symlink_to(outside)


def with_value(*keys: Any, value: Any) -> Damage:
    """Returns a function that sets a value in a JSON file, or in the first line of that kind in metrics.jsonl."""

    def change(file: Path) -> None:
        first, *rest = keys
        if file.suffix == ".jsonl":
            lines = [json.loads(line) for line in file.read_text().splitlines()]
            content = next(line for line in lines if line["kind"] == first)
        else:
            content, rest = json.loads(file.read_text()), [first, *rest]
            lines = [content]
        for key in rest[:-1]:
            content = content[key]
        content[rest[-1]] = value
        file.write_text("\n".join(json.dumps(line) for line in lines) + "\n")

    return change


HUGE, ENDLESS, NO_WORD = 10**400, float("inf"), "\ud800"
REPORTED: list[tuple[str, Damage]] = [
    ("summary.json", half),
    ("summary.json", nested),
    ("summary.json", not_utf8),
    ("summary.json", a_link_to_itself),
    ("summary.json", with_value("devices", value={"device": 0})),
    ("summary.json", with_value("devices", 0, "device", value="../../x")),
    ("summary.json", with_value("devices", 0, "device", value=1)),
    ("summary.json", with_value("devices", 0, "macs", value=HUGE)),
    ("summary.json", with_value("devices", 0, "macs_share", value=0)),
    ("summary.json", with_value("devices", 0, "personal_accuracy", value=ENDLESS)),
    ("summary.json", with_value("devices", 0, "profile", value=None)),
    ("summary.json", with_value("devices", 0, "bytes_up", value=[1])),
    ("summary.json", with_value("devices", 0, "profile", "name", value=NO_WORD)),
    ("summary.json", with_value("seconds", value=7)),
    ("summary.json", with_value("simulated_seconds", value="x")),
    ("timing.json", nested),
    ("timing.json", with_value("rounds", value={"x": 1})),
    ("versions.json", with_value("torch", value=[NO_WORD])),
    ("metrics.jsonl", nested),
    ("metrics.jsonl", pickled),
    ("metrics.jsonl", with_value("round", "round", value=[1])),
    ("metrics.jsonl", with_value("round", "simulated_seconds", value=ENDLESS)),
    ("metrics.jsonl", with_value("traffic", "up", value={"x": "y"})),
    ("metrics.jsonl", with_value("device", "alpha", value=None)),
    ("plans/00.json", nested),
    ("plans/00.json", with_value("backbone", "args", "depth", value=60000)),
    ("plans/00.json", with_value("layers", value=[])),
    ("metric-sets/00.json", with_value("metric", 0, value=HUGE)),
    ("devices/00/images.json", with_value("classes", 0, value={"a": NO_WORD})),
]


@pytest.mark.parametrize(("name", "damage"), REPORTED)
def test_a_report_shows_what_is_intact(name: str, damage: Damage, run: Path) -> None:
    damage(run / name)
    found = read_run(run)
    assert found.missing or (name == "timing.json" and not found.timing.rounds)


@pytest.mark.parametrize("names", [("summary.json", "server"), ("plans", "metrics.jsonl", "devices", "versions.json")])
def test_a_damaged_run_has_a_page(names: tuple[str, ...], run: Path) -> None:
    for file in [file for name in names for file in [run / name, *(run / name).rglob("*")] if file.is_file()]:
        half(file)
    page = page_of(read_run(run))
    assert len(page.missing) >= 1 and "What this report cannot show" in render(page)


@pytest.mark.parametrize(
    "damage",
    [
        *(half, nested, pickled, empty, a_link_to_itself, a_link_out),
        with_value("train.rounds", value="x"),
        with_value("personalize.alpha", value=ENDLESS),
        with_value("data.source", value=NO_WORD),
    ],
)
def test_a_folder_that_is_not_a_run_has_no_report(damage: Damage, run: Path) -> None:
    damage(run / "config.json")
    before = sorted(run.rglob("*"))
    with pytest.raises(ConfigError, match=r"^report .*config\.json") as refused:
        read_run(run)
    assert "\n" not in str(refused.value) and sorted(run.rglob("*")) == before


@pytest.mark.parametrize("name", ["versions.json", "metrics.jsonl", "devices/00/images.json", "plans", "devices"])
def test_a_report_follows_no_link_out_of_the_folder(name: str, run: Path, tmp_path: Path) -> None:
    shutil.move(run / name, tmp_path / "outside")
    (run / name).symlink_to(tmp_path / "outside")
    assert any(name.partition("/")[0].removesuffix("s") in each for each in read_run(run).missing)


def test_no_picture_is_written_elsewhere(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("experiments.report.single.page_of", lambda run: pytest.fail("refused before it is drawn"))
    (tmp_path / "outside").mkdir()
    (run / "figures").symlink_to(tmp_path / "outside")
    said = CliRunner().invoke(cli.app, ["report", str(run)])
    assert isinstance(said.exception, ConfigError) and "is a symbolic link to a place outside" in str(said.exception)
    assert not list((tmp_path / "outside").iterdir()) and not (run / "report.html").exists()


PRUNED: list[tuple[str, Damage]] = [
    *((name, damage) for name in ("plan.json", "model.safetensors") for damage in (half, pickled, nested, empty)),
    ("plan.json", not_utf8),
    ("plan.json", a_link_to_itself),
    ("plan.json", with_value("backbone", "args", "depth", value=HUGE)),
    ("plan.json", with_value("layers", 0, "importance", value=ENDLESS)),
    ("plan.json", with_value("provenance", "seed", value=NO_WORD)),
    ("model.safetensors", a_bit),
    ("model.safetensors", a_link_to_itself),
    ("model.safetensors", lambda file: shutil.copy(file.with_name("plan.json"), file)),
]
COMMANDS = {
    "inspect": ["inspect", "{run}/devices/00"],
    "export": ["export", "{run}/devices/00", "--out", "{out}"],
    "gain": ["bench", "gain", "{run}", "--out", "{out}", "--repeats", "1"],
    "plan": ["prune", "--plan", "{run}/devices/00", "--set", "model.weights={run}/w.safetensors", "--out", "{out}"],
}


@pytest.mark.parametrize(
    ("name", "damage", "command"),
    [
        (*each, command)
        for each in PRUNED
        for command in COMMANDS
        if (each[0], command) != ("model.safetensors", "plan")
    ],
)
def test_a_pruned_model_that_is_damaged_is_refused(
    name: str, damage: Damage, command: str, run: Path, tmp_path: Path
) -> None:
    damage(run / "devices/00/pruned" / name)
    before = {file: file.lstat().st_mtime_ns for file in run.rglob("*")}
    arguments = [part.format(run=run, out=tmp_path / "out") for part in COMMANDS[command]]
    said = CliRunner().invoke(cli.app, arguments)
    assert isinstance(said.exception, TapflError), said.output
    assert "\n" not in str(said.exception) and name in str(said.exception)
    assert {file: file.lstat().st_mtime_ns for file in run.rglob("*")} == before
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("damage", [half, nested, not_utf8, empty])
def test_the_gain_of_a_folder_that_is_not_a_run_is_refused_before_measuring(
    damage: Damage, run: Path, tmp_path: Path
) -> None:
    damage(run / "config.json")
    said = CliRunner().invoke(cli.app, ["bench", "gain", str(run), "--out", str(tmp_path / "out")])
    assert isinstance(said.exception, ConfigError) and "config.json" in str(said.exception)


def test_another_folder_among_the_devices_is_ignored(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latency, "_onnx", lambda model, *_, **__: model)  # exporting takes seconds
    shutil.copytree(run / "devices/00", run / "devices/kept")
    said = CliRunner().invoke(cli.app, ["bench", "gain", str(run), "--repeats", "1", "--device", "0"])
    assert said.exit_code == 0, said.output
