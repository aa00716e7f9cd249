"""Figures of accuracy, model by model and round by round, and of what a run cost."""

from __future__ import annotations

from typing import Any

import altair as alt
import numpy as np

from experiments.figures.figure import (
    DEVICE,
    PICKED,
    ZOOM,
    Figure,
    chart,
    device_axis,
    device_height,
    devices_of,
    faded,
    labelled_bars,
    layered,
    round_axis,
    tip,
    unless_picked,
    value_axis,
    zoomed,
)
from experiments.output import duration, size
from experiments.report import series
from experiments.report.reading import Run

STAGE_ORDER = ("personal", "pruned", "global", "dense")  # of the palette: blue, orange, green, grey
MARKS = {"personal": "circle", "pruned": "triangle-up", "global": "diamond", "dense": "M-0.2,-1.4H0.2V1.4H-0.2Z"}
SIZES = {"personal": 70, "pruned": 80, "global": 130, "dense": 130}
PHASES = {"backbone": "dense backbone"}


def mark_scales() -> dict[str, Any]:
    """Returns the encodings that tell the four models of a device apart: colour, shape and size."""
    order, legend = list(STAGE_ORDER), alt.Legend(values=list(series.STAGES))
    return {
        "color": alt.Color("stage:N", scale=alt.Scale(domain=order), legend=legend),
        "shape": alt.Shape("stage:N", scale=alt.Scale(domain=order, range=[MARKS[s] for s in order]), legend=legend),
        "size": alt.Size("stage:O", scale=alt.Scale(domain=order, range=[SIZES[s] for s in order]), legend=legend),
    }


# -- accuracy ----------------------------------------------------------------------------------------------------------


def accuracy(run: Run) -> Figure | None:
    rows = series.accuracies(run)
    if not rows:
        return None
    devices = devices_of(rows)
    found = {i: [row["accuracy"] for row in rows if row["device"] == i] for i in devices}
    spans = [{"device": i, "low": min(values), "high": max(values)} for i, values in found.items()]
    x = alt.X("accuracy:Q", title="accuracy on the device's own test images", scale=alt.Scale(zero=False, nice=True))
    y = device_axis(devices)
    span = chart("spans").mark_rule(strokeWidth=2).encode(y=y, x=alt.X("low:Q"), x2="high:Q", opacity=faded(0.1, 0.45))
    tooltip = [tip("device:O"), *(tip(f"{name}:Q", name[3:], ".3f") for name in rows[0] if name.startswith("of "))]
    points = chart("accuracies").mark_point().encode(y=y, x=x, **mark_scales(), opacity=faded(), tooltip=tooltip)
    best = max(run.equipped, key=series.gain)
    means = {stage: series.mean_accuracy(run, stage) for stage in series.STAGES}
    shown = ", ".join(f"{stage} {value:.3f}" for stage, value in means.items() if value is not None)
    return Figure(
        "accuracy",
        "Accuracy of each device, from dense to personal",
        f"One line a device, one mark a model. Means: {shown}. Device {best.device} gained most by training: "
        f"{best.pruned_accuracy:.3f} pruned, {best.personal_accuracy:.3f} personal.",
        layered(span, points, height=device_height(devices)),
        {"spans": spans, "accuracies": sorted(rows, key=lambda row: STAGE_ORDER.index(row["stage"]), reverse=True)},
        [{"device": d.device, **{stage: series.accuracy(d, stage) for stage in series.STAGES}} for d in run.equipped],
        wide=True,
    )


