"""`tapfl search`, from its file to its results."""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import optuna

from experiments.feasible import check
from experiments.jobs.federation import Engine
from experiments.jobs.pool import Job, Pool
from experiments.preflight import absolute_paths
from experiments.search.losers import drop_losers
from experiments.search.methods import carry_out, rungs_of, sampler_of, spent
from experiments.search.objective import measured
from experiments.search.page import write_page
from experiments.search.results import best_trial, write_best, write_table
from experiments.search.runner import Runner
from experiments.search.settings import Search
from experiments.search.study import open_study
from tapfl.config import RunConfig
from tapfl.errors import RunError
from tapfl.options import Scalar
from tapfl.progress import Advance, stage
from tapfl.store import only_one


@dataclass(frozen=True)
class Place:
    """Where a search keeps what it knows.

    Attributes:
        name: of Optuna's study.
        out: the folder of the search.
        storage: URL of an Optuna storage; None: a journal in `out`.
        resume: whether the study is there already.
    """

    name: str
    out: Path
    storage: str | None = None
    resume: bool = False


@dataclass(frozen=True)
class Found:
    """What a search came to: the best trial, after how many rounds, its loss and parameters, and the files."""

    trial: int
    rounds: int
    loss: float
    params: dict[str, object]
    folder: Path


def run_search(search: Search, place: Place, start: Callable[[], AbstractContextManager[tuple[Pool, Engine]]]) -> Found:
    """Carries a search out, or goes on with it, and writes its results.

    Args:
        start: starts what carries out the runs; called when everything is checked.

    Raises:
        ConfigError: if an option, the space or the storage is not valid; nothing is written then.
        RunError: if no trial has a result.
    """
    optuna.logging.set_verbosity(logging.WARNING)
    with stage("checking"):
        check(absolute_paths(RunConfig.from_flat(search.options)))
    out, new = place.out, not place.out.exists()
    with only_one(out, "search"):
        try:
            study = open_study(search, place.name, out, place.storage, place.resume)
        except BaseException:
            if new:
                _remove(out)
            raise
        with start() as (pool, engine), stage("rounds") as advance:

            def begin(options: dict[str, Scalar], folder: Path) -> Future[dict[str, float]]:
                return pool.submit(Job(measured, (options, folder, engine), folder.with_suffix(".log")))

            runner = Runner(study, search, begin, sampler_of(search), out / "trials", pool.jobs)

            def told() -> None:
                _tell(advance, study, search.rounds)
                if search.settings.keep == "best":
                    drop_losers(runner.found(), runner.folder)

            runner.told = told
            told()
            carry_out(runner, search)
            told()  # of what was settled last
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
