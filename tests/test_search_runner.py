"""The bracket runner: what a draw depends on, which trials continue, and searches that are killed."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path

import optuna
import pytest
from hypothesis import given
from hypothesis import strategies as st
from optuna.storages import BaseStorage, InMemoryStorage

from experiments.engines.cluster import MachineError
from experiments.search.runner import Runner, carry_out, rungs_of, sampler_of, spent
from experiments.search.sampler import scores
from experiments.search.schedule import FAILED, Schedule, Score
from experiments.search.settings import Search, SearchOptions
from experiments.search.space import SearchSpace
from experiments.search.study import best_trial, drop_losers, open_study
from tapfl.errors import ConfigError, RunError

optuna.logging.set_verbosity(optuna.logging.WARNING)
SPACE = SearchSpace.parse(
    {
        "train.learning-rate": {"low": 1e-4, "high": 1.0, "log": True},
        "adapters.server": {"choices": ["none", "adam"]},
        "adapters.server-learning-rate": {
            "low": 1e-3,
            "high": 1.0,
            "log": True,
            "if": {"adapters.server": "adam"},
        },
        "train.epochs": {"low": 1, "high": 5},
    },
    {},
)
ONE = ((9, 1), (3, 3), (1, 9)), ((5, 3), (1, 9)), ((3, 9),)


class Killed(BaseException):
    """Stands for SIGKILL: only what the driver has written survives."""


class Synthetic:
    """Trials whose results are a function of their options, and which end in a chosen order."""

    def __init__(self, order: random.Random | None = None, kill_after: int | None = None) -> None:
        self.order, self.kill_after = order, kill_after
        self.done: list[tuple[int, int]] = []
        self.submitted: list[tuple[int, int]] = []
        self._open: list[tuple[Future[dict[str, float]], int, dict]] = []

    def start(self, options: dict, folder: Path) -> Future[dict[str, float]]:
        future: Future[dict[str, float]] = Future()
        self.submitted.append((int(folder.name), options["train.rounds"]))
        self._open.append((future, int(folder.name), options))
        return future

    def finish_one(self) -> None:
        if self.kill_after is not None and len(self.done) == self.kill_after:
            raise Killed
        position = self.order.randrange(len(self._open)) if self.order else 0
        future, number, options = self._open.pop(position)
        self.done.append((number, options["train.rounds"]))
        rate, epochs = math.log10(options["train.learning-rate"]), float(options["train.epochs"])
        if rate > -1:
            future.set_exception(RunError("diverged"))
            return
        server = float(options.get("adapters.server-learning-rate", 0.5))
        error = (rate + 2) ** 2 / 4 + abs(epochs - 3) / 10 + abs(server - 0.3) + 1 / options["train.rounds"]
        future.set_result({"mean": error, "bytes_up": 100.0 * epochs})


@pytest.fixture(autouse=True)
def _wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets one of the synthetic trials end."""

    def first_done(flying: dict[Future[dict[str, float]], tuple[int, int]]) -> set[Future[dict[str, float]]]:
        Runner.current.finish_one()  # type: ignore[attr-defined]
        return {future for future in flying if future.done()}

    monkeypatch.setattr("experiments.search.runner.first_done", first_done)


def search_of(**options: object) -> Search:
    return Search(SearchOptions(**{"seed": 1, "brackets": 4, **options}), SPACE, {"devices.count": 4})  # type: ignore[arg-type]


def carried_out(
    search: Search, trials: Synthetic, storage: BaseStorage | None = None, jobs: int = 3, **changes: object
) -> optuna.Study:
    """Runs a search, or continues the one in `storage`."""
    study = optuna.create_study(storage=storage or InMemoryStorage(), study_name="test", load_if_exists=True)
    runner = Runner(study, search, trials.start, sampler_of(search), Path(), jobs)
    Runner.current = trials  # type: ignore[attr-defined]
    carry_out(replace(runner, **changes), search)  # type: ignore[arg-type]
    return study


def table(study: optuna.Study) -> list[tuple]:
    return [(t.number, t.state.name, t.params, repr(t.intermediate_values)) for t in study.trials]


# -- schedule ---------------------------------------------------------------------------------------------------------


