"""Optuna's Parzen estimator in the place of BOHB's densities.

Optuna has no public name for it. The range of optuna in pyproject.toml is what this was tested with; where another one
has moved it, `estimator = "parzen"` is refused before a search begins.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import numpy as np

from experiments.search.kde import CANDIDATES
from experiments.search.unit_cube import Space


def optunas() -> tuple[Any, Any]:
    """Returns the classes of the estimator and of its parameters. Raises ImportError if this Optuna has no such."""
    module = import_module("optuna.samplers._tpe.parzen_estimator")
    try:
        return module._ParzenEstimator, module._ParzenEstimatorParameters
    except AttributeError as error:
        raise ImportError(str(error)) from None


def best_by_parzen(space: Space, good: np.ndarray, bad: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Returns the internal values (d,) of the candidate with the largest l / g; of equals the first.

    Args:
        good: internal values, float64 (n, d), as `bad`.
    """
    estimator, parameters = optunas()
    options = parameters(
        prior_weight=1.0, consider_magic_clip=True, consider_endpoints=False, weights=np.ones, multivariate=True
    )
    below, above = (
        estimator({name: points[:, j] for j, name in enumerate(space)}, dict(space), options) for points in (good, bad)
    )
    candidates = below.sample(np.random.RandomState(generator.integers(2**32)), CANDIDATES)
    best = np.argmax(below.log_pdf(candidates) - above.log_pdf(candidates))
    return np.array([candidates[name][best] for name in space])
