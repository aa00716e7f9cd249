"""The driver of a search: draws configurations, runs their rungs, and is the only one that writes to the study.

All state is in the study, so that an interrupted search can be continued. A rung is done when its value is reported;
rungs that were in flight are submitted again and continue from their checkpoints. BOHB and random search promote trials
by brackets (`experiments.search.schedule`); the baseline is Optuna's Hyperband with its TPE.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path

from optuna.pruners import HyperbandPruner
from optuna.samplers import BaseSampler, TPESampler
from optuna.study import Study
from optuna.trial import FrozenTrial, Trial, TrialState

from experiments.engines.cluster import MachineError
from experiments.jobs import federation
from experiments.jobs.federation import Engine
from experiments.jobs.pool import Emit, first_done
from experiments.search.sampler import BOHBSampler, scores, violation_key
from experiments.search.schedule import FAILED
from experiments.search.settings import MEASURES, Search
from tapfl.errors import RunError, TapflError
from tapfl.options import Scalar

Measures = dict[str, float]
Start = Callable[[dict[str, Scalar], Path], Future[Measures]]  # (a run's options, its folder) -> its measures


@dataclass
class Runner:
    """The steps that all search methods use.

    Attributes:
        start: starts or continues the run in a folder, up to ``train.rounds``.
        sampler: returns the sampler for a trial number.
        folder: contains the folders of the trials.
        jobs: largest number of rungs in flight.
        changed: called when a rung is done.
    """

    study: Study
    search: Search
    start: Start
    sampler: Callable[[int], BaseSampler]
    folder: Path
    jobs: int = 1
    changed: Callable[[], None] = lambda: None
    _in_flight: dict[Future[Measures], tuple[int, int]] = field(default_factory=dict)
    _handles: dict[int, Trial] = field(default_factory=dict)

    def found(self) -> list[FrozenTrial]:
        """Returns all trials of the study, by number."""
        return self.study.get_trials(deepcopy=False)

    def draw(self) -> int:
        """Draws one more configuration and returns its number."""
        self.study.sampler = self.sampler(len(self.found()))
        trial = self.study.ask()
        self._handles[trial.number] = trial
        self.search.space.suggest(trial)
        return trial.number

    def submit(self, runs: list[tuple[int, int]]) -> None:
        """Starts as many of these (trial, rounds) as `jobs` allows, except those in flight."""
        for number, rounds in runs:
            if len(self._in_flight) >= self.jobs:
                return
            if (number, rounds) in self._in_flight.values():
                continue
            options = {**self.search.options, **self.search.space.suggest(self._handle(number)), "train.rounds": rounds}
            self._in_flight[self.start(options, run_folder(self.folder, number))] = (number, rounds)

    def wait(self) -> bool:
        """Waits for the next rung and reports it. Returns False if none is in flight."""
        if not self._in_flight:
            return False
        for future in sorted(first_done(self._in_flight), key=lambda future: self._in_flight[future]):
            number, rounds = self._in_flight.pop(future)
            self._report(self._handle(number), rounds, future)
            self.changed()
        return True

    def tell(self, numbers: list[int], state: TrialState) -> None:
        """Finishes the trials that are unfinished, with this state; a trial without a valid loss has failed."""
        found = self.found()
        for trial in (found[number] for number in numbers if not found[number].state.is_finished()):
            rounds = max(trial.intermediate_values)
            loss, violation = trial.intermediate_values[rounds], trial.user_attrs.get(violation_key(rounds))
            if violation is not None:
                self._handle(trial.number).set_constraint("constraints", violation)
            end = TrialState.FAIL if scores(trial)[rounds] == FAILED else state
            self.study.tell(trial.number, loss if end == TrialState.COMPLETE else None, state=end)

    def _handle(self, number: int) -> Trial:
        """Returns the trial for writing. If the search was killed while the trial was drawn, the draw is completed."""
        if number not in self._handles:
            self.study.sampler = self.sampler(number)
            self._handles[number] = Trial(self.study, self.found()[number]._trial_id)
        return self._handles[number]

    def _report(self, trial: Trial, rounds: int, future: Future[Measures]) -> None:
        try:
            measures = future.result()
        except MachineError as error:  # says nothing about the options, so the trial must not count as failed
            raise RunError(f"trial {trial.number}: {error}; after solving this, continue with --resume") from error
        except TapflError as error:
            trial.set_user_attr("error", str(error))
            trial.report(math.nan, step=rounds)
            return
        trial.set_user_attr(measures_key(rounds), measures)
        settings = self.search.settings
        if settings.constraints:
            trial.set_user_attr(violation_key(rounds), settings.violation(measures))
        trial.report(settings.loss(measures), step=rounds)  # last: this marks the rung as done


def measured(emit: Emit, options: Mapping[str, Scalar], folder: Path, engine: Engine) -> Measures:
    """Starts or continues a run and returns its measures; this is the job of one rung of a trial."""
    summary = federation.carry_out(emit, options, folder, engine)
    return {name: float(measure(summary)) for name, measure in MEASURES.items()}


def run_folder(folder: Path, number: int) -> Path:
    """Returns the run folder of a trial."""
    return folder / f"{number:04d}"


def measures_key(rounds: float) -> str:
    """Returns the name of the user attribute with a trial's measures after `rounds` rounds."""
    return f"measures@{rounds:g}"


