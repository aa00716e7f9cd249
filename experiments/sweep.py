"""Many federations: a grid or a list of options, each cell a complete run folder, one table of results.

A sweep's TOML has a table `[grid]`, whose lists are crossed, tables `[[run]]`, each of which is crossed with the grid,
or both; and the options that all cells share. A `[[run]]` may have a `name`, under which it is tabulated.

```toml
[grid]
"personalize.method" = ["apfl", "fedavg", "local"]
seed = [0, 1, 2]

[[run]]
name = "plain"

[[run]]
name = "with DP"
privacy = { dp-clip = 1.0, dp-noise = 1.0 }

[train]
rounds = 10
```

A cell that has its `summary.json` is finished and is not run again; one that has not goes on from where it was.
"""

from __future__ import annotations

import csv
import itertools
import json
import logging
import shutil
import subprocess
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from flwr.common.logger import log

from experiments.engines.ray import Workers
from experiments.preflight import resolve_run
from experiments.run_log import own_log
from strategies.server_app import app as server_app
from tapfl.config import RunConfig, flatten, read_toml_tables
from tapfl.errors import ConfigError, RunError, TapflError

MEASURES = (
    "dense_accuracy",
    "pruned_accuracy",
    "global_accuracy",
    "personal_accuracy",
    "personal_accuracy_worst_decile",
    "bytes_up",
)


CarryOut = Callable[["Cell", Path, bool], str]


@dataclass(frozen=True)
class Cell:
    """One run of a sweep: where it differs from the others, and all of its options."""

    name: str
    point: dict[str, Any]
    options: dict[str, Any]


def read_sweep(file: Path) -> list[Cell]:
    """Returns the cells of a sweep. Raises ConfigError if the grid or any cell is not valid."""
    tables = read_toml_tables(file)
    grid, runs = tables.pop("grid", {}), tables.pop("run", [])
    if not isinstance(grid, dict) or not all(isinstance(v, list) and v for v in grid.values()) or not (grid or runs):
        raise ConfigError(f"{file}: needs a table [grid] of options with a list of values each, or tables [[run]]")
    if not isinstance(runs, list) or not all(isinstance(run, dict) for run in runs):
        raise ConfigError(f"{file}: runs are tables [[run]], with two brackets")
    shared = flatten(tables)
    cells = []
    for run in runs or [{}]:
        name, own = run.pop("name", ""), flatten(run)
        for values in itertools.product(*grid.values()):
            crossed = dict(zip(grid, values, strict=True))
            point = ({"run": name} if name else own) | crossed
            cells.append(_cell(point, shared | own | crossed))
    if twice := [name for name, count in Counter(cell.name for cell in cells).items() if count > 1]:
        raise ConfigError(f"{file}: two runs are {twice[0]!r}; give them names of their own")
    return cells


def _cell(point: dict[str, Any], options: dict[str, Any]) -> Cell:
    RunConfig.from_flat(options)
    name = " ".join(f"{key}={value}" for key, value in point.items()).replace("/", "-")
    return Cell(name, point, options)


def run_sweep(
    cells: list[Cell], out: Path, carry_out: CarryOut, jobs: int, progress: Callable[[int, str], None]
) -> dict[str, str]:
    """Runs the cells that are not finished, `jobs` at a time.

    Args:
        carry_out: runs one cell in a folder, from the start or from where it was; returns why it failed, if it did.

    Returns:
        By cell name, why each failed one did; all that it said is in ``NAME.log``.
    """
    out.mkdir(parents=True, exist_ok=True)
    waiting = [cell for cell in cells if not (out / cell.name / "summary.json").is_file()]
    failures: dict[str, str] = {}
    done = len(cells) - len(waiting)
    progress(done, "")
    pool = ThreadPoolExecutor(jobs, thread_name_prefix="run")
    try:
        futures = {pool.submit(_go_on, carry_out, cell, out / cell.name): cell for cell in waiting}
        for future in as_completed(futures):
            done += 1
            if error := future.result():
                failures[futures[future].name] = error
            progress(done, futures[future].name)
    finally:  # interrupted: what waits is not begun, and nobody waits for what has begun
        pool.shutdown(wait=False, cancel_futures=True)
    return failures


def _go_on(carry_out: CarryOut, cell: Cell, folder: Path) -> str:
    begun = (folder / "config.json").is_file()
    if not begun:
        shutil.rmtree(folder, ignore_errors=True)
    return carry_out(cell, folder, begun)


def as_process(engine: str, workers: int, cell: Cell, folder: Path, begun: bool) -> str:
    """Carries a cell out as a process of its own: a `CarryOut`, given an engine."""
    sets = [part for key, value in cell.options.items() for part in ("--set", f"{key}={value}")]
    command = [sys.executable, "-m", "experiments.cli", "run", "--engine", engine, "--workers", str(workers)]
    command += ["--json", "--no-report"]
    command += ["--resume" if begun else "--out", str(folder)]
    command += sets
    finished = subprocess.run(command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    if finished.returncode == 0:
        return ""
    _log(folder).write_text(finished.stdout + finished.stderr)
    return (finished.stderr.strip().splitlines() or [f"exit code {finished.returncode}"])[-1]


def on_workers(workers: Workers, cell: Cell, folder: Path, begun: bool) -> str:
    """Carries a cell out in this thread, its devices on a pool that others use as well: a `CarryOut`, given a pool."""
    with own_log(_log(folder)):
        try:
            config = resolve_run(cell.options, folder, begun)
            workers.run(server_app, config.flat(), config.devices.count)
        except TapflError as error:
            log(logging.ERROR, "%s", error)
            return f"tapfl: {error}"
        except Exception as error:
            log(logging.ERROR, "%s", traceback.format_exc())
            return f"{type(error).__name__}: {error}"
    return ""


def _log(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.log")


def write_results(cells: list[Cell], out: Path) -> Path:
    """Writes `results.csv`, a line a finished cell, and returns its path. Raises RunError if no cell is finished."""
    rows = [cell.point | _measures(out / cell.name) for cell in cells if (out / cell.name / "summary.json").is_file()]
    if not rows:
        raise RunError(f"no run of the sweep in {out} came to its end")
    path = out / "results.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=_columns(rows))
        writer.writeheader()
        writer.writerows(rows)
    return path


def _columns(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Where runs differ in other options than others do, the columns are those of all; measures come last."""
    return [*dict.fromkeys(key for row in rows for key in row if key not in MEASURES), *MEASURES]


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
    columns = dict.fromkeys(key for row in rows for key in row if key in {k for cell in cells for k in cell.point})
    return [{**dict.fromkeys(columns, ""), **row} for row in rows]
