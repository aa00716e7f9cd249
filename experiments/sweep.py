"""Many federations: a grid of options, each cell a complete run folder, one table of results.

A sweep's TOML has a table `[grid]`, whose lists are crossed, and the options that all cells share:

```toml
[grid]
"personalize.method" = ["apfl", "fedavg", "local"]
seed = [0, 1, 2]

[train]
rounds = 10
```

A cell that has its `summary.json` is finished and is not run again; one that has not goes on from where it was.
"""

from __future__ import annotations

import csv
import itertools
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tapfl.config import RunConfig, flatten, read_toml_tables
from tapfl.errors import ConfigError, RunError

MEASURES = (
    "dense_accuracy",
    "pruned_accuracy",
    "global_accuracy",
    "personal_accuracy",
    "personal_accuracy_worst_decile",
    "bytes_up",
)


@dataclass(frozen=True)
class Cell:
    """One run of a sweep: where it differs from the others, and all of its options."""

    name: str
    point: dict[str, Any]
    options: dict[str, Any]


def read_sweep(file: Path) -> list[Cell]:
    """Returns the cells of a sweep. Raises ConfigError if the grid or any cell is not valid."""
    tables = read_toml_tables(file)
    grid = tables.pop("grid", None)
    if not isinstance(grid, dict) or not grid or not all(isinstance(v, list) and v for v in grid.values()):
        raise ConfigError(f"{file}: needs a table [grid] of options with a list of values each")
    shared = flatten(tables)
    cells = []
    for values in itertools.product(*grid.values()):
        point = dict(zip(grid, values, strict=True))
        RunConfig.from_flat(shared | point)
        name = " ".join(f"{key}={value}" for key, value in point.items()).replace("/", "-")
        cells.append(Cell(name, point, shared | point))
    return cells


def run_sweep(
    cells: list[Cell], out: Path, engine: str, jobs: int, progress: Callable[[int, int, str], None]
) -> dict[str, str]:
    """Runs the cells that are not finished, `jobs` at a time, each as a process of its own.

    Returns:
        By cell name, the last line of what each failed one said; its whole output is in ``NAME.log``.
    """
    out.mkdir(parents=True, exist_ok=True)
    waiting = [cell for cell in cells if not (out / cell.name / "summary.json").is_file()]
    failures: dict[str, str] = {}
    done = len(cells) - len(waiting)
    progress(done, len(cells), "")
    with ThreadPoolExecutor(jobs) as pool:
        futures = {pool.submit(_run, cell, out, engine): cell for cell in waiting}
        for future in as_completed(futures):
            done += 1
            if error := future.result():
                failures[futures[future].name] = error
            progress(done, len(cells), futures[future].name)
    return failures


def _run(cell: Cell, out: Path, engine: str) -> str:
    folder = out / cell.name
    begun = (folder / "config.json").is_file()
    if not begun:
        shutil.rmtree(folder, ignore_errors=True)
    sets = [part for key, value in cell.options.items() for part in ("--set", f"{key}={value}")]
    command = [sys.executable, "-m", "experiments.cli", "run", "--engine", engine, "--json"]
    command += ["--resume" if begun else "--out", str(folder)]
    command += sets
    finished = subprocess.run(command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    if finished.returncode == 0:
        return ""
    (out / f"{cell.name}.log").write_text(finished.stdout + finished.stderr)
    return (finished.stderr.strip().splitlines() or [f"exit code {finished.returncode}"])[-1]


def write_results(cells: list[Cell], out: Path) -> Path:
    """Writes `results.csv`, a line a finished cell, and returns its path. Raises RunError if no cell is finished."""
    rows = [cell.point | _measures(out / cell.name) for cell in cells if (out / cell.name / "summary.json").is_file()]
    if not rows:
        raise RunError(f"no run of the sweep in {out} came to its end")
    path = out / "results.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def _measures(folder: Path) -> dict[str, float]:
    summary = json.loads((folder / "summary.json").read_text())
    return {name: summary[name] for name in MEASURES}


def means_over_seeds(cells: list[Cell], out: Path) -> list[Mapping[str, str]]:
    """Returns a row for each point of the grid without its seed: mean ± sample standard deviation of every measure."""
    groups: dict[tuple[tuple[str, Any], ...], list[dict[str, float]]] = {}
    for cell in cells:
        if (out / cell.name / "summary.json").is_file():
            point = tuple((key, value) for key, value in cell.point.items() if key != "seed")
            groups.setdefault(point, []).append(_measures(out / cell.name))
    rows: list[Mapping[str, str]] = []
    for point, found in groups.items():
        row = {key: str(value) for key, value in point} | {"runs": str(len(found))}
        for name in MEASURES:
            values = np.array([measures[name] for measures in found])
            spread = values.std(ddof=1) if len(values) > 1 else 0.0
            row[name.replace("_accuracy", "")] = (
                f"{values.mean() / 1e6:.2f} MB" if name.startswith("bytes") else f"{values.mean():.3f} ± {spread:.3f}"
            )
        rows.append(row)
    return rows
