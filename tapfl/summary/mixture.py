"""A device's Gaussian mixture: fitted to descriptors of its training images, limited in support, and used as density.

Before the mixture leaves the device, descriptors can be clipped and noise can be added to the moments. Clipping bounds
the influence of a single image on the moments, and noise hides part of it. This is not differential privacy of the
mixture: the assignment of images to components and the number of components depend on the images as well, which is not
accounted for.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import numpy as np
from scipy.linalg import solve_triangular
from scipy.spatial import cKDTree
from scipy.special import logsumexp
from sklearn.exceptions import ConvergenceWarning
from sklearn.mixture import GaussianMixture

from tapfl.config import SummaryOptions
from tapfl.errors import DataError
from tapfl.progress import track
from tapfl.seeds import numpy_generator, of_secret

REG_COVAR = 1e-3  # relative to the mean variance of the descriptors
N_INIT = 3
SAME = 1e-4  # relative to the median norm of descriptors; far above float32 rounding, far below two photographs


@dataclass(frozen=True)
class GaussianSummary:
    """p(x) = Σ_k π_k N(x | μ_k, Σ_k): a device's description of its images for the server.

    Attributes:
        weights: π, float64 (K,), sum 1.
        means: μ, float64 (K, d).
        covariances: float64: variances (K, d) if diagonal, otherwise (K, d, d).
        n: number of distinct samples that the mixture was fitted on.
    """

    weights: np.ndarray
    means: np.ndarray
    covariances: np.ndarray
    n: int

    def component_log_densities(self, points: np.ndarray) -> np.ndarray:
        """Returns log π_k + log N(x | μ_k, Σ_k) at the points (n, d), float64 (n, K)."""
        d = self.means.shape[1]
        columns = []
        for mean, covariance in zip(self.means, self.covariances, strict=True):
            centred = points - mean
            if covariance.ndim == 1:
                squares, log_det = (centred**2 / covariance).sum(1), np.log(covariance).sum()
            else:
                chol = np.linalg.cholesky(covariance)
                squares = (solve_triangular(chol, centred.T, lower=True) ** 2).sum(0)
                log_det = 2 * np.log(np.diag(chol)).sum()
            columns.append(-0.5 * (squares + log_det + d * np.log(2 * np.pi)))
        with np.errstate(divide="ignore"):
            return np.stack(columns, axis=1) + np.log(self.weights)

    def log_likelihood(self, points: np.ndarray) -> np.ndarray:
        """Returns log p(x) at the points (n, d), float64 (n,), by log-sum-exp over the components."""
        return logsumexp(self.component_log_densities(points), axis=1)

    def check(self, dim: int, min_support: float) -> None:
        """Raises DataError unless this is a valid mixture in dimension `dim`, with enough samples in each component."""
        k = len(self.weights) if self.weights.ndim == 1 else 0
        shapes = ((k, dim), (k, dim, dim))
        wrong = ""
        if k == 0 or self.weights.ndim != 1 or self.means.shape != shapes[0] or self.covariances.shape not in shapes:
            got = f"{self.weights.shape}, {self.means.shape}, {self.covariances.shape}"
            wrong = f"shapes {got} do not match in dimension {dim}"
        elif not all(np.isfinite(part).all() for part in (self.weights, self.means, self.covariances)):
            wrong = "holds values that are not finite"
        elif (self.weights <= 0).any() or abs(self.weights.sum() - 1) > 1e-6:
            wrong = f"weights must be positive and sum to 1, they sum to {self.weights.sum():.6g}"
        elif not _positive(self.covariances):
            wrong = "covariances must be positive definite"
        elif (support := self.n * self.weights.min()) < min_support - 1e-6:
            wrong = f"a component stands for {support:.2f} samples, at least {min_support} needed"
        if wrong:
            raise DataError(f"mixture: {wrong}")


def _positive(covariances: np.ndarray) -> bool:
    if covariances.ndim == 2:
        return bool((covariances > 0).all())
    symmetric = np.allclose(covariances, covariances.swapaxes(1, 2), rtol=1e-6, atol=1e-9)
    return symmetric and bool((np.linalg.eigvalsh(covariances) > 0).all())


def fit_mixture(points: np.ndarray, options: SummaryOptions | None = None, seed: int = 0) -> GaussianSummary:
    """Returns the mixture of descriptors (n, d) with the lowest BIC over K = 1..max_components.

    The published method uses full covariances and K = 2..10. Ours uses diagonal covariances by default, and a
    `reg_covar` relative to the variance of the descriptors. Components of fewer than `min_support` samples are merged
    into their nearest neighbour, with the moments preserved, because the mean of one sample *is* that sample. For the
    same reason, copies of a sample count once. No sample then contributes more than 1 / `min_support` of any
    component's mean.

    Raises:
        DataError: if there are fewer distinct samples than `min_support`.
    """
    options = options or SummaryOptions()
    points = distinct(points)
    n = len(points)
    if n < options.min_support:
        raise DataError(f"mixture: {n} distinct samples are fewer than summary.min-support = {options.min_support}")
    reg = REG_COVAR * float(points.var(axis=0).mean()) + 1e-12
    most = min(options.max_components, max(1, int(n / options.min_support)))

    def fitted(k: int) -> GaussianMixture:
        mixture = GaussianMixture(
            k, covariance_type=options.covariance, reg_covar=reg, n_init=N_INIT, random_state=seed
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            return mixture.fit(points)

    best = min(map(fitted, track(range(1, most + 1), "mixture")), key=lambda mixture: mixture.bic(points))
    summary = GaussianSummary(best.weights_ / best.weights_.sum(), best.means_, best.covariances_, n)
    return limit_support(summary, options.min_support)


def distinct(points: np.ndarray) -> np.ndarray:
    """Returns points (n, d) in their order, without those that equal an earlier point up to rounding."""
    radius = max(SAME * float(np.median(np.linalg.norm(points, axis=1))), np.finfo(float).tiny)
    # first by cells of a grid: a thousand copies would form half a million pairs
    kept = np.sort(np.unique(np.round(points / radius), axis=0, return_index=True)[1])
    later = cKDTree(points[kept]).query_pairs(radius, output_type="ndarray")[:, 1]
    return points[np.delete(kept, later)]


def limit_support(summary: GaussianSummary, min_support: float) -> GaussianSummary:
    """Returns the mixture with components of fewer than `min_support` samples merged into others.

    The smallest component is merged into the one with the nearest mean. The merged component has the weight, mean and
    covariance of both together, so the first two moments of the whole mixture are preserved.
    """
    weights, means, covariances = summary.weights, summary.means, summary.covariances
    while len(weights) > 1 and weights.min() * summary.n < min_support:
        i = int(weights.argmin())
        distance = ((means - means[i]) ** 2).sum(1)
        distance[i] = np.inf
        j = int(distance.argmin())
        total = weights[i] + weights[j]
        share = weights[[i, j]] / total
        mean = share @ means[[i, j]]
        shift = means[[i, j]] - mean
        outer = shift**2 if covariances.ndim == 2 else shift[:, :, None] * shift[:, None, :]
        covariance = np.tensordot(share, covariances[[i, j]] + outer, axes=1)
        rest = [k for k in range(len(weights)) if k not in (i, j)]
        weights = np.append(weights[rest], total)
        means = np.vstack([means[rest], mean])
        covariances = np.concatenate([covariances[rest], covariance[None]])
    return GaussianSummary(weights / weights.sum(), means, covariances, summary.n)


def device_mixture(
    points: np.ndarray, options: SummaryOptions, seed: int, partition_id: int, secret: str = ""
) -> GaussianSummary:
    """Returns the mixture that a device uploads, fitted to its descriptors (n, d).

    Args:
        secret: known only to the device. Without a secret, the noise follows from the run's seed: runs can be repeated,
            but anyone who knows the seed can remove the noise.

    Raises:
        DataError: if there are fewer distinct samples than `min_support`.
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
    """Returns points (n, d) scaled to a norm of at most `norm`."""
    return points * (norm / np.maximum(np.linalg.norm(points, axis=1, keepdims=True), norm))


