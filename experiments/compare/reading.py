"""A comparison as it is given: the tables of a TOML file, and `--set` above them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from experiments.compare.grid import DEFAULT_DEVICES, DEFAULTS, OWN_AXES, Comparison, option_of, stage_of
from experiments.compare.results import ResultOptions
from tapfl.config import RunConfig, flatten, parse_assignment, read_toml_tables, validated
from tapfl.errors import ConfigError


def read_comparison(file: Path, assignments: Iterable[str] = ()) -> Comparison:
    """Returns the comparison of a TOML file.

    Args:
        assignments: options as ``key=value``, above those of the file.

    Raises:
        ConfigError: if an axis or an option is not valid.
    """
    tables = read_toml_tables(file)
    given = tables.pop("compare", None)
    grids = given if isinstance(given, list) else [given]
    if not grids or not all(isinstance(grid, dict) and _lists(grid) for grid in grids):
        raise ConfigError(f'{file}: needs a table [compare] of lists, such as criterion = ["tap", "random"]')
    known = {*OWN_AXES, *RunConfig().flat()}
    if odd := sorted(axis for grid in grids for axis in grid if option_of(axis) not in known):
        raise ConfigError(
            f"{file}: compare.{odd[0]} is no axis; accepted: {', '.join(OWN_AXES)}, and any option of a run"
        )
    results = validated(ResultOptions, tables.pop("results", {}))
    options = flatten(tables) | dict(parse_assignment(text) for text in assignments)
    given_axes = list(dict.fromkeys(axis for grid in grids for axis in grid))
    if twice := sorted({option_of(axis) for axis in given_axes} & options.keys()):
        raise ConfigError(f"{twice[0]}: is an axis of [compare] and an option of all cells; give one of the two")
    named = sorted(dict.fromkeys([*DEFAULTS, *given_axes]), key=stage_of)
    parts = tuple(_part(grid, named, options) for grid in grids)
    axes = {axis: _without_repeats(value for part in parts for value in part[axis]) for axis in named}
    comparison = Comparison(axes, options, parts, results)
    for _ in comparison.cells():  # every value is checked before anything runs
        pass
    results.check(axes)
    return comparison


def _lists(grid: Mapping[str, Any]) -> bool:
    return all(isinstance(values, list) and values for values in grid.values())


def _part(grid: Mapping[str, list[Any]], named: Iterable[str], options: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Returns the values of every axis in one grid."""
    count = options.get("devices.count", DEFAULT_DEVICES)
    plain = {name: [value] for name, value in (RunConfig().flat() | {"pool-lacks": 0}).items()}
    plain |= {option_of(axis): values for axis, values in DEFAULTS.items()}
    plain |= {"device": list(range(count if type(count) is int else 0))}
    plain |= {name: [value] for name, value in options.items()}
    return {axis: grid.get(axis) or plain[option_of(axis)] for axis in named}


def _without_repeats(values: Iterable[Any]) -> list[Any]:
    return list({str(value): value for value in values}.values())
