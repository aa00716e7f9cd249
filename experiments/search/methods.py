"""How a search goes: brackets with promotion (BOHB, and random search as one bracket), or Optuna's own Hyperband."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence

from optuna.pruners import HyperbandPruner
from optuna.samplers import BaseSampler, TPESampler
from optuna.trial import FrozenTrial, TrialState

from experiments.search.brackets import bracket_tables, in_rounds
from experiments.search.runner import Runner, scores
from experiments.search.sampler import BOHBSampler
from experiments.search.schedule import FAILED
from experiments.search.settings import Search, SearchOptions


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
