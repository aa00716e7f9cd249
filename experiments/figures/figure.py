"""A figure: one Vega-Lite description for the page and for the picture file, with its words and its numbers."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeAlias

import altair as alt
import pandas as pd
import vl_convert

from experiments.figures.theme import CATEGORIES, picture_config
from tapfl.store import write_bytes

Row = dict[str, Any]
Rows: TypeAlias = Sequence[Row] | pd.DataFrame
Chart = alt.Chart | alt.LayerChart | alt.FacetChart | alt.HConcatChart | alt.VConcatChart | alt.ConcatChart

DEVICE = "device"  # the variable of a figure that the page's device picker sets; null: all of them
PICKED = f"{DEVICE} === null || datum.device === {DEVICE}"
ZOOM = "Drag to move along the axis, Ctrl and the wheel to zoom, double-click to reset."
LINE = 24  # pixels a device, where there are few
WIDTH = 720  # pixels of a picture's drawing itself; the file has twice as many
DASHES = ([1, 0], [6, 4], [2, 3], [10, 3, 2, 3])  # for the second, third, … time that the colours are used
SHAPES = ("circle", "square", "triangle-up", "diamond", "triangle-down")
MARGIN = 0.05  # of the range of values, above and below the curves of a panel
NO_XML = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\ud800-\udfff\ufffe\uffff]")


@dataclass(frozen=True)
class Figure:
    """A chart with its words and numbers.

    Attributes:
        name: of its files.
        title: what is seen.
        alt: what it shows, in sentences with numbers, for readers who cannot see it.
        chart: as wide as its container, or of several charts with widths of their own.
        data: rows by the name under which the chart refers to them. They are kept apart from it, because altair would
            copy and check them against a schema value by value: a minute for a hundred devices of two hundred classes.
        table: the numbers behind it; default: the first of `data`.
        columns: of the table that are shown; default: all.
        wide: as wide as the page, not half of it.
        hint: how to use it on the page.
        group, choice: figures of one group share a place on the page, each shown under its choice.
    """

    name: str
    title: str
    alt: str
    chart: Chart
    data: Mapping[str, Rows]
    table: Rows | None = None
    columns: Sequence[str] = ()
    wide: bool = False
    hint: str = ""
    group: str = ""
    choice: str = ""

    @property
    def rows(self) -> list[Row]:
        """The numbers behind the figure."""
        return plain(next(iter(self.data.values())) if self.table is None else self.table)

    @cached_property
    def spec(self) -> dict[str, Any]:
        """Returns the Vega-Lite description without a configuration: page and picture have one each."""
        chart = self.chart.properties(title=self.title, description=f"{self.title}. {self.alt}")
        described: dict[str, Any] = chart.to_dict()
        described.pop("config", None)
        described.setdefault("datasets", {}).update((name, plain(rows)) for name, rows in self.data.items())
        single = described.get("width") == "container"
        return described | ({"autosize": {"type": "fit-x", "contains": "padding"}} if single else {})


def plain(rows: Rows) -> list[Row]:
    """Returns rows of plain values, None where a table has none."""
    if isinstance(rows, pd.DataFrame):
        rows = rows.astype(object).where(rows.notna(), None).to_dict("records")
    return list(rows)


def write_figure(figure: Figure, file: Path) -> None:
    """Writes a figure on white: as SVG if the file's name ends in ``.svg``, else as PNG with two pixels a point.

    Raises:
        OSError: if the file cannot be written.
    """
    spec = _drawable(figure.spec)
    if spec.get("width") == "container":
        spec["width"] = WIDTH
    if file.suffix == ".svg":
        write_bytes(file, vl_convert.vegalite_to_svg(spec, config=picture_config()).encode())
    else:
        write_bytes(file, vl_convert.vegalite_to_png(spec, config=picture_config(), scale=2))


def _drawable(value: Any) -> Any:
    """Returns a description with U+FFFD for what no SVG can hold: such a letter would abort the whole process."""
    if isinstance(value, str):
        return NO_XML.sub("\ufffd", value)
    if isinstance(value, dict):
        return {_drawable(key): _drawable(each) for key, each in value.items()}
    return [_drawable(each) for each in value] if isinstance(value, list | tuple) else value


# -- parts of charts ---------------------------------------------------------------------------------------------------


def chart(data: str) -> alt.Chart:
    """Returns an empty chart of the rows that its figure has under this name, as wide as its container."""
    return alt.Chart(alt.NamedData(name=data), width="container")


def layered(*layers: alt.Chart, height: float) -> Chart:
    """Returns the layers on top of each other, with the variable that the device picker sets."""
    stack = alt.layer(*layers).properties(width="container", height=height)
    return stack.add_params(alt.param(name=DEVICE, value=None))


def device_axis(devices: Sequence[int], gap: float = 0.0) -> alt.Y:
    """Returns the axis with a line a device, the same in all figures, its title above it.

    Args:
        gap: between the lines, as a share of a line.
    """
    title = alt.Axis(title="device", titleAngle=0, titleAlign="right", titleBaseline="bottom", titleX=-6, titleY=-6)
    scale = alt.Scale(domain=list(devices), paddingInner=gap) if gap else alt.Scale(domain=list(devices))
    return alt.Y("device:O", axis=title, scale=scale)


def device_height(devices: Sequence[int]) -> int:
    """Returns the height of a figure with a line a device; the lines of many devices are thin."""
    return len(devices) * max(4, min(LINE, 900 // max(len(devices), 1)))


def devices_of(frame: pd.DataFrame) -> list[int]:
    """Returns the partition ids in `frame`, in order."""
    return sorted(frame["device"].unique().tolist())


def round_axis(rounds: Iterable[int], title: str = "round") -> alt.X:
    """Returns the axis of `rounds`, labelled at whole numbers only, however far it is zoomed."""
    ticks = alt.Axis(
        tickCount=max(1, min(10, int(max(rounds)))),
        labelExpr="datum.value % 1 ? '' : format(datum.value, 'd')",
        grid=False,
    )
    return alt.X("round:Q", title=title, scale=alt.Scale(nice=False, padding=8), axis=ticks)


def value_axis(field: str, title: str, **scale: Any) -> alt.Y:
    """Returns a vertical axis that need not begin at zero."""
    return alt.Y(f"{field}:Q", title=title, scale=alt.Scale(zero=False, padding=8, **scale))


def faded(faint: float = 0.12, full: float = 1.0) -> Any:
    """Returns the opacity of a device's mark: faint if another device is picked."""
    return alt.condition(PICKED, alt.value(full), alt.value(faint))


