"""The page of a search: its progress, the importance of options, its configurations, and the loss of every trial."""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import altair as alt
import optuna
from optuna.distributions import CategoricalDistribution
from optuna.importance import get_param_importances
from optuna.trial import FrozenTrial, TrialState

from experiments.figures import figure as fig
from experiments.figures.figure import ZOOM, Figure, Row, chart, layered, tips
from experiments.figures.page import Page, Section
from experiments.search.sampler import scores

BEST = alt.value(alt.ExprRef("ink"))


def page_of_search(study: optuna.Study, rungs: Sequence[int], loss: str, best: FrozenTrial, after: int) -> Page:
    """Returns the page of a search; figures for which there are too few trials are left out.

    Args:
        rungs: rounds after which trials were compared.
        loss: name of the objective.
        best: the best trial.
        after: its rounds.
    """
    trials = study.get_trials(deepcopy=False)
    completed = [trial for trial in trials if trial.state == TrialState.COMPLETE]
    found = [
        history(completed, loss),
        importances(study, completed),
        configurations(completed, loss, best),
        rounds(trials, rungs, loss),
    ]
    states = Counter(trial.state.name.lower() for trial in trials)
    lead = [f"{len(trials)} trials: {', '.join(f'{count} {state}' for state, count in sorted(states.items()))}."]
    values = ", ".join(f"{name} = {_text(value)}" for name, value in best.params.items())
    reached = best.intermediate_values[after]
    lead.append(f"The best trial is {best.number}, {loss} {reached:.4g} after {after} rounds: {values}.")
    missing = [] if found[1] else ["The importance of options: too few trials are completed, or all losses are equal."]
    sections = [Section("Trials", [figure for figure in found if figure])]
    return Page(study.study_name, lead, sections, missing=missing, kicker="tapfl search")


def history(completed: Sequence[FrozenTrial], loss: str) -> Figure | None:
    """Returns the loss of each completed trial, and of the best so far; one that violates a constraint ranks last."""
    ranks = [scores(trial)[max(trial.intermediate_values)] for trial in completed]
    rows = [
        {"trial": trial.number, "loss": _loss(trial), "best": best}
        for trial, (_, best) in zip(completed, accumulate(ranks, min), strict=True)
    ]
    if not rows:
        return None
    x = alt.X("trial:Q", axis=alt.Axis(format="d", grid=False), scale=alt.Scale(zero=False, nice=False, padding=8))
    y = fig.value_axis("loss", loss)
    tooltip = tips("trial:Q", "loss:Q||.4g", "best:Q|best so far|.4g")
    points = chart("trials").mark_point().encode(x=x, y=y, tooltip=tooltip)
    line = chart("trials").mark_line(interpolate="step-after").encode(x=x, y="best:Q", color=BEST)
    return Figure(
        "history",
        "Loss of each completed trial, and the best so far",
        f"From {rows[0]['loss']:.4g} in the first completed trial to {rows[-1]['best']:.4g}, the best of {len(rows)}.",
        layered(line, points, height=300),
        {"trials": rows},
    )


def importances(study: optuna.Study, completed: Sequence[FrozenTrial]) -> Figure | None:
    """Returns the importance of each option for the loss by fANOVA (Hutter et al., 2014), as Optuna computes it."""
    if len(set(map(_loss, completed))) < 2:  # Optuna would return equal shares
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = get_param_importances(study)
    except (ValueError, RuntimeError):  # too few trials, or all of them are equal
        return None
    rows = [{"option": name, "importance": share, "text": f"{share:.2f}"} for name, share in found.items()]
    if not rows:
        return None
    y = alt.Y("option:N", sort=None, title=None, axis=alt.Axis(labelLimit=220))
    bars = fig.labelled_bars(chart("options"), y, "importance", tooltip=tips("option:N", "importance:Q||.3f"))
    return Figure(
        "importances",
        "Importance of each option",
        "Share of the variance of the loss that each option explains, among the completed trials (fANOVA): "
        + ", ".join(f"{row['option']} {row['text']}" for row in rows[:3])
        + ".",
        layered(*bars, height=30 * len(rows)),
        {"options": rows},
        columns=("option", "importance"),
    )


