"""Rows of a comparison as a table: mean ± standard deviation over devices and seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from experiments.compare.grid import Comparison
from tapfl.errors import ConfigError
from tapfl.pruning.budget import Budget

Groups = dict[tuple[str, ...], dict[str, list[Mapping[str, str]]]]


def grouped(rows: Sequence[Mapping[str, str]], comparison: Comparison, measure: str) -> tuple[list[str], Groups]:
    """Returns the axes that tell the lines of a table apart, and the rows of each line by budget.

    Those are the criterion and all axes of several values but seed, device and budget.

    Raises:
        ConfigError: if there is no such measure.
    """
    if rows and (measure not in rows[0] or measure in comparison.axes):
        accepted = [name for name in rows[0] if name not in comparison.axes and name != "refused"]
        raise ConfigError(f"--measure {measure}: accepted are {', '.join(accepted)}")
    free = ("seed", "device", "budget")
    named = [axis for axis, values in comparison.axes.items() if axis not in free and len(values) > 1]
    named = ["criterion", *(axis for axis in named if axis != "criterion")] if "criterion" in comparison.axes else named
    groups: Groups = {}
    for row in rows:
        groups.setdefault(tuple(row[axis] for axis in named), {}).setdefault(row["budget"], []).append(row)
    return named, groups


def table(
    rows: Sequence[Mapping[str, str]], comparison: Comparison, measure: str = "pruned_own"
) -> list[Mapping[str, str]]:
    """Returns one row a criterion (and a value of each other axis), one column a budget: mean ± sd (how many)."""
    named, groups = grouped(rows, comparison, measure)
    budgets = [str(Budget.parse(value)) for value in comparison.axes["budget"]]
    shown: list[Mapping[str, str]] = []
    for key, by_budget in groups.items():
        cells = {Budget.parse(b).title: _spread(by_budget.get(b, []), measure) for b in budgets}
        shown.append(dict(zip(named, key, strict=True)) | cells)
    return shown


def markdown(rows: Sequence[Mapping[str, str]]) -> str:
    """Returns rows as a Markdown table."""
    lines = [list(rows[0]), ["---"] * len(rows[0]), *(list(row.values()) for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def measured(rows: Sequence[Mapping[str, str]], measure: str) -> np.ndarray:
    """Returns the measure of the rows that were not refused, float64 (n,)."""
    return np.array([float(row[measure]) for row in rows if not row["refused"]])


def _spread(rows: Sequence[Mapping[str, str]], measure: str) -> str:
    values = measured(rows, measure)
    if not len(values):
        return "refused"
    return f"{values.mean():.3f} ± {values.std(ddof=1) if len(values) > 1 else 0:.3f} ({len(values)})"
