"""The driver of a search: draws, has rungs carried out, and writes to the study. Nothing else writes.

All that it knows is in the study, so one that was killed goes on: a rung is done when its value is reported, and what
was in flight is submitted again, to a run that goes on from its own checkpoint.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, field
from pathlib import Path

from optuna.samplers import BaseSampler
from optuna.study import Study
from optuna.trial import FrozenTrial, Trial, TrialState

from experiments.jobs.pool import EngineLostError
from experiments.search.sampler import violation_key
from experiments.search.schedule import FAILED, Score
from experiments.search.settings import Search
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
        done, _ = wait(self._flying, return_when=FIRST_COMPLETED)
        for future in sorted(done, key=lambda each: self._flying[each]):
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
