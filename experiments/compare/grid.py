"""The grid of a comparison: its cells, and the tables to make of their results.

A comparison's TOML has a table `[compare]` of lists, a table `[results]`, and the options that all cells share:

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

An axis is `device`, `budget`, `pool-lacks`, or any option of a run by its dotted name. The prefix `pruning.` may be
omitted, and results omit it. Several tables `[[compare]]` are several grids; an axis that is missing in one of them has
its default there.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator

from experiments.preflight import DEFAULT_DEVICES, absolute_paths, counted, with_model_of_hub
from tapfl.config import PruningOptions, RunConfig
from tapfl.errors import ConfigError
from tapfl.options import Section, flatten, parse_assignment, read_toml_tables, validated
from tapfl.pruning.budget import Budget
from tapfl.pruning.criteria.registry import require_criterion

DEFAULTS: dict[str, list[Any]] = {
    "seed": [0],
    "device": [],  # replaced by all devices
    "metric.rule": ["density-ratio"],
    "criterion": [PruningOptions().criterion],
    "budget": [0.5],
    "compensation": ["auto"],
}
OWN_AXES = ("device", "budget", "pool-lacks")  # axes that are not options of a run
OWNER = ["device", "seed"]  # axes that determine the test images
WITHIN_LINE = ("budget", *OWNER)  # axes that do not distinguish the lines of a table
ORACLE = "oracle"  # a value of metric.rule that exists only in a comparison: the device's own training images
# patterns of axes in the order of the computation: data and backbone (none of these), device, metric set, selection,
# compensation and recovery; cells that differ only in a late stage share the most
FINISH = (r"pruning\.compensation.*", r"pruning\.recovery.*")
STAGES = ("device", "pool-lacks", r"metric\..*", r"pruning\..*", "budget", *FINISH)
ACCURACIES = ("dense", "dense_own", "pruned", "pruned_own")
MEASURES = ("macs_share", "params_share", "own_share", "classes_covered", *ACCURACIES, "seconds")
# for each accuracy of the pruned model, the column with the test images that it classified correctly
IMAGES = {"pruned": "right", "pruned_own": "right_own"}
RANK_MEASURES = ("rank_ffn", "rank_attention")


class ResultOptions(Section):
    """The table `[results]` of a comparison's TOML."""

    measures: tuple[Literal["rank"], ...] = Field(
        (), description="expensive measures: `rank`, the correlation of a criterion's scores with the oracle's"
    )
    show: tuple[str, ...] = Field(
        ("pruned_own",), min_length=1, description="measures, one table each; the figure shows the first"
    )
    reference: tuple[str, ...] = Field(
        (), description="axis=value: each line is compared with the line that differs from it only in these values"
    )
    chosen_on: tuple[int, ...] = Field(
        (), description="devices on which a method was tuned; an additional table leaves them out"
    )

    @field_validator("*", mode="before")
    @classmethod
    def _one(cls, value: object) -> object:
        return (value,) if isinstance(value, str) or type(value) is int else value

    @property
    def columns(self) -> tuple[str, ...]:
        """The measures of every cell."""
        return MEASURES + (RANK_MEASURES if "rank" in self.measures else ())

    @property
    def values(self) -> dict[str, str]:
        """`reference` as axis -> value."""
        parts = [text.partition("=") for text in self.reference]
        if odd := [axis for axis, equals, _ in parts if not equals]:
            raise ConfigError(f"--reference {odd[0]}: must have the form axis=value, such as criterion=tap")
        return {axis_of(axis.strip()): value.strip() for axis, _, value in parts}

    def override(self, show: Sequence[str] | None, reference: Sequence[str] | None) -> ResultOptions:
        """Returns the options overridden by those of the command line, if they are given."""
        update = {name: tuple(value) for name, value in (("show", show), ("reference", reference)) if value}
        return self.model_copy(update=update)

    def check(self, axes: Mapping[str, Sequence[Any]]) -> None:
        """Raises ConfigError for a measure, a reference or a device that a comparison with these axes does not have."""
        if odd := [name for name in self.show if name not in self.columns]:
            more = "" if "rank" in self.measures else "; results.measures = ['rank'] adds rank_ffn and rank_attention"
            raise ConfigError(f"--measure {odd[0]}: accepted are {', '.join(self.columns)}{more}")
        lines = {axis: list(map(str, values)) for axis, values in axes.items() if axis not in WITHIN_LINE}
        for axis, value in self.values.items():
            values = lines.get(axis, [])
            if value not in values:
                named = f"values of {axis}: {', '.join(values)}" if values else f"axes: {', '.join(lines)}"
                raise ConfigError(f"--reference {axis}={value}: is not a line of the table; {named}")
            if axis == "devices.count" or (axis.startswith("data.") and (axis != "data.public" or "" in values)):
                accepted = "accepted: axes that leave each device its test images"
                raise ConfigError(f"--reference {axis}={value}: lines cannot be paired over other images; {accepted}")
        if missing := [device for device in self.chosen_on if device not in axes["device"]]:
            accepted = ", ".join(map(str, axes["device"]))
            raise ConfigError(f"results.chosen-on = {missing[0]}: accepted are the comparison's devices, {accepted}")