def add_noise(summary: GaussianSummary, clip: float, noise: float, generator: np.random.Generator) -> GaussianSummary:
    """Returns a valid mixture with noise on its moments.

    The moments are N_k = Σ r_ik, Σ r_ik x_i / R and Σ r_ik x_i x_iᵀ / R² (or its diagonal, for diagonal covariances).
    r_ik is the responsibility of component k for sample i, and R = `clip` ≥ ‖x_i‖. With r fixed, adding or removing one
    sample changes all of them together by at most √3 in L2 norm. Each number gets Gaussian noise of standard deviation
    √3 · `noise`.

    The noisy moments are then made valid without using the images: a component has at least one sample, its mean lies
    in the ball of radius R, and its variances, or the eigenvalues of its covariance, are at most R² and at least the
    uncertainty that the noise leaves.
    """
    σ, d = np.sqrt(3) * noise, summary.means.shape[1]
    full = summary.covariances.ndim == 3
    outer = (lambda m: m[:, :, None] * m[:, None, :]) if full else np.square
    N = summary.n * summary.weights
    count = (slice(None), *[None] * (summary.covariances.ndim - 1))
    squares = N[count] * (summary.covariances + outer(summary.means))
    draws = generator.standard_normal(squares.shape)
    if full:  # the two equal entries of a symmetric matrix get the same noise
        draws = np.triu(draws) + np.triu(draws, 1).swapaxes(1, 2)
    noisy_N = np.maximum(N + σ * generator.standard_normal(N.shape), 1.0)
    sums = N[:, None] * summary.means + σ * clip * generator.standard_normal((len(N), d))
    means = clip_points(sums / noisy_N[:, None], clip)
    covariances = (squares + σ * clip**2 * draws) / noisy_N[count] - outer(means)
    floor = np.minimum(σ / noisy_N, 1.0) * clip**2
    return GaussianSummary(noisy_N / noisy_N.sum(), means, _bounded(covariances, floor, clip**2), summary.n)


def _bounded(covariances: np.ndarray, floor: np.ndarray, ceiling: float) -> np.ndarray:
    """Returns covariances with variances (K, d), or eigenvalues if (K, d, d), clipped to [floor_k, ceiling]."""
    if covariances.ndim == 2:
        return np.clip(covariances, floor[:, None], ceiling)
    values, vectors = np.linalg.eigh(covariances)
    values = np.clip(values, floor[:, None], ceiling)
    bounded = (vectors * values[:, None, :]) @ vectors.swapaxes(1, 2)
    return (bounded + bounded.swapaxes(1, 2)) / 2
