"""Carries the cells of a comparison out, several devices at a time, and keeps each as a line of `results.csv`.

A cell that stands there is finished and is not run again, so a comparison that was killed goes on where it was.
"""

from __future__ import annotations

import csv
import io
import multiprocessing
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from queue import Empty
from typing import Any

import torch

from experiments.compare.grid import Cell, Comparison
from experiments.compare.setting import DeviceView, Setting, score
from tapfl.config import PruningOptions, RunConfig
from tapfl.data.sources import ImageSet
from tapfl.errors import BudgetError, ConfigError
from tapfl.pruning.criteria.registry import resolved
from tapfl.pruning.criteria.task import PruningTask, Selection
from tapfl.pruning.pipeline import cut, recovered, select
from tapfl.pruning.planning import plan_of
from tapfl.store import write_bytes

FINISH = tuple(name for name in PruningOptions.model_fields if name.startswith(("compensation", "recovery", "distill")))
MEASURES = ("macs_share", "params_share", "dense", "dense_own", "pruned", "pruned_own", "seconds")
Row = dict[str, str]
Progress = Callable[[int, int, str], None]


def run_comparison(comparison: Comparison, out: Path, progress: Progress, jobs: int = 1) -> list[Row]:
    """Carries out the cells that are not finished, and returns the rows of all of them in the order of the grid.

    A criterion that cannot meet a budget leaves a row without measures, with the reason in ``refused``. Every row is
    the same for any number of jobs, but for its seconds.

    Raises:
        ConfigError: if `out` holds a comparison of other axes.
    """
    out.mkdir(parents=True, exist_ok=True)
    path, fields = out / "results.csv", [*comparison.axes, *MEASURES, "refused"]
    cells = list(comparison.cells())
    finished = _read(path, fields)
    waiting = [cell for cell in cells if _key(comparison, cell.point) not in finished]
    done = len(cells) - len(waiting)
    progress(done, len(cells), "finished before" if done else "")
    write_bytes(path, _text(list(finished.values()), fields).encode())  # without the half line of a killed run
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=fields)
        for row in _rows(waiting, jobs):
            writer.writerow(row)
            file.flush()
            done += 1
            progress(done, len(cells), f"device {row['device']} {row['criterion']} {row['budget']}")
    finished = _read(path, fields)
    rows = [finished[_key(comparison, cell.point)] for cell in cells]
    write_bytes(path, _text(rows, fields).encode())  # in the order of the grid, whoever was first
    return rows


def _rows(cells: Sequence[Cell], jobs: int) -> Iterator[Row]:
    """Yields a row a cell as they come; the cells of a device of a setting stay in one process."""
    groups: dict[tuple[Any, ...], list[Cell]] = {}
    for cell in cells:
        groups.setdefault((_setting_of(cell.config), cell.device), []).append(cell)
    if min(jobs, len(groups)) <= 1:
        worker = Worker()
        for group in groups.values():
            yield from worker.rows(group)
        return
    for shared in {key[0]: None for key in groups}:  # trained and described once; the workers find it in the caches
        Setting.of(shared)
    context = multiprocessing.get_context("spawn")  # a forked torch may hang
    with context.Manager() as manager, ProcessPoolExecutor(jobs, context) as executor:
        queue = manager.Queue()
        futures = [executor.submit(_work, group, queue) for group in groups.values()]
        left = len(cells)
        while left:
            try:
                yield queue.get(timeout=1)
                left -= 1
            except Empty:
                for future in futures:
                    if future.done():
                        future.result()  # raises what ended it


def _work(cells: Sequence[Cell], queue: Any) -> None:
    global _worker
    _worker = _worker or Worker()
    for row in _worker.rows(cells):
        queue.put(row)


_worker: Worker | None = None  # of a process of the pool: what it has loaded serves its next group


