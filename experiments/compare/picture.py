"""Accuracy against MACs, a line a criterion, a panel a value of the other axes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from experiments.compare.grid import Comparison
from experiments.compare.table import Groups, grouped, mean_over_devices, measured

Owner = tuple[str, str]  # a device, and the seed that decides its images
Lines = dict[tuple[tuple[str, ...], str], dict[str, list[Mapping[str, str]]]]


def picture(rows: Sequence[Mapping[str, str]], comparison: Comparison, file: Path, measure: str) -> None:
    """Draws the mean of `measure` over devices and seeds, with its standard error, and the dense model's beside it."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    named, groups = grouped(rows, comparison)
    lines, held = comparable(_lines(groups, several_grids=len(comparison.parts) > 1), measure)
    lines = {line: by_budget for line, by_budget in lines.items() if by_budget}
    panels = list(dict.fromkeys(panel for panel, _ in lines))
    columns = min(len(panels), 3)
    height = -(-len(panels) // columns)
    size = (4.6 * columns + 1.6, 3.6 * height) if panels != [()] else (9.5, 5.0)
    figure, axes = plt.subplots(
        height, columns, figsize=size, sharex=True, sharey=True, squeeze=False, layout="constrained"
    )
    labels = list(dict.fromkeys(label for _, label in lines))
    colours = plt.get_cmap("tab20", 20)
    of_held = [row for row in rows if _owner(row) in held]
    dense = mean_over_devices(of_held, "dense_own" if measure.endswith("own") else "dense")
    drawn = {}
    for axis, panel in zip(axes.flat, panels, strict=False):
        for i, label in enumerate(labels):
            points = sorted(
                (measured(part, "macs_share").mean(), measured(part, measure))
                for part in lines.get((panel, label), {}).values()
                if len(measured(part, measure))
            )
            if points:
                drawn[label] = axis.errorbar(
                    [x for x, _ in points],
                    [values.mean() for _, values in points],
                    [values.std() / len(values) ** 0.5 for _, values in points],
                    color=colours(i % 20), marker="os^Dv"[i % 5], markersize=4, linewidth=1, capsize=2
                )  # fmt: skip
        axis.axhline(dense, color="grey", linestyle=":", linewidth=1)
        axis.annotate("dense", (0.01, dense), xycoords=("axes fraction", "data"), va="bottom", color="grey", fontsize=8)
        axis.set_title("\n".join(f"{name}: {value}" for name, value in zip(named[1:], panel, strict=False)), fontsize=9)
        axis.grid(alpha=0.3)
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    devices = sorted({int(device) for device, _ in held})
    figure.supxlabel(f"share of the dense model's MACs (devices {', '.join(map(str, devices))})")
    figure.supylabel("accuracy among the device's classes" if measure.endswith("own") else measure)
    figure.legend(list(drawn.values()), list(drawn), loc="outside right upper", fontsize=8, frameon=False)
    figure.savefig(file, dpi=130)
    plt.close(figure)


def _lines(groups: Groups, several_grids: bool) -> Lines:
    """Returns the rows of each line by budget, under its panel and its label.

    A panel is a value of the axes beside the criterion. Several grids have hardly a panel in common: theirs is one.
    """
    if not several_grids:
        return {(key[1:], key[0]): found for key, found in groups.items()}
    return {((), ", ".join(key)): found for key, found in groups.items()}


def comparable(lines: Lines, measure: str) -> tuple[Lines, set[Owner]]:
    """Returns the lines over the devices and seeds that all of them have, and these: means over others do not compare.

    They are those of all lines of several budgets; a line of one budget that lacks some of them is left to the table.
    Where there are none, as in a comparison that was just begun, each line has its own.
    """
    had = {
        line: {budget: owners for budget, found in by_budget.items() if (owners := _owners(found, measure))}
        for line, by_budget in lines.items()
    }
    most = max(map(len, had.values()), default=0)
    several = [owners for by_budget in had.values() if len(by_budget) >= min(2, most) for owners in by_budget.values()]
    held = set.intersection(*several) if several else set()
    if not held:
        return lines, {_owner(row) for by_budget in lines.values() for found in by_budget.values() for row in found}
    return {
        line: {
            budget: [row for row in found if _owner(row) in held]
            for budget, found in by_budget.items()
            if had[line].get(budget, set()) >= held
        }
        for line, by_budget in lines.items()
    }, held


def _owners(rows: Sequence[Mapping[str, str]], measure: str) -> set[Owner]:
    return {_owner(row) for row in rows if row[measure]}


def _owner(row: Mapping[str, str]) -> Owner:
    return row["device"], row["seed"]
