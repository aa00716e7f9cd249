"""Figures of the accuracy of a run by model and by round, and of the run's cost."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import altair as alt
import numpy as np
import pandas as pd

from experiments.figures import figure as fig
from experiments.figures.figure import PICKED, ZOOM, Figure, chart, layered, tips
from experiments.output import duration, size
from experiments.report import series
from experiments.report.reading import Run

# shape and size of the mark of each stage; the order assigns the colours of the palette: blue, orange, green, grey,
# vermilion, purple, sky
MARKS: dict[str, tuple[str, int]] = {
    "personal": ("circle", 70),
    "pruned": ("triangle-up", 80),
    "global": ("diamond", 130),
    "dense": ("M-0.2,-1.4H0.2V1.4H-0.2Z", 130),
    "alone": ("square", 60),
    "dense+alone": ("cross", 80),
    "pooled": ("triangle-down", 80),
}
ONE_PICKED = f"{fig.DEVICE} !== null && {PICKED}"


def mark_scales(stages: Sequence[str]) -> dict[str, Any]:
    """Returns the encodings that distinguish a device's models: colour, shape and size; `stages` are in the legend."""
    order, legend = list(MARKS), alt.Legend(values=list(stages))
    shapes, sizes = ([mark[k] for mark in MARKS.values()] for k in (0, 1))
    return {
        "color": alt.Color("stage:N", scale=alt.Scale(domain=order), legend=legend),
        "shape": alt.Shape("stage:N", scale=alt.Scale(domain=order, range=shapes), legend=legend),
        "size": alt.Size("stage:O", scale=alt.Scale(domain=order, range=sizes), legend=legend),
    }


# -- accuracy ----------------------------------------------------------------------------------------------------------


def accuracy(run: Run) -> Figure | None:
    frame = series.accuracies(run)
    if frame.empty:
        return None
    devices, means, gain = sorted(frame.index.tolist()), frame.mean().dropna(), frame["personal"] - frame["pruned"]
    spans = pd.DataFrame({"low": frame.min(axis=1), "high": frame.max(axis=1)}).reset_index()
    long = (
        frame[[stage for stage in reversed(MARKS) if stage in frame]]
        .melt(var_name="stage", value_name="accuracy", ignore_index=False)
        .dropna()
    )
    x = alt.X("accuracy:Q", title="accuracy on the device's own test images", scale=alt.Scale(zero=False, nice=True))
    y = fig.device_axis(devices)
    span = (
        chart("spans").mark_rule(strokeWidth=2).encode(y=y, x=alt.X("low:Q"), x2="high:Q", opacity=fig.faded(0.1, 0.45))
    )
    tooltip = tips("device:O", *(f"of {stage}:Q|{stage}|.3f" for stage in means.index))
    points = (
        chart("accuracies")
        .mark_point()
        .encode(y=y, x=x, **mark_scales(series.stages(run)), opacity=fig.faded(), tooltip=tooltip)
    )
    best = frame.loc[gain.idxmax()]
    return Figure(
        "accuracy",
        "Accuracy of each device, from dense to personal",
        f"One line per device, one mark per model. Means: {', '.join(f'{key} {v:.3f}' for key, v in means.items())}. "
        f"Device {best.name} gained most from training: {best['pruned']:.3f} pruned, {best['personal']:.3f} personal.",
        layered(span, points, height=fig.device_height(devices)),
        {"spans": spans, "accuracies": long.join(frame.add_prefix("of ")).reset_index()},
        frame.reset_index(),
        wide=True,
    )


