"""What a cell of a comparison comes to; neighbouring cells share what they can.

```
setting ─► device's view ─► metric set ─► scores ─► selection ─► smaller model ─► recovered ─► accuracy
              pool-lacks      metric.*    criterion    budget     compensation     recovery
```
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from experiments.compare.grid import Cell
from experiments.compare.rank import rank_correlations
from experiments.compare.setting import DeviceView, Setting, score
from tapfl.config import PruningOptions, RunConfig
from tapfl.data.sources import ImageSet
from tapfl.errors import BudgetError, ConfigError
from tapfl.memo import Memo
from tapfl.pruning.criteria.registry import criterion_of, resolved
from tapfl.pruning.criteria.task import PruningTask, Ranked, Selection
from tapfl.pruning.lost_output import unit_moments
from tapfl.pruning.pipeline import cut, recovered, row_sensitivities, select
from tapfl.pruning.planning import plan_of

Row = dict[str, str]
FINISH = tuple(name for name in PruningOptions.model_fields if name.startswith(("compensation", "recovery", "distill")))
# options that scores do not depend on: how a budget is spent by them
SPENDING = ("criterion", "ratio", "tau", "gamma", "align", "floor", "unit_shape", "probe", "send")
KEPT = {
    "images": 2,
    "scores": 64,
    "felt": 2,
    "moments": 2,
}  # results of a kind that are kept; of all others the last one


@dataclass(frozen=True)
class Timed:
    """A result, and the CPU seconds that it took."""

    value: Any
    seconds: float

    @classmethod
    def of(cls, make: Callable[[], Any]) -> Timed:
        start = time.process_time()
        return cls(make(), time.process_time() - start)


class Worker:
    """Runs cells one after the other.

    Args:
        rank: also measures how the scores agree with the oracle's, which costs a second scoring.
    """

    def __init__(self, rank: bool = False) -> None:
        torch.set_num_threads(1)
        self.rank = rank
        self._kept: dict[str, Memo] = {}

    def rows(self, cells: Sequence[Cell]) -> Iterator[Row]:
        """Yields a row a cell: its values along the axes and its measures."""
        for cell in cells:
            yield cell.point | {name: str(value) for name, value in self._measure(cell).items()}

    def _once(self, kind: str, key: Hashable, make: Callable[[], Any]) -> Any:
        return self._kept.setdefault(kind, Memo(KEPT.get(kind, 1))).once(key, make)

    def _measure(self, cell: Cell) -> Mapping[str, object]:
        try:
            options = resolved(cell.config.pruning)
        except ConfigError as error:  # a criterion that cannot do with one of the options
            return {"refused": str(error)}
        view, seed = self._view(cell), cell.config.seed
        chosen = self._images(cell, view, cell.instead)
        choice = (_images_key(cell), cell.budget, options.model_copy(update=dict.fromkeys(FINISH)))
        task: PruningTask = self._once("task", choice, lambda: self._task(cell, view, chosen))
        task = replace(task, options=task.options.model_copy(update={name: getattr(options, name) for name in FINISH}))
        found: Timed = self._once("selection", choice, lambda: self._select(cell, task))
        if isinstance(found.value, str):
            return {"refused": found.value}
        cutting = (*choice, options.compensation, options.compensation_rows)
        small = self._once("cut", cutting, lambda: self._cut(cell, task, found.value))
        fine_tune = view.fine_tune_set(cell.config.metric, options, cell.instead)
        small = recovered(task, found.value, small, fine_tune, seed)
        plan = plan_of(task, found.value, view.setting.spec)
        pruned, pruned_own = score(small, view.inputs, view.labels, view.classes)
        own_share, classes_covered = view.coverage(chosen)
        measures: dict[str, object] = {
            "macs_share": plan.cost.macs / plan.dense.macs,
            "params_share": plan.cost.params / plan.dense.params,
            "own_share": own_share,
            "classes_covered": classes_covered,
            "dense": view.dense[0],
            "dense_own": view.dense[1],
            "pruned": pruned,
            "pruned_own": pruned_own,
            "seconds": round(found.seconds, 4),
        }
        return {**measures, **(self._agreement(cell, view, task) if self.rank else {})}

    def _view(self, cell: Cell) -> DeviceView:
        shared = setting_of(cell.config)
        setting: Setting = self._once("setting", shared, partial(Setting.of, shared))

        def make() -> DeviceView:
            here = setting.lacking(cell.device, cell.lacks) if cell.lacks else setting
            return DeviceView.of(here, cell.device)

        view: DeviceView = self._once("view", (shared, cell.device, cell.lacks), make)
        return view

    def _images(self, cell: Cell, view: DeviceView, instead: str) -> ImageSet:
        metric = cell.config.metric
        key = (_images_key(cell), instead)
        images: ImageSet = self._once("images", key, lambda: view.public_images(metric, metric.size, instead))
        return images

    def _task(self, cell: Cell, view: DeviceView, images: ImageSet) -> PruningTask:
        return view.task(images, cell.budget, cell.config.pruning, cell.config.metric.batch)

    def _select(self, cell: Cell, task: PruningTask) -> Timed:
        """Returns what the criterion chose, or why it could not."""
        criterion = criterion_of(task.options.criterion)
        try:
            if not isinstance(criterion, Ranked):
                return Timed.of(lambda: select(task))
            scores = self._scores(cell, task.options, criterion, cell.instead, lambda: task)
            spent = Timed.of(lambda: criterion.spend(task, scores.value))
            return Timed(spent.value, scores.seconds + spent.seconds)
        except BudgetError as error:
            return Timed(str(error), 0.0)

    def _scores(
        self, cell: Cell, options: PruningOptions, criterion: Ranked, instead: str, task: Callable[[], PruningTask]
    ) -> Timed:
        plain = options.model_copy(update=dict.fromkeys((*FINISH, *SPENDING)))
        key = (_images_key(cell), instead, criterion.scores, plain)

        def make() -> Timed:
            problem = task()
            return Timed.of(lambda: criterion.scores(problem))

        scores: Timed = self._once("scores", key, make)
        return scores

    def _agreement(self, cell: Cell, view: DeviceView, task: PruningTask) -> Mapping[str, object]:
        """Returns how the scores agree with those on the device's own training images, layer kind by layer kind."""
        criterion = criterion_of(task.options.criterion)
        if not isinstance(criterion, Ranked):
            return {}

        def oracle() -> PruningTask:
            return self._task(cell, view, self._images(cell, view, "oracle"))

        ours = self._scores(cell, task.options, criterion, cell.instead, lambda: task)
        theirs = self._scores(cell, task.options, criterion, "oracle", oracle)
        return rank_correlations(task.layers, ours.value, theirs.value)

    def _cut(self, cell: Cell, task: PruningTask, selection: Selection) -> nn.Module:
        seed, options, felt, known = cell.config.seed, task.options, None, None
        if selection.model is None and options.compensation != "none":  # the same weights for all criteria of a basis
            key = (_images_key(cell), options.basis, options.compensation_rows)
            felt = self._once("felt", key, lambda: row_sensitivities(task, task.model, seed))
            if options.compensation == "one-pass":
                looked_at = (task.model, task.layers, task.inputs, task.batch, felt)
                known = self._once("moments", key, lambda: unit_moments(*looked_at))
        return cut(task, selection, seed, felt, known)


def setting_of(config: RunConfig) -> RunConfig:
    """Returns `config` with all that a setting does not depend on at its default."""
    plain = RunConfig()
    own = ("metric", "pruning", "adapters", "train", "personalize")
    return config.model_copy(update={name: getattr(plain, name) for name in own})


def _images_key(cell: Cell) -> Hashable:
    return setting_of(cell.config), cell.device, cell.lacks, cell.config.metric, cell.instead
