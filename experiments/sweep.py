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

A cell that has its `summary.json` is finished and is not run again; one that has not, or that has fewer rounds than are
wanted now, goes on from where it was. Cells that differ only in what comes after round zero share it: one of them
begins, the others find its summaries and plans in `round-zero/` and come to the same bits.
"""

from __future__ import annotations

import itertools
import logging
import shutil
import subprocess
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flwr.common.logger import log

from experiments.preflight import DEFAULT_DEVICES, absolute_paths, resolve_run
from experiments.run_log import own_log
from experiments.shared_round_zero import is_kept, keep, name_of, prepare
from strategies.records import require_same_options
from tapfl.config import RunConfig
from tapfl.errors import ConfigError, TapflError
from tapfl.options import flatten, read_toml_tables
from tapfl.progress import Advance
from tapfl.store import RunFolder

if TYPE_CHECKING:
    from experiments.engines.ray import ActorPool

LONGEST_NAME = 240  # bytes of a cell's name: file systems take 255, and its log's is longer
CarryOut = Callable[["Cell", Path, bool], str]


@dataclass(frozen=True)
class Cell:
    """One run of a sweep: where it differs from the others, and all of its options."""

    name: str
    point: dict[str, Any]
    options: dict[str, Any]


def read_sweep(file: Path, changes: Mapping[str, Any] | None = None) -> list[Cell]:
    """Returns the cells of a sweep.

    Args:
        changes: options above those that the file's cells share.

    Raises:
        ConfigError: if the grid or any cell is not valid, or if the cells differ in what is to be changed.
    """
    tables = read_toml_tables(file)
    tables.pop("sweep", None)  # how it is reported: `experiments.swept.settings`
    grid, runs = tables.pop("grid", {}), tables.pop("run", [])
    if not isinstance(grid, dict) or not all(isinstance(v, list) and v for v in grid.values()) or not (grid or runs):
        raise ConfigError(f"{file}: needs a table [grid] of options with a list of values each, or tables [[run]]")
    if not isinstance(runs, list) or not all(isinstance(run, dict) for run in runs):
        raise ConfigError(f"{file}: runs are tables [[run]], with two brackets")
    shared = flatten(tables) | dict(changes or {})
    own_options = {*grid, *(key for run in runs for key in flatten(run))}
    if fixed := sorted(own_options & {*(changes or {})}):
        raise ConfigError(f"--set {fixed[0]}: the runs of {file} differ in it; change it there")
    cells = []
    for run in runs or [{}]:
        name, own = run.pop("name", ""), flatten(run)
        for values in itertools.product(*grid.values()):
            crossed = dict(zip(grid, values, strict=True))
            point = ({"run": name} if name else own) | crossed
            cells.append(_cell(file, point, shared | own | crossed))
    if twice := [name for name, count in Counter(cell.name for cell in cells).items() if count > 1]:
        raise ConfigError(f"{file}: two runs are {twice[0]!r}; give them names of their own")
    return cells


def _cell(file: Path, point: dict[str, Any], options: dict[str, Any]) -> Cell:
    RunConfig.from_flat(options)
    name = " ".join(f"{key}={value}" for key, value in point.items()).replace("/", "-")
    if (size := len(name.encode())) > LONGEST_NAME:
        accepted = f"at most {LONGEST_NAME} are accepted; give a [[run]] a name, or cross fewer options"
        raise ConfigError(f"{file}: the run {name:.60}… would have a folder's name of {size} bytes, {accepted}")
    return Cell(name, point, options)


def run_sweep(cells: list[Cell], out: Path, carry_out: CarryOut, jobs: int, progress: Advance) -> dict[str, str]:
    """Runs the cells that are not finished, `jobs` at a time.

    Args:
        carry_out: runs one cell in a folder, from the start or from where it was; returns why it failed, if it did.

    Returns:
        By cell name, why each failed one did; all that it said is in ``NAME.log``.

    Raises:
        ConfigError: if a cell's run was begun under other options.
    """
    waiting = [cell for cell in cells if not _finished(cell, out)]
    out.mkdir(parents=True, exist_ok=True)
    alike: dict[str, list[Cell]] = {}
    for cell in waiting:
        alike.setdefault(name_of(_resolved(cell, out)), []).append(cell)
    failures: dict[str, str] = {}
    done = len(cells) - len(waiting)
    progress(done, len(cells))
    pool = ThreadPoolExecutor(jobs, thread_name_prefix="run")
    try:
        running: dict[Future[str], tuple[Cell, list[Cell]]] = {}
        for first, *others in alike.values():
            running[pool.submit(_go_on, carry_out, first, out)] = first, others
        while running:
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                cell, others = running.pop(future)
                for other in others:
                    running[pool.submit(_go_on, carry_out, other, out)] = other, []
                done += 1
                if error := future.result():
                    failures[cell.name] = error
                progress(done, len(cells), cell.name)
    finally:  # interrupted: what waits is not begun, and nobody waits for what has begun
        pool.shutdown(wait=False, cancel_futures=True)
    return failures


def _finished(cell: Cell, out: Path) -> bool:
    """Says whether a cell has all of its rounds. Raises ConfigError if its run was begun under other options."""
    folder = RunFolder(out / cell.name)
    if not (folder.path / "config.json").is_file():
        return False
    wanted = _resolved(cell, out)
    require_same_options(folder, wanted)
    return folder.summary.is_file() and folder.config()["train.rounds"] >= wanted.train.rounds


def _resolved(cell: Cell, out: Path) -> RunConfig:
    own = {"out": str(out / cell.name), "resume": True}
    return absolute_paths(RunConfig.from_flat({"devices.count": DEFAULT_DEVICES, **cell.options, **own}))


def _go_on(carry_out: CarryOut, cell: Cell, out: Path) -> str:
    folder, store, config = out / cell.name, out / "round-zero", _resolved(cell, out)
    begun = (folder / "config.json").is_file()
    if not begun:
        shutil.rmtree(folder, ignore_errors=True)
        if is_kept(config, store):
            prepare(folder, config, store)
            begun = True
    error = carry_out(cell, folder, begun)
    if not error:
        keep(folder, config, store)
    return error


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


def on_workers(workers: ActorPool, cell: Cell, folder: Path, begun: bool) -> str:
    """Carries a cell out in this thread, its devices on a pool that others use as well: a `CarryOut`, given a pool."""
    from strategies.server_app import app as server_app  # with torch: not before all cells are known to be good

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
