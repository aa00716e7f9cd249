"""What a device makes of its descriptors before any of it leaves: clipped, fitted, and with noise on the moments.

Both are optional. They bound what a single image can do to the moments that leave, and hide part of it. They are no
differential privacy of the mixture: which image counts to which component, and how many components there are, depends
on the images as well, and is not paid for.
"""

from __future__ import annotations

import numpy as np

from tapfl.config import SummaryOptions
from tapfl.seeds import numpy_generator, of_secret
from tapfl.summary.mixture import GaussianSummary, fit_mixture, limit_support


def device_mixture(
    points: np.ndarray, options: SummaryOptions, seed: int, partition_id: int, secret: str = ""
) -> GaussianSummary:
    """Returns the mixture that a device uploads, of its descriptors (n, d).

    Args:
        secret: of the device alone. Without one the noise follows from the run's seed, so that a run can be repeated,
            and whoever knows the seed can take it off again.

    Raises:
        DataError: if there are fewer different samples than `min_support`.
    """
    if options.clip:
        points = clip_points(points, options.clip)
    summary = fit_mixture(points, options, int(numpy_generator(seed, "mixture", partition_id).integers(2**31)))
    if not options.noise:
        return summary
    own = of_secret(secret)
    generator = numpy_generator(seed, "summary-noise", partition_id, *own)
    return limit_support(add_noise(summary, options.clip, options.noise, generator), options.min_support)


def clip_points(points: np.ndarray, norm: float) -> np.ndarray:
    """Returns points (n, d), those longer than `norm` shortened to it."""
    return points * (norm / np.maximum(np.linalg.norm(points, axis=1, keepdims=True), norm))


def add_noise(summary: GaussianSummary, clip: float, noise: float, generator: np.random.Generator) -> GaussianSummary:
    """Returns the mixture of noisy moments, made valid again.

    The moments are N_k = Σ r_ik, Σ r_ik x_i / R and Σ r_ik x_i x_iᵀ / R² (its diagonal, for diagonal covariances), r_ik
    the share of sample i that counts to component k and R = `clip` ≥ ‖x_i‖. With r fixed, one sample more or less
    moves all of them together by √3 at most in L2; each number gets Gaussian noise of standard deviation √3 · `noise`.

    What comes after looks at no image: a component counts one sample at least, its mean lies in the ball of R, and its
    variances, or the eigenvalues of its covariance, lie between what the noise leaves unknown of them and R².
    """
    σ, d = np.sqrt(3) * noise, summary.means.shape[1]
    full = summary.covariances.ndim == 3
    outer = (lambda m: m[:, :, None] * m[:, None, :]) if full else np.square
    N = summary.n * summary.weights
    count = (slice(None), *[None] * (summary.covariances.ndim - 1))
    squares = N[count] * (summary.covariances + outer(summary.means))
    hidden = generator.standard_normal(squares.shape)
    if full:  # a symmetric matrix has one number for each pair
        hidden = np.triu(hidden) + np.triu(hidden, 1).swapaxes(1, 2)
    noisy_N = np.maximum(N + σ * generator.standard_normal(N.shape), 1.0)
    sums = N[:, None] * summary.means + σ * clip * generator.standard_normal((len(N), d))
    means = clip_points(sums / noisy_N[:, None], clip)
    covariances = (squares + σ * clip**2 * hidden) / noisy_N[count] - outer(means)
    floor = np.minimum(σ / noisy_N, 1.0) * clip**2
    return GaussianSummary(noisy_N / noisy_N.sum(), means, _bounded(covariances, floor, clip**2), summary.n)


def _bounded(covariances: np.ndarray, floor: np.ndarray, ceiling: float) -> np.ndarray:
    """Returns variances (K, d), or the eigenvalues of covariances (K, d, d), moved into [floor_k, ceiling]."""
    if covariances.ndim == 2:
        return np.clip(covariances, floor[:, None], ceiling)
    values, vectors = np.linalg.eigh(covariances)
    values = np.clip(values, floor[:, None], ceiling)
    bounded = (vectors * values[:, None, :]) @ vectors.swapaxes(1, 2)
    return (bounded + bounded.swapaxes(1, 2)) / 2