class _File(Section):
    results: ResultOptions = ResultOptions()


@dataclass(frozen=True)
class Cell:
    """One combination of values along the axes.

    Attributes:
        point: axis -> value, as in `results.csv`.
        config: all options.
        device: the device's partition id.
        budget: limits on the cost of its model.
        oracle: the metric set has the device's own training images.
        lacks: share of the device's classes whose images are removed from the public pool.
    """

    point: dict[str, str]
    config: RunConfig
    device: int
    budget: Budget
    oracle: bool
    lacks: float


@dataclass(frozen=True)
class Comparison:
    """A comparison.

    Attributes:
        axes: the values along each axis.
        options: options of all cells.
        parts: the grids, each with values for every axis.
        results: the tables to make.
    """

    axes: dict[str, list[Any]]
    options: dict[str, Any]
    parts: tuple[dict[str, list[Any]], ...]
    results: ResultOptions

    @property
    def columns(self) -> list[str]:
        """The columns of `results.csv`."""
        return [*self.axes, *self.results.columns, *IMAGES.values(), "refused"]

    def cells(self) -> Iterator[Cell]:
        """Yields every cell; the axes that are most expensive to change vary slowest.

        Raises:
            ConfigError: for a value that is not accepted.
        """
        grids = [{axis: {str(value) for value in values} for axis, values in part.items()} for part in self.parts]
        for values in itertools.product(*self.axes.values()):
            point = dict(zip(self.axes, values, strict=True))
            if any(all(str(value) in grid[axis] for axis, value in point.items()) for grid in grids):
                yield self._cell(point)

    def _cell(self, point: Mapping[str, Any]) -> Cell:
        options = {"devices.count": DEFAULT_DEVICES, **self.options}
        options |= {option_of(axis): value for axis, value in point.items() if axis not in OWN_AXES}
        oracle = options.get("metric.rule") == ORACLE
        if oracle:
            del options["metric.rule"]
        config = with_model_of_hub(RunConfig.from_flat(options))
        require_criterion(config.pruning.criterion)
        device, count = point["device"], config.devices.count
        if type(device) is not int or not 0 <= device < count:
            raise ConfigError(f"device = {device!r}: must lie in 0..{count - 1}")
        lacks = point.get("pool-lacks", 0)
        if isinstance(lacks, bool) or not isinstance(lacks, int | float) or not 0 <= lacks <= 1:
            raise ConfigError(f"pool-lacks = {lacks!r}: is a share of the device's classes and must lie in 0..1")
        budget = Budget.parse(point["budget"])
        shown = {axis: str(value) for axis, value in point.items()} | {"budget": str(budget)}
        return Cell(shown, config, device, budget, oracle, float(lacks))


