"""Figures with a line a device: which images there are, and what is kept of each layer."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import altair as alt
import numpy as np

from experiments.figures.figure import (
    Figure,
    chart,
    device_axis,
    device_height,
    devices_of,
    faded,
    layered,
    tip,
)
from experiments.report import series
from experiments.report.reading import ClassCounts, Run

GAP = 0.06  # between the cells of a heat map, as a share of a cell
CELL_LABELS = 30  # cells across, up to which values are written into them


def partition(run: Run) -> Figure | None:
    rows = series.partition(run)
    if not rows:
        return None
    devices, classes = devices_of(rows), _class_names(run.images.values())
    held = [sum(1 for row in rows if row["device"] == i and row["train"]) for i in devices]
    few = f"{min(held)}" if min(held) == max(held) else f"{min(held)} to {max(held)}"
    tooltip = [tip("device:O"), tip("class:N"), tip("train:Q", "training"), tip("test:Q", "test")]
    most = max(row["train"] for row in rows)
    drawn = _cells(_Cells("train", "training images", most, len(classes)), devices, _class_axis(classes), tooltip)
    return Figure(
        "partition",
        "Training images by device and class",
        f"{sum(row['train'] for row in rows)} training images; a device holds {few} of {len(classes)} classes.",
        layered(*drawn, height=device_height(devices)),
        {"cells": rows},
        rows,
    )


def coverage(run: Run) -> Figure | None:
    rows = series.coverage(run)
    if not rows:
        return None
    devices = devices_of(rows)
    tooltip = [
        tip("device:O"),
        tip("own share:Q", "of its own classes", ".1%"),
        tip("by chance:Q", "of the pool", ".1%"),
        tip("covered:Q", "classes covered"),
        tip("own classes:Q"),
        tip("not covered:N"),
    ]
    share = alt.Scale(domain=[0, 1])
    x = alt.X("own share:Q", title="share of the metric set", axis=alt.Axis(format="%", tickCount=5), scale=share)
    base = chart("devices").encode(y=device_axis(devices), opacity=faded(), tooltip=tooltip)
    bars, chance = base.mark_bar(height={"band": 0.45}).encode(x=x), base.mark_tick(size=14).encode(x="by chance:Q")
    worst = min(rows, key=lambda row: row["own share"])
    lacking = sum(1 for row in rows if row["not covered"])
    covered = (
        f"{lacking} of {len(rows)} devices have classes that no image covers"
        if lacking
        else "all classes of all devices are covered"
    )
    own, pool = (np.mean([row[name] for row in rows]) for name in ("own share", "by chance"))
    return Figure(
        "coverage",
        "Share of each metric set that is of the device's own classes",
        "Bars: the share of the public images chosen for a device that is of its classes; ticks: that share in the "
        f"whole pool, which a random choice would have. The mean is {own:.1%}, and {pool:.1%} in the pool; the lowest "
        f"is {worst['own share']:.1%} (device {worst['device']}); {covered}.",
        layered(bars, chance, height=device_height(devices)),
        {"devices": rows},
        rows,
        wide=True,
    )


def metric_classes(run: Run) -> Figure | None:
    rows = series.metric_classes(run)
    if not rows:
        return None
    devices, classes = devices_of(rows), _class_names(run.metric_sets.values())
    tooltip = [tip("device:O"), tip("class:N"), tip("images:Q", "images of its metric set"), tip("own:N", "own class")]
    axis, chosen = _class_axis(classes), [row for row in rows if row["images"]]
    cells = _Cells("images", "images", max(row["images"] for row in rows), len(classes))
    frame = 1.5 if max(len(classes), len(devices)) <= CELL_LABELS else 0.6
    own = (
        chart("own")
        .mark_rect(filled=False, stroke=alt.ExprRef("ink"), strokeWidth=frame, strokeOpacity=0.8, fillOpacity=0)
        .encode(y=device_axis(devices, GAP), x=axis, opacity=faded(), tooltip=tooltip)
    )
    missed = sum(1 for row in rows if row["own"] and not row["images"])
    return Figure(
        "metric-classes",
        "Classes that each metric set covers",
        "Images of each device's metric set by class; framed: the device's own classes. "
        + (f"{missed} of the framed cells are empty." if missed else "No framed cell is empty."),
        layered(*_cells(cells, devices, axis, tooltip), own, height=device_height(devices)),
        {"cells": chosen, "own": [row for row in rows if row["own"]]},
        rows,
    )


def kept_attention(run: Run) -> Figure | None:
    return _kept(run, "attention", "Kept width of the attention by layer", "head dimensions")


def kept_ffn(run: Run) -> Figure | None:
    return _kept(run, "ffn", "Kept width of the FFN by layer", "hidden neurons")


def _kept(run: Run, kind: str, title: str, units: str) -> Figure | None:
    rows = [row for row in series.widths(run) if row["kind"] == kind]
    if not rows:
        return None
    devices, blocks = devices_of(rows), list(dict.fromkeys(row["block"] for row in rows))
    mean = {block: float(np.mean([row["share"] for row in rows if row["block"] == block])) for block in blocks}
    places = _places(blocks)
    most, least = max(blocks, key=mean.__getitem__), min(blocks, key=mean.__getitem__)
    cells = [row | {"text": f"{row['share']:.0%}", "place": places[row["block"]]} for row in rows]
    scale = alt.Scale(domain=list(places.values()), paddingInner=GAP)
    axis = alt.X("place:N", title="block", scale=scale, axis=alt.Axis(labelAngle=0))
    tooltip = [tip("device:O"), tip("layer:N"), tip("width:N"), tip("dense width:N"), tip("share:Q", "kept", ".0%")]
    drawn = _cells(_Cells("share", "kept share", 1, len(blocks), "text:N", ".0%"), devices, axis, tooltip)
    return Figure(
        f"kept-{kind}",
        title,
        f"Share of the {units} that is kept. On average {most} keeps most ({mean[most]:.0%}), {least} least "
        f"({mean[least]:.0%}).",
        layered(*drawn, height=device_height(devices)),
        {"cells": cells},
        [{key: row[key] for key in ("device", "layer", "width", "dense width", "share")} for row in rows],
    )


@dataclass(frozen=True)
class _Cells:
    """The field that colours the cells of a heat map, its legend and largest value, and how many cells are across."""

    field: str
    legend: str
    most: float
    across: int
    text: str = ""
    format: str = "d"


def _cells(cells: _Cells, devices: Sequence[int], x: alt.X, tooltip: Sequence[alt.Tooltip]) -> list[alt.Chart]:
    """Returns the layers of a heat map of the figure's `cells`; where there is room, with values written into them."""
    written = max(cells.across, len(devices)) <= CELL_LABELS
    legend = None if written else alt.Legend(title=cells.legend, format=cells.format, tickCount=4)
    colour = alt.Color(f"{cells.field}:Q", scale=alt.Scale(domain=[0, cells.most]), legend=legend)
    base = chart("cells").encode(y=device_axis(devices, GAP), x=x, tooltip=tooltip)
    drawn = base.mark_rect(cornerRadius=1).encode(color=colour, opacity=faded())
    dark = f"datum[{cells.field!r}] > {0.55 * cells.most}"
    text = base.mark_text(fontSize=10).encode(
        text=cells.text or f"{cells.field}:Q",
        color=alt.condition(dark, alt.value("white"), alt.value(alt.ExprRef("ink"))),
        opacity=faded(0.25),
    )
    return [drawn, text] if written else [drawn]


def _class_names(counts: Iterable[ClassCounts]) -> list[str]:
    return list(dict.fromkeys(name for each in counts for name in each.names))


def _class_axis(classes: Sequence[str]) -> alt.X:
    flat = all(len(name) <= 3 for name in classes) and len(classes) <= CELL_LABELS
    return alt.X(
        "class:N",
        sort=None,  # the domain has the order; a list would put the names into an expression
        scale=alt.Scale(domain=list(classes), paddingInner=GAP),
        axis=alt.Axis(labelAngle=0 if flat else -45, labelLimit=90),
    )


def _places(blocks: Sequence[str]) -> dict[str, str]:
    """Returns the blocks' numbers by name, 3 of blocks.3 and 1.0 of layers.1.blocks.0; the names where these fail."""
    short = {block: ".".join(part for part in block.split(".") if part.isdigit()) for block in blocks}
    return short if all(short.values()) and len(set(short.values())) == len(blocks) else {b: b for b in blocks}