def curves(run: Run) -> Figure | None:
    rows = series.curves(run)
    if not rows:
        return None
    means = series.spread(rows, "accuracy")
    legend = alt.Legend(values=list(series.KINDS), symbolOpacity=1)
    colour = alt.Color("kind:N", scale=alt.Scale(domain=list(STAGE_ORDER)), legend=legend)
    mean = chart("means").encode(x=round_axis(means), color=colour)
    own = chart("devices").encode(x=round_axis(means), y="accuracy:Q", color=colour)
    own = own.transform_filter(f"{DEVICE} !== null && {PICKED}")  # the curves of the device that is picked
    y = value_axis("mean", "accuracy on own test images")
    own_tips = [tip("device:O"), tip("round:Q"), tip("kind:N"), tip("accuracy:Q", form=".3f")]
    last = {row["kind"]: row["mean"] for row in means}
    return Figure(
        "curves",
        "Accuracy after each round",
        f"Lines are means over devices, bands their middle half. From {means[0]['mean']:.3f} before the first "
        f"round to {last['personal']:.3f} personal and {last['global']:.3f} global after round {means[-1]['round']}.",
        layered(
            mean.mark_area(opacity=0.14).encode(y=alt.Y("low:Q"), y2="high:Q"),
            mean.mark_line().encode(y=y, opacity=unless_picked()).add_params(zoomed()),
            mean.mark_point(size=50).encode(y=y, opacity=unless_picked(), tooltip=_spread_tips("accuracy")),
            own.mark_line(),
            own.mark_point(size=50).encode(tooltip=own_tips),
            height=300,
        ),
        {"means": means, "devices": rows},
        [{"device": "mean", **{key: row[key] for key in ("round", "kind")}, "accuracy": row["mean"]} for row in means]
        + rows,
        hint=ZOOM,
    )


def alpha(run: Run) -> Figure | None:
    rows = series.alphas(run)
    if not rows:
        return None
    means = series.spread(rows, "α")
    each = chart("devices").encode(x=round_axis(rows), y=value_axis("α", "α"))
    dots = alt.condition(PICKED, alt.value(0.4), alt.value(0.0))
    mean = chart("means").encode(x=round_axis(rows), y="mean:Q", color=alt.value(alt.ExprRef("ink")))
    last = [row["α"] for row in rows if row["round"] == rows[-1]["round"]]
    return Figure(
        "alpha",
        "α, the weight of a device's own adapters in the interpolation",
        f"A line a device; dashed: the mean. α starts at {rows[0]['α']:g} and ends between {min(last):.3f} and "
        f"{max(last):.3f}.",
        layered(
            each.mark_line(strokeWidth=1.5).encode(detail="device:N", opacity=faded(0.08, 0.4)).add_params(zoomed()),
            each.mark_point(size=40).encode(
                opacity=dots, tooltip=[tip("device:O"), tip("round:Q"), tip("α:Q", form=".3f")]
            ),
            mean.mark_line(strokeDash=[6, 4]).encode(opacity=unless_picked(0.35), tooltip=_spread_tips("α")),
            height=300,
        ),
        {"means": means, "devices": rows},
        [{"device": row["device"], "round": row["round"], "α": row["α"]} for row in rows],
        hint=ZOOM,
    )


def _spread_tips(name: str) -> list[alt.Tooltip]:
    quartiles = [tip("low:Q", "lower quartile", ".3f"), tip("high:Q", "upper quartile", ".3f")]
    return [tip("round:Q"), tip("kind:N"), tip("mean:Q", f"mean {name}", ".3f"), *quartiles]


# -- cost --------------------------------------------------------------------------------------------------------------


