"""A figure: one description for the page and for the picture, its words, and its numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import altair as alt

Row = dict[str, Any]
Chart = alt.Chart | alt.LayerChart | alt.FacetChart

DEVICE = "device"  # the variable of a figure that the page's device picker sets; null: all of them
PICKED = f"{DEVICE} === null || datum.device === {DEVICE}"
ZOOM = "Drag to move along the axis, Ctrl and the wheel to zoom, double-click to go back."
LINE = 24  # pixels a device, where there are few


@dataclass(frozen=True)
class Figure:
    """What is drawn, and what is said beside it.

    Attributes:
        name: of its files.
        title: what is seen.
        alt: what it shows, in sentences with numbers, for who cannot see it.
        chart: as wide as what it stands in.
        data: rows by the name under which the chart has them. They are kept apart from it, or they would be copied and
            checked against a schema value by value: a minute for a hundred devices of two hundred classes.
        rows: the numbers behind it, as a table.
        wide: as wide as the page, not half of it.
        hint: what can be done with it on the page.
        group, choice: figures of one group share a place on the page, each shown under its choice.
    """

    name: str
    title: str
    alt: str
    chart: Chart
    data: Mapping[str, Sequence[Row]]
    rows: Sequence[Row]
    wide: bool = False
    hint: str = ""
    group: str = ""
    choice: str = ""

    @cached_property
    def spec(self) -> dict[str, Any]:
        """Returns the Vega-Lite description, without a configuration: page and picture have one of their own."""
        chart = self.chart.properties(title=self.title, description=f"{self.title}. {self.alt}")
        described: dict[str, Any] = chart.to_dict()
        described.pop("config", None)
        described["datasets"] = {name: list(rows) for name, rows in self.data.items()}
        return described | {"autosize": {"type": "fit-x", "contains": "padding"}}


def chart(data: str) -> alt.Chart:
    """Returns an empty chart of the rows that its figure has under this name, as wide as its container."""
    return alt.Chart(alt.NamedData(name=data), width="container")


def layered(*layers: alt.Chart, height: float) -> Chart:
    """Returns the layers on top of each other, with the variable that the device picker sets."""
    return alt.layer(*layers).properties(width="container", height=height).add_params(device_param())


def device_param() -> alt.Parameter:
    return alt.param(name=DEVICE, value=None)


def device_axis(devices: Sequence[int], gap: float = 0.0) -> alt.Y:
    """Returns the axis with a line a device, the same in all figures, its title above it.

    Args:
        gap: share of a line that parts it from the next.
    """
    title = alt.Axis(title="device", titleAngle=0, titleAlign="right", titleBaseline="bottom", titleX=-6, titleY=-6)
    scale = alt.Scale(domain=list(devices), paddingInner=gap) if gap else alt.Scale(domain=list(devices))
    return alt.Y("device:O", axis=title, scale=scale)


def device_height(devices: Sequence[int]) -> int:
    """Returns the height of a figure with a line a device; many devices get thin ones."""
    return len(devices) * max(4, min(LINE, 900 // max(len(devices), 1)))


def round_axis(rows: Sequence[Row], title: str = "round") -> alt.X:
    """Returns the axis of the rounds in `rows`, labelled at whole ones only, however near it is looked at."""
    ticks = alt.Axis(
        tickCount=max(1, min(10, max(row["round"] for row in rows))),
        labelExpr="datum.value % 1 ? '' : format(datum.value, 'd')",
        grid=False,
    )
    return alt.X("round:Q", title=title, scale=alt.Scale(nice=False, padding=8), axis=ticks)


def faded(faint: float = 0.12, full: float = 1.0) -> Any:
    """Returns the opacity of a mark: faint if another device is picked."""
    return alt.condition(PICKED, alt.value(full), alt.value(faint))


def unless_picked(faint: float = 0.2) -> Any:
    """Returns the opacity of what stands for all devices: faint if one is picked."""
    return alt.condition(f"{DEVICE} === null", alt.value(1), alt.value(faint))


def devices_of(rows: Sequence[Row]) -> list[int]:
    """Returns the partition ids in `rows`, in order."""
    return sorted({row["device"] for row in rows})


def zoomed() -> alt.Parameter:
    """Returns what moves a figure along its x axis: dragging, and Ctrl with the wheel, which alone moves the page."""
    return alt.selection_interval(bind="scales", encodings=["x"], zoom="wheel![event.ctrlKey]")
