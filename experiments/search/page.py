"""The page of a search: its progress, the importance of options, its configurations, and every trial by rounds."""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import altair as alt
import optuna
from optuna.distributions import CategoricalDistribution
from optuna.importance import get_param_importances
from optuna.trial import FrozenTrial, TrialState

from experiments.figures.figure import ZOOM, Figure, Row, chart, layered, round_axis, value_axis, zoomed
from experiments.figures.page import Page, Section, render
from tapfl.store import write_bytes

BEST = alt.value(alt.ExprRef("ink"))


def write_page(study: optuna.Study, rungs: Sequence[int], loss: str, path: Path) -> None:
    """Writes the page of a search as one HTML file that opens offline.

    Args:
        rungs: rounds after which trials were compared.
        loss: name of the objective's value.
    """
    write_bytes(path, render(page_of_search(study, rungs, loss)).encode())


def page_of_search(study: optuna.Study, rungs: Sequence[int], loss: str) -> Page:
    """Returns what there is to see of a search; figures for which there are too few trials are left out."""
    trials = study.get_trials(deepcopy=False)
    completed = [trial for trial in trials if trial.state == TrialState.COMPLETE]
    found = [history(completed, loss), importances(study), configurations(completed, loss), rounds(trials, rungs, loss)]
    states = Counter(trial.state.name.lower() for trial in trials)
    lead = [f"{len(trials)} trials: {', '.join(f'{count} {state}' for state, count in sorted(states.items()))}."]
    if completed:
        best = min(completed, key=_loss)
        values = ", ".join(f"{name} = {_text(value)}" for name, value in best.params.items())
        lead.append(f"The best completed trial is {best.number}, {loss} {best.value:.4g}: {values}.")
    missing = [] if found[1] else ["The importance of the options: too few trials are completed, or all have one loss."]
    sections = [Section("Trials", [figure for figure in found if figure])]
    return Page(study.study_name, lead, sections, missing=missing, kicker="tapfl search")


def history(completed: Sequence[FrozenTrial], loss: str) -> Figure | None:
    """Returns the loss of each completed trial and the best so far."""
    rows: list[Row] = []
    for trial in completed:
        best = min(rows[-1]["best"], _loss(trial)) if rows else _loss(trial)
        rows.append({"trial": trial.number, "loss": _loss(trial), "best": best})
    if not rows:
        return None
    x = alt.X("trial:Q", axis=alt.Axis(format="d", grid=False), scale=alt.Scale(zero=False, nice=False, padding=8))
    y = value_axis("loss", loss)
    tooltip = ["trial:Q", alt.Tooltip("loss:Q", format=".4g"), alt.Tooltip("best:Q", title="best so far", format=".4g")]
    points = chart("trials").mark_point().encode(x=x, y=y, tooltip=tooltip)
    line = chart("trials").mark_line(interpolate="step-after").encode(x=x, y="best:Q", color=BEST)
    return Figure(
        "history",
        "Loss of each completed trial, and the best so far",
        f"From {rows[0]['loss']:.4g} in the first completed trial to {rows[-1]['best']:.4g}, the best of {len(rows)}.",
        layered(line, points, height=300),
        {"trials": rows},
        rows,
    )


