"""BOHB's model as a sampler of Optuna (Falkner, Klein, Hutter 2018): stateless, all of it is in the study.

What is drawn for a trial depends on the seed, the trial's number and the observations that it sees, so that a search
that goes on draws what it would have drawn.
"""

from __future__ import annotations

import math
import secrets
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler
from optuna.study import Study, StudyDirection
from optuna.trial import FrozenTrial, TrialState

from experiments.search.kde import Density, best_candidate, impute, split_counts
from experiments.search.unit_cube import Space, choices, decode, encode, external_values, internal_values, uniform

OBSERVED = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.RUNNING, TrialState.FAIL)
BAD = (math.inf, math.inf)


@dataclass(frozen=True)
class Observation:
    """What a configuration came to at one budget: by how much it breaks constraints, then its loss; less is better."""

    params: Mapping[str, Any]
    score: tuple[float, float]


class BOHBSampler(BaseSampler):
    """Draws from the model of the largest budget that has enough observations, and uniformly now and then.

    Observations are the intermediate values of all trials, by step; a trial without any counts with its final value at
    a budget above all others. A trial that failed, or whose value is NaN, is a bad one.

    Args:
        seed: None: another in each process.
        space: all parameters that there can be; None: those of the study's trials so far.
        random_share: ρ, the share of configurations that are drawn uniformly in any case.
        sees: says whether the trial of the first number sees what that of the second came to after so many rounds;
            None: all that is there.
    """

    def __init__(
        self,
        seed: int | None = None,
        space: Space | None = None,
        random_share: float = 1 / 3,
        sees: Callable[[int, int, float], bool] | None = None,
    ) -> None:
        self.seed = secrets.randbits(32) if seed is None else seed
        self.space, self.random_share, self.sees = space, random_share, sees

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """Returns the parameters that are drawn together: also those that exist only under a condition."""
        if self.space is not None:
            found: dict[str, BaseDistribution] = dict(self.space)
        else:
            found, changed = {}, set()
            for other in study.get_trials(deepcopy=False, states=OBSERVED):
                for name, distribution in other.distributions.items():
                    if found.setdefault(name, distribution) != distribution:
                        changed.add(name)  # one whose range moves is drawn alone, uniformly
            found = {name: found[name] for name in sorted(found) if name not in changed}
        return {name: distribution for name, distribution in found.items() if not distribution.single()}

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
        return np.random.default_rng([self.seed, number, *(zlib.crc32(name.encode()) for name in names)])

    def _observations(self, study: Study, number: int, d: int) -> list[Observation]:
        """Returns those of the largest budget that has enough of them, best first; none if no budget has."""
        sign = -1.0 if study.direction == StudyDirection.MAXIMIZE else 1.0
        by_budget: dict[float, list[Observation]] = {}
        for other in study.get_trials(deepcopy=False, states=OBSERVED):
            if other.number == number:
                continue
            for budget, score in _scores(other, sign).items():
                if self.sees is None or self.sees(number, other.number, budget):
                    by_budget.setdefault(budget, []).append(Observation(other.params, score))
        enough = [budget for budget, found in by_budget.items() if len(found) >= d + 3]  # N_min + 2
        return sorted(by_budget[max(enough)], key=lambda found: found.score) if enough else []

    def _from_model(self, space: Space, model: Sequence[Observation], generator: np.random.Generator) -> np.ndarray:
        """Returns the internal values (d,) of a new configuration."""
        n_good, n_bad = split_counts(len(model), len(space))
        best = [found for found in model[:n_good] if found.score != BAD]
        if not best:
            return decode(space, uniform(space, 1, generator))[0]
        rows = internal_values(space, [found.params for found in (*best, *model[-n_bad:])])
        fallback = decode(space, uniform(space, len(rows), generator))
        rows = impute(rows, rows[: len(best)], fallback, generator)
        good, bad = rows[: len(best)], rows[len(best) :]
        kinds = choices(space)
        l, g = (Density.fit(encode(space, points), kinds) for points in (good, bad))  # noqa: E741
        return decode(space, best_candidate(l, g, generator)[None])[0]


def violation_key(budget: float) -> str:
    """Returns the user attribute that says by how much a trial broke the constraints at a budget."""
    return f"violation@{budget:g}"


def _scores(trial: FrozenTrial, sign: float) -> dict[float, tuple[float, float]]:
    values: dict[float, float] = {float(step): value for step, value in trial.intermediate_values.items()}
    if not values and trial.state == TrialState.FAIL:
        values = {math.inf: math.nan}
    elif not values and trial.value is not None:
        values = {math.inf: trial.value}
    return {
        budget: BAD if math.isnan(value) else (trial.user_attrs.get(violation_key(budget), 0.0), sign * value)
        for budget, value in values.items()
    }