def sampler_of(search: Search) -> Callable[[int], BaseSampler]:
    """Returns a function that returns the sampler for a trial number."""
    settings = search.settings
    if settings.method == "tpe-hyperband":  # a new sampler for each trial, so that a resumed search draws the same
        return lambda number: TPESampler(seed=zlib.crc32(f"{settings.seed} {number}".encode()))
    bohb = BOHBSampler(
        seed=settings.seed,
        space=search.space.distributions(),
        random_share=1.0 if settings.method == "random" else settings.random_share,
        sees=search.schedule().sees,
    )
    return lambda number: bohb


def carry_out(runner: Runner, search: Search) -> None:
    """Runs or continues the search until it is finished."""
    if search.settings.method == "tpe-hyperband":
        _hyperband(runner, search)
    else:
        _brackets(runner, search)


def rungs_of(search: Search) -> list[int]:
    """Returns the rounds after which trials are compared."""
    return [rounds for _, rounds in search.schedule().brackets[0]]


def spent(trials: Sequence[FrozenTrial]) -> int:
    """Returns the number of rounds that were run."""
    return sum(max(trial.intermediate_values, default=0) for trial in trials)


def _brackets(runner: Runner, search: Search) -> None:
    """Runs brackets of successive halving; the best of a rung continue from their checkpoints."""
    schedule = search.schedule()
    while True:
        standing = schedule.standing([scores(trial) for trial in runner.found()])
        runner.tell(standing.losers, TrialState.PRUNED)
        runner.tell(standing.winners, TrialState.COMPLETE)
        for _ in range(standing.draws):
            runner.draw()
        if standing.draws:
            continue
        runner.submit(standing.runs)
        if not runner.wait():
            return


def _hyperband(runner: Runner, search: Search) -> None:
    """Runs Optuna's HyperbandPruner and TPESampler, unchanged, on blocks of trials that are drawn together.

    The trials of a block go from rung to rung together and are pruned in their order, so that pruning does not depend
    on how many run at once. A trial that is not pruned continues from its checkpoint.
    """
    settings = search.settings
    runner.study.pruner = HyperbandPruner(settings.min_rounds, settings.max_rounds, int(settings.eta))
    block = max(1, settings.block)
    while True:
        trials = runner.found()
        first = (len(trials) - 1) // block * block if trials else 0
        if len(trials) == first + block and all(trial.state.is_finished() for trial in trials[first:]):
            if spent(trials) >= search.rounds:
                return
            first = len(trials)
        for _ in range(len(trials), first + block):
            runner.draw()
        for rounds in rungs_of(search):
            _rung(runner, range(first, first + block), rounds, last=rounds == settings.max_rounds)


def _rung(runner: Runner, members: Sequence[int], rounds: int, last: bool) -> None:
    while waiting := [
        (number, rounds)
        for number in members
        if not (trial := runner.found()[number]).state.is_finished() and rounds not in trial.intermediate_values
    ]:
        runner.submit(waiting)
        runner.wait()
    for number in members:
        trial = runner.found()[number]
        if trial.state.is_finished() or max(trial.intermediate_values) > rounds:
            continue
        if last or scores(trial)[rounds] == FAILED:
            runner.tell([number], TrialState.COMPLETE)
        elif runner.study.pruner.prune(runner.study, trial):
            runner.tell([number], TrialState.PRUNED)