def walk(schedule: Schedule, loss: Callable[[int, int], Score], order: random.Random) -> tuple[list, list]:
    """Runs a schedule, one rung at a time in a chosen order; returns the rungs and what each trial saw."""
    results: list[dict[int, Score]] = []
    rungs, seen = [], []
    while True:
        standing = schedule.standing(results)
        for _ in range(standing.draws):
            there = {(n, r) for n, found in enumerate(results) for r in found}
            could = {(n, r) for n in range(schedule.trials) for r in (1, 3, 9) if schedule.sees(len(results), n, r)}
            seen.append(there & could)
            results.append({})
        if standing.draws:
            continue
        if not standing.runs:
            return rungs, seen
        number, rounds = order.choice(standing.runs)
        results[number][rounds] = loss(number, rounds)
        rungs.append((number, rounds))


def of_number(number: int, rounds: int) -> Score:
    return FAILED if number % 7 == 3 else (0.0, (number * 37 % 11) / rounds)


@given(st.integers(0, 2**32), st.sampled_from([0, 1, 4]), st.sampled_from([0, 1, 2]))
def test_runs_and_draws_do_not_depend_on_the_order_of_results(seed: int, block: int, overlap: int) -> None:
    schedule = Schedule(ONE + ONE, block, overlap)
    rungs, seen = walk(schedule, of_number, random.Random(seed))
    expected, seen_before = walk(schedule, of_number, random.Random(0))
    assert sorted(rungs) == sorted(expected) and len(set(rungs)) == len(rungs)
    assert seen == seen_before


def test_the_best_of_a_rung_continue_and_failed_trials_never() -> None:
    rungs, _ = walk(Schedule((ONE[0],)), lambda n, r: FAILED if n == 8 else (0.0, 10.0 - n), random.Random(0))
    assert sorted(rungs) == sorted([*((n, 1) for n in range(9)), (5, 3), (6, 3), (7, 3), (7, 9)])
    rungs, _ = walk(Schedule((ONE[0],)), lambda n, r: FAILED, random.Random(0))
    assert sorted(rungs) == [(n, 1) for n in range(9)]


def test_a_constraint_outranks_the_loss_and_ties_go_by_number() -> None:
    schedule = Schedule((((3, 1), (1, 3)),))
    assert schedule.standing([{1: (0.1, 0.0)}, {1: (0.0, 5.0)}, {1: (0.0, 5.0)}]).runs == [(1, 3)]


def test_blocks_and_overlap_determine_when_a_configuration_is_drawn() -> None:
    none: dict[int, Score] = {}
    done = {1: (0.0, 1.0)}
    assert Schedule(ONE).standing([]).draws == 9
    assert Schedule(ONE, block=4).standing([]).draws == 4
    assert Schedule(ONE, block=4).standing([done] * 3 + [none]).draws == 0
    assert Schedule(ONE, block=4).standing([done] * 4).draws == 4
    assert Schedule(ONE, overlap=0).standing([done] * 9).draws == 0  # its second rung does not exist yet
    assert Schedule(ONE, overlap=1).standing([done] * 9).draws == 5
    assert Schedule(ONE, overlap=1).standing([done] * 8 + [none]).draws == 0


def test_random_search_costs_what_bohb_does() -> None:
    assert search_of(brackets=0).rounds == 69 and search_of(brackets=6).rounds == 138
    assert search_of(brackets=0, method="random").schedule().brackets == (((7, 9),),)
    assert len(search_of(brackets=0, rounds=70).schedule().brackets) == 4


# -- runner -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["bohb", "random", "tpe-hyperband"])
def test_nothing_depends_on_how_many_run_at_once_or_in_which_order(method: str) -> None:
    search = search_of(method=method, block=3)
    one = carried_out(search, Synthetic(), jobs=1)
    for seed, jobs in [(1, 2), (2, 5)]:
        assert table(carried_out(search, Synthetic(random.Random(seed)), jobs=jobs)) == table(one)
    assert all(trial.state.is_finished() for trial in one.trials)
    states = {"COMPLETE"} if method == "random" else {"COMPLETE", "PRUNED"}
    assert {trial.state.name for trial in one.trials} >= states


@pytest.mark.parametrize("method", ["bohb", "random", "tpe-hyperband"])
@pytest.mark.parametrize("kill_after", [0, 1, 4, 7])
def test_a_killed_and_resumed_run_equals_an_uninterrupted_one(method: str, kill_after: int) -> None:
    search, storage = search_of(method=method), InMemoryStorage()
    whole = carried_out(search, Synthetic())
    killed = Synthetic(random.Random(0), kill_after)
    with pytest.raises(Killed):
        carried_out(search, killed, storage)
    rest = Synthetic(random.Random(1))
    study = carried_out(search, rest, storage)
    assert table(study) == table(whole)
    assert not set(killed.done) & set(rest.submitted), "a finished rung was run again"
    assert len(killed.done) + len(rest.done) == sum(len(trial.intermediate_values) for trial in whole.trials)


