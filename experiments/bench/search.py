"""Searches on a toy problem with a known optimum: regret by rounds spent.

The toy problem has learning curves: one parameter determines how fast a configuration converges, so that the first
rungs mislead, and every value is noisy. Regret is the noiseless loss after R rounds minus that of the best
configuration.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import numpy as np
import optuna
import typer
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from scipy.stats import sem

from experiments.bench.timing import Row, chosen
from experiments.command_line import options_of
from experiments.search.runner import Runner, carry_out, sampler_of
from experiments.search.settings import Search, SearchOptions
from experiments.search.space import Parameter, SearchSpace
from tapfl.options import validated

R, ETA = 27, 3
NOISE = 0.05
KINDS = ("a", "b", "c")
METHODS: dict[str, dict[str, str | int]] = {
    "bohb": {"method": "bohb"},
    "tpe-hyperband": {"method": "tpe-hyperband", "block": 1},  # one trial after another, as in Optuna
    "random": {"method": "random"},
}
SPACE = SearchSpace(
    {
        name: Parameter(distribution, {})
        for name, distribution in {
            "speed": FloatDistribution(1e-4, 1e-1, log=True),
            "x": FloatDistribution(0, 1),
            "y": FloatDistribution(0, 1),
            "n": IntDistribution(1, 20),
            "kind": CategoricalDistribution(KINDS),
        }.items()
    }
)


@dataclass(frozen=True)
class Toy:
    """A loss over five parameters, with a different optimum for each seed."""

    seed: int

    def loss(self, options: Mapping[str, object], rounds: float) -> float:
        """Returns the loss after `rounds`, without noise."""
        speed = (math.log10(float(str(options["speed"]))) + 4) / 3
        n = (int(str(options["n"])) - 1) / 19
        numbers = np.array([speed, float(str(options["x"])), float(str(options["y"])), n])
        optimum = np.random.default_rng([self.seed, 0]).uniform(0.15, 0.85, 4)
        kind = (KINDS.index(str(options["kind"])) - self.seed) % 3 / 10
        return float(((numbers - optimum) ** 2).sum()) + kind + 0.5 * math.exp(-rounds * (0.1 + 0.4 * speed))

    def least(self) -> float:
        """Returns the smallest possible loss after R rounds."""
        speeds, ns = np.logspace(-4, -1, 400), range(1, 21)
        x, y = np.random.default_rng([self.seed, 0]).uniform(0.15, 0.85, 4)[1:3]
        best = {"x": x, "y": y, "kind": KINDS[self.seed % 3]}
        n = min(ns, key=lambda value: self.loss(best | {"speed": 1e-2, "n": value}, R))
        return min(self.loss(best | {"speed": speed, "n": n}, R) for speed in speeds)


@dataclass
class ToyRuns:
    """Runs of the toy problem, which finish immediately and record the rounds spent."""

    toy: Toy
    spent: int = 0
    done: dict[int, int] = field(default_factory=dict)
    log: list[tuple[int, int, float, float]] = field(default_factory=list)

    def start(self, options: Mapping[str, object], folder: Path) -> Future[dict[str, float]]:
        number, rounds = int(folder.name), int(str(options["train.rounds"]))
        self.spent += rounds - self.done.get(number, 0)
        self.done[number] = rounds
        noise = np.random.default_rng([self.toy.seed, 1, number, rounds]).normal(0, NOISE)
        value = self.toy.loss(options, rounds) + float(noise)
        self.log.append((self.spent, rounds, value, self.toy.loss(options, R)))
        future: Future[dict[str, float]] = Future()
        future.set_result({"mean": value})
        return future

    def truth(self, rounds: int) -> float:
        """Returns the true loss of the trial that looks best after `rounds` rounds in total, among the longest ones."""
        found = [(-b, value, truth) for spent, b, value, truth in self.log if spent <= rounds]
        return min(found)[2]


def regrets(seed: int, totals: Sequence[int], settings: Mapping[str, object]) -> list[float]:
    """Returns the regret of one search after each of `totals` rounds."""
    toy = Toy(seed)
    options = {"eta": ETA, "max_rounds": R, "rounds": max(totals), "seed": seed, **settings}
    search = Search(SearchOptions.model_validate(options), SPACE, {})
    toys = ToyRuns(toy)
    study = optuna.create_study(study_name=f"toy {seed}")
    carry_out(Runner(study, search, toys.start, sampler_of(search), Path()), search)
    return [toys.truth(total) - toy.least() for total in totals]


def search(
    seeds: Annotated[int, typer.Option(min=1, help="searches per method")] = 20,
    first_seed: Annotated[int, typer.Option(min=0, help="seed of the first search; the others follow")] = 0,
    rounds: Annotated[list[int], typer.Option(min=27, help="rounds spent in total")] = [200, 400, 800, 1600],
    method: Annotated[list[str], typer.Option(help=f"{', '.join(METHODS)}; default: all")] = [],
    set: Annotated[list[str], typer.Option("--set", help="key=value, options of \\[search]")] = [],
) -> Iterator[Row]:
    """Methods of `tapfl search` on a toy problem with five parameters, learning curves and noise: regret by rounds.

    Regret is the mean over seeds ± its standard error.
    """
    methods = chosen("--method", method, [*METHODS])
    changes = options_of(None, set)
    for name in methods:
        validated(SearchOptions, {**METHODS[name], **changes})
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    for name in methods:
        runs = [regrets(seed, rounds, {**METHODS[name], **changes}) for seed in range(first_seed, first_seed + seeds)]
        means, errors = np.mean(runs, axis=0), sem(runs) if seeds > 1 else np.zeros(len(rounds))
        cells = {f"{t} rounds": f"{m:.3f} ± {e:.3f}" for t, m, e in zip(rounds, means, errors, strict=True)}
        yield {"method": name, "seeds": str(seeds)} | cells