def importances(study: optuna.Study) -> Figure | None:
    """Returns the importance of each option for the loss by fANOVA (Hutter et al., 2014), as Optuna computes it."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = get_param_importances(study)
    except (ValueError, RuntimeError):  # too few trials, or all of them alike
        return None
    rows = [{"option": name, "importance": share, "text": f"{share:.2f}"} for name, share in found.items()]
    if not rows:
        return None
    base = chart("options").encode(
        y=alt.Y("option:N", sort=None, title=None, axis=alt.Axis(labelLimit=220)),
        x=alt.X("importance:Q", axis=None),
        tooltip=["option:N", alt.Tooltip("importance:Q", format=".3f")],
    )
    bars, text = base.mark_bar(height={"band": 0.62}), base.mark_text(align="left", dx=6).encode(text="text:N")
    return Figure(
        "importances",
        "Importance of each option",
        "Share of the variance of the loss that each option explains, among the completed trials (fANOVA): "
        + ", ".join(f"{row['option']} {row['text']}" for row in rows[:3])
        + ".",
        layered(bars, text, height=30 * len(rows)),
        {"options": rows},
        [{"option": row["option"], "importance": row["importance"]} for row in rows],
    )


def configurations(completed: Sequence[FrozenTrial], loss: str) -> Figure | None:
    """Returns the completed trials in parallel coordinates: a line each through its values of all options."""
    axes = _axes(completed)
    if not axes:
        return None
    rows = [
        {
            "trial": t.number,
            "loss": _loss(t),
            "option": name,
            "value": _text(t.params[name]),
            "place": axis.place(t.params[name]),
        }
        for t in completed
        for name, axis in axes.items()
        if name in t.params
    ]
    ends = [
        {"option": name, "place": place, "text": text} for name, axis in axes.items() for place, text in axis.labels
    ]
    x = alt.X("option:N", sort=None, title=None, scale=alt.Scale(domain=list(axes)), axis=alt.Axis(labelAngle=-20))
    y = alt.Y("place:Q", axis=None, scale=alt.Scale(domain=[0, 1], padding=12))
    colour = alt.Color("loss:Q", title=loss, scale=alt.Scale(reverse=True), legend=alt.Legend(title=loss))
    tooltip = ["trial:Q", alt.Tooltip("loss:Q", format=".4g"), "option:N", "value:N"]
    rules = chart("ends").mark_rule(strokeWidth=1).encode(x=x, y=alt.value("height"), y2=alt.value(0))
    lines = chart("trials").mark_line(strokeWidth=1.5).encode(x=x, y=y, color=colour, detail="trial:N")
    points = chart("trials").mark_point(size=40).encode(x=x, y=y, color=colour, tooltip=tooltip)
    labels = chart("ends").mark_text(align="left", dx=8).encode(x=x, y=y, text="text:N")
    best = min(completed, key=_loss)
    return Figure(
        "configurations",
        "Configurations of the completed trials",
        f"A line a trial through its value of each option, the lower the loss the darker. The best is trial "
        f"{best.number} with {_loss(best):.4g}.",
        layered(rules, lines, points, labels, height=320),
        {"trials": rows, "ends": ends},
        [{"trial": t.number, "loss": _loss(t), **t.params} for t in completed],
        wide=True,
    )


def rounds(trials: Sequence[FrozenTrial], rungs: Sequence[int], loss: str) -> Figure | None:
    """Returns the loss of every trial by rounds, and the rungs at which trials are compared."""
    rows: list[Row] = [
        {"trial": trial.number, "state": trial.state.name.lower(), "round": t, "loss": value}
        for trial in trials
        for t, value in sorted(trial.intermediate_values.items())
        if value == value  # a failed trial reports NaN
    ]
    if not rows:
        return None
    x, y = round_axis(rows, "rounds"), value_axis("loss", loss)
    states = sorted({row["state"] for row in rows})
    colour = alt.Color("state:N", scale=alt.Scale(domain=states))
    tooltip = ["trial:Q", "state:N", "round:Q", alt.Tooltip("loss:Q", format=".4g")]
    rules = chart("rungs").mark_rule(strokeDash=[2, 3]).encode(x=alt.X("round:Q"))
    lines = chart("trials").mark_line(strokeWidth=1.5).encode(x=x, y=y, color=colour, detail="trial:N")
    points = chart("trials").mark_point(size=40).encode(x=x, y=y, color=colour, tooltip=tooltip)
    return Figure(
        "rounds",
        "Loss of every trial by rounds",
        f"A line a trial; dotted: the rungs, at {', '.join(map(str, rungs))} rounds, where trials are compared.",
        layered(rules, lines.add_params(zoomed()), points, height=320),
        {"trials": rows, "rungs": [{"round": t} for t in rungs]},
        rows,
        wide=True,
        hint=ZOOM,
    )


@dataclass(frozen=True)
class _Axis:
    """An axis of parallel coordinates: the place of each value in [0, 1], and (place, text) labels."""

    place: Callable[[Any], float]
    labels: Sequence[tuple[float, str]]


def _axes(completed: Sequence[FrozenTrial]) -> dict[str, _Axis]:
    """Returns an axis for each option of the trials: choices equally spaced, numbers from low to high."""
    distributions = {name: each for trial in completed for name, each in trial.distributions.items()}
    return {name: _axis(distribution) for name, distribution in distributions.items()}


def _axis(distribution: Any) -> _Axis:
    if isinstance(distribution, CategoricalDistribution):
        places = {choice: (k + 0.5) / len(distribution.choices) for k, choice in enumerate(distribution.choices)}
        return _Axis(places.__getitem__, [(place, str(choice)) for choice, place in places.items()])
    scale = math.log if distribution.log else float
    low, high = scale(distribution.low), scale(distribution.high)
    ends = [(0.0, f"{distribution.low:g}"), (1.0, f"{distribution.high:g}")]
    return _Axis(lambda value: (scale(value) - low) / (high - low), ends)


def _text(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _loss(trial: FrozenTrial) -> float:
    assert trial.value is not None
    return trial.value
