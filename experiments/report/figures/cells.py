"""Heat maps with a line a device."""

from __future__ import annotations

from collections.abc import Sequence

import altair as alt

from experiments.figures.figure import Row, chart, device_axis, faded

GAP = 0.06  # between the cells of a heat map, as a share of them
CELL_LABELS = 30  # cells across, up to which counts are written into them


def cells(
    rows: Sequence[Row],
    devices: Sequence[int],
    x: alt.X,
    value: str,
    legend: str,
    tooltip: Sequence[object],
    across: int,
    text: str = "",
    domain: tuple[float, float] | None = None,
    format: str = "d",
) -> list[alt.Chart]:
    """Returns the layers of a heat map, devices down; where there is room, with the numbers in its cells.

    Args:
        rows: what the figure has as `cells`.
    """
    written = across <= CELL_LABELS and len(devices) <= CELL_LABELS
    high = domain[1] if domain else max(row[value] for row in rows)
    scale = alt.Scale(domain=domain or [0, high])
    drawn = (
        chart("cells")
        .mark_rect(cornerRadius=1)
        .encode(
            y=device_axis(devices, GAP),
            x=x,
            color=alt.Color(
                f"{value}:Q",
                scale=scale,
                legend=None if written else alt.Legend(title=legend, format=format, tickCount=4),
            ),
            opacity=faded(),
            tooltip=tooltip,
        )
    )
    if not written:
        return [drawn]
    words = (
        chart("cells")
        .mark_text(fontSize=10)
        .encode(
            y=device_axis(devices, GAP),
            x=x,
            text=text or f"{value}:Q",
            color=alt.condition(f"datum[{value!r}] > {0.55 * high}", alt.value("white"), alt.value(alt.ExprRef("ink"))),
            opacity=faded(0.25),
            tooltip=tooltip,  # it lies above its cell
        )
    )
    return [drawn, words]
