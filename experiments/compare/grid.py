"""The grid of a comparison: which cells there are, and which of them share what costs most.

A comparison's TOML has a table `[compare]` of lists, and the options that all cells share:

```toml
[compare]
criterion = ["tap", "taylor", "random"]
budget = ["block-macs<=0.5", 0.3]
compensation = ["none", "one-pass", "sequential"]
"metric.rule" = ["density-ratio", "oracle"]
seed = [0, 1, 2]
device = [0, 3, 6]
```

An axis is `device`, `budget`, or any option of a run by its dotted name; those of `[pruning]` also by their own name
alone.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tapfl.config import PruningOptions, RunConfig, flatten, read_toml_tables
from tapfl.errors import ConfigError
from tapfl.pruning.budget import Budget
from tapfl.pruning.criteria.registry import require_criterion

DEFAULT_DEVICES = 10
DEFAULTS: dict[str, list[Any]] = {
    "seed": [0],
    "device": [],  # all of them
    "metric.rule": ["density-ratio"],
    "criterion": ["tap", "random"],
    "budget": [0.5],
    "compensation": ["none"],
}
ORACLE = "oracle"  # the metric set that no server has: the device's own training images
# axes by what a change of them costs, behind those of data and backbone: device, metric set, selection, finish
STAGES = (r"device", r"metric\..*", r"pruning\..*", r"budget", r"pruning\.compensation.*", r"pruning\.recovery.*")


@dataclass(frozen=True)
class Cell:
    """One combination: the values along the axes as they were given, and what they mean.

    Attributes:
        point: axis -> value, as `results.csv` has them.
        config: all options.
        device: which device.
        budget: what its model may cost.
        oracle: whether the metric set is the device's own training images.
    """

    point: dict[str, str]
    config: RunConfig
    device: int
    budget: Budget
    oracle: bool


@dataclass(frozen=True)
class Comparison:
    """A comparison: the values along each axis, and the options of all cells."""

    axes: dict[str, list[Any]]
    options: dict[str, Any]

    def cells(self) -> Iterator[Cell]:
        """Yields every cell, the axis that costs most to change first.

        Raises:
            ConfigError: for a value that is not accepted.
        """
        for values in itertools.product(*self.axes.values()):
            yield self._cell(dict(zip(self.axes, values, strict=True)))

    def _cell(self, point: Mapping[str, Any]) -> Cell:
        options = {"devices.count": DEFAULT_DEVICES, **self.options}
        options |= {_option(axis): value for axis, value in point.items() if axis not in ("device", "budget")}
        oracle = options.get("metric.rule") == ORACLE
        if oracle:
            del options["metric.rule"]
        config = RunConfig.from_flat(options)
        require_criterion(config.pruning.criterion)
        device, count = point["device"], config.devices.count
        if type(device) is not int or not 0 <= device < count:
            raise ConfigError(f"device = {device!r}: must lie in 0..{count - 1}")
        budget = Budget.parse(point["budget"])
        shown = {axis: str(value) for axis, value in point.items()} | {"budget": str(budget)}
        return Cell(shown, config, device, budget, oracle)


def read_comparison(file: Path) -> Comparison:
    """Returns the comparison of a TOML file. Raises ConfigError if an axis or an option is not valid."""
    tables = read_toml_tables(file)
    given = tables.pop("compare", None)
    if not isinstance(given, dict) or not all(isinstance(v, list) and v for v in given.values()):
        raise ConfigError(f'{file}: needs a table [compare] of lists, such as criterion = ["tap", "random"]')
    known = {"device", "budget", *RunConfig().flat()}
    if odd := sorted(axis for axis in given if _option(axis) not in known):
        raise ConfigError(f"{file}: compare.{odd[0]} is no axis; accepted: device, budget, and any option of a run")
    options = flatten(tables)
    axes = DEFAULTS | given
    if not axes["device"]:
        count = options.get("devices.count", DEFAULT_DEVICES)
        axes["device"] = list(range(count if type(count) is int else 0))
    comparison = Comparison(dict(sorted(axes.items(), key=lambda axis: _stage(axis[0]))), options)
    for _ in comparison.cells():  # every value is checked before anything runs
        pass
    return comparison


def _option(axis: str) -> str:
    """The dotted name of an axis."""
    short = axis.replace("-", "_") in PruningOptions.model_fields
    return f"pruning.{axis}" if short else axis


def _stage(axis: str) -> int:
    return max((i for i, pattern in enumerate(STAGES, start=1) if re.fullmatch(pattern, _option(axis))), default=0)
