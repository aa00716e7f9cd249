"""The sweeps in experiments/configs: each value along each axis runs once, with a tiny backbone and one round."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from test_inprocess_run import SMALL
from test_sweep import CONFIGS, in_threads

from experiments.sweep.grid import SweepRun, read_sweep
from tapfl.options import parse_assignment


def reduced(cell: SweepRun, cache: Path) -> SweepRun:
    """The cell with a tiny backbone and one round of two epochs; its point in the grid does not change."""
    small = dict(parse_assignment(option) for option in SMALL) | {"devices.count": 10}
    del small["data.public-share"]  # 40 devices need more private images than it leaves
    return replace(cell, options=small | cell.options | {"train.rounds": 1, "train.epochs": 2, "cache": str(cache)})


def one_of_each(cells: list[SweepRun]) -> list[SweepRun]:
    """Returns cells that together have every value of every axis except the seed."""
    seen: set[tuple[str, object]] = set()
    chosen = []
    for cell in cells:
        values = {item for item in cell.point.items() if item[0] != "seed"}
        if values - seen:
            chosen.append(cell)
            seen |= values
    return chosen


@pytest.mark.slow
@pytest.mark.parametrize("name", ["criteria", "partitions", "devices", "rules", "methods"])
def test_a_ready_sweep_runs(name: str, tmp_path: Path) -> None:
    cells = [reduced(cell, tmp_path / "cache") for cell in one_of_each(read_sweep(CONFIGS / f"{name}.toml")[0])]
    failures = in_threads(cells, tmp_path / "out", 1)
    assert len(cells) > 3 and not failures
    assert all((tmp_path / "out" / cell.name / "summary.json").is_file() for cell in cells)
