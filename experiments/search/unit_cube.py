"""Parameters of Optuna as coordinates: numbers lie in [0, 1], categories are their index.

Optuna's internal representation (float; a category's index) is what goes in and what comes out. An integer, or a float
with a step, is the middle of its interval, so that the ends are drawn as often as the rest.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

Space = Mapping[str, BaseDistribution]


def choices(space: Space) -> np.ndarray:
    """Returns how many choices each parameter has, int64 (d,); 0: it is a number."""
    return np.array([len(x.choices) if isinstance(x, CategoricalDistribution) else 0 for x in space.values()], np.int64)


def encode(space: Space, internal: np.ndarray) -> np.ndarray:
    """Returns coordinates, float64 (n, d), of internal values (n, d); NaN stays."""
    columns = [_to_unit(x, internal[:, j]) for j, x in enumerate(space.values())]
    return np.stack(columns, axis=1) if columns else internal


def decode(space: Space, points: np.ndarray) -> np.ndarray:
    """Returns internal values (n, d) of coordinates; the inverse of `encode`."""
    return np.stack([_from_unit(x, points[:, j]) for j, x in enumerate(space.values())], axis=1)


def uniform(space: Space, n: int, generator: np.random.Generator) -> np.ndarray:
    """Returns `n` points of the space, coordinates, float64 (n, d)."""
    u, counts = generator.random((n, len(space))), choices(space)
    return np.where(counts > 0, np.floor(u * counts), u)


def internal_values(space: Space, params: Sequence[Mapping[str, Any]]) -> np.ndarray:
    """Returns the internal values, float64 (n, d), of parameters as Optuna's trials have them; NaN where one is not."""
    rows = [
        [x.to_internal_repr(found[name]) if name in found else math.nan for name, x in space.items()]
        for found in params
    ]
    return np.array(rows, dtype=np.float64).reshape(len(params), len(space))


def external_values(space: Space, internal: np.ndarray) -> dict[str, Any]:
    """Returns the parameters of one row of internal values, as Optuna's `suggest` methods give them."""
    values = {name: x.to_external_repr(float(internal[j])) for j, (name, x) in enumerate(space.items())}
    return {name: int(value) if isinstance(space[name], IntDistribution) else value for name, value in values.items()}


def _ends(x: FloatDistribution | IntDistribution) -> tuple[float, float]:
    half = (x.step or 0) / 2
    low, high = x.low - half, x.high + half
    return (math.log(low), math.log(high)) if x.log else (low, high)


def _to_unit(x: BaseDistribution, values: np.ndarray) -> np.ndarray:
    if isinstance(x, CategoricalDistribution):
        return values
    assert isinstance(x, FloatDistribution | IntDistribution)
    low, high = _ends(x)
    values = np.log(values) if x.log else values
    return np.clip((values - low) / (high - low), 0, 1) if high > low else np.zeros_like(values)


def _from_unit(x: BaseDistribution, u: np.ndarray) -> np.ndarray:
    if isinstance(x, CategoricalDistribution):
        return u
    assert isinstance(x, FloatDistribution | IntDistribution)
    low, high = _ends(x)
    values = low + u * (high - low)
    values = np.exp(values) if x.log else values
    if x.step:
        values = x.low + x.step * np.round((values - x.low) / x.step)
    return np.clip(values, x.low, x.high)
