"""Runs the cells of a comparison, several devices at a time, and writes each as a line of `results.csv`.

A cell that has a line is finished and is not repeated, so that a comparison that was killed can be continued.
"""

from __future__ import annotations

import csv
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import closing
from functools import cache
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

from experiments.compare.cells import CellRunner, Row, scenario_of
from experiments.compare.folder import origin_of, read_origin, require_same, write_origin
from experiments.compare.grid import Cell, Comparison
from experiments.compare.scenario import Scenario
from experiments.jobs.pool import LOOK, Emit, Job, ProcessPool
from experiments.output import as_csv
from tapfl.errors import ConfigError
from tapfl.models.backbone import build, spec_of
from tapfl.models.dense import layers_of
from tapfl.progress import Advance
from tapfl.store import write_bytes

FILE = "results.csv"
Key = tuple[str, ...]  # a cell's values along the axes


def run_comparison(comparison: Comparison, out: Path, progress: Advance, jobs: int = 1) -> list[Row]:
    """Runs the cells that are not finished, and returns the rows of all cells in the order of the grid.

    If a criterion cannot meet a budget, or criterion, backbone or pool do not support an option of pruning, the row has
    no measures but the reason in ``refused``. Except for the seconds, a row does not depend on the number of jobs.
    Finished cells that are no longer part of the comparison stay at the end of the file.

    Raises:
        ConfigError: if `out` has a comparison with other axes, measures, options, images or weights.
        ModelError: if a backbone is unknown or cannot be pruned; then nothing is written.
    """
    path, origin, finished = out / FILE, origin_of(comparison), _read(out / FILE, comparison)
    cells = {_key(comparison, cell.point): cell for cell in comparison.cells()}
    if finished:
        origin = require_same(read_origin(out), origin, out)
    waiting = [cell for key, cell in cells.items() if key not in finished]
    if waiting:
        for options in {cell.config.model: None for cell in waiting}:
            layers_of(build(spec_of(options, ("any",))), options)  # refused before anything is written
        write_origin(out, origin.measured_now())
    before, done = "finished before" if len(waiting) < len(cells) else "", len(cells) - len(waiting)
    progress(done, len(cells), before)
    for row in _rows(waiting, jobs, "rank" in comparison.results.measures):
        key = _key(comparison, row)
        done += key not in finished  # a worker that died may have finished it before
        finished.setdefault(key, row)
        _write(path, cells, finished, comparison)
        progress(done, len(cells), f"device {row['device']} {row['criterion']} {row['budget']}")
    return _write(path, cells, finished, comparison)[: len(cells)]


def _write(path: Path, cells: Iterable[Key], finished: Mapping[Key, Row], comparison: Comparison) -> list[Row]:
    """Writes and returns the rows of finished cells: those of the grid in its order, then all others."""
    order = [key for key in dict.fromkeys([*cells, *finished]) if key in finished]
    rows = [dict.fromkeys(comparison.columns, "") | finished[key] for key in order]
    write_bytes(path, as_csv(rows, comparison.columns))
    return rows


def finished_rows(comparison: Comparison, out: Path) -> list[Row]:
    """Returns the rows of the finished cells in the order of the grid; runs nothing and writes nothing.

    Raises:
        ConfigError: if there are none, or as `run_comparison`; images and weights that no longer exist are not checked.
    """
    if finished := _read(out / FILE, comparison):
        require_same(read_origin(out), origin_of(comparison, require=False), out)
    keys = (_key(comparison, cell.point) for cell in comparison.cells())
    rows = [finished[key] for key in keys if key in finished]
    if not rows:
        raise ConfigError(f"--finished: {out} has no finished cells of this comparison")
    return rows


def _rows(cells: Sequence[Cell], jobs: int, rank: bool) -> Iterator[Row]:
    """Yields rows as they are finished; the cells of one device of a scenario run in one process."""
    groups: dict[tuple[Any, ...], list[Cell]] = {}
    for cell in cells:
        groups.setdefault((scenario_of(cell.config), cell.device), []).append(cell)
    if min(jobs, len(groups)) <= 1:
        yield from CellRunner(rank).rows(itertools.chain(*groups.values()))
        return
    for shared in {key[0]: None for key in groups}:  # fills the caches before the workers start
        Scenario.of(shared)
    arrived: SimpleQueue[Row | Future[None]] = SimpleQueue()
    with closing(ProcessPool(jobs)) as pool:
        for group in groups.values():
            pool.submit(Job(_run_group, (group, rank)), arrived.put).add_done_callback(arrived.put)
        left = len(groups)
        while left:
            try:
                event = arrived.get(timeout=LOOK)
            except Empty:
                continue
            if isinstance(event, Future):
                event.result()  # raises the exception of a group that failed
                left -= 1
            else:
                yield event


def _run_group(emit: Emit, cells: Sequence[Cell], rank: bool) -> None:
    for row in _runner(rank).rows(cells):
        emit(row)


_runner = cache(CellRunner)  # one per process of the pool, so that the next group can use its caches


def _key(comparison: Comparison, row: Mapping[str, str]) -> Key:
    return tuple(row[axis] for axis in comparison.axes)


def _read(path: Path, comparison: Comparison) -> dict[Key, Row]:
    """Returns the finished cells by their values along the axes."""
    if not path.is_file():
        return {}
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        rows = [row for row in reader if None not in row.values()]  # earlier versions could leave an incomplete line
    if reader.fieldnames is not None and list(reader.fieldnames) != comparison.columns:
        theirs = ", ".join(reader.fieldnames)
        raise ConfigError(f"{path}: is a comparison with other axes or measures ({theirs}); give another --out")
    return {_key(comparison, row): row for row in rows}
