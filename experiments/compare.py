"""Criteria side by side: the same metric sets, budgets, alignment, cost meter and test images for all of them.

A comparison's TOML has a table `[compare]` and the options that all cells share:

```toml
[compare]
criterion = ["tap", "taylor", "random"]
budget = [0.5, "params<=0.3"]
compensation = ["none", "one-pass", "sequential"]
"metric.rule" = ["density-ratio"]
seed = [0, 1, 2]
device = [0, 3, 6]
```

One-shot: nothing is trained after pruning, but what a criterion trains in its own search. A cell that stands in
`results.csv` is finished and is not run again.
"""

from __future__ import annotations

import csv
import itertools
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from strategies.round_zero import PublicPool, describe_pool
from tapfl.config import RunConfig, flatten, read_toml_tables
from tapfl.data.federated import check_classes, open_pool, open_private
from tapfl.data.partition import DeviceSplit, partition
from tapfl.data.sources import ImageSet
from tapfl.errors import BudgetError, ConfigError
from tapfl.models.backbone import BackboneSpec, input_transform
from tapfl.models.dense import DenseCache, dense_backbone
from tapfl.pruning.budget import Budget
from tapfl.pruning.compensation import COMPENSATIONS, compensated
from tapfl.pruning.criteria.registry import criterion_of
from tapfl.pruning.criteria.task import PruningTask, Selection
from tapfl.pruning.planning import plan_of, pruning_task
from tapfl.seeds import numpy_generator
from tapfl.store import cache_folder
from tapfl.summary.descriptors import image_features
from tapfl.summary.metric_set import pick_metric_set
from tapfl.summary.mixture import GaussianSummary, fit_mixture
from tapfl.training import accuracy, predict

AXES: dict[str, list[Any]] = {
    "seed": [0],
    "device": [],
    "metric.rule": ["density-ratio"],
    "budget": [0.5],
    "criterion": ["tap", "random"],
    "compensation": ["none"],
}
MEASURES = ("macs_share", "params_share", "dense", "dense_own", "pruned", "pruned_own", "seconds")


@dataclass(frozen=True)
class Comparison:
    """A comparison: the values along each axis, and the options of all cells."""

    axes: dict[str, list[Any]]
    options: dict[str, Any]

    def config(self, seed: int) -> RunConfig:
        return RunConfig.from_flat({"devices.count": 10, **self.options, "seed": seed})

    def cells(self) -> Iterator[dict[str, Any]]:
        """Yields every cell, the axis that costs most to change first."""
        for values in itertools.product(*self.axes.values()):
            yield dict(zip(self.axes, values, strict=True))


def read_comparison(file: Path) -> Comparison:
    """Returns the comparison of a TOML file. Raises ConfigError if an axis or an option is not valid."""
    tables = read_toml_tables(file)
    given = tables.pop("compare", None)
    if not isinstance(given, dict) or not all(isinstance(v, list) and v for v in given.values()):
        raise ConfigError(f"{file}: needs a table [compare] of lists; axes: {', '.join(AXES)}")
    if odd := sorted(set(given) - set(AXES)):
        raise ConfigError(f"{file}: compare.{odd[0]} is no axis; accepted: {', '.join(AXES)}")
    comparison = Comparison(AXES | given, flatten(tables))
    for seed in comparison.axes["seed"]:
        devices = comparison.config(seed).devices.count
    comparison.axes["device"] = comparison.axes["device"] or list(range(devices))
    for name in comparison.axes["criterion"]:
        criterion_of(name)
    for rule in comparison.axes["metric.rule"]:
        RunConfig.from_flat({**comparison.options, "metric.rule": rule})
    if bad := [value for value in comparison.axes["compensation"] if value not in COMPENSATIONS]:
        raise ConfigError(f"compensation = {bad[0]!r}: accepted are {', '.join(COMPENSATIONS)}")
    comparison.axes["budget"] = [str(Budget.parse(budget)) for budget in comparison.axes["budget"]]
    if bad := [i for i in comparison.axes["device"] if not isinstance(i, int) or not 0 <= i < devices]:
        raise ConfigError(f"device = {bad[0]!r}: must lie in 0..{devices - 1}")
    return comparison


@dataclass(frozen=True)
class Setting:
    """What all cells of one seed share."""

    config: RunConfig
    pool: PublicPool
    private: ImageSet
    splits: list[DeviceSplit]
    spec: BackboneSpec
    model: nn.Module

    @classmethod
    def of(cls, config: RunConfig) -> Setting:
        cache, transform = cache_folder(config.cache), input_transform(config.model)
        images = open_pool(config.data, transform, config.seed, cache)
        private = open_private(config.data, transform, config.seed, cache)
        check_classes(config.data, images, private)
        splits = partition(private.labels, config.data, config.devices.count, config.seed)
        _, spec, model = dense_backbone(config.model, images, config.seed, DenseCache(cache))
        return cls(config, describe_pool(config, images, model), private, splits, spec, model)


