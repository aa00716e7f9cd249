"""The figure of a comparison: accuracy against MACs, one line per criterion, one panel per values of the other axes."""

from __future__ import annotations

import pandas as pd

from experiments.compare.grid import OWNER, Comparison
from experiments.compare.tables import line_axes, mean_over_devices
from experiments.figures.figure import Figure, Panel, panels_of_curves

DENSE = {"pruned": "dense", "pruned_own": "dense_own"}  # accuracy of the pruned model -> that of the dense model


def accuracy_against_macs(rows: pd.DataFrame, comparison: Comparison, measure: str) -> Figure | None:
    """Returns the mean of `measure` over devices and seeds with its standard error; None if no cell has the measure.

    For an accuracy of the pruned model, each panel also has the mean of the dense model, if that is one model.
    """
    held, drawn = points(rows, comparison, measure)
    if drawn.empty:
        return None
    drawn = drawn.assign(low=drawn["mean"] - drawn["error"], high=drawn["mean"] + drawn["error"])
    panels = []
    for panel, of_panel in held.groupby("panel", sort=False):
        own = drawn[drawn["panel"] == panel].sort_values("x", kind="stable")
        curves = own[["line", "x", "mean", "low", "high"]].to_dict("records")
        dense = mean_over_devices(of_panel, DENSE[measure]) if measure in DENSE else None
        panels.append(Panel(str(panel), "share of the dense model's MACs", curves, dense))
    value = "accuracy among the device's classes" if measure.endswith("own") else measure
    size = (640, 380) if len(panels) == 1 else (300, 240)
    chart, data = panels_of_curves(panels, value, min(len(panels), 3), size, bars=True)
    devices = ", ".join(map(str, sorted(held["device"].astype(int).unique())))
    level = {panel.dense for panel in panels}
    dense_too = f"; the dense model has {level.pop():.3f}" if len(level) == 1 and None not in level else ""
    return Figure(
        "accuracy-against-macs",
        f"{'Accuracy after pruning' if measure in DENSE else measure} against MACs: "
        f"mean ± standard error, devices {devices}",
        f"Mean and standard error over devices {devices} and all seeds{dense_too}.",
        chart,
        data,
        [row for panel in panels for row in panel.rows],
    )


def points(rows: pd.DataFrame, comparison: Comparison, measure: str) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Returns the rows that are drawn, and one row per point: panel, line, budget, x (share of the MACs), mean, error.

    A panel is a combination of the axes other than the criterion. Several grids share one panel.
    """
    axes = line_axes(comparison)
    apart = [] if len(comparison.parts) > 1 else axes[1:]
    records = rows.to_dict("records")
    rows = rows.assign(
        line=[", ".join(row[axis] for axis in axes if axis not in apart) for row in records],
        panel=["\n".join(f"{axis}: {row[axis]}" for axis in apart) for row in records],
    )
    held = comparable(rows, measure)
    measured = held[held[measure] != ""].astype({measure: float, "macs_share": float})
    groups = measured.groupby(["panel", "line", "budget"], sort=False)
    drawn = groups.agg(x=("macs_share", "mean"), mean=(measure, "mean"), error=(measure, "sem"))
    drawn["error"] = drawn["error"].fillna(0)  # of a single value
    return held, drawn.reset_index()


def comparable(rows: pd.DataFrame, measure: str) -> pd.DataFrame:
    """Returns the rows of the devices and seeds that all lines with several budgets have, so that means are comparable.

    A line with one budget is left out if it does not have all of these devices and seeds. If there are none in common,
    as in a comparison that has just begun, all rows are returned.
    """
    key = ["panel", "line", "budget"]
    owners = {
        group: set(zip(*(part[name] for name in OWNER), strict=True))
        for group, part in rows[rows[measure] != ""].groupby(key, sort=False)
    }
    budgets = pd.Series([group[:2] for group in owners], dtype=object).value_counts()
    several = [found for group, found in owners.items() if budgets[group[:2]] >= min(2, budgets.max())]
    common = set.intersection(*several) if several else set()
    if not common:
        return rows
    kept = {(*group, *owner) for group, found in owners.items() if found >= common for owner in common}
    return rows[[row in kept for row in rows[[*key, *OWNER]].itertuples(index=False, name=None)]]
