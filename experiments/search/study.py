"""`tapfl search`: the study in an Optuna storage, its runs, and its results."""

from __future__ import annotations

import json
import logging
import re
import shutil
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import optuna
import pandas as pd
import tomli_w
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock
from optuna.trial import FrozenTrial

from experiments.feasible import check
from experiments.figures.page import render
from experiments.jobs.federation import Engine
from experiments.jobs.pool import Job, ThreadPool
from experiments.preflight import absolute_paths, counted
from experiments.search.page import page_of_search
from experiments.search.runner import Runner, carry_out, measured, measures_key, run_folder, rungs_of, sampler_of, spent
from experiments.search.sampler import scores
from experiments.search.schedule import FAILED
from experiments.search.settings import MEASURES, UNSEEN, Search
from tapfl.config import RunConfig
from tapfl.data.contents import changed
from tapfl.errors import ConfigError, RunError
from tapfl.options import Scalar, differences, nested
from tapfl.progress import stage
from tapfl.run_folder import only_one
from tapfl.store import write_bytes

JOURNAL = "study.journal"
TRIALS = "trials"  # the folder of their runs
IDENTITY, INPUTS = "tapfl:search", "tapfl:inputs"
PATIENCE = 4  # seconds that a storage may stay locked by another process


def open_study(search: Search, name: str, out: Path, url: str | None, resume: bool) -> optuna.Study:
    """Creates the study, or opens it if `resume` is true.

    Args:
        url: URL of the storage; None: a journal in `out`.

    Raises:
        ConfigError: if the storage cannot be used, if the study exists or `out` has another one and `resume` is false,
            if it does not exist and `resume` is true, or if it belongs to another search.
    """
    if url is None and resume and not (out / JOURNAL).is_file():
        raise ConfigError(f"--resume: there is no study in {out}")
    shown = _without_password(url) if url else str(out / JOURNAL)
    try:
        storage = _storage(url, out)
        names = optuna.get_all_study_names(storage)
        known = name in names
        if known and not resume:
            raise ConfigError(f"storage {shown}: has a study {name!r} already; continue it with --resume")
        if not resume and ((names and url is None) or (out / TRIALS).exists()):
            raise ConfigError(f"--out {out}: has the trials of another search; give another --out")
        if resume and not known:
            raise ConfigError(f"--resume: storage {shown} has no study {name!r}")
        inputs = search.inputs()
        study = optuna.create_study(study_name=name, storage=storage, load_if_exists=True)
        if IDENTITY not in study.user_attrs and not study.get_trials(deepcopy=False):
            study.set_user_attr(INPUTS, inputs)
            study.set_user_attr(IDENTITY, json.dumps(search.identity()))
    except ConfigError:
        raise
    except Exception as error:  # each storage's driver raises its own
        lines = str(getattr(error, "orig", None) or error).strip().splitlines() or [type(error).__name__]
        reason = lines[0].replace(url, shown) if url else lines[0]
        raise ConfigError(f"storage {shown}: cannot be used ({reason})") from None
    identities = json.loads(study.user_attrs.get(IDENTITY, "{}")), search.identity()
    odd = differences(*({key: json.loads(text) for key, text in identity.items()} for identity in identities))
    odd += changed(study.user_attrs.get(INPUTS, {}), inputs, "it began")
    if odd:
        raise ConfigError(f"study {name!r} belongs to another search: {'; '.join(odd)}")
    return study


def begun(out: Path) -> bool:
    """Returns whether `out` has a search that can be continued."""
    return (out / JOURNAL).is_file() or (out / TRIALS).is_dir()


def _without_password(url: str) -> str:
    return re.sub(r"(?<=password=)[^&\s]*", "***", re.sub(r"(://[^:/@]*):.*@", r"\1:***@", url))


def _storage(url: str | None, out: Path) -> BaseStorage:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        if url is None:
            file = str(out / JOURNAL)
            # `only_one` excludes other drivers, so that a lock left by a killed driver may be broken
            return JournalStorage(JournalFileBackend(file, JournalFileOpenLock(file, grace_period=PATIENCE)))
        if url.startswith("sqlite"):
            return RDBStorage(url, engine_kwargs={"connect_args": {"timeout": PATIENCE}})
        return RDBStorage(url)


