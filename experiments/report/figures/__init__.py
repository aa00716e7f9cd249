"""The figures of one run."""

from __future__ import annotations

from collections.abc import Callable

from experiments.figures.figure import Figure
from experiments.report.figures import costs, images, learning, widths
from experiments.report.reading import Run

DRAWN: tuple[Callable[[Run], Figure | None], ...] = (  # in the order of the page
    learning.accuracy,
    learning.curves,
    learning.alpha,
    images.partition,
    widths.kept_attention,
    widths.kept_ffn,
    images.coverage,
    images.metric_classes,
    costs.traffic,
    costs.simulated_rounds,
    costs.phases,
    costs.real_rounds,
)


def figures(run: Run) -> list[Figure]:
    """Returns the figures for which a run has the numbers."""
    made = (draw(run) for draw in DRAWN)
    return [figure for figure in made if figure is not None]
