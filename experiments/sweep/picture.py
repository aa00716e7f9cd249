"""Learning curves of a sweep: accuracy against rounds, bytes and simulated time, one line per point of the grid."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

from experiments.figures.figure import Figure, Panel, Row, panels_of_curves
from experiments.sweep.grid import Point
from experiments.sweep.results import Outcome, grouped
from strategies.records import CurvePoint

# x values of a learning curve, by axis title; the cost of round zero is the same for all runs and left out
ACROSS: Mapping[str, Callable[[int, CurvePoint, CurvePoint], float]] = {
    "rounds": lambda round, point, start: round,
    "MB after round zero, up and down, all devices": lambda round, point, start: (point.bytes - start.bytes) / 1e6,
    "simulated seconds after round zero": lambda round, point, start: point.seconds - start.seconds,
}


def learning_curves(runs: Sequence[Outcome]) -> Figure:
    """Returns the mean curves over seeds, with a band of one standard deviation.

    If several axes of the grid have several values, there is a row of panels for each value of the first such axis. The
    dotted line is the mean accuracy of the dense model on the devices' test images.
    """
    groups = grouped(runs)
    panels = []
    for title, lines in _panels(groups).items():
        dense = float(np.mean([run.summary.dense_accuracy for point in lines.values() for run in groups[point]]))
        for k, (across, place) in enumerate(ACROSS.items()):
            rows = [row for name, point in lines.items() for row in _curve(name, groups[point], place)]
            panels.append(Panel("" if k else title, across, rows, dense, whole=across == "rounds"))
    drawn, data = panels_of_curves(panels, "mean personal accuracy", len(ACROSS), (300, 240))
    last = {row["line"]: row["mean"] for row in panels[0].rows}
    return Figure(
        "learning-curves",
        "Mean personal accuracy ± standard deviation over seeds, against rounds, bytes and time",
        "Accuracy after the last round: " + ", ".join(f"{name} {value:.3f}" for name, value in last.items()) + ".",
        drawn,
        data,
        [row for panel in panels for row in panel.rows],
    )


def _panels(groups: Mapping[Point, Sequence[Outcome]]) -> dict[str, dict[str, Point]]:
    """Returns the points of each panel, by the panel's title and the name of the point's line."""
    points = {point: dict(point) for point in groups}
    keys = dict.fromkeys(key for place in points.values() for key in place)
    short = Counter(key.rpartition(".")[2] for key in keys)

    def name(place: Mapping[str, object], keys: Sequence[str]) -> str:
        """Names options by their last part, unless two share it; a named run has only its name."""
        parts = {key: last if short[last := key.rpartition(".")[2]] == 1 else key for key in keys}
        return ", ".join(str(place[key]) if key == "run" else f"{part} {place[key]}" for key, part in parts.items())

    varied = [key for key in keys if len({str(place.get(key)) for place in points.values()}) > 1]
    first = varied[0] if len(varied) > 1 and all(varied[0] in place for place in points.values()) else None
    panels: dict[str, dict[str, Point]] = {}
    for point, place in points.items():
        rest = [key for key in place if key != first and key in (varied or place)]
        panels.setdefault(name(place, [first] if first else []), {})[name(place, rest) or "all seeds"] = point
    return panels


def _curve(name: str, runs: Sequence[Outcome], place: Callable[[int, CurvePoint, CurvePoint], float]) -> Iterator[Row]:
    for t, points in enumerate(zip(*(run.curve for run in runs), strict=False)):  # as long as the shortest
        accuracies = [point.accuracy for point in points]
        mean, deviation = np.mean(accuracies), np.std(accuracies, ddof=1) if len(runs) > 1 else 0.0
        x = np.mean([place(t, point, run.curve[0]) for point, run in zip(points, runs, strict=True)])
        ends = {"low": float(mean - deviation), "high": float(mean + deviation)}
        yield {"line": name, "x": float(x), "mean": float(mean)} | ends
