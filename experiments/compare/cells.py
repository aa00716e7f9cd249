"""Measures the cells of a comparison; neighbouring cells share intermediate results.

```
scenario ─► device's view ─► metric set ─► scores ─► selection ─► pruned model ──► recovered ─► accuracy
               pool-lacks      metric.*    criterion    budget     compensation     recovery
```
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import TypeVar

import numpy as np
from scipy.stats import spearmanr
from torch import nn

from experiments.compare.grid import IMAGES, MEASURES, Cell
from experiments.compare.scenario import DeviceView, Scenario, hits, shares
from experiments.statistics import as_text
from tapfl.compute import Compute, home
from tapfl.config import PruningOptions, RunConfig
from tapfl.data.images import ImageSet
from tapfl.errors import BudgetError, ConfigError, ModelError
from tapfl.memo import Memo
from tapfl.models.units import PrunableLayer
from tapfl.pruning.compensation import cut, row_sensitivities
from tapfl.pruning.criteria.criterion import PruningTask, Scores, Selection
from tapfl.pruning.criteria.registry import criterion_of, resolved
from tapfl.pruning.pipeline import finished, plan_of
from tapfl.pruning.recovery import recovered
from tapfl.pruning.tokens import select

T = TypeVar("T")
Row = dict[str, str]
Scoring = Callable[[PruningTask], Scores]
FINISH = tuple(name for name in PruningOptions.model_fields if name.startswith(("compensation", "recovery")))
RECOVERY = tuple(name for name in FINISH if name.startswith("recovery"))
# options that scores do not depend on, because they only determine how a budget is spent
OF_TOKENS = ("tokens", "token_share")
SPENDING = ("criterion", "ratio", "tau", "align", "floor", "unit_shape", "probe", "send", *OF_TOKENS)
KEPT = {"images": 2, "scores": 64, "sensitivities": 2}  # number of cached results of each kind; 1 of the others


def timed(make: Callable[[], T], compute: Compute) -> tuple[T, float]:
    """Returns the result of `make` and the seconds that it took, measured by the clock of the device it computes on."""
    made: list[T] = []
    seconds = compute.seconds(lambda: made.append(make()))
    return made[0], seconds


class CellRunner:
    """Measures cells one after the other.

    Args:
        rank: also measure the rank correlation of the scores with the oracle's, which needs a second scoring.
    """

    def __init__(self, rank: bool = False) -> None:
        self.rank = rank
        self._kept: dict[str, Memo] = {}

    def rows(self, cells: Iterable[Cell]) -> Iterator[Row]:
        """Yields one row per cell: its values along the axes and its measures."""
        for cell in cells:
            yield cell.point | {name: str(value) for name, value in self._measure(cell).items()}

    def _once(self, kind: str, key: Hashable, make: Callable[[], T]) -> T:
        result: T = self._kept.setdefault(kind, Memo(KEPT.get(kind, 1))).once(key, make)
        return result

    def _measure(self, cell: Cell) -> dict[str, object]:
        """Returns the measures of a cell, or the reason that it has none.

        An error in the data ends the comparison instead, because it may be gone when the command is repeated.
        """
        Compute.of(cell.config.compute).prepare()
        self._scenario(cell)  # its errors are not about one cell
        try:
            return self._measured(cell)
        except (BudgetError, ConfigError, ModelError) as error:
            return {"refused": str(error)}

    def _measured(self, cell: Cell) -> dict[str, object]:
        view, images = self._view(cell), self._images(cell)
        options = resolved(cell.config.pruning)
        later = FINISH if options.tokens != "auto" else RECOVERY  # with auto, tokens depend on compensation
        choice = (_images_key(cell), cell.budget, options.model_copy(update=dict.fromkeys(later)))
        task = self._once("task", choice, lambda: self._task(cell))
        task = replace(task, options=task.options.model_copy(update={name: getattr(options, name) for name in FINISH}))
        selection, seconds = self._once("selection", choice, lambda: self._select(cell, task))
        cutting = (*choice, *(getattr(options, name) for name in FINISH if name.startswith("compensation")))
        small = self._once("cut", cutting, lambda: self._cut(cell, task, selection))
        fine_tune = view.fine_tune_set(cell.config.metric, options, cell.oracle)
        small = view.own(finished(task, recovered(task, selection, small, fine_tune, cell.config.seed)))
        plan = plan_of(task, selection, view.scenario.spec)
        right = hits(small, view.inputs, view.labels, view.classes)
        cost = (plan.cost.macs / plan.dense.macs, plan.cost.params / plan.dense.params)
        values = (*cost, *view.coverage(images), *view.dense, *shares(right), round(seconds, 4))
        measures: dict[str, object] = dict(zip(MEASURES, values, strict=True))
        measures |= {name: as_text(part.tolist()) for name, part in zip(IMAGES.values(), right, strict=True)}
        return measures | (self._agreement(cell, task) if self.rank else {})

    def _scenario(self, cell: Cell) -> Scenario:
        shared = scenario_of(cell.config)
        return self._once("scenario", shared, lambda: Scenario.of(shared))

    def _view(self, cell: Cell) -> DeviceView:
        scenario = self._scenario(cell)
        key = (scenario.config, cell.device, cell.lacks)
        return self._once("view", key, lambda: DeviceView.of(scenario.lacking(cell.device, cell.lacks), cell.device))

    def _images(self, cell: Cell) -> ImageSet:
        metric, view = cell.config.metric, self._view(cell)
        return self._once("images", _images_key(cell), lambda: view.public_images(metric, metric.size, cell.oracle))

    def _task(self, cell: Cell) -> PruningTask:
        config = cell.config
        return self._view(cell).task(self._images(cell), cell.budget, config.pruning, config.metric.batch)

    def _select(self, cell: Cell, task: PruningTask) -> tuple[Selection, float]:
        """Returns the selection of the criterion and the seconds it took."""
        criterion, compute = criterion_of(task.options.criterion), Compute.of(cell.config.compute)
        if criterion.scores is None:
            return timed(lambda: select(task), compute)
        scores, scoring_seconds = self._scores(cell, task.options, criterion.scores, lambda: task)
        selection, seconds = timed(lambda: select(task, scores), compute)
        return selection, scoring_seconds + seconds

    def _scores(
        self, cell: Cell, options: PruningOptions, scoring: Scoring, task: Callable[[], PruningTask]
    ) -> tuple[Scores, float]:
        def make() -> tuple[Scores, float]:
            problem = task()  # not part of the measured time
            return timed(lambda: home(scoring(problem)), Compute.of(cell.config.compute))

        plain = options.model_copy(update=dict.fromkeys((*FINISH, *SPENDING)))
        return self._once("scores", (_images_key(cell), scoring, plain), make)

    def _agreement(self, cell: Cell, task: PruningTask) -> dict[str, float]:
        """Returns the rank correlations of the scores with those on the device's own training images."""
        scoring = criterion_of(task.options.criterion).scores
        if scoring is None:
            return {}
        oracle = replace(cell, oracle=True)
        ours, _ = self._scores(cell, task.options, scoring, lambda: task)
        theirs, _ = self._scores(oracle, task.options, scoring, lambda: self._task(oracle))
        return rank_correlations(task.layers, ours, theirs)

    def _cut(self, cell: Cell, task: PruningTask, selection: Selection) -> nn.Module:
        options, rows = task.options, None
        if selection.model is None and options.compensation != "none":  # shared by all criteria with the same basis
            key = (_images_key(cell), options.basis, options.compensation_rows)
            rows = self._once("sensitivities", key, lambda: row_sensitivities(task, task.model))
        return cut(task, selection, rows)


def scenario_of(config: RunConfig) -> RunConfig:
    """Returns `config` with defaults in all sections that a scenario does not depend on."""
    others = ("metric", "pruning", "adapters", "train", "personalize")
    return config.model_copy(update={name: getattr(RunConfig(), name) for name in others})


def rank_correlations(layers: Sequence[PrunableLayer], ours: Scores, theirs: Scores) -> dict[str, float]:
    """Returns Spearman's ρ between two scores of a layer's units, as ``rank_ffn`` and ``rank_attention``.

    Each is the mean over the layers of a kind. Layers whose units all have the same score are left out, and so is a
    kind that has only such layers.
    """
    found: dict[str, list[float]] = {}
    for layer in layers:
        a, b = (scores[layer.name].double().numpy() for scores in (ours, theirs))
        if np.ptp(a) > 0 and np.ptp(b) > 0:
            found.setdefault(f"rank_{layer.kind}", []).append(float(spearmanr(a, b).statistic))
    return {name: float(np.mean(values)) for name, values in sorted(found.items())}


def _images_key(cell: Cell) -> Hashable:
    return scenario_of(cell.config), cell.device, cell.lacks, cell.config.metric, cell.oracle
