"""The metric set: the public images that look like a device's own, on which its task is measured."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from tapfl.config import MetricOptions
from tapfl.errors import DataError
from tapfl.summary.mixture import GaussianSummary

PoolDensity = Callable[[], np.ndarray]
Rule = Callable[[GaussianSummary, PoolDensity, np.ndarray, int, np.random.Generator], np.ndarray]


def top_likelihood(
    device: GaussianSummary, pool: PoolDensity, points: np.ndarray, size: int, generator: np.random.Generator
) -> np.ndarray:
    """As published: the samples of largest log p_i(φ(x)). Mode-seeking: it crowds into the densest component."""
    return _largest(device.log_likelihood(points), size)


def density_ratio(
    device: GaussianSummary, pool: PoolDensity, points: np.ndarray, size: int, generator: np.random.Generator
) -> np.ndarray:
    """Ours: the samples of largest log p_i(φ(x)) - log p_pool(φ(x)): more the device's than the pool's."""
    return _largest(device.log_likelihood(points) - pool(), size)


def component_quota(
    device: GaussianSummary, pool: PoolDensity, points: np.ndarray, size: int, generator: np.random.Generator
) -> np.ndarray:
    """Ours: n_k = round(π_k M) samples a component, the best by responsibility-weighted likelihood, none twice."""
    affinity = device.component_log_densities(points)  # log π_k N_k(x) = log p(x) + log r_k(x)
    exact = device.weights * size
    quota = np.floor(exact).astype(int)
    for k in np.argsort(-(exact - quota), kind="stable")[: size - quota.sum()]:
        quota[k] += 1
    free = np.ones(len(points), dtype=bool)
    chosen: list[np.ndarray] = []
    for k in np.argsort(-device.weights, kind="stable"):
        taken = _largest(np.where(free, affinity[:, k], -np.inf), quota[k])
        free[taken] = False
        chosen.append(taken)
    return np.concatenate(chosen)


def random_set(
    device: GaussianSummary, pool: PoolDensity, points: np.ndarray, size: int, generator: np.random.Generator
) -> np.ndarray:
    """A control: `size` samples drawn evenly from the pool."""
    return generator.choice(len(points), size, replace=False)


RULES: dict[str, Rule] = {
    "top-likelihood": top_likelihood,
    "density-ratio": density_ratio,
    "component-quota": component_quota,
    "random": random_set,
}


def pick_metric_set(
    device: GaussianSummary,
    pool: GaussianSummary | np.ndarray,
    points: np.ndarray,
    options: MetricOptions | None = None,
    generator: np.random.Generator | None = None,
) -> np.ndarray:
    """Returns `options.size` different positions in the pool, int64, best first.

    Args:
        device: the device's mixture.
        pool: a mixture fitted on all of the pool's descriptors, or, where many devices share it, its log-likelihood at
            `points`, float64 (n,).
        points: the pool's descriptors, float64 (n, d).

    Raises:
        DataError: if the pool is smaller than the metric set that is asked for.
    """
    options, generator = options or MetricOptions(), generator or np.random.default_rng(0)
    if options.size > len(points):
        raise DataError(f"metric.size = {options.size}: the public pool has {len(points)} images")

    def density() -> np.ndarray:
        return pool.log_likelihood(points) if isinstance(pool, GaussianSummary) else pool

    return RULES[options.rule](device, density, points, options.size, generator)


def _largest(scores: np.ndarray, count: int) -> np.ndarray:
    return np.argsort(-scores, kind="stable")[:count]
