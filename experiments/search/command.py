"""`tapfl search`, from its file to its results."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import optuna

from experiments.feasible import check
from experiments.preflight import absolute_paths
from experiments.search.losers import drop_losers
from experiments.search.methods import carry_out, rungs_of, sampler_of, spent
from experiments.search.page import write_page
from experiments.search.results import best_trial, write_best, write_table
from experiments.search.runner import Runner
from experiments.search.settings import Search
from experiments.search.study import open_study
from experiments.search.trials import Trials
from tapfl.config import RunConfig
from tapfl.errors import RunError
from tapfl.progress import Advance, stage
from tapfl.store import only_one


@dataclass(frozen=True)
class Found:
    """What a search came to: the best trial, after how many rounds, its loss and parameters, and the files."""

    trial: int
    rounds: int
    loss: float
    params: dict[str, object]
    folder: Path


def run_search(
    search: Search, name: str, out: Path, storage: str | None, resume: bool, jobs: int, trials: Callable[[], Trials]
) -> Found:
    """Carries a search out, or goes on with it, and writes its results into `out`.

    Args:
        name: of the study.
        trials: starts what carries out the runs; called when everything is checked.

    Raises:
        ConfigError: if an option, the space or the storage is not valid; nothing is written then.
        RunError: if no trial came to a result.
    """
    optuna.logging.set_verbosity(logging.WARNING)
    with stage("checking"):
        check(absolute_paths(RunConfig.from_flat(search.options)))
    new = not out.exists()
    with only_one(out, "search"):
        try:
            study = open_study(search, name, out, storage, resume)
        except BaseException:
            if new:
                _remove(out)
            raise
        workers = trials()
        try:
            runner = Runner(
                study,
                search.space,
                search.options,
                search.objective(),
                workers,
                sampler_of(search),
                out / "trials",
                jobs,
            )
            with stage("rounds") as advance:

                def told() -> None:
                    _tell(advance, study, search.rounds)
                    if search.settings.keep == "best":
                        drop_losers(runner.found(), runner.folder)

                runner.told = told
                told()
                carry_out(runner, search)
                told()  # of what was settled last
        finally:
            workers.close()
        return write_results(search, study, out)


def write_results(search: Search, study: optuna.Study, out: Path) -> Found:
    """Writes best.toml, trials.csv and search.html. Raises RunError if no trial has a result."""
    found = study.get_trials(deepcopy=False)
    write_table(search, found, out / "trials.csv")
    best, rounds = best_trial(found)
    write_best(search, best, rounds, out / "best.toml")
    write_page(study, rungs_of(search.settings), f"loss ({' + '.join(search.settings.objective)})", out / "search.html")
    return Found(best.number, rounds, best.intermediate_values[rounds], dict(best.params), out)


def _tell(advance: Advance, study: optuna.Study, rounds: int) -> None:
    found = study.get_trials(deepcopy=False)
    try:
        best, after = best_trial(found)
    except RunError:
        said = "none has a result yet"
    else:
        said = f"best so far: trial {best.number}, {best.intermediate_values[after]:.4f} after {after}"
    advance(spent(found), rounds, said)


def _remove(out: Path) -> None:
    """Takes back the empty folder of a search that was refused."""
    for file in (out / ".lock", *out.glob("study.journal*")):
        file.unlink(missing_ok=True)
    out.rmdir()