def traffic(run: Run) -> Figure | None:
    rows = series.bytes_by_kind(run)
    if not rows:
        return None
    labelled = [row | {"what": f"{row['kind']} {row['direction']}"} for row in rows]
    sums = {row["what"]: sum(r["bytes"] for r in labelled if r["what"] == row["what"]) for row in labelled}
    order = sorted(sums, key=lambda what: (what.endswith(" down"), -sums[what]))
    shown = "datum.bytes < 1e6 ? format(datum.bytes / 1e3, '.1f') + ' kB' : format(datum.bytes / 1e6, '.2f') + ' MB'"
    base = (
        chart("bytes")
        .transform_filter(PICKED)
        .transform_aggregate(bytes="sum(bytes)", groupby=["what", "direction", "kind"])
        .transform_calculate(text=shown)
        .encode(y=alt.Y("what:N", sort=None, title=None, scale=alt.Scale(domain=order)), x=alt.X("bytes:Q", axis=None))
    )
    colour = alt.Color("direction:N", scale=alt.Scale(domain=["up", "down"]))
    bars = labelled_bars(base, color=colour, tooltip=[tip("kind:N"), tip("direction:N"), tip("bytes:Q", form=",")])
    sent, received = (size(series.total_bytes(run.devices, side)) for side in ("up", "down"))
    most = ", ".join(f"{what} {size(sums[what])}" for what in sorted(sums, key=lambda what: -sums[what])[:3])
    return Figure(
        "bytes",
        "Bytes by kind and direction",
        f"The devices sent {sent} and received {received}. The largest parts: {most}.",
        layered(*bars, height=30 * len(order)),
        {"bytes": labelled},
        rows,
    )


def phases(run: Run) -> Figure | None:
    if not run.seconds:
        return None
    rows = [
        {"phase": PHASES.get(name, name), "seconds": value, "text": duration(value)}
        for name, value in run.seconds.items()
    ]
    base = chart("phases").encode(y=alt.Y("phase:N", sort=None, title=None), x=alt.X("seconds:Q", axis=None))
    total = duration(sum(run.seconds.values()))
    return Figure(
        "real-phases",
        "Wall time by phase",
        f"{total} on this machine in all: " + ", ".join(f"{row['phase']} {row['text']}" for row in rows) + ".",
        layered(*labelled_bars(base, tooltip=[tip("phase:N"), tip("text:N", "took")]), height=30 * len(rows)),
        {"phases": rows},
        [{"phase": name, "seconds": value} for name, value in run.seconds.items()],
    )


def real_rounds(run: Run) -> Figure | None:
    rows = [{"round": t, "seconds": seconds} for t, seconds in run.timing.rounds.items()]
    if not rows:
        return None
    seconds = list(run.timing.rounds.values())
    x, y = alt.X("round:O", axis=alt.Axis(labelAngle=0)), alt.Y("seconds:Q", title="wall seconds")
    bars = chart("rounds").mark_bar(width={"band": 0.7})
    return Figure(
        "real-rounds",
        "Wall time by round",
        f"A round took {duration(float(np.mean(seconds)))} on average, between {duration(min(seconds))} and "
        f"{duration(max(seconds))}.",
        bars.encode(x=x, y=y, tooltip=[tip("round:O"), tip("seconds:Q", form=".3~g")]).properties(height=220),
        {"rounds": rows},
        rows,
    )


def simulated_rounds(run: Run) -> Figure | None:
    rows, devices = series.simulated_rounds(run), series.simulated_devices(run)
    if not any(row["seconds"] for row in rows):
        return None
    x = alt.X("round:O", title="round (0: round zero)", axis=alt.Axis(labelAngle=0))
    y, seconds = alt.Y("seconds:Q", title="simulated seconds"), tip("seconds:Q", form=".3~g")
    bars = chart("rounds").mark_bar(width={"band": 0.7}).encode(x=x, y=y, opacity=unless_picked(0.3))
    own = chart("devices").transform_filter(f"{DEVICE} !== null && {PICKED}").mark_bar(width={"band": 0.7})
    return Figure(
        "simulated-rounds",
        "Simulated time by round, set by its slowest device",
        f"On devices of these profiles the run would take {duration(sum(row['seconds'] for row in rows))}, of which "
        f"round zero {duration(rows[0]['seconds'])}. If a device is picked: its own time in each round.",
        layered(
            bars.encode(tooltip=[tip("round:O"), seconds, tip("slowest:O", "slowest device")]),
            own.encode(x=x, y=y, tooltip=[tip("device:O"), tip("round:O"), seconds]),
            height=220,
        ),
        {"rounds": rows, "devices": devices},
        [*rows, *devices],
    )
