"""What a sweep is to be told by: the table `[sweep]` of its TOML, and the reference points of its tests.

```toml
[sweep]
reach = [0.5, 0.6]                                # accuracies: bytes and simulated time to each of them
reference = { "personalize.method" = "local" }    # every point is tested against the one that differs in this alone
```
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from pydantic import Field

from experiments.sweep.outcome import Point
from tapfl.errors import ConfigError
from tapfl.options import AnyShares, Scalar, Section, flatten, read_toml_tables, validated


class SweepOptions(Section):
    """How a sweep is reported."""

    reach: AnyShares = Field((), description="mean personal accuracies to which bytes and time are counted")
    reference: dict[str, Scalar] = Field(
        {}, description="values that make a point of the grid that it is tested against"
    )


def read_sweep_options(file: Path, reference: Mapping[str, Scalar] | None = None) -> SweepOptions:
    """Returns the table `[sweep]` of a sweep's TOML.

    Args:
        reference: in place of the file's, if there is one.

    Raises:
        ConfigError: if the table is not valid.
    """
    table = read_toml_tables(file).get("sweep", {})
    if not isinstance(table, dict):
        raise ConfigError(f"{file}: sweep = {table!r}: is a table, [sweep]")
    given = {**table, "reference": flatten(table["reference"])} if isinstance(table.get("reference"), dict) else table
    return validated(SweepOptions, {**given, **({"reference": reference} if reference else {})})


def references(points: Iterable[Point], reference: Mapping[str, Scalar]) -> dict[Point, Point]:
    """Returns for each point the one that has `reference`'s values and is the same otherwise, where that is another.

    Values are compared as they are written.

    Raises:
        ConfigError: if `reference` names no axis, or no point has such a one.
    """
    if not reference:
        return {}
    written = {frozenset((key, str(value)) for key, value in point): point for point in points}
    axes = dict.fromkeys(key for point in written.values() for key, _ in point)
    if unknown := [key for key in reference if key not in axes]:
        raise ConfigError(f"reference {unknown[0]}: is no axis of this sweep; accepted: {', '.join(axes)}")
    wanted = {key: str(value) for key, value in reference.items()}
    found: dict[Point, Point] = {}
    for own, point in written.items():
        other = written.get(frozenset((dict(own) | wanted).items()))
        if other is not None and other != point:
            found[point] = other
    if not found:
        said = ", ".join(f"{key}={value}" for key, value in wanted.items())
        accepted = "; ".join(f"{key}: {', '.join(_values(written.values(), key))}" for key in wanted)
        raise ConfigError(
            f"reference {said}: no point of the sweep has another one like it with that; there are {accepted}"
        )
    return found


def _values(points: Iterable[Point], key: str) -> list[str]:
    return list(dict.fromkeys(str(dict(point)[key]) for point in points if key in dict(point)))
