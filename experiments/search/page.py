"""A search in pictures: Optuna's own, on one page that opens offline."""

from __future__ import annotations

import html
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import optuna
from optuna import visualization

from tapfl.store import write_bytes

STYLE = "body { font-family: sans-serif; max-width: 1100px; margin: 2em auto; color: #222 }"


def write_page(study: optuna.Study, rungs: Sequence[int], loss: str, path: Path) -> None:
    """Writes history, importance, parallel coordinates and intermediate values, with plotly.js in the page.

    Args:
        rungs: rounds after which trials were compared.
        loss: what the values are.
    """
    pictures: dict[str, Callable[[], object]] = {
        "Best so far, of the trials that came through": lambda: visualization.plot_optimization_history(
            study, target_name=loss
        ),
        "How much each option matters, among the trials that came through": lambda: (
            visualization.plot_param_importances(study, target_name=loss)
        ),
        "Configurations that came through": lambda: visualization.plot_parallel_coordinate(study, target_name=loss),
        "Every trial by rounds, with the rungs": lambda: _with_rungs(study, rungs, loss),
    }
    parts: list[str] = []
    script: bool | str = True  # plotly.js itself, once
    for title, draw in pictures.items():
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                picture = draw()
            body = picture.to_html(full_html=False, include_plotlyjs=script)  # type: ignore[attr-defined]
            script = False
        except (ValueError, RuntimeError) as error:  # too few trials, or all of them alike
            body = f"<p>{html.escape(str(error))}</p>"
        parts.append(f"<h2>{html.escape(title)}</h2>\n{body}")
    name = html.escape(study.study_name)
    head = f'<html lang="en"><head><meta charset="utf-8"><title>{name}</title><style>{STYLE}</style></head>'
    states = ", ".join(f"{n} {state}" for state, n in _states(study).items())
    page = "\n".join(
        [
            "<!DOCTYPE html>",
            head,
            f"<body><h1>{name}</h1><p>{len(study.trials)} trials: {states}</p>",
            *parts,
            "</body></html>",
        ]
    )
    write_bytes(path, page.encode())


def _with_rungs(study: optuna.Study, rungs: Sequence[int], loss: str) -> object:
    picture = visualization.plot_intermediate_values(study)
    for rounds in rungs:
        picture.add_vline(x=rounds, line_dash="dot", line_color="grey")
    return picture.update_layout(title=None, xaxis_title="rounds", yaxis_title=loss, xaxis_type="linear")


def _states(study: optuna.Study) -> dict[str, int]:
    names = [trial.state.name.lower() for trial in study.get_trials(deepcopy=False)]
    return {name: names.count(name) for name in sorted(set(names))}
