"""Mean curves of several methods in panels, with their spread and the dense model's level."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import altair as alt

from experiments.figures.figure import Chart, Row, line_styles

MARGIN = 0.05  # of the range of values, above and below the curves


@dataclass(frozen=True)
class Panel:
    """Curves over one quantity.

    Attributes:
        title: of the panel.
        across: title of the x axis.
        rows: line (its name), x, mean, low, high.
        dense: the dense model's value, a horizontal line.
        whole: x has whole values only.
    """

    title: str
    across: str
    rows: Sequence[Row]
    dense: float
    whole: bool = False


def panels_of_curves(
    panels: Sequence[Panel], value: str, columns: int, size: tuple[int, int], bars: bool = False
) -> tuple[Chart, dict[str, Sequence[Row]]]:
    """Returns the panels in rows of `columns`, on one scale of values and with one legend, and the data they refer to.

    Args:
        value: title of the y axis.
        size: of a panel, in pixels.
        bars: draw error bars from low to high, not a band.
    """
    names = list(dict.fromkeys(row["line"] for panel in panels for row in panel.rows))
    values = [row[key] for panel in panels for row in panel.rows for key in ("low", "high")]
    values += [panel.dense for panel in panels]
    margin = MARGIN * (max(values) - min(values))
    scale = alt.Scale(domain=[min(values) - margin, max(values) + margin], nice=False, zero=False)
    data = {f"panel {k}": panel.rows for k, panel in enumerate(panels)}
    drawn = []
    for k, (name, panel) in enumerate(zip(data, panels, strict=True)):
        layers = _layers(name, panel, value if k % columns == 0 else "", names, (scale, bars))
        title = {"title": alt.TitleParams(panel.title.split("\n"), fontSize=12, offset=8)} if panel.title else {}
        drawn.append(alt.layer(*layers).properties(width=size[0], height=size[1], **title))
    return alt.concat(*drawn, columns=columns, spacing=24), data


def _layers(name: str, panel: Panel, value: str, names: Sequence[str], form: tuple[alt.Scale, bool]) -> list[alt.Chart]:
    scale, bars = form
    ticks = alt.Axis(tickCount=max((row["x"] for row in panel.rows), default=1)) if panel.whole else alt.Axis()
    x = alt.X("x:Q", title=panel.across, scale=alt.Scale(zero=False, nice=False, padding=8), axis=ticks)
    y = alt.Y("mean:Q", title=value or None, scale=scale)
    styles = line_styles(
        "line", names, alt.Legend(orient="right", columns=1, labelLimit=0, symbolOpacity=1, symbolStrokeWidth=0)
    )
    colour = {"color": styles["color"]}
    base = alt.Chart(alt.NamedData(name=name)).encode(x=x)
    spread = base.mark_rule(strokeWidth=1.5) if bars else base.mark_area(opacity=0.14)
    level = alt.Chart(alt.InlineData(values=[{"text": "dense"}])).encode(y=alt.YDatum(panel.dense, scale=scale))
    return [
        spread.encode(y=alt.Y("low:Q", scale=scale), y2="high:Q", **colour),
        level.mark_rule(strokeDash=[2, 3]),
        level.mark_text(align="left", baseline="bottom", dx=4, dy=-2).encode(x=alt.value(0), text="text:N"),
        base.mark_line().encode(y=y, **colour, strokeDash=styles["strokeDash"]),
        base.mark_point().encode(y=y, **colour, shape=styles["shape"]),
    ]
