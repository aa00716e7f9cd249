"""Rows of a comparison as tables: mean ± standard deviation over devices and seeds, and differences to one line."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from experiments.compare.grid import Comparison
from experiments.compare.results import ResultOptions
from experiments.statistics import Paired, by_device, paired
from tapfl.pruning.budget import Budget

Rows = Sequence[Mapping[str, str]]
LONGEST = 40  # letters of a reference that has room in the head of a column

Groups = dict[tuple[str, ...], dict[str, list[Mapping[str, str]]]]


@dataclass(frozen=True)
class Section:
    """A table: what it is of, and its rows as they are shown."""

    measure: str
    devices: str
    rows: list[Mapping[str, str]]


def sections(rows: Rows, comparison: Comparison, results: ResultOptions) -> Iterator[Section]:
    """Yields the tables: a measure each, of the devices that no method was chosen on, and of all."""
    held = comparison.axes["device"]
    others = [device for device in held if device not in results.chosen_on]
    for measure in results.show:
        apart = [row for row in rows if int(row["device"]) in others]
        if results.chosen_on and apart:
            named = f"devices {', '.join(map(str, others))}, on which nothing was chosen"
            yield Section(measure, named, table(apart, comparison, measure, results.values))
        named = f"all {len(held)} devices" if len(held) > 1 else f"device {held[0]}"
        yield Section(measure, named, table(rows, comparison, measure, results.values))


def table(
    rows: Rows, comparison: Comparison, measure: str = "pruned_own", reference: Mapping[str, str] | None = None
) -> list[Mapping[str, str]]:
    """Returns one row a criterion (and a value of each other axis), one column a budget: mean ± sd (how many).

    Args:
        reference: axis -> value; a further column a budget says how a line differs from the one of these values.
    """
    named, groups = grouped(rows, comparison)
    budgets = [str(Budget.parse(value)) for value in comparison.axes["budget"]]
    to = named_reference(reference or {})
    to = f"({to})" if len(to) <= LONGEST else "reference"  # which the caption of the page names
    shown: list[Mapping[str, str]] = []
    for key, by_budget in groups.items():
        line = dict(zip(named, key, strict=True))
        base = tuple((line | dict(reference or {}))[axis] for axis in named)
        cells = {}
        for budget in budgets:
            found, title = by_budget.get(budget, []), Budget.parse(budget).title
            cells[title] = _spread(found, measure)
            if reference:
                other = groups.get(base, {}).get(budget, [])
                apart = "reference" if base == key else difference(found, other, measure)
                cells[f"{title} − {to}"] = "" if apart is None else str(apart)
        shown.append(line | cells)
    return shown


def named_reference(reference: Mapping[str, str]) -> str:
    """Returns the values that a reference line has, as they are given: ``axis=value axis=value``."""
    return " ".join(f"{axis}={value}" for axis, value in reference.items())


def grouped(rows: Rows, comparison: Comparison) -> tuple[list[str], Groups]:
    """Returns the axes that tell the lines of a table apart, and the rows of each line by budget.

    Those are the criterion and all axes of several values but seed, device and budget.
    """
    free = ("seed", "device", "budget")
    named = [axis for axis, values in comparison.axes.items() if axis not in free and len(values) > 1]
    named = ["criterion", *(axis for axis in named if axis != "criterion")]
    groups: Groups = {}
    for row in rows:
        groups.setdefault(tuple(row[axis] for axis in named), {}).setdefault(row["budget"], []).append(row)
    return named, groups


def measured(rows: Rows, measure: str) -> np.ndarray:
    """Returns the measure of the rows that have it, float64 (n,)."""
    return np.array([float(row[measure]) for row in rows if row[measure]])


def mean_over_devices(rows: Rows, measure: str) -> float:
    """Returns the mean of what does not depend on a line, such as the dense model's: a device of a seed counts once."""
    return float(np.mean(list(_by_device_and_seed(rows, measure).values())))


def difference(
    line: Sequence[Mapping[str, str]], reference: Sequence[Mapping[str, str]], measure: str
) -> Paired | None:
    """Returns how a line differs from the reference on the devices and seeds that both have; None if there are none."""
    ours, theirs = _by_device_and_seed(line, measure), _by_device_and_seed(reference, measure)
    common = [key for key in ours if key in theirs]
    if not common:
        return None
    means = [by_device((key[0], values[key]) for key in common) for values in (ours, theirs)]
    return paired(*means)


def _spread(rows: Rows, measure: str) -> str:
    values = measured(rows, measure)
    if not len(values):
        return "refused" if any(row["refused"] for row in rows) else ""
    return f"{values.mean():.3f} ± {values.std(ddof=1) if len(values) > 1 else 0:.3f} ({len(values)})"


def _by_device_and_seed(rows: Sequence[Mapping[str, str]], measure: str) -> dict[tuple[str, str], float]:
    return {(row["device"], row["seed"]): float(row[measure]) for row in rows if row[measure]}
