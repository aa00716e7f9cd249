"""The driver of a search: draws configurations, has rungs carried out, and writes to the study. Nothing else writes.

All its state is in the study, so an interrupted search can continue: a rung is done when its value is reported, and
rungs that were in flight are submitted again, to runs that continue from their own checkpoints. BOHB and random search
promote by brackets (`experiments.search.schedule`); the rival is Optuna's own Hyperband with its TPE.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path

from optuna.pruners import HyperbandPruner
from optuna.samplers import BaseSampler, TPESampler
from optuna.study import Study
from optuna.trial import FrozenTrial, Trial, TrialState

from experiments.jobs.pool import EngineLostError, first_done
from experiments.search.sampler import BOHBSampler, violation_key
from experiments.search.schedule import FAILED, Score, bracket_tables, in_rounds
from experiments.search.settings import Search, SearchOptions
from tapfl.errors import TapflError
from tapfl.options import Scalar

Measures = dict[str, float]
Start = Callable[[dict[str, Scalar], Path], Future[Measures]]  # a run's options and folder -> its measures


@dataclass
class Runner:
    """What all methods do with a study.

    Attributes:
        start: begins a run, or goes on with the one in its folder, up to ``train.rounds``.
        sampler: what draws the trial of a number.
        folder: where their folders are, by trial number.
        jobs: rungs in flight at once.
        told: called when a rung is done.
    """

    study: Study
    search: Search
    start: Start
    sampler: Callable[[int], BaseSampler]
    folder: Path
    jobs: int = 1
    told: Callable[[], None] = lambda: None
    _flying: dict[Future[Measures], tuple[int, int]] = field(default_factory=dict)
    _handles: dict[int, Trial] = field(default_factory=dict)

    def found(self) -> list[FrozenTrial]:
        """Returns all trials as they stand in the study, by number."""
        return self.study.get_trials(deepcopy=False)

    def draw(self) -> int:
        """Draws one more configuration and returns its number."""
        self.study.sampler = self.sampler(len(self.found()))
        trial = self.study.ask()
        self._handles[trial.number] = trial
        self.search.space.suggest(trial)
        return trial.number

    def submit(self, runs: list[tuple[int, int]]) -> None:
        """Starts as many of the (trial, rounds) as there is room for; those in flight are left alone."""
        for number, rounds in runs:
            if len(self._flying) >= self.jobs:
                return
            if (number, rounds) in self._flying.values():
                continue
            options = {**self.search.options, **self.search.space.suggest(self._handle(number)), "train.rounds": rounds}
            self._flying[self.start(options, run_folder(self.folder, number))] = (number, rounds)

    def wait(self) -> bool:
        """Waits for the next rung and reports it. Returns False if none is in flight."""
        if not self._flying:
            return False
        for future in sorted(first_done(self._flying), key=lambda each: self._flying[each]):
            number, rounds = self._flying.pop(future)
            self._report(self._handle(number), rounds, future)
            self.told()
        return True

    def tell(self, numbers: list[int], state: TrialState) -> None:
        """Settles those of the trials that are not settled yet; one that failed as failed, whatever is said of it."""
        found = self.found()
        for trial in (found[number] for number in numbers if not found[number].state.is_finished()):
            rounds = max(trial.intermediate_values)
            loss, violation = trial.intermediate_values[rounds], trial.user_attrs.get(violation_key(rounds))
            if violation is not None:
                self._handle(trial.number).set_constraint("constraints", violation)
            if math.isnan(loss):
                self.study.tell(trial.number, state=TrialState.FAIL)
            elif state == TrialState.COMPLETE:
                self.study.tell(trial.number, loss)
            else:
                self.study.tell(trial.number, state=state)

    def _handle(self, number: int) -> Trial:
        """Returns the trial to write to; one that was being drawn when the search was killed is drawn to its end."""
        if number not in self._handles:
            self.study.sampler = self.sampler(number)
            self._handles[number] = Trial(self.study, self.found()[number]._trial_id)
        return self._handles[number]

    def _report(self, trial: Trial, rounds: int, future: Future[Measures]) -> None:
        try:
            measures = future.result()
        except EngineLostError:
            raise
        except TapflError as error:
            trial.set_user_attr("error", str(error))
            trial.report(math.nan, step=rounds)
            return
        trial.set_user_attr(measures_key(rounds), measures)
        objective = self.search.objective()
        if objective.constraints:
            trial.set_user_attr(violation_key(rounds), objective.violation(measures))
        trial.report(objective.loss(measures), step=rounds)  # last: with it the rung is done


def run_folder(folder: Path, number: int) -> Path:
    """Returns where the run of a trial is."""
    return folder / f"{number:04d}"


def measures_key(rounds: float) -> str:
    """Returns the user attribute that holds a trial's measures after so many rounds."""
    return f"measures@{rounds:g}"


def scores(trial: FrozenTrial) -> dict[int, Score]:
    """Returns what a trial came to, by rounds."""
    return {
        rounds: FAILED if math.isnan(loss) else (trial.user_attrs.get(violation_key(rounds), 0.0), loss)
        for rounds, loss in trial.intermediate_values.items()
    }


def sampler_of(search: Search) -> Callable[[int], BaseSampler]:
    """Returns what draws the trial of a number."""
    settings = search.settings
    if settings.method == "tpe-hyperband":
        return lambda number: _tpe(settings.seed, number)
    bohb = BOHBSampler(
        seed=settings.seed,
        space=search.space.distributions(),
        random_share=1.0 if settings.method == "random" else settings.random_share,
        sees=search.schedule().sees,
    )
    return lambda number: bohb


def carry_out(runner: Runner, search: Search) -> None:
    """Carries the search out, or goes on with it, to its end."""
    if search.settings.method == "tpe-hyperband":
        _hyperband(runner, search)
    else:
        _brackets(runner, search)


def rungs_of(settings: SearchOptions) -> list[int]:
    """Returns the rounds after which trials are compared."""
    longest = bracket_tables(settings.min_rounds, settings.max_rounds, settings.eta)[0]
    return [rounds for _, rounds in in_rounds(longest)]


def spent(trials: Sequence[FrozenTrial]) -> int:
    """Returns the rounds that were carried out."""
    return sum(max(trial.intermediate_values, default=0) for trial in trials)


def _brackets(runner: Runner, search: Search) -> None:
    """A rung's best go on from their checkpoints."""
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
    """Optuna's HyperbandPruner and TPESampler, as they are, by blocks of trials that are drawn at once.

    A block goes from rung to rung together and is judged in the order of its trials, so that what is pruned does not
    depend on how many run at once. A trial that is not pruned goes on from its checkpoint here too.
    """
    settings = search.settings
    runner.study.pruner = HyperbandPruner(settings.min_rounds, settings.max_rounds, round(settings.eta))
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
        for rounds in rungs_of(settings):
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


def _tpe(seed: int, number: int) -> TPESampler:
    """A sampler of its own for each trial, so that a search that goes on draws what it would have drawn."""
    return TPESampler(seed=zlib.crc32(f"{seed} {number}".encode()))
