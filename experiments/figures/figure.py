"""A figure: one Vega-Lite description, used for both the page and the picture file, with its text and its numbers."""

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

DEVICE = "device"  # Vega parameter with the device selected on the page; null: all devices
PICKED = f"{DEVICE} === null || datum.device === {DEVICE}"
ZOOM = "Drag to move along the axis, Ctrl and the wheel to zoom, double-click to reset."
LINE = 24  # pixels per device, if there are few devices
WIDTH = 720  # width in points of the plot in a picture file; a PNG has two pixels per point
DASHES = ([1, 0], [6, 4], [2, 3], [10, 3, 2, 3])  # one for each pass through the colours; the first is solid
SHAPES = ("circle", "square", "triangle-up", "diamond", "triangle-down")
MARGIN = 0.05  # space above and below the curves of a panel, as a fraction of the range of values
NO_XML = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\ud800-\udfff\ufffe\uffff]")


@dataclass(frozen=True)
class Figure:
    """A chart with its text and numbers.

    Attributes:
        name: name of its files, without suffix.
        title: heading.
        alt: what the figure shows, in sentences with numbers; caption and text alternative.
        chart: either as wide as its container, or several charts, each with its own width.
        data: rows by the name under which the chart refers to them. They are not part of the chart, because altair
            would copy them and check every value against a schema, which takes a minute for a hundred devices with
            two hundred classes.
        table: the numbers behind the figure; default: the first of `data`.
        columns: the columns of the table that are shown; default: all.
        wide: as wide as the page instead of half of it.
        hint: how to use the figure on the page.
        group, choice: figures of the same group share one place on the page, and a menu of their choices selects one.
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
        """The Vega-Lite description, without a configuration: pages and picture files have different ones."""
        chart = self.chart.properties(title=self.title, description=f"{self.title}. {self.alt}")
        described: dict[str, Any] = chart.to_dict()
        described.pop("config", None)
        described.setdefault("datasets", {}).update((name, plain(rows)) for name, rows in self.data.items())
        single = described.get("width") == "container"
        return described | ({"autosize": {"type": "fit-x", "contains": "padding"}} if single else {})


def plain(rows: Rows) -> list[Row]:
    """Returns the rows as dictionaries; missing values of a data frame become None."""
    if isinstance(rows, pd.DataFrame):
        rows = rows.astype(object).where(rows.notna(), None).to_dict("records")
    return list(rows)


def write_figure(figure: Figure, file: Path) -> None:
    """Writes a figure on white: as SVG if the file's name ends in ``.svg``, else as PNG with two pixels per point.

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
    """Returns the description with U+FFFD for characters that XML does not allow; they would abort the process."""
    if isinstance(value, str):
        return NO_XML.sub("\ufffd", value)
    if isinstance(value, dict):
        return {_drawable(key): _drawable(item) for key, item in value.items()}
    return [_drawable(item) for item in value] if isinstance(value, list | tuple) else value


# -- parts of charts ---------------------------------------------------------------------------------------------------


def chart(data: str) -> alt.Chart:
    """Returns an empty chart, as wide as its container, of the rows that the figure has under this name."""
    return alt.Chart(alt.NamedData(name=data), width="container")


def layered(*layers: alt.Chart, height: float) -> Chart:
    """Returns the layers on top of each other, with the parameter that holds the selected device."""
    stack = alt.layer(*layers).properties(width="container", height=height)
    return stack.add_params(alt.param(name=DEVICE, value=None))


def device_axis(devices: Sequence[int], gap: float = 0.0) -> alt.Y:
    """Returns the vertical axis with one line per device, the same in all figures; its title is above it.

    Args:
        gap: space between the lines, as a fraction of a line.
    """
    title = alt.Axis(title="device", titleAngle=0, titleAlign="right", titleBaseline="bottom", titleX=-6, titleY=-6)
    scale = alt.Scale(domain=list(devices), paddingInner=gap) if gap else alt.Scale(domain=list(devices))
    return alt.Y("device:O", axis=title, scale=scale)


