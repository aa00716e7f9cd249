"""The page of several runs beside each other."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import altair as alt

from experiments.figures.figure import (
    LINE,
    ZOOM,
    Figure,
    Row,
    chart,
    device_axis,
    device_height,
    faded,
    labelled_bars,
    layered,
    line_styles,
    round_axis,
    tip,
    value_axis,
    zoomed,
)
from experiments.figures.page import Page, Section, Table
from experiments.output import duration, size
from experiments.report import series
from experiments.report.charts import mark_scales
from experiments.report.reading import Run
from experiments.report.single import PLACE, shown_accuracy, shown_option, source
from strategies.records import RoundLine

AXES = {"round": "rounds", "MB": "bytes", "seconds": "simulated time"}  # over which runs are compared
TITLES = {"round": "round", "MB": "MB sent and received by all devices", "seconds": "simulated seconds"}
MOST_APART = 6  # runs whose marks on a device's line stand below each other
DIRECTIONS = ["up", "down"]


def page_of_all(runs: Sequence[Run]) -> Page:
    """Returns the page of several runs."""
    named = dict(zip(names(runs), runs, strict=True))
    begun = {name: run for name, run in named.items() if run.equipped}
    options = differing(runs)
    sections = [Section("Results", [_stages(begun)] if begun else [], _results(named, options))]
    if begun:
        sections.append(Section("How they got there", _curves(begun)))
        sections.append(Section("Device by device", [_devices(begun)]))
        sections.append(Section("What they cost", [_traffic(begun)]))
    folders = [[name, str(run.path)] for name, run in named.items()]
    sections.append(Section("Folders", table=Table(("run", "folder"), folders, words=frozenset({0, 1}))))
    missing = [f"{name}: {sentence}" for name, run in named.items() for sentence in run.missing]
    ids = sorted({device.device for run in begun.values() for device in run.equipped})
    return Page(f"{len(runs)} runs compared", _lead(begun, options), sections, missing=missing, picker=ids)


def names(runs: Sequence[Run]) -> list[str]:
    """Returns a name a run: the last part of its path, or as much of the path as tells the runs apart."""
    paths = [run.path for run in runs]
    if len({path.name for path in paths}) == len(paths):
        return [path.name for path in paths]
    common = Path(os.path.commonpath([path.parent for path in paths]))
    short = [str(path.relative_to(common)) for path in paths]
    seen: Counter[str] = Counter()
    for k, name in enumerate(short):  # the same folder, given twice
        seen[name] += 1
        short[k] = name if seen[name] == 1 else f"{name} ({seen[name]})"
    return short


def differing(runs: Sequence[Run]) -> list[str]:
    """Returns the options in which the runs differ, except those that name places."""
    options = dict.fromkeys(option for run in runs for option in run.config)
    places = PLACE - {"devices.count"}
    return [o for o in options if o not in places and len({repr(run.config.get(o)) for run in runs}) > 1]


def curve(run: Run) -> list[Row]:
    """Returns round, MB (sent and received by all devices until its end), seconds (simulated), mean accuracy."""
    rows = series.curves(run)
    means = {row["round"]: row["mean"] for row in series.spread(rows, "accuracy") if row["kind"] == "personal"}
    return [
        {
            "round": line.round,
            "MB": (line.bytes_up + line.bytes_down) / 1e6,
            "seconds": line.simulated_seconds,
            "accuracy": means[line.round],
        }
        for line in run.of(RoundLine)
        if line.round in means
    ]


def _lead(runs: dict[str, Run], options: Sequence[str]) -> list[str]:
    if not runs:
        return ["None of these runs has a device with a model yet."]
    means = {name: series.mean_accuracy(run, "personal") or 0.0 for name, run in runs.items()}
    best, worst = max(means, key=means.__getitem__), min(means, key=means.__getitem__)
    first = f"{len(runs)} runs on {', '.join(sorted({source(run) for run in runs.values()}))}."
    if len(runs) > 1:
        first += (
            f" {best} has the highest mean personal accuracy, {means[best]:.3f}; {worst} the lowest, "
            f"{means[worst]:.3f}."
        )
    sent = {name: series.total_bytes(run.devices, "up") for name, run in runs.items()}
    least = min(sent, key=sent.__getitem__)
    return [
        first,
        f"The runs differ in {', '.join(options)}." if options else "The runs have the same options.",
        f"The devices of {least} sent least: {size(sent[least])}.",
    ]


def _results(runs: dict[str, Run], options: Sequence[str]) -> Table:
    columns = ["run", *series.STAGES, "worst tenth", "up", "down", "simulated", "devices", "rounds", *options]
    rows = [
        [
            name,
            *(shown_accuracy(series.mean_accuracy(run, stage)) for stage in series.STAGES),
            shown_accuracy(run.summary.personal_accuracy_worst_decile if run.summary else None),
            *(size(series.total_bytes(run.devices, side)) for side in DIRECTIONS),
            duration(run.summary.simulated_seconds) if run.summary and run.summary.simulated_seconds else "–",
            str(len(run.devices)),
            str(run.rounds),
            *(shown_option(run.config.get(option, "")) for option in options),
        ]
        for name, run in runs.items()
    ]
    return Table(columns, rows, words=frozenset({0, *range(len(columns) - len(options), len(columns))}))


def _stages(runs: dict[str, Run]) -> Figure:
    means = {(name, stage): series.mean_accuracy(run, stage) for name, run in runs.items() for stage in series.STAGES}
    rows = [
        {"run": name, "stage": stage, "accuracy": mean} for (name, stage), mean in means.items() if mean is not None
    ]
    x = alt.X("accuracy:Q", title="mean accuracy", scale=alt.Scale(zero=False, padding=8))
    y = alt.Y("run:N", sort=None, title=None, axis=alt.Axis(labelLimit=220, grid=True))
    drawn = chart("means").mark_point().encode(y=y.scale(domain=list(runs)), x=x, **mark_scales())
    shown = "; ".join(f"{name} {series.mean_accuracy(run, 'personal'):.3f}" for name, run in runs.items())
    return Figure(
        "runs",
        "Mean accuracy of each run, from dense to personal",
        f"Personal: {shown}.",
        drawn.encode(tooltip=[tip("run:N"), tip("stage:N"), tip("accuracy:Q", form=".3f")]).properties(
            height=(LINE + 4) * len(runs)
        ),
        {"means": rows[::-1]},
        rows,
        wide=True,
    )


def _curves(runs: dict[str, Run]) -> list[Figure]:
    rows = [{"run": name, **row} for name, run in runs.items() for row in curve(run)]
    last = {row["run"]: row for row in rows}
    figures = []
    for axis, what in AXES.items() if rows else ():
        where = "after round {:d}" if axis == "round" else f"at {{:.4g}} {TITLES[axis]}"
        ends = "; ".join(f"{name}: {row['accuracy']:.3f} {where.format(row[axis])}" for name, row in last.items())
        figure = Figure(
            f"curves-over-{axis.lower()}",
            f"Mean personal accuracy over {what}",
            f"A line a run. {ends}.",
            layered(*_lines(rows, list(runs), axis), height=340),
            {"curves": rows},
            [{"run": row["run"], "round": row["round"], axis: row[axis], "accuracy": row["accuracy"]} for row in rows],
            wide=True,
            hint=ZOOM,
            group="curves",
            choice=what,
        )
        figures.append(figure)
    return figures


def _lines(rows: Sequence[Row], runs: Sequence[str], axis: str) -> list[alt.Chart]:
    scale = alt.Scale(nice=False, zero=False, padding=8)
    x = alt.X(f"{axis}:Q", title=TITLES[axis], scale=scale, axis=alt.Axis(grid=False))
    styles = line_styles("run", runs, _legend(runs))
    base = chart("curves").encode(
        x=round_axis(rows) if axis == "round" else x,
        y=value_axis("accuracy", "mean personal accuracy"),
        color=styles["color"],
    )
    tooltip = [tip("run:N"), tip("round:Q"), tip(f"{axis}:Q", form=".4~g"), tip("accuracy:Q", form=".3f")]
    return [
        base.mark_line().encode(strokeDash=styles["strokeDash"]).add_params(zoomed()),
        base.mark_point(size=40).encode(shape=styles["shape"], tooltip=tooltip),
    ]


def _legend(runs: Sequence[str]) -> alt.Legend:
    """Returns the legend of the runs; long names stand below each other."""
    columns = 1 if max(map(len, runs)) > 14 else 4
    return alt.Legend(columns=columns, labelLimit=320, symbolOpacity=1, symbolStrokeWidth=0)


def _devices(runs: dict[str, Run]) -> Figure:
    rows: list[Row] = [
        {"run": name, "device": d.device, "pruned": d.pruned_accuracy, "personal": d.personal_accuracy}
        for name, run in runs.items()
        for d in run.equipped
    ]
    devices, names, apart = sorted({row["device"] for row in rows}), list(runs), len(runs) <= MOST_APART
    title, scale = "personal accuracy on the device's own test images", alt.Scale(zero=False, padding=8)
    drawn = (
        chart("devices")
        .mark_point(size=60 if apart else 90, filled=apart, strokeWidth=2)
        .encode(
            y=device_axis(devices),
            x=alt.X("personal:Q", title=title, scale=scale),
            color=line_styles("run", names, _legend(names))["color"],
            opacity=faded(),
            tooltip=[tip("run:N"), tip("device:O"), tip("pruned:Q", form=".3f"), tip("personal:Q", form=".3f")],
        )
    )
    if apart:
        drawn = drawn.encode(yOffset=alt.YOffset("run:N", sort=None, scale=alt.Scale(domain=names, paddingOuter=1)))
    found = {i: [row["personal"] for row in rows if row["device"] == i] for i in devices}
    most = max(devices, key=lambda i: max(found[i]) - min(found[i]))
    return Figure(
        "devices-by-run",
        "Personal accuracy of each device by run",
        f"A line a device, a mark a run. The runs differ most on device {most}: {min(found[most]):.3f} to "
        f"{max(found[most]):.3f}.",
        layered(drawn, height=(1 + len(names) // 3 if apart else 1) * device_height(devices)),
        {"devices": rows},
        rows,
        wide=True,
    )


def _traffic(runs: dict[str, Run]) -> Figure:
    sums = {(name, side): series.total_bytes(run.devices, side) for name, run in runs.items() for side in DIRECTIONS}
    rows = [{"run": name, "direction": side, "bytes": sent, "text": size(sent)} for (name, side), sent in sums.items()]
    y = alt.Y("run:N", sort=None, title=None, axis=alt.Axis(labelLimit=220))
    scale = alt.Scale(domain=DIRECTIONS)
    base = chart("bytes").encode(
        y=y.scale(domain=list(runs), paddingInner=0.35),
        yOffset=alt.YOffset("direction:N", sort=None, scale=scale),
        x=alt.X("bytes:Q", axis=None),
    )
    tooltip = [tip("run:N"), tip("direction:N"), tip("bytes:Q", form=",")]
    bars = labelled_bars(base, color=alt.Color("direction:N", scale=scale), tooltip=tooltip)
    shown = "; ".join(f"{name} {size(sums[name, 'up'])} up, {size(sums[name, 'down'])} down" for name in runs)
    return Figure(
        "bytes-by-run",
        "Bytes of all devices by run and direction",
        f"{shown}.",
        layered(*bars, height=44 * len(runs)),
        {"bytes": rows},
        [{key: row[key] for key in ("run", "direction", "bytes")} for row in rows],
        wide=True,
    )