def unless_picked(faint: float = 0.2) -> Any:
    """Returns the opacity of what stands for all devices: faint if one is picked."""
    return alt.condition(f"{DEVICE} === null", alt.value(1), alt.value(faint))


def zoomed() -> alt.Parameter:
    """Returns the parameter that moves a figure along its x axis: dragging, and Ctrl with the wheel."""
    return alt.selection_interval(bind="scales", encodings=["x"], zoom="wheel![event.ctrlKey]")


def tips(*lines: str) -> list[alt.Tooltip]:
    """Returns a tooltip; a line is ``field:type``, ``field:type|title`` or ``field:type|title|number format of d3``."""
    parts = [(*line.split("|"), "", "")[:3] for line in lines]
    return [alt.Tooltip(field, title=title or field[:-2], format=form or alt.Undefined) for field, title, form in parts]


def labelled_bars(base: alt.Chart, y: alt.Y, value: str, **bars: Any) -> list[alt.Chart]:
    """Returns horizontal bars of a field, with the field ``text`` at their ends; `bars` are encodings of them alone."""
    base = base.encode(y=y, x=alt.X(f"{value}:Q", axis=None))
    values = base.mark_text(align="left", dx=6).encode(text="text:N")
    return [base.mark_bar(height={"band": 0.62}).encode(**bars), values]


def line_styles(field: str, names: Sequence[str], legend: alt.Legend) -> dict[str, Any]:
    """Returns the encodings that tell many lines apart: by colour, by dash after the eighth, and by shape."""
    domain, colours = list(names), len(CATEGORIES)
    dashes = [DASHES[k // colours % len(DASHES)] for k in range(len(domain))]
    shapes = [SHAPES[k % len(SHAPES)] for k in range(len(domain))]
    return {
        "color": alt.Color(f"{field}:N", scale=alt.Scale(domain=domain), legend=legend),
        "strokeDash": alt.StrokeDash(f"{field}:N", scale=alt.Scale(domain=domain, range=dashes), legend=legend),
        "shape": alt.Shape(f"{field}:N", scale=alt.Scale(domain=domain, range=shapes), legend=legend),
    }


# -- mean curves in panels ---------------------------------------------------------------------------------------------


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
    legend = alt.Legend(orient="right", columns=1, labelLimit=0, symbolOpacity=1, symbolStrokeWidth=0)
    styles = line_styles("line", names, legend)
    drawn = []
    for k, (name, panel) in enumerate(zip(data, panels, strict=True)):
        ticks = alt.Axis(tickCount=max((row["x"] for row in panel.rows), default=1)) if panel.whole else alt.Axis()
        x = alt.X("x:Q", title=panel.across, scale=alt.Scale(zero=False, nice=False, padding=8), axis=ticks)
        y = alt.Y("mean:Q", title=value if k % columns == 0 else None, scale=scale)
        base = alt.Chart(alt.NamedData(name=name)).encode(x=x, color=styles["color"])
        spread = base.mark_rule(strokeWidth=1.5) if bars else base.mark_area(opacity=0.14)
        level = alt.Chart(alt.InlineData(values=[{"text": "dense"}])).encode(y=alt.YDatum(panel.dense, scale=scale))
        layers = [
            spread.encode(y=alt.Y("low:Q", scale=scale), y2="high:Q"),
            level.mark_rule(strokeDash=[2, 3]),
            level.mark_text(align="left", baseline="bottom", dx=4, dy=-2).encode(x=alt.value(0), text="text:N"),
            base.mark_line().encode(y=y, strokeDash=styles["strokeDash"]),
            base.mark_point().encode(y=y, shape=styles["shape"]),
        ]
        title = {"title": alt.TitleParams(panel.title.split("\n"), fontSize=12, offset=8)} if panel.title else {}
        drawn.append(alt.layer(*layers).properties(width=size[0], height=size[1], **title))
    return alt.concat(*drawn, columns=columns, spacing=24), data
