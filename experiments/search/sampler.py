"""The model of BOHB as an Optuna sampler (Falkner, Klein, Hutter 2018, § 3).

Multivariate product kernels estimate the densities of good and of bad configurations. Numbers have Gaussian kernels.
Categories have the kernels of Aitchison and Aitken (1976): ``K(x, x') = 1 − λ`` if x = x', else ``λ / (c − 1)``, with
λ ≤ (c − 1) / c.

The sampler has no state: a draw depends on the seed, the trial's number and the observations that it sees. Therefore a
resumed search draws the same configurations.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState
from scipy.special import logsumexp, ndtr, ndtri

from experiments.search.schedule import FAILED, Score
from experiments.search.space import Space, choices, decode, encode, external_values, internal_values, uniform
from tapfl.seeds import numpy_generator

MIN_BANDWIDTH = 1e-3
CANDIDATES = 64
WIDER = 3.0  # candidates are drawn from kernels that are wider by this factor


@dataclass(frozen=True)
class Density:
    """A kernel density over coordinates of the unit cube (`experiments.search.space`).

    Attributes:
        points: centres of the kernels, float64 (n, d).
        bandwidths: the standard deviation of a number's kernel, λ of a category's kernel, float64 (d,).
        choices: number of choices of each parameter, int64 (d,); 0: it is a number.
    """

    points: np.ndarray
    bandwidths: np.ndarray
    choices: np.ndarray

    @classmethod
    def fit(cls, points: np.ndarray, choices: np.ndarray) -> Density:
        """Returns the density with normal-reference bandwidths, ``1.06 σ n^(−1 / (4 + d))``, at least 1e-3.

        For a category σ is ``√(½ Σ_c p_c (1 − p_c))``. This generalises the standard deviation √(p (1 − p)) of two
        choices coded 0 and 1, and does not depend on the order of the choices.
        """
        n, d = points.shape
        spread = np.array([_spread(points[:, j], choices[j]) for j in range(d)])
        bandwidths = np.maximum(1.06 * spread * n ** (-1 / (4 + d)), MIN_BANDWIDTH)
        return cls(points, _at_most_even(bandwidths, choices), choices)

    def log_pdf(self, x: np.ndarray) -> np.ndarray:
        """Returns the logarithm of the density at `x` (m, d), float64 (m,)."""
        difference = x[:, None, :] - self.points[None, :, :]
        gauss = -0.5 * (difference / self.bandwidths) ** 2 - np.log(self.bandwidths * np.sqrt(2 * np.pi))
        others = np.maximum(self.choices - 1, 1)
        same = np.log1p(-np.where(self.choices > 0, self.bandwidths, 0))
        category = np.where(np.abs(difference) < 0.5, same, np.log(self.bandwidths / others))
        kernels = np.where(self.choices > 0, category, gauss).sum(axis=2)
        return logsumexp(kernels, axis=1) - np.log(len(self.points))

    def draw(self, n: int, generator: np.random.Generator) -> np.ndarray:
        """Returns `n` candidates, float64 (n, d), from kernels that are `WIDER`; numbers are truncated to [0, 1]."""
        centres = self.points[generator.integers(len(self.points), size=n)]
        u, v = generator.random(centres.shape), generator.random(centres.shape)
        width = _at_most_even(WIDER * self.bandwidths, self.choices)
        below, above = ndtr(-centres / width), ndtr((1 - centres) / width)
        numbers = np.clip(centres + width * ndtri(below + u * (above - below)), 0, 1)
        others = np.floor(v * np.maximum(self.choices - 1, 1))  # one of the choices other than the centre
        moved = others + (others >= centres)
        return np.where(self.choices > 0, np.where(u < width, moved, centres), numbers)


def best_candidate(good: Density, bad: Density, generator: np.random.Generator) -> np.ndarray:
    """Returns the one of 64 candidates around good points with the largest l / g, (d,); among equals the first."""
    candidates = good.draw(CANDIDATES, generator)
    return candidates[np.argmax(good.log_pdf(candidates) - bad.log_pdf(candidates))]


def split_counts(n: int, d: int) -> tuple[int, int]:
    """Returns how many of `n` configurations with `d` parameters count as good, and how many as bad."""
    least = d + 1
    good = max(least, int(0.15 * n))
    return good, max(least, n - good)


def impute(points: np.ndarray, good: np.ndarray, fallback: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Returns the points without NaN: a missing parameter is taken from a random good configuration that has it.

    Args:
        fallback: uniform points of the same shape, for parameters that no good configuration has.
    """
    filled = points.copy()
    for j in range(points.shape[1]):
        missing, known = np.isnan(points[:, j]), good[~np.isnan(good[:, j]), j]
        if missing.any():
            filled[missing, j] = generator.choice(known, missing.sum()) if len(known) else fallback[missing, j]
    return filled


