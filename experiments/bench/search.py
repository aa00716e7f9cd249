"""Searches on a toy of which the truth is known: regret by rounds spent.

The toy has learning curves: how fast a configuration gets where it goes depends on one of its parameters, so that first
rungs mislead, and every value is noisy. Regret is without noise, after R rounds, over that of the best configuration.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import optuna
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from experiments.search.methods import carry_out, sampler_of
from experiments.search.runner import Runner
from experiments.search.settings import Search, SearchOptions
from experiments.search.space import Parameter, SearchSpace
from experiments.search.trials import Job

R, ETA = 27, 3
NOISE = 0.05
KINDS = ("a", "b", "c")
METHODS: dict[str, dict[str, str | int]] = {
    "bohb kde": {"method": "bohb", "estimator": "kde"},
    "bohb parzen": {"method": "bohb", "estimator": "parzen"},
    "tpe-hyperband": {"method": "tpe-hyperband", "block": 1},  # one after another, as Optuna does it
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
    """A loss over five parameters whose optimum lies elsewhere for each seed."""

    seed: int

    def loss(self, options: Mapping[str, object], rounds: float) -> float:
        """Returns the loss after so many rounds, without noise."""
        speed = (math.log10(float(str(options["speed"]))) + 4) / 3
        n = (int(str(options["n"])) - 1) / 19
        numbers = np.array([speed, float(str(options["x"])), float(str(options["y"])), n])
        optimum = np.random.default_rng([self.seed, 0]).uniform(0.15, 0.85, 4)
        kind = (KINDS.index(str(options["kind"])) - self.seed) % 3 / 10
        return float(((numbers - optimum) ** 2).sum()) + kind + 0.5 * math.exp(-rounds * (0.1 + 0.4 * speed))

    def least(self) -> float:
        """Returns the least loss that there is after R rounds."""
        speeds, ns = np.logspace(-4, -1, 400), range(1, 21)
        x, y = np.random.default_rng([self.seed, 0]).uniform(0.15, 0.85, 4)[1:3]
        best = {"x": x, "y": y, "kind": KINDS[self.seed % 3]}
        n = min(ns, key=lambda each: self.loss(best | {"speed": 1e-2, "n": each}, R))
        return min(self.loss(best | {"speed": speed, "n": n}, R) for speed in speeds)


@dataclass
class ToyTrials:
    """`Trials` that are done at once, and remember what was spent."""

    toy: Toy
    spent: int = 0
    done: dict[int, int] = field(default_factory=dict)
    log: list[tuple[int, int, float, float]] = field(default_factory=list)

    def submit(self, job: Job) -> Future[dict[str, float]]:
        number = int(job.folder.name)
        self.spent += job.rounds - self.done.get(number, 0)
        self.done[number] = job.rounds
        noise = np.random.default_rng([self.toy.seed, 1, number, job.rounds]).normal(0, NOISE)
        value = self.toy.loss(job.options, job.rounds) + float(noise)
        self.log.append((self.spent, job.rounds, value, self.toy.loss(job.options, R)))
        future: Future[dict[str, float]] = Future()
        future.set_result({"mean": value})
        return future

    def close(self) -> None:
        pass

    def truth(self, rounds: int) -> float:
        """Returns the true loss of what looked best after so many rounds in all: of those that came furthest."""
        found = [(-b, value, truth) for spent, b, value, truth in self.log if spent <= rounds]
        return min(found)[2]


def regrets(seed: int, totals: Sequence[int], settings: Mapping[str, object]) -> list[float]:
    """Returns the regret of one search after each of `totals` rounds."""
    toy = Toy(seed)
    options = {"eta": ETA, "max_rounds": R, "rounds": max(totals), "seed": seed, **settings}
    search = Search(SearchOptions.model_validate(options), SPACE, {})
    trials = ToyTrials(toy)
    study = optuna.create_study(study_name=f"toy {seed}")
    carry_out(Runner(study, SPACE, {}, search.objective(), trials, sampler_of(search), Path()), search)
    return [trials.truth(total) - toy.least() for total in totals]


def bench_search(
    seeds: Sequence[int], totals: Sequence[int], names: Sequence[str] = (), changes: Mapping[str, object] | None = None
) -> Iterator[dict[str, str]]:
    """Yields a row a method: mean regret ± standard error of the mean over seeds, by rounds spent.

    Args:
        changes: settings of `[search]` above the methods' own.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    for name in names or METHODS:
        found = np.array([regrets(seed, totals, {**METHODS[name], **(changes or {})}) for seed in seeds])
        error = found.std(axis=0, ddof=1) / math.sqrt(len(seeds)) if len(seeds) > 1 else np.zeros(len(totals))
        cells = {f"{t} rounds": f"{m:.3f} ± {e:.3f}" for t, m, e in zip(totals, found.mean(axis=0), error, strict=True)}
        yield {"method": name, "seeds": str(len(seeds))} | cells