def configurations(completed: Sequence[FrozenTrial], loss: str, best: FrozenTrial) -> Figure | None:
    """Returns the completed trials in parallel coordinates: one line per trial through its values of all options."""
    distributions: dict[str, Any] = {name: part for trial in completed for name, part in trial.distributions.items()}
    if not distributions:
        return None
    rows = [
        {"trial": t.number, "loss": _loss(t), "option": name, "value": _text(value)}
        | {"place": _place(distributions[name], value)}
        for t in completed
        for name, value in t.params.items()
    ]
    ends = [
        {"option": name, "place": _place(part, value), "text": str(value) if choices else f"{value:g}"}
        for name, part in distributions.items()
        for choices in [getattr(part, "choices", ())]
        for value in choices or (part.low, part.high)
    ]
    x = alt.X(
        "option:N", sort=None, title=None, scale=alt.Scale(domain=list(distributions)), axis=alt.Axis(labelAngle=-20)
    )
    y = alt.Y("place:Q", axis=None, scale=alt.Scale(domain=[0, 1], padding=12))
    colour = alt.Color("loss:Q", title=loss, scale=alt.Scale(reverse=True), legend=alt.Legend(title=loss))
    tooltip = tips("trial:Q", "loss:Q||.4g", "option:N", "value:N")
    rules = chart("ends").mark_rule(strokeWidth=1).encode(x=x, y=alt.value("height"), y2=alt.value(0))
    lines, points = _lines(x, y, colour, tooltip)
    labels = chart("ends").mark_text(align="left", dx=8).encode(x=x, y=y, text="text:N")
    return Figure(
        "configurations",
        "Configurations of the completed trials",
        "One line per trial through its values of all options; the lower the loss, the darker the line. The best trial "
        f"is {best.number}.",
        layered(rules, lines, points, labels, height=320),
        {"trials": rows, "ends": ends},
        [{"trial": t.number, "loss": _loss(t), **t.params} for t in completed],
        wide=True,
    )


def rounds(trials: Sequence[FrozenTrial], rungs: Sequence[int], loss: str) -> Figure | None:
    """Returns the loss of every trial by round, and the rungs at which trials are compared."""
    rows: list[Row] = [
        {"trial": trial.number, "state": trial.state.name.lower(), "round": t, "loss": value}
        for trial in trials
        for t, value in sorted(trial.intermediate_values.items())
        if value == value  # a failed trial reports NaN
    ]
    if not rows:
        return None
    x, y = fig.round_axis([row["round"] for row in rows], "rounds"), fig.value_axis("loss", loss)
    states = sorted({row["state"] for row in rows})
    colour = alt.Color("state:N", scale=alt.Scale(domain=states))
    tooltip = tips("trial:Q", "state:N", "round:Q", "loss:Q||.4g")
    rules = chart("rungs").mark_rule(strokeDash=[2, 3]).encode(x=alt.X("round:Q"))
    lines, points = _lines(x, y, colour, tooltip)
    return Figure(
        "rounds",
        "Loss of every trial by round",
        f"One line per trial. The dotted lines are the rungs at {', '.join(map(str, rungs))} rounds, at which trials "
        "are compared.",
        layered(rules, lines.add_params(fig.zoomed()), points, height=320),
        {"trials": rows, "rungs": [{"round": t} for t in rungs]},
        wide=True,
        hint=ZOOM,
    )


def _lines(x: alt.X, y: alt.Y, colour: alt.Color, tooltip: Sequence[alt.Tooltip]) -> tuple[alt.Chart, alt.Chart]:
    """Returns one line per trial, and its points."""
    base = chart("trials").encode(x=x, y=y, color=colour)
    return base.mark_line(strokeWidth=1.5).encode(detail="trial:N"), base.mark_point(size=40).encode(tooltip=tooltip)


def _place(distribution: Any, value: Any) -> float:
    """Returns the position of a value on its option's axis, in [0, 1]: choices are equally spaced, numbers scaled."""
    if isinstance(distribution, CategoricalDistribution):
        return (distribution.choices.index(value) + 0.5) / len(distribution.choices)
    low, high, place = map(math.log if distribution.log else float, (distribution.low, distribution.high, value))
    return (place - low) / (high - low)


def _text(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _loss(trial: FrozenTrial) -> float:
    assert trial.value is not None
    return trial.value
