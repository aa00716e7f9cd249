"""How well the devices do: from model to model, and from round to round."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import altair as alt

from experiments.figures.figure import (
    DEVICE,
    PICKED,
    ZOOM,
    Figure,
    Row,
    chart,
    device_axis,
    device_height,
    devices_of,
    faded,
    layered,
    round_axis,
    unless_picked,
    zoomed,
)
from experiments.report import series
from experiments.report.reading import Run

STAGE_ORDER = ("personal", "pruned", "global", "dense")  # of the palette: blue, orange, green, grey
SHAPES = {"personal": "circle", "pruned": "triangle-up", "global": "diamond", "dense": "M-0.2,-1.4H0.2V1.4H-0.2Z"}
SIZES = {"personal": 70, "pruned": 80, "global": 130, "dense": 130}


def mark_scales() -> dict[str, Any]:
    """Returns the encodings that tell the four models of a device apart: by colour, by shape, and by size."""
    order, legend = list(STAGE_ORDER), alt.Legend(values=list(series.STAGES))
    return {
        "color": alt.Color("stage:N", scale=alt.Scale(domain=order), legend=legend),
        "shape": alt.Shape("stage:N", scale=alt.Scale(domain=order, range=[SHAPES[s] for s in order]), legend=legend),
        "size": alt.Size("stage:O", scale=alt.Scale(domain=order, range=[SIZES[s] for s in order]), legend=legend),
    }


def accuracy(run: Run) -> Figure | None:
    rows = series.accuracies(run)
    if not rows:
        return None
    devices = devices_of(rows)
    spans = [
        {"device": i, "low": min(found), "high": max(found)}
        for i in devices
        for found in [[row["accuracy"] for row in rows if row["device"] == i]]
    ]
    said = [name for name in rows[0] if name.startswith("of ")]
    x = alt.X("accuracy:Q", title="accuracy on the device's own test images", scale=alt.Scale(zero=False, nice=True))
    span = (
        chart("spans")
        .mark_rule(strokeWidth=2, opacity=0.35)
        .encode(y=device_axis(devices), x=alt.X("low:Q"), x2="high:Q", opacity=faded(0.1, 0.45))
    )
    points = (
        chart("accuracies")
        .mark_point()
        .encode(
            y=device_axis(devices),
            x=x,
            **mark_scales(),
            opacity=faded(),
            tooltip=["device:O", *(alt.Tooltip(f"{name}:Q", title=name[3:], format=".3f") for name in said)],
        )
    )
    best = max(run.equipped, key=series.gain)
    return Figure(
        "accuracy",
        "Accuracy of each device, from dense to personal",
        f"One line a device, one mark a model. On average {_means(run)}. Device {best['device']} gained most by "
        f"training: {best['pruned_accuracy']:.3f} pruned, {best['personal_accuracy']:.3f} personal.",
        layered(span, points, height=device_height(devices)),
        {"spans": spans, "accuracies": sorted(rows, key=lambda row: STAGE_ORDER.index(row["stage"]), reverse=True)},
        [
            {"device": d["device"], **{stage: series.accuracy(d, stage) for stage in series.STAGES}}
            for d in run.equipped
        ],
        wide=True,
    )


def curves(run: Run) -> Figure | None:
    rows = series.curves(run)
    if not rows:
        return None
    means = series.spread(rows, "accuracy")
    colour = alt.Color(
        "kind:N",
        scale=alt.Scale(domain=list(STAGE_ORDER)),
        legend=alt.Legend(values=list(series.KINDS), symbolOpacity=1),
    )
    x = round_axis(means)
    y = alt.Y("mean:Q", title="accuracy on own test images", scale=alt.Scale(zero=False, padding=8))
    band = chart("means").mark_area(opacity=0.14).encode(x=x, y=alt.Y("low:Q"), y2="high:Q", color=colour)
    line = chart("means").mark_line().encode(x=x, y=y, color=colour, opacity=unless_picked())
    dots = (
        chart("means")
        .mark_point(size=50)
        .encode(x=x, y=y, color=colour, opacity=unless_picked(), tooltip=_spread_tooltip("accuracy"))
    )
    own = _own_lines("accuracy", x, colour)
    last = {row["kind"]: row["mean"] for row in means}
    return Figure(
        "curves",
        "Accuracy after each round",
        f"Lines are means over the devices, bands their middle half. From {means[0]['mean']:.3f} before the first "
        f"round to {last['personal']:.3f} personal and {last['global']:.3f} global after round {means[-1]['round']}.",
        layered(band, line.add_params(zoomed()), dots, *own, height=300),
        {"means": means, "devices": rows},
        _wide_rows(means, rows),
        hint=ZOOM,
    )


def alpha(run: Run) -> Figure | None:
    rows = series.alphas(run)
    if not rows:
        return None
    means = series.spread(rows, "α")
    x, colour = round_axis(rows), alt.value(alt.ExprRef("ink"))
    each = (
        chart("devices")
        .mark_line(strokeWidth=1.5)
        .encode(
            x=x,
            y=alt.Y("α:Q", title="α: share of the device's own part", scale=alt.Scale(zero=False, padding=8)),
            detail="device:N",
            opacity=faded(0.08, 0.4),
        )
    )
    dots = (
        chart("devices")
        .mark_point(size=40)
        .encode(
            x=x,
            y="α:Q",
            opacity=alt.condition(PICKED, alt.value(0.4), alt.value(0.0)),
            tooltip=["device:O", "round:Q", alt.Tooltip("α:Q", format=".3f")],
        )
    )
    mean = (
        chart("means")
        .mark_line(strokeDash=[6, 4])
        .encode(x=x, y="mean:Q", color=colour, opacity=unless_picked(0.35), tooltip=_spread_tooltip("α"))
    )
    last = [row["α"] for row in rows if row["round"] == rows[-1]["round"]]
    return Figure(
        "alpha",
        "α, the share of its own part in a device's mixture",
        f"A line a device; dashed: their mean. It begins at {rows[0]['α']:g} and ends between {min(last):.3f} and "
        f"{max(last):.3f}.",
        layered(each.add_params(zoomed()), dots, mean, height=300),
        {"means": means, "devices": rows},
        [{"device": row["device"], "round": row["round"], "α": row["α"]} for row in rows],
        hint=ZOOM,
    )


def _means(run: Run) -> str:
    means = {stage: series.mean_accuracy(run, stage) for stage in series.STAGES}
    return ", ".join(f"{stage} {value:.3f}" for stage, value in means.items() if value is not None)


def _spread_tooltip(name: str) -> list[object]:
    return [
        "round:Q",
        "kind:N",
        alt.Tooltip("mean:Q", title=f"mean {name}", format=".3f"),
        alt.Tooltip("low:Q", title="lower quartile", format=".3f"),
        alt.Tooltip("high:Q", title="upper quartile", format=".3f"),
    ]


def _own_lines(name: str, x: alt.X, colour: alt.Color) -> list[alt.Chart]:
    """Returns the curve of the device that is picked."""
    own = chart("devices").transform_filter(f"{DEVICE} !== null && {PICKED}")
    tooltip = ["device:O", "round:Q", "kind:N", alt.Tooltip(f"{name}:Q", format=".3f")]
    return [
        own.mark_line().encode(x=x, y=f"{name}:Q", color=colour),
        own.mark_point(size=50).encode(x=x, y=f"{name}:Q", color=colour, tooltip=tooltip),
    ]


def _wide_rows(means: Sequence[Row], rows: Sequence[Row]) -> list[Row]:
    shown = [{"device": "mean", **{k: row[k] for k in ("round", "kind")}, "accuracy": row["mean"]} for row in means]
    return [*shown, *rows]
