"""The page of several runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

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
    layered,
    round_axis,
    zoomed,
)
from experiments.figures.page import Page, Section, Table
from experiments.figures.theme import CATEGORIES
from experiments.output import duration, size
from experiments.report import differences, series, tables, wording
from experiments.report.figures.learning import mark_scales
from experiments.report.reading import Run

MOST_APART = 6  # runs, whose marks on a device's line stand below each other
DASHES = ([1, 0], [6, 4], [2, 3], [10, 3, 2, 3])  # the second, third, … time that the colours are used


def page_of_all(runs: Sequence[Run]) -> Page:
    """Returns what there is to see of several runs beside each other."""
    names = differences.names(runs)
    by_name = {name: run for name, run in zip(names, runs, strict=True) if run.equipped}
    missing = [f"{name}: {sentence}" for name, run in zip(names, runs, strict=True) for sentence in run.missing]
    differing = differences.differing(runs)
    sections = [Section("Results", [*_stages(by_name)], _results(names, runs, differing))]
    if by_name:
        sections.append(Section("How they got there", _curves(by_name)))
        sections.append(Section("Device by device", [_devices(by_name)]))
        sections.append(Section("What they cost", [_traffic(by_name)]))
    ids = sorted({device["device"] for run in by_name.values() for device in run.equipped})
    folders = [[name, str(run.path)] for name, run in zip(names, runs, strict=True)]
    sections.append(Section("Where they lie", table=Table(("run", "folder"), folders, words=frozenset({0, 1}))))
    return Page(f"{len(runs)} runs beside each other", _lead(by_name, differing), sections, missing=missing, picker=ids)


def _lead(runs: dict[str, Run], differing: Sequence[str]) -> list[str]:
    if not runs:
        return ["None of these runs has a device with a model yet."]
    means = {name: series.mean_accuracy(run, "personal") or 0.0 for name, run in runs.items()}
    best, worst = max(means, key=means.__getitem__), min(means, key=means.__getitem__)
    sources = sorted({wording.source(run) for run in runs.values()})
    said = f"{len(runs)} runs on {', '.join(sources)}. "
    if len(runs) > 1:
        said += (
            f"The personal models of {best} have the highest mean accuracy, {means[best]:.3f}; those of {worst} the "
            f"lowest, {means[worst]:.3f}."
        )
    cheapest = min(runs, key=lambda name: _total(runs[name], "bytes_up"))
    options = ", ".join(differing)
    return [
        said,
        f"The runs differ in {options}." if differing else "The runs have the same options.",
        f"The devices of {cheapest} sent least: {size(_total(runs[cheapest], 'bytes_up'))}.",
    ]


def _total(run: Run, side: str) -> int:
    return sum(series.total_bytes(device, side) for device in run.devices)


def _results(names: Sequence[str], runs: Sequence[Run], differing: Sequence[str]) -> Table:
    columns = ["run", *series.STAGES, "worst tenth", "up", "down", "simulated", "devices", "rounds", *differing]
    rows = []
    for name, run in zip(names, runs, strict=True):
        means = [series.mean_accuracy(run, stage) for stage in series.STAGES]
        simulated = run.summary.get("simulated_seconds")
        worst = run.summary.get("personal_accuracy_worst_decile")
        rows.append(
            [
                name,
                *(_accuracy(mean) for mean in means),
                _accuracy(worst),
                size(_total(run, "bytes_up")),
                size(_total(run, "bytes_down")),
                duration(simulated) if simulated else "–",
                str(len(run.devices)),
                str(run.rounds),
                *(tables.shown_option(run.config.get(option, "")) for option in differing),
            ]
        )
    return Table(columns, rows, words=frozenset({0, *range(len(columns) - len(differing), len(columns))}))


def _accuracy(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _stages(runs: dict[str, Run]) -> list[Figure]:
    rows = [
        {"run": name, "stage": stage, "accuracy": mean}
        for name, run in runs.items()
        for stage in series.STAGES
        if (mean := series.mean_accuracy(run, stage)) is not None
    ]
    if not rows:
        return []
    drawn = (
        chart("means")
        .mark_point()
        .encode(
            y=_run_axis(list(runs), grid=True),
            x=alt.X("accuracy:Q", title="mean accuracy", scale=alt.Scale(zero=False, padding=8)),
            **mark_scales(),
            tooltip=["run:N", "stage:N", alt.Tooltip("accuracy:Q", format=".3f")],
        )
    )
    said = "; ".join(f"{name} {series.mean_accuracy(run, 'personal'):.3f}" for name, run in runs.items())
    title = "Mean accuracy of each run, from dense to personal"
    return [
        Figure(
            "runs",
            title,
            f"Personal: {said}.",
            drawn.properties(height=(LINE + 4) * len(runs)),
            {"means": rows[::-1]},
            rows,
            wide=True,
        )
    ]


def _curves(runs: dict[str, Run]) -> list[Figure]:
    rows = [{"run": name, **row} for name, run in runs.items() for row in differences.curve(run)]
    titles = {"round": "round", "MB": "MB sent and received by all devices", "seconds": "simulated seconds"}
    return [
        Figure(
            f"curves-over-{axis.lower()}",
            f"Mean personal accuracy over {what}",
            f"A line a run. {_ends(rows, axis, titles[axis])}",
            layered(*_lines(rows, list(runs), axis, titles[axis]), height=340),
            {"curves": rows},
            [{"run": row["run"], "round": row["round"], axis: row[axis], "accuracy": row["accuracy"]} for row in rows],
            wide=True,
            hint=ZOOM,
            group="curves",
            choice=what,
        )
        for axis, what in differences.AXES.items()
        if rows
    ]


def _ends(rows: Sequence[Row], axis: str, title: str) -> str:
    last = {row["run"]: row for row in rows}
    where = "after round {:d}" if axis == "round" else f"at {{:.4g}} {title}"
    return "; ".join(f"{name}: {row['accuracy']:.3f} {where.format(row[axis])}" for name, row in last.items()) + "."


def _lines(rows: Sequence[Row], names: Sequence[str], axis: str, title: str) -> list[alt.Chart]:
    scale = alt.Scale(nice=False, zero=False, padding=8)
    x = round_axis(rows) if axis == "round" else alt.X(f"{axis}:Q", title=title, scale=scale, axis=alt.Axis(grid=False))
    y = alt.Y("accuracy:Q", title="mean personal accuracy", scale=alt.Scale(zero=False, padding=8))
    tooltip = ["run:N", "round:Q", alt.Tooltip(f"{axis}:Q", format=".4~g"), alt.Tooltip("accuracy:Q", format=".3f")]
    legend = _legend(names)
    dashes = alt.Scale(
        domain=list(names), range=[DASHES[k // len(CATEGORIES) % len(DASHES)] for k in range(len(names))]
    )
    line = (
        chart("curves")
        .mark_line()
        .encode(x=x, y=y, color=_colour(names, legend), strokeDash=alt.StrokeDash("run:N", scale=dashes, legend=legend))
        .add_params(zoomed())
    )
    return [line, chart("curves").mark_point(size=40).encode(x=x, y=y, color=_colour(names, legend), tooltip=tooltip)]


def _colour(names: Sequence[str], legend: Any) -> alt.Color:
    return alt.Color("run:N", scale=alt.Scale(domain=list(names)), legend=legend)


def _legend(names: Sequence[str]) -> alt.Legend:
    """Returns the legend of the runs; long names stand below each other."""
    long = max(map(len, names)) > 14
    return alt.Legend(columns=1 if long else 4, labelLimit=320, symbolOpacity=1)


def _run_axis(names: Sequence[str], **form: Any) -> alt.Y:
    padding = alt.Undefined if form.get("grid") else 0.35
    scale = alt.Scale(domain=list(names), paddingInner=padding)
    return alt.Y("run:N", sort=None, title=None, axis=alt.Axis(labelLimit=220, **form), scale=scale)


def _devices(runs: dict[str, Run]) -> Figure:
    rows = [
        {"run": name, "device": d["device"], "pruned": d["pruned_accuracy"], "personal": d["personal_accuracy"]}
        for name, run in runs.items()
        for d in run.equipped
    ]
    devices = sorted({row["device"] for row in rows})
    names = list(runs)
    apart = len(names) <= MOST_APART
    drawn = (
        chart("devices")
        .mark_point(size=60 if apart else 90, filled=apart, strokeWidth=2)
        .encode(
            y=device_axis(devices),
            x=alt.X(
                "personal:Q",
                title="personal accuracy on the device's own test images",
                scale=alt.Scale(zero=False, padding=8),
            ),
            color=_colour(names, _legend(names)),
            **(
                {"yOffset": alt.YOffset("run:N", sort=None, scale=alt.Scale(domain=names, paddingOuter=1))}
                if apart
                else {}
            ),
            opacity=faded(),
            tooltip=[
                "run:N",
                "device:O",
                alt.Tooltip("pruned:Q", format=".3f"),
                alt.Tooltip("personal:Q", format=".3f"),
            ],
        )
    )
    spread = {i: [row["personal"] for row in rows if row["device"] == i] for i in devices}
    most = max(devices, key=lambda i: max(spread[i]) - min(spread[i]))
    return Figure(
        "devices-by-run",
        "Personal accuracy of each device by run",
        f"A line a device, a mark a run. The runs differ most on device {most}: {min(spread[most]):.3f} to "
        f"{max(spread[most]):.3f}.",
        layered(drawn, height=(1 + len(names) // 3 if apart else 1) * device_height(devices)),
        {"devices": rows},
        rows,
        wide=True,
    )


def _traffic(runs: dict[str, Run]) -> Figure:
    rows = [
        {"run": name, "direction": direction, "bytes": _total(run, side), "said": size(_total(run, side))}
        for name, run in runs.items()
        for direction, side in (("up", "bytes_up"), ("down", "bytes_down"))
    ]
    y = _run_axis(list(runs))
    offset = alt.YOffset("direction:N", sort=None, scale=alt.Scale(domain=["up", "down"]))
    x, colour = alt.X("bytes:Q", axis=None), alt.Color("direction:N", scale=alt.Scale(domain=["up", "down"]))
    bars = (
        chart("bytes")
        .mark_bar()
        .encode(
            y=y, yOffset=offset, x=x, color=colour, tooltip=["run:N", "direction:N", alt.Tooltip("bytes:Q", format=",")]
        )
    )
    text = chart("bytes").mark_text(align="left", dx=6).encode(y=y, yOffset=offset, x=x, text="said:N")
    said = "; ".join(
        f"{name} {size(_total(run, 'bytes_up'))} up, {size(_total(run, 'bytes_down'))} down"
        for name, run in runs.items()
    )
    return Figure(
        "bytes-by-run",
        "Bytes of all devices by run and direction",
        f"{said}.",
        layered(bars, text, height=44 * len(runs)),
        {"bytes": rows},
        [{key: row[key] for key in ("run", "direction", "bytes")} for row in rows],
        wide=True,
    )