class Worker:
    """Runs cells one after the other, and keeps the last thing of each kind: neighbours share most of it."""

    def __init__(self) -> None:
        torch.set_num_threads(1)
        self._made: dict[str, tuple[tuple[Any, ...], Any]] = {}

    def rows(self, cells: Sequence[Cell]) -> Iterator[Row]:
        for cell in cells:
            yield cell.point | {name: str(value) for name, value in self._measure(cell).items()}

    def _reuse(self, name: str, key: tuple[Any, ...], make: Callable[[], Any]) -> Any:
        if name not in self._made or self._made[name][0] != key:
            self._made[name] = (key, make())
        return self._made[name][1]

    def _measure(self, cell: Cell) -> Mapping[str, object]:
        shared = _setting_of(cell.config)
        setting: Setting = self._reuse("setting", (shared,), partial(Setting.of, shared))
        view: DeviceView = self._reuse("view", (shared, cell.device), partial(DeviceView.of, setting, cell.device))
        options, metric = cell.config.pruning, cell.config.metric
        images = (shared, cell.device, metric, cell.oracle)
        chosen: ImageSet = self._reuse("images", images, partial(view.public_images, metric, metric.size, cell.oracle))
        choice = (*images, cell.budget, options.model_copy(update=dict.fromkeys(FINISH)))
        task: PruningTask = self._reuse("task", choice, partial(view.task, chosen, cell.budget, options, metric.batch))
        finish = {name: getattr(resolved(options), name) for name in FINISH}
        task = replace(task, options=task.options.model_copy(update=finish))
        found = self._reuse("selection", choice, partial(_select, task))
        if isinstance(found.selection, str):
            return {"refused": found.selection}
        cutting = (*choice, task.options.compensation, task.options.compensation_rows)
        small = self._reuse("cut", cutting, partial(cut, task, found.selection, cell.config.seed))
        fine_tune = view.fine_tune_set(metric, options, cell.oracle)
        small = recovered(task, found.selection, small, fine_tune, cell.config.seed)
        plan = plan_of(task, found.selection, setting.spec)
        pruned, pruned_own = score(small, view.inputs, view.labels, view.classes)
        return {
            "macs_share": plan.cost.macs / plan.dense.macs,
            "params_share": plan.cost.params / plan.dense.params,
            "dense": view.dense[0],
            "dense_own": view.dense[1],
            "pruned": pruned,
            "pruned_own": pruned_own,
            "seconds": round(found.seconds, 4),
        }


@dataclass(frozen=True)
class Found:
    """What a criterion chose, or why it could not; and the CPU seconds that it took."""

    selection: Selection | str
    seconds: float


def _select(task: PruningTask) -> Found:
    start = time.process_time()
    try:
        selection: Selection | str = select(task)
    except BudgetError as error:
        selection = str(error)
    return Found(selection, time.process_time() - start)


def _setting_of(config: RunConfig) -> RunConfig:
    """Returns `config` with all that a setting does not depend on at its default."""
    plain = RunConfig()
    own = ("metric", "pruning", "adapters", "train", "personalize")
    return config.model_copy(update={name: getattr(plain, name) for name in own})


def _key(comparison: Comparison, row: Mapping[str, str]) -> tuple[str, ...]:
    return tuple(row[axis] for axis in comparison.axes)


def _text(rows: Sequence[Row], fields: Sequence[str]) -> str:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, fields)
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _read(path: Path, fields: Sequence[str]) -> dict[tuple[str, ...], Row]:
    """Returns the finished cells by their values along the axes."""
    if not path.is_file():
        return {}
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        rows = [row for row in reader if None not in row.values()]  # a killed run may leave half a line
    if reader.fieldnames is not None and list(reader.fieldnames) != list(fields):
        raise ConfigError(f"{path}: is a comparison of other axes ({', '.join(reader.fieldnames)}); give another --out")
    axes = fields[: -len(MEASURES) - 1]
    return {tuple(row[axis] for axis in axes): row for row in rows}