def read_comparison(file: Path, assignments: Iterable[str] = ()) -> Comparison:
    """Returns the comparison of a TOML file.

    Args:
        assignments: options as ``key=value``; they override those of the file.

    Raises:
        ConfigError: if an axis or an option is not valid.
        TapflError: if the number of devices depends on the images, and these are missing or cannot be divided.
    """
    tables = read_toml_tables(file)
    table = tables.pop("compare", None)
    grids = table if isinstance(table, list) else [table]
    if not grids or not all(isinstance(g, dict) and all(isinstance(v, list) and v for v in g.values()) for g in grids):
        raise ConfigError(f'{file}: needs a table [compare] of lists, such as criterion = ["tap", "random"]')
    for grid in grids:
        if twice := sorted(axis for axis in grid if axis != axis_of(axis) in grid):
            raise ConfigError(f"{file}: compare.{twice[0]} and compare.{axis_of(twice[0])} are one axis; give only one")
    grids = [{axis_of(axis): values for axis, values in grid.items()} for grid in grids]
    for grid in grids:
        if "budget" in grid:  # one spelling of each budget
            grid["budget"] = [str(Budget.parse(value)) for value in grid["budget"]]
    known = {*OWN_AXES, *RunConfig().flat()}
    given_axes = list(dict.fromkeys(itertools.chain(*grids)))
    if odd := sorted(axis for axis in given_axes if option_of(axis) not in known):
        accepted = f"{', '.join(OWN_AXES)}, and any option of a run"
        raise ConfigError(f"{file}: compare.{odd[0]} is not an axis; accepted: {accepted}")
    results = validated(_File, {"results": tables.pop("results", {})}).results
    options = flatten(tables) | dict(parse_assignment(text) for text in assignments)
    if twice := sorted({option_of(axis) for axis in given_axes} & options.keys()):
        raise ConfigError(f"{twice[0]}: is an axis of [compare] and an option of all cells; give only one of the two")
    options |= _devices_of({**options, **{axis: values[0] for axis, values in grids[0].items()}})
    named = sorted(dict.fromkeys([*DEFAULTS, *given_axes]), key=stage_of)
    parts = tuple(_part(grid, named, options) for grid in grids)
    axes = {axis: list({str(value): value for part in parts for value in part[axis]}.values()) for axis in named}
    comparison = Comparison(axes, options, parts, results)
    if not list(comparison.cells()):  # checks every value before anything runs
        raise ConfigError(f"{file}: has no cells; accepted: a list of devices, or devices.count above 0")
    results.check(axes)
    return comparison


def axis_of(option: str) -> str:
    """Returns the name of an option as an axis: options of pruning lose their prefix."""
    short = option.removeprefix("pruning.")
    return short if option_of(short) == option else option


def option_of(axis: str) -> str:
    """Returns the dotted name of the option of an axis."""
    short = axis.replace("-", "_") in PruningOptions.model_fields
    return f"pruning.{axis}" if short else axis


def stage_of(axis: str) -> int:
    """Returns the position of an axis in `STAGES`; cells that differ only in a later stage share more work."""
    return max((i for i, pattern in enumerate(STAGES, start=1) if re.fullmatch(pattern, option_of(axis))), default=0)


def _devices_of(given: Mapping[str, Any]) -> dict[str, int]:
    """Returns the number of devices as an option, if the partition determines it from the images."""
    unknown = (*OWN_AXES, "metric.rule")  # metric.rule may be `ORACLE`
    config = RunConfig.from_flat({option_of(name): value for name, value in given.items() if name not in unknown})
    if "devices.count" in given or not config.data.makes_devices:
        return {}
    return {"devices.count": counted(absolute_paths(config)).devices.count}


def _part(grid: Mapping[str, list[Any]], named: Iterable[str], options: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Returns the values of every axis in one grid."""
    count = options.get("devices.count", DEFAULT_DEVICES)
    plain = {name: [value] for name, value in (RunConfig().flat() | {"pool-lacks": 0}).items()}
    plain |= {option_of(axis): values for axis, values in DEFAULTS.items()}
    plain |= {"device": list(range(count if type(count) is int else 0))}
    plain |= {name: [value] for name, value in options.items()}
    return {axis: grid.get(axis) or plain[option_of(axis)] for axis in named}