def best_trial(trials: Sequence[FrozenTrial]) -> tuple[FrozenTrial, int]:
    """Returns the best trial among those with the most rounds, and its rounds.

    Raises:
        RunError: if no trial has a result.
    """
    found = [(-rounds, score, t.number) for t in trials for rounds, score in scores(t).items() if score != FAILED]
    if not found:
        errors = [str(trial.user_attrs["error"]) for trial in trials if "error" in trial.user_attrs]
        raise RunError("no trial has a result" + (f": {errors[-1]}" if errors else ""))
    rounds, _, number = min(found)
    return trials[number], -rounds


def write_best(search: Search, trial: FrozenTrial, rounds: int, path: Path) -> None:
    """Writes the options of a trial for `tapfl run --config`, which then evaluates on the test images."""
    shared = {name: value for name, value in search.options.items() if (name, value) not in UNSEEN.items()}
    write_bytes(path, tomli_w.dumps(nested({**shared, **trial.params, "train.rounds": rounds})).encode())


def write_table(search: Search, trials: Sequence[FrozenTrial], path: Path) -> None:
    """Writes one line per trial: its rounds, its measures after them, its loss at every rung, and its parameters."""
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
    write_bytes(path, pd.DataFrame(rows, dtype=object).to_csv(index=False).encode())


def drop_losers(trials: Sequence[FrozenTrial], folder: Path) -> None:
    """Removes the checkpoints and models of all finished trials except the best; their results stay."""
    try:
        best = best_trial(trials)[0].number
    except RunError:
        best = -1
    for trial in trials:
        if trial.state.is_finished() and trial.number != best:
            for name in ("server", "devices"):
                shutil.rmtree(run_folder(folder, trial.number) / name, ignore_errors=True)


@dataclass(frozen=True)
class Found:
    """The result of a search: the best trial, its rounds, loss and parameters, and the folder of the files."""

    trial: int
    rounds: int
    loss: float
    params: dict[str, object]
    folder: Path


def run_search(
    search: Search,
    name: str,
    out: Path,
    start: Callable[[], AbstractContextManager[tuple[ThreadPool, Engine]]],
    storage: str | None = None,
    resume: bool = False,
) -> Found:
    """Runs a search, or continues it, and writes its results.

    Args:
        name: name of the study.
        out: the folder of the search.
        start: starts the pool and the engine of the runs; called when everything has been checked.
        storage: URL of an Optuna storage; None: a journal in `out`.
        resume: continue an existing study.

    Raises:
        ConfigError: if an option, the space or the storage is not valid; then nothing is written.
        RunError: if no trial has a result.
    """
    optuna.logging.set_verbosity(logging.WARNING)
    with stage("checking"):
        check(counted(absolute_paths(RunConfig.from_flat(search.options))))
    new = not out.exists()
    with only_one(out, "search"):
        try:
            study = open_study(search, name, out, storage, resume)
        except BaseException:
            if new:
                shutil.rmtree(out)
            raise
        with start() as (pool, engine), stage("rounds") as advance:

            def begin(options: dict[str, Scalar], folder: Path) -> Future[dict[str, float]]:
                return pool.submit(Job(measured, (options, folder, engine), folder.with_suffix(".log")))

            def changed() -> None:
                trials = study.get_trials(deepcopy=False)
                advance(spent(trials), search.rounds, _best_so_far(trials))
                if search.settings.keep == "best":
                    drop_losers(trials, out / TRIALS)

            changed()
            carry_out(Runner(study, search, begin, sampler_of(search), out / TRIALS, pool.jobs, changed), search)
            changed()  # once more, for the trials that were finished last
        return write_results(search, study, out)


def write_results(search: Search, study: optuna.Study, out: Path) -> Found:
    """Writes best.toml, trials.csv and search.html. Raises RunError if no trial has a result."""
    found = study.get_trials(deepcopy=False)
    write_table(search, found, out / "trials.csv")
    best, rounds = best_trial(found)
    write_best(search, best, rounds, out / "best.toml")
    loss = f"loss ({' + '.join(search.settings.objective)})"
    page = page_of_search(study, rungs_of(search), loss, best, rounds)
    write_bytes(out / "search.html", render(page).encode())
    return Found(best.number, rounds, best.intermediate_values[rounds], dict(best.params), out)


def _best_so_far(trials: Sequence[FrozenTrial]) -> str:
    try:
        best, after = best_trial(trials)
    except RunError:
        return "no trial has a result yet"
    return f"best so far: trial {best.number}, {best.intermediate_values[after]:.4f} after {after} rounds"
