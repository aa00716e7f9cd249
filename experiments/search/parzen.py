"""Optuna's Parzen estimator in the place of BOHB's densities."""

from __future__ import annotations

import numpy as np

from experiments.search.kde import CANDIDATES
from experiments.search.unit_cube import Space


def best_by_parzen(space: Space, good: np.ndarray, bad: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Returns the internal values (d,) of the candidate with the largest l / g; of equals the first.

    Args:
        good: internal values, float64 (n, d), as `bad`.
    """
    # there is no public name for it; the range of optuna in pyproject.toml is what this was tested with
    from optuna.samplers._tpe.parzen_estimator import _ParzenEstimator, _ParzenEstimatorParameters

    options = _ParzenEstimatorParameters(
        prior_weight=1.0, consider_magic_clip=True, consider_endpoints=False, weights=np.ones, multivariate=True
    )
    below, above = (
        _ParzenEstimator({name: points[:, j] for j, name in enumerate(space)}, dict(space), options)
        for points in (good, bad)
    )
    candidates = below.sample(np.random.RandomState(generator.integers(2**32)), CANDIDATES)
    best = np.argmax(below.log_pdf(candidates) - above.log_pdf(candidates))
    return np.array([candidates[name][best] for name in space])
