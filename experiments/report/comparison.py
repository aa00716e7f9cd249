"""The report page that compares several runs."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import altair as alt
import pandas as pd

from experiments.figures import figure as fig
from experiments.figures.figure import ZOOM, Figure, chart, layered, tips
from experiments.figures.page import Page, Section, Table
from experiments.output import duration, size
from experiments.report import series
from experiments.report.charts import mark_scales
from experiments.report.reading import Run
from experiments.report.single import PLACE, shown_accuracy, shown_option, source
from strategies.records import RoundLine

AXES = {"round": "rounds", "MB": "bytes", "seconds": "simulated time"}  # x axes of the accuracy curves
TITLES = {"round": "round", "MB": "MB sent and received by all devices", "seconds": "simulated seconds"}
MOST_APART = 6  # up to this many runs, the marks of a device are drawn one below the other
DIRECTIONS = ["up", "down"]


def page_of_all(runs: Sequence[Run]) -> Page:
    """Returns the page of several runs."""
    named = dict(zip(names(runs), runs, strict=True))
    begun = {name: run for name, run in named.items() if run.equipped}
    options = differing(runs)
    sections = [Section("Results", [_stages(begun)] if begun else [], _results(named, options))]
    if begun:
        sections.append(Section("Accuracy during training", _curves(begun)))
        sections.append(Section("Accuracy of each device", [_devices(begun)]))
        sections.append(Section("Cost", [_traffic(begun)]))
    folders = [[name, str(run.path)] for name, run in named.items()]
    sections.append(Section("Folders", table=Table(("run", "folder"), folders, words={0, 1})))
    missing = [f"{name}: {sentence}" for name, run in named.items() for sentence in run.missing]
    ids = sorted({device.device for run in begun.values() for device in run.equipped})
    return Page(f"{len(runs)} runs compared", _lead(begun, options), sections, missing=missing, picker=ids)


def names(runs: Sequence[Run]) -> list[str]:
    """Returns one name per run: the last part of its path; if two are equal, the paths below their common folder."""
    paths = [run.path for run in runs]
    if len({path.name for path in paths}) == len(paths):
        return [path.name for path in paths]
    common = Path(os.path.commonpath([path.parent for path in paths]))
    short = [str(path.relative_to(common)) for path in paths]
    seen: Counter[str] = Counter()
    for k, name in enumerate(short):  # the same folder may be given twice
        seen[name] += 1
        short[k] = name if seen[name] == 1 else f"{name} ({seen[name]})"
    return short


def differing(runs: Sequence[Run]) -> list[str]:
    """Returns the options whose values differ between the runs, except those that name places."""
    options = dict.fromkeys(option for run in runs for option in run.config)
    places = PLACE - {"devices.count"}
    return [o for o in options if o not in places and len({repr(run.config.get(o)) for run in runs}) > 1]


def curve(run: Run) -> pd.DataFrame:
    """Returns the mean personal accuracy after each round, with the MB and simulated seconds spent until then.

    Columns: round, MB (sent and received by all devices), seconds, accuracy.
    """
    personal = series.curves(run).query("kind == 'personal'").groupby("round")["accuracy"].mean()
    spent = [(r.round, (r.bytes_up + r.bytes_down) / 1e6, r.simulated_seconds) for r in run.of(RoundLine)]
    return pd.DataFrame(spent, columns=list(AXES)).join(personal, on="round", how="inner")


def _lead(runs: dict[str, Run], options: Sequence[str]) -> list[str]:
    if not runs:
        return ["None of these runs has a device with a model yet."]
    means = pd.Series({name: series.mean_accuracy(run, "personal") for name, run in runs.items()})
    sent = pd.Series({name: series.total_bytes(run.devices, "up") for name, run in runs.items()})
    first = f"{len(runs)} runs on {', '.join(sorted({source(run) for run in runs.values()}))}."
    if len(runs) > 1:
        first += (
            f" {means.idxmax()} has the highest mean personal accuracy, {means.max():.3f}; {means.idxmin()} the "
            f"lowest, {means.min():.3f}."
        )
    return [
        first,
        f"The runs differ in {', '.join(options)}." if options else "The runs have the same options.",
        f"The devices of {sent.idxmin()} sent the least: {size(sent.min())}.",
    ]


def _results(runs: dict[str, Run], options: Sequence[str]) -> Table:
    stages = series.stages(*runs.values())
    columns = ["run", *stages, "worst tenth", "up", "down", "simulated", "devices", "rounds", *options]
    rows = [
        [
            name,
            *(shown_accuracy(series.mean_accuracy(run, stage)) for stage in stages),
            shown_accuracy(run.summary.personal_accuracy_worst_decile if run.summary else None),
            *(size(series.total_bytes(run.devices, side)) for side in DIRECTIONS),
            duration(run.summary.simulated_seconds) if run.summary and run.summary.simulated_seconds else "–",
            str(len(run.devices)),
            str(run.rounds),
            *(shown_option(run.config.get(option, "")) for option in options),
        ]
        for name, run in runs.items()
    ]
    return Table(columns, rows, words={0, *range(len(columns) - len(options), len(columns))})


def _stages(runs: dict[str, Run]) -> Figure:
    means = pd.DataFrame({name: series.accuracies(run).mean() for name, run in runs.items()})
    frame = means.rename_axis("stage").melt(var_name="run", value_name="accuracy", ignore_index=False)
    frame = frame.dropna().reset_index()[["run", "stage", "accuracy"]]
    x = alt.X("accuracy:Q", title="mean accuracy", scale=alt.Scale(zero=False, padding=8))
    y = alt.Y("run:N", sort=None, title=None, axis=alt.Axis(labelLimit=220, grid=True))
    drawn = (
        chart("means")
        .mark_point()
        .encode(y=y.scale(domain=list(runs)), x=x, **mark_scales(series.stages(*runs.values())))
    )
    return Figure(
        "runs",
        "Mean accuracy of each run, from dense to personal",
        f"Personal: {'; '.join(f'{name} {value:.3f}' for name, value in means.loc['personal'].items())}.",
        drawn.encode(tooltip=tips("run:N", "stage:N", "accuracy:Q||.3f")).properties(height=(fig.LINE + 4) * len(runs)),
        {"means": frame[::-1]},
        frame,
        wide=True,
    )


def _curves(runs: dict[str, Run]) -> list[Figure]:
    frame = pd.concat([curve(run).assign(run=name) for name, run in runs.items()])
    last = frame.groupby("run", sort=False).last()
    figures = []
    for axis, what in AXES.items() if len(frame) else ():
        where = "after round {:.0f}" if axis == "round" else f"at {{:.4g}} {TITLES[axis]}"
        ends = [
            f"{name}: {row['accuracy']:.3f} {where.format(row[axis])}" for name, row in last.to_dict("index").items()
        ]
        figure = Figure(
            f"curves-over-{axis.lower()}",
            f"Mean personal accuracy over {what}",
            f"One line per run. {'; '.join(ends)}.",
            layered(*_lines(frame, list(runs), axis), height=340),
            {"curves": frame},
            columns=list(dict.fromkeys(("run", "round", axis, "accuracy"))),
            wide=True,
            hint=ZOOM,
            group="curves",
            choice=what,
        )
        figures.append(figure)
    return figures


def _lines(frame: pd.DataFrame, runs: Sequence[str], axis: str) -> list[alt.Chart]:
    scale = alt.Scale(nice=False, zero=False, padding=8)
    x = alt.X(f"{axis}:Q", title=TITLES[axis], scale=scale, axis=alt.Axis(grid=False))
    x, styles = fig.round_axis(frame["round"]) if axis == "round" else x, fig.line_styles("run", runs, _legend(runs))
    y = fig.value_axis("accuracy", "mean personal accuracy")
    base = chart("curves").encode(x=x, y=y, color=styles["color"])
    tooltip = tips("run:N", "round:Q", f"{axis}:Q||.4~g", "accuracy:Q||.3f")
    return [
        base.mark_line().encode(strokeDash=styles["strokeDash"]).add_params(fig.zoomed()),
        base.mark_point(size=40).encode(shape=styles["shape"], tooltip=tooltip),
    ]


def _legend(runs: Sequence[str]) -> alt.Legend:
    """Returns the legend of the runs; long names are listed in one column."""
    columns = 1 if max(map(len, runs)) > 14 else 4
    return alt.Legend(columns=columns, labelLimit=320, symbolOpacity=1, symbolStrokeWidth=0)


def _devices(runs: dict[str, Run]) -> Figure:
    tables = [series.accuracies(run)[["pruned", "personal"]].reset_index() for run in runs.values()]
    frame = pd.concat([table.assign(run=name) for name, table in zip(runs, tables, strict=True)])
    devices, names, apart = fig.devices_of(frame), list(runs), len(runs) <= MOST_APART
    title, scale = "personal accuracy on the device's own test images", alt.Scale(zero=False, padding=8)
    drawn = (
        chart("devices")
        .mark_point(size=60 if apart else 90, filled=apart, strokeWidth=2)
        .encode(
            y=fig.device_axis(devices),
            x=alt.X("personal:Q", title=title, scale=scale),
            color=fig.line_styles("run", names, _legend(names))["color"],
            opacity=fig.faded(),
            tooltip=tips("run:N", "device:O", "pruned:Q||.3f", "personal:Q||.3f"),
        )
    )
    if apart:
        drawn = drawn.encode(yOffset=alt.YOffset("run:N", sort=None, scale=alt.Scale(domain=names, paddingOuter=1)))
    ends = frame.groupby("device")["personal"].agg(["min", "max"])
    most = (ends["max"] - ends["min"]).idxmax()
    return Figure(
        "devices-by-run",
        "Personal accuracy of each device by run",
        f"One line per device, one mark per run. The runs differ most on device {most}: {ends['min'][most]:.3f} to "
        f"{ends['max'][most]:.3f}.",
        layered(drawn, height=(1 + len(names) // 3 if apart else 1) * fig.device_height(devices)),
        {"devices": frame},
        columns=("run", "device", "pruned", "personal"),
        wide=True,
    )


def _traffic(runs: dict[str, Run]) -> Figure:
    sums = {name: {side: series.total_bytes(run.devices, side) for side in DIRECTIONS} for name, run in runs.items()}
    rows = [
        {"run": name, "direction": side, "bytes": sent, "text": size(sent)}
        for name, sides in sums.items()
        for side, sent in sides.items()
    ]
    scale = alt.Scale(domain=DIRECTIONS)
    names = alt.Y("run:N", sort=None, title=None, axis=alt.Axis(labelLimit=220))
    names = names.scale(domain=list(runs), paddingInner=0.35)
    base = chart("bytes").encode(yOffset=alt.YOffset("direction:N", sort=None, scale=scale))
    tooltip = tips("run:N", "direction:N", "bytes:Q||,")
    bars = fig.labelled_bars(base, names, "bytes", color=alt.Color("direction:N", scale=scale), tooltip=tooltip)
    shown = "; ".join(f"{name} {size(sides['up'])} up, {size(sides['down'])} down" for name, sides in sums.items())
    return Figure(
        "bytes-by-run",
        "Bytes sent and received by all devices, by run",
        f"{shown}.",
        layered(*bars, height=44 * len(runs)),
        {"bytes": rows},
        columns=("run", "direction", "bytes"),
        wide=True,
    )
