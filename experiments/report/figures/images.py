"""Which images there are: those that the devices hold, and the public ones that stand for them."""

from __future__ import annotations

from collections.abc import Sequence

import altair as alt
import numpy as np

from experiments.figures.figure import Figure, chart, device_axis, device_height, devices_of, faded, layered
from experiments.report import series
from experiments.report.figures.cells import CELL_LABELS, GAP, cells
from experiments.report.reading import Run


def partition(run: Run) -> Figure | None:
    rows = series.partition(run)
    if not rows:
        return None
    devices, classes = devices_of(rows), _class_names(run.images.values())
    held = [sum(1 for row in rows if row["device"] == i and row["train"]) for i in devices]
    total = sum(row["train"] for row in rows)
    few = f"{min(held)}" if min(held) == max(held) else f"{min(held)} to {max(held)}"
    tooltip = ["device:O", "class:N", alt.Tooltip("train:Q", title="training"), alt.Tooltip("test:Q", title="test")]
    axis = _class_axis(classes)
    drawn = cells(rows, devices, axis, "train", "training images", tooltip, len(classes))
    return Figure(
        "partition",
        "Training images by device and class",
        f"{total} training images; a device holds {few} of {len(classes)} classes.",
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
        "device:O",
        alt.Tooltip("own share:Q", title="of its own classes", format=".1%"),
        alt.Tooltip("by chance:Q", title="of the pool", format=".1%"),
        alt.Tooltip("covered:Q", title="classes covered"),
        alt.Tooltip("own classes:Q", title="own classes"),
        alt.Tooltip("not covered:N", title="not covered"),
    ]
    x = alt.X(
        "own share:Q",
        title="share of the metric set",
        axis=alt.Axis(format="%", tickCount=5),
        scale=alt.Scale(domain=[0, 1]),
    )
    bars = (
        chart("devices")
        .mark_bar(height={"band": 0.45})
        .encode(y=device_axis(devices), x=x, opacity=faded(), tooltip=tooltip)
    )
    chance = (
        chart("devices")
        .mark_tick(size=14)
        .encode(y=device_axis(devices), x="by chance:Q", opacity=faded(), tooltip=tooltip)
    )
    worst = min(rows, key=lambda row: row["own share"])
    lacking = [row for row in rows if row["not covered"]]
    covered = (
        "every device's classes are all covered"
        if not lacking
        else f"{len(lacking)} of {len(rows)} devices have classes that no image covers"
    )
    return Figure(
        "coverage",
        "How much of its metric set is of a device's own classes",
        "Bars: share of the public images chosen for a device that are of its classes; the tick: that share in the "
        f"whole pool, which chance would give. On average {np.mean([row['own share'] for row in rows]):.1%} beside "
        f"{np.mean([row['by chance'] for row in rows]):.1%} by chance, least {worst['own share']:.1%} (device "
        f"{worst['device']}); {covered}.",
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
    tooltip = [
        "device:O",
        "class:N",
        alt.Tooltip("images:Q", title="images of its metric set"),
        alt.Tooltip("own:N", title="its own class"),
    ]
    axis = _class_axis(classes)
    chosen = [row for row in rows if row["images"]]
    drawn = cells(chosen, devices, axis, "images", "images", tooltip, len(classes))
    frame = 1.5 if max(len(classes), len(devices)) <= CELL_LABELS else 0.6
    own = (
        chart("own")
        .mark_rect(filled=False, stroke=alt.ExprRef("ink"), strokeWidth=frame, strokeOpacity=0.8, fillOpacity=0)
        .encode(y=device_axis(devices, GAP), x=axis, opacity=faded(), tooltip=tooltip)
    )
    missed = [row for row in rows if row["own"] and not row["images"]]
    return Figure(
        "metric-classes",
        "Which classes each metric set covers",
        "Images of each device's metric set by class; framed: the device's own classes. "
        + (f"{len(missed)} of the framed cells are empty." if missed else "No framed cell is empty."),
        layered(*drawn, own, height=device_height(devices)),
        {"cells": chosen, "own": [row for row in rows if row["own"]]},
        rows,
    )


def _class_names(counts: object) -> list[str]:
    return list(dict.fromkeys(str(name) for each in counts for name in each["classes"]))  # type: ignore[attr-defined]


def _class_axis(classes: Sequence[str]) -> alt.X:
    flat = all(len(name) <= 3 for name in classes) and len(classes) <= CELL_LABELS
    return alt.X(
        "class:N",
        sort=None,  # the domain has the order; a list would put the names into an expression
        title="class",
        scale=alt.Scale(domain=list(classes), paddingInner=GAP),
        axis=alt.Axis(labelAngle=0 if flat else -45, labelLimit=90),
    )
