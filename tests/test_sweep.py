"""A grid of federations: every cell a run of its own, finished ones kept, failures told."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
from test_inprocess_run import SMALL
from typer.testing import CliRunner

from experiments import cli
from experiments.sweep import read_sweep
from tapfl.errors import ConfigError, RunError


def sweep_file(tmp_path: Path, grid: str) -> Path:
    shared = {**dict(option.split("=", 1) for option in SMALL), "train.rounds": "1", "cache": str(tmp_path / "cache")}
    lines = [f'"{key}" = {value if value.isdigit() else json.dumps(value)}' for key, value in shared.items()]
    file = tmp_path / "sweep.toml"
    file.write_text("\n".join(lines) + f"\n[grid]\n{grid}\n")
    return file


def test_a_sweep_runs_each_cell_once_and_tells_what_failed(tmp_path: Path) -> None:
    file = sweep_file(tmp_path, '"personalize.method" = ["fedavg"]\n"devices.count" = [2, 400]\nseed = [0]')
    out = tmp_path / "out"

    def invoke() -> tuple[str, BaseException | None]:
        done = CliRunner().invoke(cli.app, ["sweep", "--config", str(file), "--out", str(out), "--jobs", "1", "--json"])
        return done.stdout, done.exception

    stdout, error = invoke()
    assert isinstance(error, RunError) and "1 of 2 runs failed" in str(error) and "devices.count = 400" in str(error)
    rows = [json.loads(line) for line in stdout.splitlines() if line.startswith("{")]
    assert [row["runs"] for row in rows] == ["1"] and rows[0]["devices.count"] == "2"
    with (out / "results.csv").open() as table:
        assert [row["devices.count"] for row in csv.DictReader(table)] == ["2"]
    (finished,) = [folder for folder in out.iterdir() if (folder / "summary.json").exists()]
    before = (finished / "summary.json").stat().st_mtime_ns
    invoke()
    assert (finished / "summary.json").stat().st_mtime_ns == before


@pytest.mark.parametrize("grid", ["", "seed = 3", "seed = []", '"train.roundz" = [1]', 'seed = ["x"]'])
def test_a_grid_that_is_not_one_is_refused(tmp_path: Path, grid: str) -> None:
    with pytest.raises(ConfigError):
        read_sweep(sweep_file(tmp_path, grid))
