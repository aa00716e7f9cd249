"""What a search leaves: the best configuration as TOML, and a table of all trials."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tomli_w
from optuna.trial import FrozenTrial

from experiments.output import as_csv
from experiments.search.objective import MEASURES
from experiments.search.runner import measures_key, scores
from experiments.search.schedule import FAILED
from experiments.search.settings import UNSEEN, Search
from tapfl.errors import RunError
from tapfl.store import write_bytes


def best_trial(trials: Sequence[FrozenTrial]) -> tuple[FrozenTrial, int]:
    """Returns the best of the trials that came furthest, and after how many rounds it is.

    Raises:
        RunError: if no trial has a result.
    """
    found = [(-rounds, score, t.number) for t in trials for rounds, score in scores(t).items() if score != FAILED]
    if not found:
        errors = [str(trial.user_attrs["error"]) for trial in trials if "error" in trial.user_attrs]
        raise RunError("no trial came to a result" + (f": {errors[-1]}" if errors else ""))
    rounds, _, number = min(found)
    return trials[number], -rounds


def write_best(search: Search, trial: FrozenTrial, rounds: int, path: Path) -> None:
    """Writes the options of a trial as `tapfl run --config` takes them, to be reported on the test part."""
    nested: dict[str, Any] = {}
    shared = {name: value for name, value in search.options.items() if (name, value) not in UNSEEN.items()}
    for name, value in {**shared, **trial.params, "train.rounds": rounds}.items():
        table, _, option = name.rpartition(".")
        (nested.setdefault(table, {}) if table else nested)[option] = value
    plain = {name: value for name, value in nested.items() if not isinstance(value, dict)}
    tables = {name: value for name, value in nested.items() if isinstance(value, dict)}
    write_bytes(path, tomli_w.dumps(plain | tables).encode())


def write_table(search: Search, trials: Sequence[FrozenTrial], path: Path) -> None:
    """Writes a line a trial: where it came to, its measures there, its loss at every rung, and its parameters."""
    rungs = sorted({rounds for trial in trials for rounds in trial.intermediate_values})
    rows = []
    for trial in trials:
        rounds = max(trial.intermediate_values, default=0)
        measures = trial.user_attrs.get(measures_key(rounds), {})
        row = {"trial": trial.number, "state": trial.state.name.lower(), "rounds": rounds}
        row |= {f"loss@{r}": trial.intermediate_values.get(r, "") for r in rungs}
        row |= {name: measures.get(name, "") for name in MEASURES}
        row |= {name: trial.params.get(name, "") for name in search.space.parameters}
        rows.append(row | {"error": trial.user_attrs.get("error", "")})
    write_bytes(path, as_csv(rows, list(rows[0])))
