"""Learning curves of a sweep: accuracy against rounds, bytes and simulated time, a line a point of the grid."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from experiments.swept.outcome import Outcome, Point, grouped
from strategies.simulated import CurvePoint

# by title, where a point of a learning curve lies; what round zero cost is the same for all and left out
ACROSS: Mapping[str, Callable[[int, CurvePoint, CurvePoint], float]] = {
    "rounds": lambda round, point, start: round,
    "MB after round zero, up and down, all devices": lambda round, point, start: (point.bytes - start.bytes) / 1e6,
    "simulated seconds after round zero": lambda round, point, start: point.seconds - start.seconds,
}


def picture(runs: Sequence[Outcome], file: Path) -> None:
    """Draws the mean over seeds with a band of one standard deviation.

    With several axes of several values there is a line of panels for each value of the first of them. Dotted: the mean
    accuracy of the dense model on the devices' test parts.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import MaxNLocator

    groups = grouped(runs)
    panels = _panels(groups)
    figure, axes = plt.subplots(
        len(panels), len(ACROSS), figsize=(4.2 * len(ACROSS) + 2, 3.4 * len(panels) + 0.4), sharey=True, squeeze=False,
        layout="constrained",
    )  # fmt: skip
    names = list(dict.fromkeys(name for lines in panels.values() for name in lines))
    colours = plt.get_cmap("tab10" if len(names) <= 10 else "tab20")
    for row, (title, lines) in zip(axes, panels.items(), strict=True):
        for axis, (across, place) in zip(row, ACROSS.items(), strict=True):
            for name, point in lines.items():
                i = names.index(name)
                _line(axis, groups[point], place, label=name, color=colours(i % colours.N), marker="os^Dv"[i % 5])
            dense = np.mean([run.summary["dense_accuracy"] for point in lines.values() for run in groups[point]])
            axis.axhline(dense, color="grey", linestyle=":", linewidth=1)
            axis.annotate(
                "dense", (0.99, dense), xycoords=("axes fraction", "data"), ha="right", va="bottom", color="grey"
            )
            axis.set_xlabel(across)
            axis.xaxis.set_major_locator(MaxNLocator(nbins=7, integer=across == "rounds"))
            axis.grid(alpha=0.3)
        row[0].set_ylabel("personal accuracy")
        row[0].set_title(title, loc="left", fontsize=10)
    handles = {text: line for axis in axes[:, 0] for line, text in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside right upper", frameon=False)
    figure.savefig(file, dpi=130)
    plt.close(figure)


def _panels(groups: Mapping[Point, Sequence[Outcome]]) -> dict[str, dict[str, Point]]:
    """Returns the points by panel title and name of their line."""
    values: dict[str, set[str]] = {}
    for point in groups:
        for key, value in point:
            values.setdefault(key, set()).add(str(value))
    varied = [key for key in values if len(values[key]) > 1 or any(key not in dict(point) for point in groups)]
    by_panel = len(varied) > 1 and all(varied[0] in dict(point) for point in groups)
    panels: dict[str, dict[str, Point]] = {}
    for point in groups:
        place = dict(point)
        title = _name({varied[0]: place[varied[0]]}) if by_panel else ""
        rest = {key: value for key, value in place.items() if key in (varied[1:] if by_panel else varied or place)}
        panels.setdefault(title, {})[_name(rest)] = point
    return panels


def _name(place: Mapping[str, object]) -> str:
    """Short names: the last part of an option's, and a run's own name alone."""
    return ", ".join(str(v) if k == "run" else f"{k.rpartition('.')[2]} {v}" for k, v in place.items())


def _line(axis, runs: Sequence[Outcome], place, **style) -> None:  # type: ignore[no-untyped-def]
    length = min(len(run.curve) for run in runs)
    across = np.array([[place(t, run.curve[t], run.curve[0]) for t in range(length)] for run in runs]).mean(axis=0)
    accuracies = np.array([[point.accuracy for point in run.curve[:length]] for run in runs])
    mean, spread = accuracies.mean(axis=0), accuracies.std(axis=0, ddof=1) if len(runs) > 1 else 0
    axis.plot(across, mean, linewidth=1.4, markersize=3.5, **style)
    axis.fill_between(across, mean - spread, mean + spread, color=style["color"], alpha=0.15, linewidth=0)