def _spread(column: np.ndarray, choices: int) -> float:
    if not choices:
        return float(column.std())
    shares = np.bincount(column.astype(np.int64), minlength=choices) / len(column)
    return float(np.sqrt(0.5 * (shares * (1 - shares)).sum()))


def _at_most_even(bandwidths: np.ndarray, choices: np.ndarray) -> np.ndarray:
    """Limits λ to (c − 1) / c, at which all choices are equally likely; above, the centre would be the least likely."""
    return np.where(choices > 0, np.minimum(bandwidths, (choices - 1) / np.maximum(choices, 1)), bandwidths)


OBSERVED = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.RUNNING, TrialState.FAIL)
Observation = tuple[Score, Mapping[str, Any]]  # the score of a configuration at one budget, and its parameters


class BOHBSampler(BaseSampler):
    """Draws from the model of the largest budget that has enough observations, and sometimes uniformly.

    A budget has enough observations if there are at least N_min + 2 and N_min of them succeeded, which the density of
    the good ones needs. Each intermediate value of a trial is an observation, also while the trial is running and after
    it was pruned.

    Args:
        space: all possible parameters, including those that exist only under a condition.
        random_share: ρ, the share of configurations that are always drawn uniformly.
        sees: (number, other, rounds) -> whether trial `number` may use the result of trial `other` after `rounds`
            rounds; by default it may use all results.
    """

    def __init__(
        self,
        seed: int,
        space: Space,
        random_share: float = 1 / 3,
        sees: Callable[[int, int, float], bool] = lambda number, other, rounds: True,
    ) -> None:
        self.seed, self.space, self.random_share, self.sees = seed, space, random_share, sees

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """Returns the parameters that are drawn together."""
        return {name: distribution for name, distribution in self.space.items() if not distribution.single()}

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        self._raise_error_if_multi_objective(study)
        if not search_space:
            return {}
        generator = self._generator(trial.number)
        model = self._observations(study, trial.number, len(search_space))
        if generator.random() < self.random_share or not model:
            return external_values(search_space, decode(search_space, uniform(search_space, 1, generator))[0])
        return external_values(search_space, self._from_model(search_space, model, generator))

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        self._raise_error_if_multi_objective(study)
        space, generator = {param_name: param_distribution}, self._generator(trial.number, param_name)
        return external_values(space, decode(space, uniform(space, 1, generator))[0])[param_name]

    def _generator(self, number: int, *names: str) -> np.random.Generator:
        return numpy_generator(self.seed, number, *names)

    def _observations(self, study: Study, number: int, d: int) -> list[Observation]:
        """Returns the observations of the largest budget that has enough, the best first; otherwise an empty list."""
        by_budget: dict[int, list[Observation]] = {}
        for other in study.get_trials(deepcopy=False, states=OBSERVED):
            for rounds, score in scores(other).items():
                if other.number != number and self.sees(number, other.number, rounds):
                    by_budget.setdefault(rounds, []).append((score, other.params))
        for rounds in sorted(by_budget, reverse=True):
            found = sorted(by_budget[rounds], key=lambda observation: observation[0])
            if len(found) >= d + 3 and found[d][0] != FAILED:  # N_min = d + 1
                return found
        return []

    def _from_model(self, space: Space, model: Sequence[Observation], generator: np.random.Generator) -> np.ndarray:
        """Returns the internal values (d,) of a new configuration."""
        n_good, n_bad = split_counts(len(model), len(space))
        best = [found for found in model[:n_good] if found[0] != FAILED]
        rows = internal_values(space, [params for _, params in (*best, *model[-n_bad:])])
        fallback = decode(space, uniform(space, len(rows), generator))
        rows = impute(rows, rows[: len(best)], fallback, generator)
        good, bad = rows[: len(best)], rows[len(best) :]
        kinds = choices(space)
        l, g = (Density.fit(encode(space, points), kinds) for points in (good, bad))  # noqa: E741
        return decode(space, best_candidate(l, g, generator)[None])[0]


def violation_key(budget: float) -> str:
    """Returns the name of the user attribute with a trial's violation of the constraints at a budget."""
    return f"violation@{budget:g}"


def scores(trial: FrozenTrial) -> dict[int, Score]:
    """Returns the scores of a trial by rounds, `FAILED` if the loss is not finite."""
    return {
        rounds: (trial.user_attrs.get(violation_key(rounds), 0.0), loss) if math.isfinite(loss) else FAILED
        for rounds, loss in trial.intermediate_values.items()
    }
