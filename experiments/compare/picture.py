"""Accuracy against MACs, a line a criterion, a panel a value of the other axes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from experiments.compare.grid import Comparison
from experiments.compare.table import grouped, measured


def picture(rows: Sequence[Mapping[str, str]], comparison: Comparison, file: Path, measure: str) -> None:
    """Draws the mean of `measure` over devices and seeds, with its standard error, and the dense model's beside it."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    named, groups = grouped(rows, comparison)
    panels = list(dict.fromkeys(key[1:] for key in groups))
    columns = min(len(panels), 3)
    lines = -(-len(panels) // columns)
    figure, axes = plt.subplots(
        lines, columns, figsize=(4.6 * columns + 1.6, 3.6 * lines), sharex=True, sharey=True, squeeze=False,
        layout="constrained",
    )  # fmt: skip
    criteria = list(dict.fromkeys(key[0] for key in groups))
    colours = plt.get_cmap("tab20", 20)
    dense = measured(rows, "dense_own" if measure.endswith("own") else "dense").mean()
    for axis, panel in zip(axes.flat, panels, strict=False):
        for i, criterion in enumerate(criteria):
            found = groups.get((criterion, *panel), {})
            points = sorted(
                (measured(part, "macs_share").mean(), measured(part, measure)) for part in found.values()
                if len(measured(part, measure))
            )  # fmt: skip
            if points:
                axis.errorbar(
                    [x for x, _ in points],
                    [values.mean() for _, values in points],
                    [values.std() / len(values) ** 0.5 for _, values in points],
                    label=criterion, color=colours(i % 20), marker="os^Dv"[i % 5], markersize=4, linewidth=1, capsize=2
                )  # fmt: skip
        axis.axhline(dense, color="grey", linestyle=":", linewidth=1)
        axis.annotate("dense", (0.01, dense), xycoords=("axes fraction", "data"), va="bottom", color="grey", fontsize=8)
        axis.set_title(", ".join(f"{name}: {value}" for name, value in zip(named[1:], panel, strict=True)), fontsize=9)
        axis.grid(alpha=0.3)
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    figure.supxlabel("share of the dense model's MACs")
    figure.supylabel("accuracy among the device's classes" if measure.endswith("own") else measure)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", fontsize=8, frameon=False)
    figure.savefig(file, dpi=130)
    plt.close(figure)
