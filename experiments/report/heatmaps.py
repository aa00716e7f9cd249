"""Figures with one line per device: its images, its metric set, and how much of each layer is kept."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import altair as alt
import pandas as pd

from experiments.figures.figure import (
    Figure,
    chart,
    device_axis,
    device_height,
    devices_of,
    faded,
    layered,
    tips,
)
from experiments.report import series
from experiments.report.reading import ClassCounts, Run, named

GAP = 0.06  # between the cells of a heat map, as a fraction of a cell
CELL_LABELS = 30  # with more rows or columns, the cells are too small for their values
ONE_GAUSSIAN = {  # how a mixture of one component affects the metric set, by metric.rule
    "top-likelihood": "the rule picks the images nearest to the mean of all the device's classes, whatever their class",
    "density-ratio": "the rule picks images that are likelier under this one Gaussian than in the pool, and these "
    "include images between a device's classes",
    "component-quota": "with one component the rule is the same as top-likelihood, and no class has a quota",
}
KEPT = {"attention": ("the attention", "head dimensions"), "ffn": ("the FFN", "hidden neurons")}


def partition(run: Run) -> Figure | None:
    frame = series.partition(run)
    if frame.empty:
        return None
    devices, classes = devices_of(frame), _class_names(run.images.values())
    held = [int((part > 0).sum()) for _, part in frame.groupby("device")["train"]]
    few = " to ".join(dict.fromkeys((str(min(held)), str(max(held)))))
    tooltip = tips("device:O", "class:N", "train:Q|training", "test:Q|test")
    cells = _cells("train:Q|training images|d", frame["train"].max(), devices, _class_axis(classes), tooltip)
    return Figure(
        "partition",
        "Training images by device and class",
        f"{frame['train'].sum()} training images. Each device holds {few} of {len(classes)} classes.",
        layered(*cells, height=device_height(devices)),
        {"cells": frame},
    )


def coverage(run: Run) -> Figure | None:
    frame = series.coverage(run)
    if frame.empty:
        return None
    devices = devices_of(frame)
    tooltip = tips(
        *("device:O", "own share:Q|of its own classes|.1%", "by chance:Q|of the pool|.1%"),
        *("covered:Q|classes covered", "own classes:Q", "not covered:N"),
    )
    share = alt.Scale(domain=[0, 1])
    x = alt.X("own share:Q", title="share of the metric set", axis=alt.Axis(format="%", tickCount=5), scale=share)
    base = chart("devices").encode(y=device_axis(devices), opacity=faded(), tooltip=tooltip)
    bars, chance = base.mark_bar(height={"band": 0.45}).encode(x=x), base.mark_tick(size=14).encode(x="by chance:Q")
    worst, lacking = frame.loc[frame["own share"].idxmin()], int((frame["not covered"] != "").sum())
    covered = f"{lacking} of {len(frame)} devices have classes that no image covers"
    return Figure(
        "coverage",
        "Share of each metric set in the device's own classes",
        "Bars: the share of a device's metric set that belongs to its own classes. Ticks: the same share of the whole "
        f"pool, which a random choice would have. The mean is {frame['own share'].mean():.1%}, and "
        f"{frame['by chance'].mean():.1%} of the pool; the lowest is "
        f"{worst['own share']:.1%} (device {worst['device']}); "
        f"{covered if lacking else 'all classes of all devices are covered'}.{_one_component(run)}",
        layered(bars, chance, height=device_height(devices)),
        {"devices": frame},
        wide=True,
    )


def effective(run: Run) -> Figure | None:
    """Returns the effective size of each metric set, unless the devices' classes are known and `coverage` is shown."""
    frame = series.effective_sizes(run)
    if frame.empty or not series.coverage(run).empty:
        return None
    devices, worst = devices_of(frame), frame.loc[frame["share"].idxmin()]
    tooltip = tips("device:O", "effective:Q|effective size|.1f", "size:Q|images", "share:Q|effective share|.1%")
    axis = alt.Axis(format="%", tickCount=5)
    x = alt.X("share:Q", title="effective share of the metric set", axis=axis, scale=alt.Scale(domain=[0, 1]))
    bars = chart("devices").mark_bar(height={"band": 0.45}).encode(y=device_axis(devices), x=x, opacity=faded())
    return Figure(
        "effective",
        "Effective share of each metric set",
        "The public images belong to none of the devices' classes, so images of these classes cannot be counted. The "
        "figure shows the effective sample size of the metric set (Kish) as a share of its images; each image is "
        "weighted by how much likelier it is on the device than in the pool. A low share means that only a few of the "
        f"images are likely on the device. The mean is {frame['share'].mean():.1%}; the lowest is "
        f"{worst['share']:.1%} (device {int(worst['device'])}).{_one_component(run)}",
        layered(bars.encode(tooltip=tooltip), height=device_height(devices)),
        {"devices": frame},
        wide=True,
    )


def _one_component(run: Run) -> str:
    """Returns sentences on the devices whose mixture does not separate their classes, or an empty string."""
    alike = [device.device for device in run.devices if device.one_component]
    rule = run.config.get("metric.rule")
    if not alike or rule not in ONE_GAUSSIAN:
        return ""
    return (
        f" The mixture of {named(alike)} has one component, as happens with few images: a single Gaussian, which does "
        f"not separate the device's classes. For metric.rule = {rule} this means: {ONE_GAUSSIAN[rule]}."
    )


