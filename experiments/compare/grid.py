"""The grid of a comparison: which cells there are.

A comparison's TOML has a table `[compare]` of lists, the options that all cells share, and what is to be made of the
results:

```toml
[compare]
criterion = ["tap", "taylor", "random"]
budget = ["block-macs<=0.5", 0.3]
compensation = ["none", "one-pass", "sequential"]
"metric.rule" = ["density-ratio", "shared", "oracle"]
pool-lacks = [0, 0.5]
seed = [0, 1, 2]
device = [0, 3, 6]

[results]
reference = ["criterion=tap"]
```

An axis is `device`, `budget`, `pool-lacks`, or any option of a run by its dotted name; those of `[pruning]` also by
their own name alone. Several tables `[[compare]]` are several grids in one: an axis that one of them does not name has
its default there.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from experiments.compare.results import ResultOptions
from tapfl.config import PruningOptions, RunConfig
from tapfl.errors import ConfigError
from tapfl.pruning.budget import Budget
from tapfl.pruning.criteria.registry import require_criterion

DEFAULT_DEVICES = 10
DEFAULTS: dict[str, list[Any]] = {
    "seed": [0],
    "device": [],  # none named: all of them
    "metric.rule": ["density-ratio"],
    "criterion": ["tap", "random"],
    "budget": [0.5],
    "compensation": ["none"],
}
OWN_AXES = ("device", "budget", "pool-lacks")  # those that are no options of a run
# metric sets that no rule of a server gives: the device's own training images; images of the whole pool, so that all
# devices share one plan
INSTEAD = ("oracle", "shared")
# axes by what a change of them costs, behind those of data and backbone: device, metric set, selection, finish
STAGES = (
    r"device",
    r"pool-lacks",
    r"metric\..*",
    r"pruning\..*",
    r"budget",
    r"pruning\.compensation.*",
    r"pruning\.recovery.*",
)


@dataclass(frozen=True)
class Cell:
    """One combination: the values along the axes as they were given, and what they mean.

    Attributes:
        point: axis -> value, as `results.csv` has them.
        config: all options.
        device: which device.
        budget: what its model may cost.
        instead: the metric set where no rule of `metric.rule` gives it, one of `INSTEAD`, or empty.
        lacks: the share of the device's own classes that the public pool has no images of.
    """

    point: dict[str, str]
    config: RunConfig
    device: int
    budget: Budget
    instead: str
    lacks: float


@dataclass(frozen=True)
class Comparison:
    """A comparison.

    Attributes:
        axes: the values along each axis.
        options: of all cells.
        parts: the grids that it consists of, each with values of every axis.
        results: what is to be made of the results.
    """

    axes: dict[str, list[Any]]
    options: dict[str, Any]
    parts: tuple[dict[str, list[Any]], ...]
    results: ResultOptions

    def cells(self) -> Iterator[Cell]:
        """Yields every cell, the axis that costs most to change first.

        Raises:
            ConfigError: for a value that is not accepted.
        """
        held = [{axis: {str(value) for value in values} for axis, values in part.items()} for part in self.parts]
        for values in itertools.product(*self.axes.values()):
            point = dict(zip(self.axes, values, strict=True))
            if any(all(str(value) in part[axis] for axis, value in point.items()) for part in held):
                yield self._cell(point)

    def _cell(self, point: Mapping[str, Any]) -> Cell:
        options = {"devices.count": DEFAULT_DEVICES, **self.options}
        options |= {option_of(axis): value for axis, value in point.items() if axis not in OWN_AXES}
        instead = options.get("metric.rule")
        if instead in INSTEAD:
            del options["metric.rule"]
        config = RunConfig.from_flat(options)
        require_criterion(config.pruning.criterion)
        device, count = point["device"], config.devices.count
        if type(device) is not int or not 0 <= device < count:
            raise ConfigError(f"device = {device!r}: must lie in 0..{count - 1}")
        lacks = point.get("pool-lacks", 0)
        if isinstance(lacks, bool) or not isinstance(lacks, int | float) or not 0 <= lacks <= 1:
            raise ConfigError(f"pool-lacks = {lacks!r}: is a share of the device's classes and must lie in 0..1")
        budget = Budget.parse(point["budget"])
        shown = {axis: str(value) for axis, value in point.items()} | {"budget": str(budget)}
        return Cell(shown, config, device, budget, str(instead) if instead in INSTEAD else "", float(lacks))


def option_of(axis: str) -> str:
    """Returns the dotted name of an axis."""
    short = axis.replace("-", "_") in PruningOptions.model_fields
    return f"pruning.{axis}" if short else axis


def stage_of(axis: str) -> int:
    """Returns which of the `STAGES` an axis belongs to: the higher, the less a change of it costs."""
    return max((i for i, pattern in enumerate(STAGES, start=1) if re.fullmatch(pattern, option_of(axis))), default=0)