@dataclass(frozen=True)
class DeviceView:
    """One device of a setting: its mixture, its test part, and how the dense model does on that."""

    setting: Setting
    summary: GaussianSummary
    inputs: Tensor
    labels: Tensor
    classes: Tensor
    dense: tuple[float, float]

    @classmethod
    def of(cls, setting: Setting, device: int) -> DeviceView:
        config, split, transform = setting.config, setting.splits[device], input_transform(setting.config.model)
        mine = setting.private.subset(split.train)
        points = setting.pool.projection(image_features(setting.model, transform.batches(mine.images)))
        drawn = int(numpy_generator(config.seed, "mixture", device).integers(2**31))
        test = setting.private.subset(split.test)
        inputs, labels = transform(test.images), torch.from_numpy(test.labels)
        classes = torch.from_numpy(np.unique(mine.labels))
        summary = fit_mixture(points, config.summary, drawn)
        return cls(setting, summary, inputs, labels, classes, score(setting.model, inputs, labels, classes))

    def task(self, device: int, rule: str, budget: str) -> PruningTask:
        """Returns the problem that every criterion is given."""
        config, pool = self.setting.config, self.setting.pool
        metric = config.metric.model_copy(update={"rule": rule})
        generator = numpy_generator(config.seed, "metric", device)
        chosen = pick_metric_set(self.summary, pool.mixture, pool.points, metric, generator)
        inputs = input_transform(config.model)(pool.images.images[chosen])
        return pruning_task(self.setting.model, inputs, budget, config.pruning, metric.batch, seed=config.seed)


def score(model: nn.Module, inputs: Tensor, labels: Tensor, classes: Tensor) -> tuple[float, float]:
    """Returns the accuracy among all classes, and among the device's own alone."""
    logits = predict(model, inputs)
    own = torch.full_like(logits, -torch.inf)
    own[:, classes] = logits[:, classes]
    return accuracy(logits, labels), accuracy(own, labels)


def run_comparison(
    comparison: Comparison, out: Path, progress: Callable[[int, int, str], None]
) -> list[dict[str, str]]:
    """Carries out the cells that are not finished, and returns the rows of all of them as `results.csv` has them.

    A criterion that cannot meet a budget leaves a row without measures, with the reason in ``refused``.
    """
    out.mkdir(parents=True, exist_ok=True)
    path = out / "results.csv"
    rows = _read(path)
    finished = {_key(row) for row in rows}
    cells = list(comparison.cells())
    torch.set_num_threads(1)
    made: dict[str, tuple[tuple[Any, ...], Any]] = {}

    def reuse(name: str, key: tuple[Any, ...], make: Callable[[], Any]) -> Any:
        """Keeps the last thing of each kind: cells that follow each other share most of what they need."""
        if name not in made or made[name][0] != key:
            made[name] = (key, make())
        return made[name][1]

    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=[*AXES, *MEASURES, "refused"])
        if not rows:
            writer.writeheader()
        for done, cell in enumerate(cells):
            progress(done, len(cells), f"{cell['criterion']} {cell['budget']} device {cell['device']}")
            if _key(cell) in finished:
                continue
            seed, device, rule, budget, criterion, compensation = (cell[axis] for axis in AXES)
            setting = reuse("setting", (seed,), partial(Setting.of, comparison.config(seed)))
            view = reuse("view", (seed, device), partial(DeviceView.of, setting, device))
            task = reuse("task", (seed, device, rule, budget), partial(view.task, device, rule, budget))
            found = reuse("selection", (id(task), criterion), partial(_select, task, criterion))
            row = cell | _measure(view, task, found, compensation)
            writer.writerow(row)
            file.flush()
    progress(len(cells), len(cells), "")
    return _read(path)


def _select(task: PruningTask, criterion: str) -> tuple[Selection | str, float]:
    start = time.process_time()
    try:
        return criterion_of(criterion)(task), time.process_time() - start
    except BudgetError as error:
        return str(error), time.process_time() - start


def _measure(
    view: DeviceView, task: PruningTask, found: tuple[Selection | str, float], compensation: str
) -> dict[str, object]:
    selection, seconds = found
    if isinstance(selection, str):
        return {"refused": selection}
    model = selection.model or task.model
    plan = plan_of(task, selection, view.setting.spec)
    small = compensated(model, selection.kept, task.layers, task.inputs, task.batch, compensation)
    pruned, pruned_own = score(small, view.inputs, view.labels, view.classes)
    dense, dense_own = view.dense
    return {
        "macs_share": plan.cost.macs / plan.dense.macs,
        "params_share": plan.cost.params / plan.dense.params,
        "dense": dense,
        "dense_own": dense_own,
        "pruned": pruned,
        "pruned_own": pruned_own,
        "seconds": round(seconds, 4),
    }


def _read(path: Path) -> list[dict[str, str]]:
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def _key(cell: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(str(cell[axis]) for axis in AXES)


def table(rows: list[dict[str, str]], measure: str = "pruned_own") -> list[Mapping[str, str]]:
    """Returns one row a criterion and compensation, one column a budget: mean ± sd over devices and seeds."""
    several = [axis for axis in ("metric.rule",) if len({row[axis] for row in rows}) > 1]
    budgets = list(dict.fromkeys(row["budget"] for row in rows))
    groups: dict[tuple[str, ...], dict[str, list[float]]] = {}
    for row in rows:
        key = tuple(row[axis] for axis in ("criterion", "compensation", *several))
        values = groups.setdefault(key, {}).setdefault(row["budget"], [])
        if not row["refused"]:
            values.append(float(row[measure]))
    shown: list[Mapping[str, str]] = []
    for key, by_budget in groups.items():
        named = dict(zip(("criterion", "compensation", *several), key, strict=True))
        shown.append(named | {Budget.parse(b).title: _spread(by_budget.get(b, [])) for b in budgets})
    return shown


def _spread(values: list[float]) -> str:
    if not values:
        return "refused"
    return f"{np.mean(values):.3f} ± {np.std(values, ddof=1) if len(values) > 1 else 0:.3f} ({len(values)})"


def markdown(rows: list[Mapping[str, str]]) -> str:
    """Returns rows as a Markdown table."""
    lines = [list(rows[0]), ["---"] * len(rows[0]), *(list(row.values()) for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"