def curves(run: Run) -> Figure | None:
    frame = series.curves(run)
    if frame.empty:
        return None
    means = series.spread(frame, "accuracy")
    legend = alt.Legend(values=sorted(set(frame["kind"]), key=series.KINDS.index), symbolOpacity=1)
    colour = alt.Color("kind:N", scale=alt.Scale(domain=list(MARKS)), legend=legend)
    mean = chart("means").encode(x=fig.round_axis(means["round"]), color=colour)
    own = chart("devices").encode(x=fig.round_axis(means["round"]), y="accuracy:Q", color=colour)
    own = own.transform_filter(ONE_PICKED)
    y = fig.value_axis("mean", "accuracy on own test images")
    last = means.groupby("kind")["mean"].last()
    return Figure(
        "curves",
        "Accuracy after each round",
        "Lines are means over devices; bands span the middle half of the devices. The mean goes from "
        f"{means['mean'].iloc[0]:.3f} before the first round to {last['personal']:.3f} (personal) and "
        f"{last['global']:.3f} (global) after round {means['round'].iloc[-1]}.",
        layered(
            mean.mark_area(opacity=0.14).encode(y=alt.Y("low:Q"), y2="high:Q"),
            mean.mark_line().encode(y=y, opacity=fig.unless_picked()).add_params(fig.zoomed()),
            mean.mark_point(size=50).encode(y=y, opacity=fig.unless_picked(), tooltip=_spread_tips("accuracy")),
            own.mark_line(),
            own.mark_point(size=50).encode(tooltip=tips("device:O", "round:Q", "kind:N", "accuracy:Q||.3f")),
            height=300,
        ),
        {"means": means, "devices": frame},
        pd.concat([means.rename(columns={"mean": "accuracy"}).assign(device="mean"), frame]),
        columns=("device", "round", "kind", "accuracy"),
        hint=ZOOM,
    )


def alpha(run: Run) -> Figure | None:
    frame = series.alphas(run)
    if frame.empty:
        return None
    x = fig.round_axis(frame["round"])
    own = chart("devices").encode(x=x, y=fig.value_axis("α", "α"))
    dots = alt.condition(PICKED, alt.value(0.4), alt.value(0.0))
    mean = chart("means").encode(x=x, y="mean:Q", color=alt.value(alt.ExprRef("ink")))
    last = frame["α"][frame["round"] == frame["round"].max()]
    return Figure(
        "alpha",
        "α, the weight of a device's own adapters in the interpolation",
        "One line per device; the dashed line is the mean. With α = 0 a device uses only the shared adapters, as it "
        f"does until it has personal ones. At the end, α is between {last.min():.3f} and {last.max():.3f}.",
        layered(
            own.mark_line(strokeWidth=1.5)
            .encode(detail="device:N", opacity=fig.faded(0.08, 0.4))
            .add_params(fig.zoomed()),
            own.mark_point(size=40).encode(opacity=dots, tooltip=tips("device:O", "round:Q", "α:Q||.3f")),
            mean.mark_line(strokeDash=[6, 4]).encode(opacity=fig.unless_picked(0.35), tooltip=_spread_tips("α")),
            height=300,
        ),
        {"devices": frame, "means": series.spread(frame, "α")},
        columns=("device", "round", "α"),
        hint=ZOOM,
    )


def oracle(run: Run) -> Figure | None:
    used = {record.device: record.alpha for record in run.equipped if record.device in run.alphas}
    if not used:
        return None
    frame = pd.DataFrame([{"device": i, "best": run.alphas[i].best, "α": alpha} for i, alpha in used.items()])
    span, ends = alt.Scale(domain=[0, 1]), [{"best": 0, "α": 0}, {"best": 1, "α": 1}]
    x = alt.X("best:Q", title="best α on the device's test images (oracle)", scale=span)
    y = alt.Y("α:Q", title="α in use", scale=span)
    line = chart("equal").mark_line(strokeDash=[6, 4], strokeWidth=1).encode(x=x, y=y, opacity=alt.value(0.5))
    points = chart("devices").mark_point(size=70).encode(x=x, y=y, opacity=fig.faded())
    alphas = next(iter(run.alphas.values())).alpha
    means = np.mean([device.accuracy for device in run.alphas.values() if device.alpha == alphas], axis=0)
    by_alpha = ", ".join(f"{a:g}: {mean:.3f}" for a, mean in zip(alphas, means, strict=True))
    return Figure(
        "alpha-oracle",
        "α in use against the best α on the test images (oracle)",
        f"One mark per device; on the dashed line both are equal. Means: {frame['α'].mean():.3f} in use, "
        f"{frame['best'].mean():.3f} best. The oracle is for comparison only: no choice uses the test images, and with "
        f"few test images the oracle is noisy. Mean test accuracy if all devices use the same α: {by_alpha}.",
        layered(line, points.encode(tooltip=tips("device:O", "best:Q|best α|.2f", "α:Q||.3f")), height=300),
        {"devices": frame, "equal": ends},
    )


def _spread_tips(name: str) -> list[alt.Tooltip]:
    return tips("round:Q", "kind:N", f"mean:Q|mean {name}|.3f", "low:Q|lower quartile|.3f", "high:Q|upper quartile|.3f")


