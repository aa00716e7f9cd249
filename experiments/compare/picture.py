"""Accuracy against MACs: one line per criterion, one panel per combination of the other axes."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from experiments.compare.grid import Comparison
from experiments.compare.tables import OWNER, line_axes, mean_over_devices


def picture(rows: pd.DataFrame, comparison: Comparison, file: Path, measure: str) -> None:
    """Draws the mean of `measure` over devices and seeds with its standard error, and the dense model's mean."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    held, drawn = points(rows, comparison, measure)
    panels, labels = list(held["panel"].unique()), list(drawn["line"].unique())
    columns = min(len(panels), 3)
    height = -(-len(panels) // columns)
    size = (4.6 * columns + 1.6, 3.6 * height) if panels != [""] else (9.5, 5.0)
    figure, axes = plt.subplots(
        height, columns, figsize=size, sharex=True, sharey=True, squeeze=False, layout="constrained"
    )
    colours = plt.get_cmap("tab20", 20)
    dense = mean_over_devices(held, "dense_own" if measure.endswith("own") else "dense")
    legend = {}
    for axis, panel in zip(axes.flat, panels, strict=False):
        for label, line in drawn[drawn["panel"] == panel].groupby("line", sort=False):
            line, i = line.sort_values("x"), labels.index(label)
            legend[label] = axis.errorbar(
                *(line[name] for name in ("x", "mean", "error")),
                color=colours(i % 20), marker="os^Dv"[i % 5], markersize=4, linewidth=1, capsize=2
            )  # fmt: skip
        axis.axhline(dense, color="grey", linestyle=":", linewidth=1)
        axis.annotate("dense", (0.01, dense), xycoords=("axes fraction", "data"), va="bottom", color="grey", fontsize=8)
        axis.set_title(panel, fontsize=9)
        axis.grid(alpha=0.3)
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    devices = sorted(held["device"].astype(int).unique())
    figure.supxlabel(f"share of the dense model's MACs (devices {', '.join(map(str, devices))})")
    figure.supylabel("accuracy among the device's classes" if measure.endswith("own") else measure)
    figure.legend([legend[label] for label in labels], labels, loc="outside right upper", fontsize=8, frameon=False)
    figure.savefig(file, dpi=130)
    plt.close(figure)


def points(rows: pd.DataFrame, comparison: Comparison, measure: str) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Returns the rows that are drawn, and a row per point: panel, line, x (share of the MACs), mean, standard error.

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
    drawn = groups.agg(x=("macs_share", "mean"), mean=(measure, "mean"), std=(measure, lambda v: v.std(ddof=0)))
    drawn["error"] = drawn["std"] / groups.size() ** 0.5
    return held, drawn.reset_index()


def comparable(rows: pd.DataFrame, measure: str) -> pd.DataFrame:
    """Returns the rows of the devices and seeds that all lines of several budgets have: other means do not compare.

    A line of one budget that lacks some of these is left out. If there are none, as in a comparison that has just
    begun, all rows are returned.
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