@pytest.mark.parametrize("method", ["bohb", "tpe-hyperband"])
def test_a_fault_of_the_machine_stops_the_search_and_fails_no_trial(method: str) -> None:
    """A full disk or a worker that was killed says nothing about the options of a trial."""

    class OnAFullDisk(Synthetic):
        def finish_one(self) -> None:
            if len(self.done) == 4:
                self._open.pop(0)[0].set_exception(MachineError("/runs/state: No space left on device"))
            else:
                super().finish_one()

    search, storage = search_of(method=method), InMemoryStorage()
    with pytest.raises(RunError, match=r"^trial \d+: /runs/state: No space left .*; after .* continue with --resume$"):
        carried_out(search, OnAFullDisk(), storage)
    assert table(carried_out(search, Synthetic(), storage)) == table(carried_out(search, Synthetic()))


WRITES = ("create_new_trial", "set_trial_param", "set_trial_user_attr", "set_trial_intermediate_value")


@pytest.mark.parametrize("count", [1, 2, 13])
@pytest.mark.parametrize("write", [*WRITES, "set_trial_state_values"])
def test_killed_in_the_middle_of_writing(write: str, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    search, storage = search_of(), InMemoryStorage()
    whole = carried_out(search, Synthetic())
    real, calls = getattr(storage, write), itertools.count(1)

    def kills(*arguments: object, **named: object) -> object:
        result = real(*arguments, **named)
        if next(calls) == count:
            raise Killed
        return result

    with monkeypatch.context() as patch:
        patch.setattr(storage, write, kills)
        with pytest.raises(Killed):
            carried_out(search, Synthetic(), storage)
    assert table(carried_out(search, Synthetic(), storage)) == table(whole)


def test_a_finished_search_may_grow() -> None:
    storage, nothing = InMemoryStorage(), Synthetic()
    carried_out(search_of(brackets=2), Synthetic(), storage)
    study = carried_out(search_of(brackets=4), Synthetic(), storage)
    assert table(study) == table(carried_out(search_of(brackets=4), Synthetic()))
    carried_out(search_of(brackets=4), nothing, storage)
    assert not nothing.submitted


@pytest.mark.parametrize("method", ["bohb", "random", "tpe-hyperband"])
def test_checkpoints_of_losers_are_removed_unless_they_are_needed(method: str, tmp_path: Path) -> None:
    """A search that drops losers and is killed has the same result as one that keeps everything."""
    search, storage = search_of(method=method), InMemoryStorage()

    class OnDisk(Synthetic):
        def start(self, options: dict, folder: Path) -> Future[dict[str, float]]:
            begun = any(number == int(folder.name) for number, _ in before + self.submitted)
            for name in ("server", "devices"):
                assert (folder / name).exists() == begun, "goes on from its checkpoint"
                (folder / name / "some").mkdir(parents=True, exist_ok=True)
            (folder / "summary.json").touch()
            return super().start(options, folder)

    def go_on(trials: Synthetic) -> optuna.Study:
        def told() -> None:
            drop_losers(optuna.load_study(study_name="test", storage=storage).trials, tmp_path)

        study = carried_out(search, trials, storage, folder=tmp_path, changed=told)
        told()
        return study

    before: list[tuple[int, int]] = []
    killed = OnDisk(random.Random(0), kill_after=9)
    with pytest.raises(Killed):
        go_on(killed)
    before = killed.submitted
    study = go_on(OnDisk(random.Random(1)))
    assert table(study) == table(carried_out(search, Synthetic()))
    best = best_trial(study.trials)[0].number
    assert {int(folder.parent.name) for folder in tmp_path.glob("*/server")} == {best}
    assert {int(folder.parent.name) for folder in tmp_path.glob("*/devices")} == {best}
    assert len(list(tmp_path.glob("*/summary.json"))) == len(study.trials)


def test_the_results_of_trials_are_in_the_study() -> None:
    study = carried_out(search_of(brackets=3), Synthetic())
    failed = [trial for trial in study.trials if trial.state.name == "FAIL"]
    assert failed and all(trial.user_attrs["error"] == "diverged" for trial in failed)
    best, rounds = best_trial(study.trials)
    assert rounds == 9 and best.value == min(t.value for t in study.trials if t.state.name == "COMPLETE")
    assert all(
        ("adapters.server-learning-rate" in t.params) == (t.params["adapters.server"] == "adam") for t in study.trials
    )
    assert spent(study.trials) == sum(max(scores(trial)) for trial in study.trials) <= 69
    assert rungs_of(search_of()) == rungs_of(search_of(method="tpe-hyperband")) == [1, 3, 9]
    assert rungs_of(search_of(method="random")) == [9]


def test_a_constraint_is_met_if_possible() -> None:
    study = carried_out(search_of(brackets=6, constraints=("bytes_up<=250",)), Synthetic())
    assert best_trial(study.trials)[0].params["train.epochs"] <= 2
    assert study.best_trial.params["train.epochs"] <= 2, "Optuna knows of it too"


def test_the_objective_is_a_weighted_sum() -> None:
    measures = {"mean": 0.2, "worst-decile": 0.5, "bytes_up": 3e6, "bytes_down": 1e6, "macs": 0.5}
    options = SearchOptions(objective={"mean": 1.0, "bytes_up": 1e-7}, constraints=("bytes_up<=2e6", "macs<=0.6"))
    assert options.loss(measures) == pytest.approx(0.5)
    assert options.violation(measures) == pytest.approx(0.5)


# -- refused ----------------------------------------------------------------------------------------------------------


def test_a_study_is_resumed_only_with_the_same_settings(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no study"):
        open_study(search_of(), "test", tmp_path, None, resume=True)
    open_study(search_of(), "test", tmp_path, None, resume=False)
    with pytest.raises(ConfigError, match="already; continue it with --resume"):
        open_study(search_of(), "test", tmp_path, None, resume=False)
    with pytest.raises(ConfigError, match=r"search\.eta: 3\.0 then, 4\.0 now"):
        open_study(search_of(eta=4), "test", tmp_path, None, resume=True)
    smaller = replace(
        search_of(), space=SearchSpace({k: v for k, v in SPACE.parameters.items() if k != "train.epochs"})
    )
    with pytest.raises(ConfigError, match=r"space\.train\.epochs: .* then, \(not there now\) now"):
        open_study(smaller, "test", tmp_path, None, resume=True)


@pytest.mark.parametrize("kept", ["study.journal", "trials"])
def test_a_folder_has_one_search(kept: str, tmp_path: Path) -> None:
    if kept == "trials":
        (tmp_path / kept).mkdir()
    else:
        open_study(search_of(), "other", tmp_path, None, resume=False)
    for url in (None, f"sqlite:///{tmp_path}/study.db") if kept == "trials" else (None,):
        with pytest.raises(ConfigError, match=r"^--out .*: has the trials of another search; give another --out$"):
            open_study(search_of(), "test", tmp_path, url, resume=False)


def test_a_study_is_resumed_only_with_the_same_images_and_weights(tmp_path: Path) -> None:
    files = [tmp_path / name for name in ("images.npz", "one.safetensors", "other.safetensors")]
    for file in files:
        file.write_bytes(file.name.encode())
    images, *weights = map(str, files)
    space = SearchSpace.parse({"model.weights": {"choices": weights}}, {})
    search = replace(search_of(), space=space, options={**search_of().options, "data.source": images})
    open_study(search, "test", tmp_path, None, resume=False)
    open_study(search, "test", tmp_path, None, resume=True)
    for file in (files[0], files[2]):
        before = file.read_bytes()
        file.write_bytes(b"others")
        with pytest.raises(
            ConfigError, match=rf"another search: .* = '{file}': the (images|contents) changed since it began"
        ):
            open_study(search, "test", tmp_path, None, resume=True)
        file.write_bytes(before)


@pytest.mark.parametrize("url", ["nonsense", "postgresql://nobody@localhost:1/none", "sqlite:////nowhere/at/all.db"])
def test_an_invalid_storage_is_refused(url: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be used"):
        open_study(search_of(), "test", tmp_path, url, resume=False)


def test_a_locked_storage_is_refused(tmp_path: Path) -> None:
    import sqlite3

    url = f"sqlite:///{tmp_path}/study.db"
    open_study(search_of(), "test", tmp_path, url, resume=False)
    with sqlite3.connect(tmp_path / "study.db") as other:
        other.execute("BEGIN EXCLUSIVE")
        with pytest.raises(ConfigError, match="locked"):
            open_study(search_of(), "test", tmp_path, url, resume=True)