def device_height(devices: Sequence[int]) -> int:
    """Returns the height in pixels of a figure with one line per device; with many devices the lines are thin."""
    return len(devices) * max(4, min(LINE, 900 // max(len(devices), 1)))


def devices_of(frame: pd.DataFrame) -> list[int]:
    """Returns the partition ids in `frame`, sorted."""
    return sorted(frame["device"].unique().tolist())


def round_axis(rounds: Iterable[int], title: str = "round") -> alt.X:
    """Returns the axis of `rounds`, labelled at whole numbers only at any zoom."""
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
    """Returns the opacity of a device's mark: faint if another device is selected."""
    return alt.condition(PICKED, alt.value(full), alt.value(faint))


def unless_picked(faint: float = 0.2) -> Any:
    """Returns the opacity of a mark for all devices: faint if one device is selected."""
    return alt.condition(f"{DEVICE} === null", alt.value(1), alt.value(faint))


def zoomed() -> alt.Parameter:
    """Returns the parameter that lets a reader move (drag) and zoom (Ctrl and the wheel) along the x axis."""
    return alt.selection_interval(bind="scales", encodings=["x"], zoom="wheel![event.ctrlKey]")


def tips(*lines: str) -> list[alt.Tooltip]:
    """Returns a tooltip; each line is ``field:type``, ``field:type|title`` or ``field:type|title|d3 number format``."""
    parts = [(*line.split("|"), "", "")[:3] for line in lines]
    return [alt.Tooltip(field, title=title or field[:-2], format=form or alt.Undefined) for field, title, form in parts]


def labelled_bars(base: alt.Chart, y: alt.Y, value: str, **bars: Any) -> list[alt.Chart]:
    """Returns horizontal bars of a field, with the field ``text`` at their ends.

    Args:
        bars: encodings of the bars that the text does not have.
    """
    base = base.encode(y=y, x=alt.X(f"{value}:Q", axis=None))
    values = base.mark_text(align="left", dx=6).encode(text="text:N")
    return [base.mark_bar(height={"band": 0.62}).encode(**bars), values]


def line_styles(field: str, names: Sequence[str], legend: alt.Legend) -> dict[str, Any]:
    """Returns the encodings that distinguish many lines: colour, dash (from the ninth line on) and shape."""
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
    """A panel with several curves.

    Attributes:
        title: title of the panel.
        across: title of the x axis.
        rows: with the keys line (name of the curve), x, mean, low and high.
        dense: value of the dense model, drawn as a horizontal line; None: not drawn.
        whole: whether x has only whole values.
    """

    title: str
    across: str
    rows: Sequence[Row]
    dense: float | None
    whole: bool = False


def panels_of_curves(
    panels: Sequence[Panel], value: str, columns: int, size: tuple[int, int], bars: bool = False
) -> tuple[Chart, dict[str, Sequence[Row]]]:
    """Returns a chart of the panels in `columns` columns, with a common y scale and legend, and the chart's data.

    Args:
        value: title of the y axis.
        size: width and height of a panel, in pixels.
        bars: draw error bars from low to high instead of a band.
    """
    names = list(dict.fromkeys(row["line"] for panel in panels for row in panel.rows))
    values = [row[key] for panel in panels for row in panel.rows for key in ("low", "high")]
    values += [panel.dense for panel in panels if panel.dense is not None]
    margin = MARGIN * (max(values) - min(values)) or MARGIN
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
        layers = [
            spread.encode(y=alt.Y("low:Q", scale=scale), y2="high:Q"),
            *([] if panel.dense is None else _level(panel.dense, scale)),
            base.mark_line().encode(y=y, strokeDash=styles["strokeDash"]),
            base.mark_point().encode(y=y, shape=styles["shape"]),
        ]
        title = {"title": alt.TitleParams(panel.title.split("\n"), fontSize=12, offset=8)} if panel.title else {}
        drawn.append(alt.layer(*layers).properties(width=size[0], height=size[1], **title))
    return alt.concat(*drawn, columns=columns, spacing=24), data


def _level(value: float, scale: alt.Scale) -> list[alt.Chart]:
    """Returns a horizontal line at the value of the dense model, and its name."""
    level = alt.Chart(alt.InlineData(values=[{"text": "dense"}])).encode(y=alt.YDatum(value, scale=scale))
    name = level.mark_text(align="left", baseline="bottom", dx=4, dy=-2)
    return [level.mark_rule(strokeDash=[2, 3]), name.encode(x=alt.value(0), text="text:N")]