def metric_classes(run: Run) -> Figure | None:
    frame = series.metric_classes(run).drop(columns="pool")
    frame = frame[(frame["images"] > 0) | frame["own"]]
    if frame.empty:
        return None
    devices, classes = devices_of(frame), _class_names(run.metric_sets.values())
    axis = _class_axis(classes)
    tooltip = tips("device:O", "class:N", "images:Q|images of its metric set", "own:N|own class")
    border = 1.5 if max(len(classes), len(devices)) <= CELL_LABELS else 0.6
    own = (
        chart("own")
        .mark_rect(filled=False, stroke=alt.ExprRef("ink"), strokeWidth=border, strokeOpacity=0.8, fillOpacity=0)
        .encode(y=device_axis(devices, GAP), x=axis, opacity=faded(), tooltip=tooltip)
    )
    missed = int((frame["images"] == 0).sum())
    cells = _cells("images:Q|images|d", frame["images"].max(), devices, axis, tooltip)
    return Figure(
        "metric-classes",
        "Classes covered by each metric set",
        "Number of images of each class in the device's metric set. The device's own classes are framed. "
        + (
            f"{missed} of the framed cells are empty."
            if missed
            else "No framed cell is empty."
            if frame["own"].any()
            else "The devices' own classes are not known."
        ),
        layered(*cells, own, height=device_height(devices)),
        {"cells": frame[frame["images"] > 0], "own": frame[frame["own"]]},
        frame,
    )


def kept(run: Run, kind: str) -> Figure | None:
    """Returns the kept widths of all layers of one kind, ``attention`` or ``ffn``."""
    frame = series.widths(run)
    frame = frame[frame["kind"] == kind]
    if frame.empty:
        return None
    of, units = KEPT[kind]
    mean = frame.groupby("block", sort=False)["share"].mean()
    high, low = f"{mean.max():.0%}", f"{mean.min():.0%}"
    average = (
        f"{mean.idxmax()} keeps the most ({high}) and {mean.idxmin()} the least ({low})"
        if high != low
        else f"every block keeps {high}"
    )
    caption = f"Share of the {units} that is kept. On average {average}."
    return _by_block(f"kept-{kind}", f"Kept width of {of} by layer", caption, frame, ("width", "dense width"))


def merged(run: Run) -> Figure | None:
    """Returns the share of an image's tokens that the FFN of each block sees, if any tokens are merged."""
    frame = series.widths(run)
    frame = frame[frame["kind"] == "ffn"]
    frame = frame.assign(share=frame["tokens"] / frame["dense tokens"])
    if not (frame["share"] < 1).any():
        return None
    caption = "Share of an image's tokens that remain after the attention of each block."
    return _by_block("tokens", "Tokens by block", caption, frame, ("tokens", "dense tokens"))


def _by_block(key: str, title: str, caption: str, frame: pd.DataFrame, of: tuple[str, str]) -> Figure:
    """Returns a heat map of `share` by device and block; `of` are the columns of the kept and the dense value."""
    devices, places = devices_of(frame), _places(list(dict.fromkeys(frame["block"])))
    cells = frame.assign(text=frame["share"].map("{:.0%}".format), place=frame["block"].map(places))
    scale = alt.Scale(domain=list(places.values()), paddingInner=GAP)
    axis = alt.X("place:N", title="block", scale=scale, axis=alt.Axis(labelAngle=0))
    tooltip = tips("device:O", "layer:N", *(f"{name}:N" for name in of), "share:Q|kept|.0%")
    return Figure(
        key,
        title,
        caption,
        layered(*_cells("share:Q|kept share|.0%", 1, devices, axis, tooltip, "text:N"), height=device_height(devices)),
        {"cells": cells},
        columns=("device", "layer", *of, "share"),
    )


def _cells(
    colour: str, most: float, devices: Sequence[int], x: alt.X, tooltip: Sequence[alt.Tooltip], text: str = ""
) -> list[alt.Chart]:
    """Returns the layers of a heat map of the figure's `cells`, with a value in each cell if there is room.

    Args:
        colour: the field that sets a cell's colour, as ``field:Q|title of the legend|its number format``.
        most: upper end of the colour scale.
        text: the field written into the cells; default: that of `colour`.
    """
    field, title, form = colour.split("|")
    written, most = max(len(x["scale"]["domain"]), len(devices)) <= CELL_LABELS, float(most)
    legend = None if written else alt.Legend(title=title, format=form, tickCount=4)
    base = chart("cells").encode(y=device_axis(devices, GAP), x=x, tooltip=tooltip)
    scaled = alt.Color(field, scale=alt.Scale(domain=[0, most]), legend=legend)
    drawn = base.mark_rect(cornerRadius=1).encode(color=scaled, opacity=faded())
    dark = f"datum[{field[:-2]!r}] > {0.55 * most}"
    ink = alt.condition(dark, alt.value("white"), alt.value(alt.ExprRef("ink")))
    values = base.mark_text(fontSize=10).encode(text=text or field, color=ink, opacity=faded(0.25))
    return [drawn, values] if written else [drawn]


def _class_names(counts: Iterable[ClassCounts]) -> list[str]:
    return list(dict.fromkeys(name for part in counts for name in part.names))


def _class_axis(classes: Sequence[str]) -> alt.X:
    flat = all(len(name) <= 3 for name in classes) and len(classes) <= CELL_LABELS
    return alt.X(
        "class:N",
        sort=None,  # the domain sets the order; a list here would put the names into a Vega expression
        scale=alt.Scale(domain=list(classes), paddingInner=GAP),
        axis=alt.Axis(labelAngle=0 if flat else -45, labelLimit=90),
    )


def _places(blocks: Sequence[str]) -> dict[str, str]:
    """Returns a short label for each block: 3 for blocks.3, 1.0 for layers.1.blocks.0.

    If a block has no number, or two have the same, the labels are the names.
    """
    short = {block: ".".join(part for part in block.split(".") if part.isdigit()) for block in blocks}
    return short if all(short.values()) and len(set(short.values())) == len(blocks) else {b: b for b in blocks}
