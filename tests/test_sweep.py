"""Sweeps: every cell is a run, finished runs are not repeated, failures are reported."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
from contextlib import closing, suppress
from pathlib import Path

import pytest
from test_inprocess_run import SMALL
from test_search import running, until
from typer.testing import CliRunner

from experiments import cli
from experiments.jobs.federation import in_process
from experiments.jobs.pool import ThreadPool
from experiments.sweep.grid import (
    SweepOptions,
    SweepRun,
    group_of,
    read_sweep,
    run_sweep,
)
from experiments.sweep.results import means_over_seeds, outcomes
from tapfl.config import METHODS, RULES, RunConfig
from tapfl.errors import ConfigError, RunError
from tapfl.options import read_toml
from tapfl.pruning.criteria.registry import criterion_names


def sweep_file(tmp_path: Path, grid: str, *options: str) -> Path:
    shared = {
        **dict(option.split("=", 1) for option in [*SMALL, *options]),
        "train.rounds": "1",
        "cache": str(tmp_path / "cache"),
    }
    lines = [f'"{key}" = {value if value.isdigit() else json.dumps(value)}' for key, value in shared.items()]
    file = tmp_path / "sweep.toml"
    file.write_text("\n".join(lines) + f"\n[grid]\n{grid}\n")
    return file


@pytest.mark.slow
def test_a_sweep_runs_each_cell_once_and_reports_failures(tmp_path: Path) -> None:
    file = sweep_file(tmp_path, '"personalize.method" = ["fedavg"]\n"devices.count" = [2, 400]\nseed = [0]')
    out = tmp_path / "out"

    def invoke() -> tuple[str, BaseException | None]:
        done = CliRunner().invoke(
            cli.app,
            ["sweep", "--config", str(file), "--out", str(out), "--engine", "inprocess", "--jobs", "1", "--json"],
        )
        return done.stdout, done.exception

    stdout, error = invoke()
    assert isinstance(error, RunError) and "1 of 2 runs failed" in str(error) and "devices.count = 400" in str(error)
    rows = [json.loads(line) for line in stdout.splitlines() if line.startswith("{")]
    assert [row["runs"] for row in rows] == ["1"] and rows[0]["devices.count"] == "2"
    with (out / "results.csv").open() as table:
        assert [row["devices.count"] for row in csv.DictReader(table)] == ["2"]
    assert f"`tapfl sweep --config …/{file.name} --out DIR`; seed 0" in (out / "table.md").read_text()
    assert (out / "devices.csv").is_file() and (out / "learning-curves.png").is_file()
    (finished,) = [folder for folder in out.iterdir() if (folder / "summary.json").exists()]
    assert not (finished / "report.html").exists()  # a sweep writes no report for each run
    before = (finished / "summary.json").stat().st_mtime_ns
    invoke()
    assert (finished / "summary.json").stat().st_mtime_ns == before


def test_runs_share_a_warm_pool_and_their_logs_do_not_mix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two runs at a time in one process; one of them fails alone."""
    file = sweep_file(tmp_path, '"personalize.method" = ["fedavg", "local"]\n"devices.count" = [2, 400]')
    cells, out = read_sweep(file)[0], tmp_path / "out"
    failures = in_threads(cells, out)
    assert sorted(failures) == [f"personalize.method={method} devices.count=400" for method in ("fedavg", "local")]
    assert all("devices.count = 400" in error for error in failures.values())
    for method in ("fedavg", "local"):
        said = (out / f"personalize.method={method} devices.count=2.log").read_text()
        assert f"{method} devices.count=2" in said.splitlines()[-1]
        assert said.count("mean personal accuracy") == 1
    assert len(means_over_seeds(outcomes(cells, out), SweepOptions())) == 2


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("command", ["sweep", "compare"])
def test_an_interrupted_command_leaves_no_process(command: str, number: int, tmp_path: Path) -> None:
    file, more = sweep_file(tmp_path, "seed = [0, 1]"), ["--set", "train.rounds=300"]
    if command == "compare":
        axes = '[compare]\ncriterion = ["tap+", "updp"]\ndevice = [0, 1]'
        text = file.read_text().replace("[grid]", axes)
        file.write_text(text.replace('"pruning.criterion" = "tap"\n', ""))  # an axis is not also an option
        more = []
    arguments = ["-m", "experiments.cli", command, "--config", str(file), "--out", str(tmp_path / "out"), "--jobs", "2"]
    working = subprocess.Popen(
        [sys.executable, *arguments, *more], stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        until(lambda: len(running(working.pid)) >= 4 or working.poll() is not None)  # itself, a tracker, two workers
        assert working.poll() is None, working.communicate()[1]
        (os.killpg if number == signal.SIGINT else os.kill)(working.pid, number)
        _, printed = working.communicate(timeout=60)
        assert working.returncode == 130 and printed.endswith("tapfl: interrupted; continue with: the same command\n")
        until(lambda: not running(working.pid), 30)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(working.pid, signal.SIGKILL)


def in_threads(runs: list[SweepRun], out: Path, jobs: int = 2) -> dict[str, str]:
    """Runs a sweep in this process, because starting worker processes takes seconds."""
    with closing(ThreadPool(jobs)) as pool:
        return run_sweep(runs, out, pool, in_process, lambda *_: None)


def test_a_sweep_in_which_every_run_fails_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from experiments.sweep import grid

    monkeypatch.setattr(grid, "run_sweep", lambda runs, *_: {run.name: "no images" for run in runs})
    file = sweep_file(tmp_path, "seed = [0, 1]")
    done = CliRunner().invoke(cli.app, ["sweep", "--config", str(file), "--out", str(tmp_path / "out"), "--jobs", "1"])
    assert isinstance(done.exception, RunError) and "2 of 2 runs failed" in str(done.exception)
    assert "seed=1: no images" in str(done.exception)


def test_a_run_with_too_long_a_name_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "sweep.toml"
    numbers = [f'"{key}" = {value}' for key, value in RunConfig().flat().items() if type(value) is float]
    file.write_text("\n".join(["[[run]]", *numbers]))
    with pytest.raises(ConfigError, match=r"the folder of run .* has \d+ bytes; accepted: at most 240; give a"):
        read_sweep(file)
    file.write_text(file.read_text().replace("[[run]]", '[[run]]\nname = "mine"'))
    assert [cell.name for cell in read_sweep(file)[0]] == ["run=mine"]


def test_runs_of_a_list_are_crossed_with_the_grid(tmp_path: Path) -> None:
    file = sweep_file(tmp_path, 'seed = [0, 1]\n[[run]]\nname = "a"\ntrain.epochs = 2\n[[run]]\nadapters.rule = "ffa"')
    cells = read_sweep(file)[0]
    assert [cell.name for cell in cells] == [
        "run=a seed=0",
        "run=a seed=1",
        "adapters.rule=ffa seed=0",
        "adapters.rule=ffa seed=1",
    ]
    assert cells[0].options["train.epochs"] == 2 and cells[2].options["adapters.rule"] == "ffa"


@pytest.mark.parametrize(
    "grid",
    [
        "",
        '[[run]]\nname = "a"\n[[run]]\nname = "a"',
        "[run]\nseed = 1",
        "seed = 3",
        "seed = []",
        '"train.roundz" = [1]',
        'seed = ["x"]',
        'out = ["a", "b"]',
        '"pruning.criterion" = ["tapp"]',
    ],
)
def test_an_invalid_grid_is_refused(tmp_path: Path, grid: str) -> None:
    with pytest.raises(ConfigError):
        read_sweep(sweep_file(tmp_path, grid))


def test_a_reference_without_a_value_is_refused(tmp_path: Path) -> None:
    file = sweep_file(tmp_path, "seed = [0, 1]")
    sweep = ["sweep", "--config", str(file), "--out", str(tmp_path / "out"), "--reference", "local"]
    done = CliRunner().invoke(cli.app, sweep)
    assert done.exit_code == 2 and "Invalid value for '--reference': 'local' must have the" in done.stderr


@pytest.mark.parametrize(
    "grid", ["[[run]]", '[[run]]\nname = ""\n[[run]]\ntrain.epochs = 3', "seed = [0]\n[[run]]", '"privacy" = [{}]']
)
def test_a_run_without_options_needs_a_name(tmp_path: Path, grid: str) -> None:
    with pytest.raises(
        ConfigError, match=r"sweep\.toml: a run without options needs a name; accepted: \[\[run\]\] with"
    ):
        read_sweep(sweep_file(tmp_path, grid))
    names = [run.name for run in read_sweep(sweep_file(tmp_path, '[[run]]\nname = "a"\n[[run]]\ntrain.epochs = 3'))[0]]
    assert names == ["run=a", "train.epochs=3"]


def test_a_folder_that_is_not_a_run_s_is_refused_and_kept(tmp_path: Path) -> None:
    file = sweep_file(tmp_path, "seed = [0]")
    (run,), _ = read_sweep(file)
    mine = tmp_path / "out" / run.name / "mine.txt"
    mine.parent.mkdir(parents=True)
    mine.write_text("kept")
    failures = in_threads([run], tmp_path / "out")
    assert "has no config.json, so it is not a run's folder; accepted: an empty folder" in failures[run.name]
    assert mine.read_text() == "kept"


def test_values_of_the_grid_may_be_lists_and_tables_as_in_a_run(tmp_path: Path) -> None:
    budgets = '"devices.budgets" = [[0.3, 0.5, 0.6], [0.5, 0.7, 0.8]]'
    file = sweep_file(tmp_path, f"{budgets}\ntrain = [{{ epochs = 2 }}, {{ epochs = 3, batch = 4 }}]")
    runs, _ = read_sweep(file)
    assert [run.name for run in runs][:2] == [
        "devices.budgets=0.3,0.5,0.6 train.epochs=2",
        "devices.budgets=0.3,0.5,0.6 train.epochs=3 train.batch=4",
    ]
    assert len({group_of(run.point) for run in runs}) == 4
    with pytest.raises(ConfigError, match=r"--set train\.batch: the runs of .* differ in this option"):
        read_sweep(file, {"train.batch": 8})


def test_an_option_cannot_be_both_in_the_grid_and_in_a_run(tmp_path: Path) -> None:
    file = sweep_file(tmp_path, '"train.epochs" = [1, 2]\n[[run]]\nname = "a"\n[[run]]\ntrain.epochs = 3')
    with pytest.raises(ConfigError, match=r"sweep\.toml: train\.epochs = 3 in \[\[run\]\], .* in \[grid\]; accepted"):
        read_sweep(file)


CONFIGS = Path(cli.__file__).parent / "configs"


@pytest.mark.parametrize(
    ("file", "option", "values"),
    [
        ("criteria", "pruning.criterion", criterion_names()),
        ("rules", "adapters.rule", RULES),
        # local and pooled are references there
        ("methods", "personalize.method", [name for name in METHODS if name not in ("local", "pooled")]),
        ("partitions", "data.partition", ["pathological", "class-blocks", "dirichlet", "iid", "shard"]),
    ],
)
def test_the_ready_sweeps_leave_nothing_out(file: str, option: str, values: list[str]) -> None:
    assert {cell.options[option] for cell in read_sweep(CONFIGS / f"{file}.toml")[0]} == set(values)


def test_the_ready_run_for_gains_is_valid() -> None:
    config = RunConfig.from_flat(read_toml(CONFIGS / "evidence-gain.toml"))
    assert config.devices.count == len(config.devices.budgets) == 3


def test_the_ready_sweep_of_devices() -> None:
    counts = {cell.options["devices.count"] for cell in read_sweep(CONFIGS / "devices.toml")[0]}
    assert min(counts) <= 5 and max(counts) >= 40
