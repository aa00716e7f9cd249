"""What a run cost: bytes, and time, real and simulated."""

from __future__ import annotations

import altair as alt
import numpy as np

from experiments.figures.figure import DEVICE, PICKED, Figure, chart, layered, unless_picked
from experiments.output import duration, size
from experiments.report import series
from experiments.report.reading import Run

PHASES = {"backbone": "dense backbone"}


def traffic(run: Run) -> Figure | None:
    rows = series.bytes_by_kind(run)
    if not rows:
        return None
    labelled = [row | {"what": f"{row['kind']} {row['direction']}"} for row in rows]
    totals = {side: sum(row["bytes"] for row in rows if row["direction"] == side) for side in ("up", "down")}
    sums = {row["what"]: sum(r["bytes"] for r in labelled if r["what"] == row["what"]) for row in labelled}
    order = sorted(sums, key=lambda what: (what.endswith(" down"), -sums[what]))
    base = (
        chart("bytes")
        .transform_filter(PICKED)
        .transform_aggregate(bytes="sum(bytes)", groupby=["what", "direction", "kind"])
        .transform_calculate(
            said="datum.bytes < 1e6 ? format(datum.bytes / 1e3, '.1f') + ' kB'"
            " : format(datum.bytes / 1e6, '.2f') + ' MB'"
        )
    )
    y = alt.Y("what:N", sort=None, title=None, scale=alt.Scale(domain=order))
    x = alt.X("bytes:Q", axis=None)
    colour = alt.Color("direction:N", scale=alt.Scale(domain=["up", "down"]))
    bars = base.mark_bar(height={"band": 0.62}).encode(
        y=y, x=x, color=colour, tooltip=["kind:N", "direction:N", alt.Tooltip("bytes:Q", format=",")]
    )
    text = base.mark_text(align="left", dx=6).encode(y=y, x=x, text="said:N")
    return Figure(
        "bytes",
        "Bytes by kind and direction",
        f"The devices sent {size(totals['up'])} and received {size(totals['down'])}; most of it: "
        + ", ".join(f"{what} {size(sums[what])}" for what in sorted(sums, key=lambda w: -sums[w])[:3])
        + ".",
        layered(bars, text, height=30 * len(order)),
        {"bytes": labelled},
        rows,
    )


def phases(run: Run) -> Figure | None:
    rows = series.phases(run)
    if not rows:
        return None
    named = [
        {"phase": PHASES.get(row["phase"], row["phase"]), "seconds": row["seconds"], "said": duration(row["seconds"])}
        for row in rows
    ]
    y = alt.Y("phase:N", sort=None, title=None)
    x = alt.X("seconds:Q", axis=None)
    bars = (
        chart("phases")
        .mark_bar(height={"band": 0.62})
        .encode(y=y, x=x, tooltip=["phase:N", alt.Tooltip("said:N", title="took")])
    )
    text = chart("phases").mark_text(align="left", dx=6).encode(y=y, x=x, text="said:N")
    total = sum(row["seconds"] for row in rows)
    return Figure(
        "real-phases",
        "Real time by phase",
        f"{duration(total)} on this machine in all: "
        + ", ".join(f"{row['phase']} {row['said']}" for row in named)
        + ".",
        layered(bars, text, height=30 * len(named)),
        {"phases": named},
        rows,
    )


def real_rounds(run: Run) -> Figure | None:
    rows = series.real_rounds(run)
    if not rows:
        return None
    seconds = [row["seconds"] for row in rows]
    drawn = (
        chart("rounds")
        .mark_bar(width={"band": 0.7})
        .encode(
            x=alt.X("round:O", title="round", axis=alt.Axis(labelAngle=0)),
            y=alt.Y("seconds:Q", title="seconds here"),
            tooltip=["round:O", alt.Tooltip("seconds:Q", format=".3~g")],
        )
    )
    return Figure(
        "real-rounds",
        "Real time by round",
        f"A round took {duration(float(np.mean(seconds)))} on average, between {duration(min(seconds))} and "
        f"{duration(max(seconds))}.",
        drawn.properties(height=220),
        {"rounds": rows},
        rows,
    )


def simulated_rounds(run: Run) -> Figure | None:
    rows = series.simulated_rounds(run)
    if not any(row["seconds"] for row in rows):
        return None
    x = alt.X("round:O", title="round (0: round zero)", axis=alt.Axis(labelAngle=0))
    y = alt.Y("seconds:Q", title="simulated seconds")
    bars = (
        chart("rounds")
        .mark_bar(width={"band": 0.7})
        .encode(
            x=x,
            y=y,
            opacity=unless_picked(0.3),
            tooltip=[
                "round:O",
                alt.Tooltip("seconds:Q", format=".3~g"),
                alt.Tooltip("slowest:O", title="slowest device"),
            ],
        )
    )
    each = (
        chart("devices")
        .transform_filter(f"{DEVICE} !== null && {PICKED}")
        .mark_bar(width={"band": 0.7})
        .encode(x=x, y=y, tooltip=["device:O", "round:O", alt.Tooltip("seconds:Q", format=".3~g")])
    )
    total, devices = sum(row["seconds"] for row in rows), series.simulated_devices(run)
    return Figure(
        "simulated-rounds",
        "Simulated time by round, which its slowest device decides",
        f"On devices of these profiles the run would take {duration(total)}, of which round zero "
        f"{duration(rows[0]['seconds'])}. With a device picked: its own part of each round.",
        layered(bars, each, height=220),
        {"rounds": rows, "devices": devices},
        [*rows, *devices],
    )