# -- cost --------------------------------------------------------------------------------------------------------------


def traffic(run: Run) -> Figure | None:
    frame = series.bytes_by_kind(run)
    if frame.empty:
        return None
    frame["what"] = frame["kind"] + " " + frame["direction"]
    sums = frame.groupby("what", sort=False)["bytes"].sum().sort_values(ascending=False, kind="stable")
    order = sorted(sums.index, key=lambda what: what.endswith(" down"))
    shown = "datum.bytes < 1e6 ? format(datum.bytes / 1e3, '.1f') + ' kB' : format(datum.bytes / 1e6, '.2f') + ' MB'"
    base = (
        chart("bytes")
        .transform_filter(PICKED)
        .transform_aggregate(bytes="sum(bytes)", groupby=["what", "direction", "kind"])
        .transform_calculate(text=shown)
    )
    y = alt.Y("what:N", sort=None, title=None, scale=alt.Scale(domain=order))
    colour = alt.Color("direction:N", scale=alt.Scale(domain=["up", "down"]))
    bars = fig.labelled_bars(base, y, "bytes", color=colour, tooltip=tips("kind:N", "direction:N", "bytes:Q||,"))
    sent, received = (size(series.total_bytes(run.devices, side)) for side in ("up", "down"))
    most = ", ".join(f"{what} {size(part)}" for what, part in sums.head(3).items())
    return Figure(
        "bytes",
        "Bytes by kind and direction",
        f"The devices sent {sent} and received {received}. The largest parts are {most}.",
        layered(*bars, height=30 * len(order)),
        {"bytes": frame},
        columns=("device", "direction", "kind", "bytes"),
    )


def phases(run: Run) -> Figure | None:
    if not run.seconds:
        return None
    named = {"dense backbone" if name == "backbone" else name: seconds for name, seconds in run.seconds.items()}
    rows = [{"phase": name, "seconds": value, "text": duration(value)} for name, value in named.items()]
    y = alt.Y("phase:N", sort=None, title=None)
    bars = fig.labelled_bars(chart("phases"), y, "seconds", tooltip=tips("phase:N", "text:N|took"))
    return Figure(
        "real-phases",
        "Wall time by phase",
        f"{duration(sum(named.values()))} in total on this machine: "
        + ", ".join(f"{row['phase']} {row['text']}" for row in rows)
        + ".",
        layered(*bars, height=30 * len(rows)),
        {"phases": rows},
        columns=("phase", "seconds"),
    )


def real_rounds(run: Run) -> Figure | None:
    if not run.timing.rounds:
        return None
    seconds = list(run.timing.rounds.values())
    return Figure(
        "real-rounds",
        "Wall time by round",
        f"A round took {duration(float(np.mean(seconds)))} on average, between {duration(min(seconds))} and "
        f"{duration(max(seconds))}.",
        _round_bars("rounds", "wall seconds").properties(height=220),
        {"rounds": [{"round": t, "seconds": seconds} for t, seconds in run.timing.rounds.items()]},
    )


def simulated_rounds(run: Run) -> Figure | None:
    frame, devices = series.simulated_rounds(run), series.simulated_devices(run)
    if not frame["seconds"].any():
        return None
    title, axis = "simulated seconds", "round (0: round zero)"
    bars = _round_bars("rounds", title, axis, "slowest:O|slowest device").encode(opacity=fig.unless_picked(0.3))
    return Figure(
        "simulated-rounds",
        "Simulated time of each round, set by its slowest device",
        f"On devices with these profiles the run would take {duration(frame['seconds'].sum())}, of which round zero "
        f"takes {duration(frame['seconds'].iloc[0])}. For a selected device, its own time in each round is shown too.",
        layered(bars, _round_bars("devices", title, axis, "device:O").transform_filter(ONE_PICKED), height=220),
        {"rounds": frame, "devices": devices},
        pd.concat([frame, devices]),
    )


def _round_bars(data: str, title: str, axis: str = "round", *more: str) -> alt.Chart:
    """Returns one bar per round; its tooltip begins with the lines `more`, in the format of `tips`."""
    x, y = alt.X("round:O", title=axis, axis=alt.Axis(labelAngle=0)), alt.Y("seconds:Q", title=title)
    bars = chart(data).mark_bar(width={"band": 0.7})
    return bars.encode(x=x, y=y, tooltip=tips(*more, "round:O", "seconds:Q||.3~g"))
