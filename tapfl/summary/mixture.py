"""A device's Gaussian mixture: fitted on the descriptors of its training images, limited in support, and scored.

Before it leaves the device, descriptors can be clipped and noise added to the moments. Both bound what a single image
can do to the moments and hide part of it. They are no differential privacy of the mixture: which image counts to which
component, and how many components there are, depends on the images as well, and is not accounted for.
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
SAME = 1e-4  # relative to the median length of descriptors; rounding in float32 is far below, two photographs far above


@dataclass(frozen=True)
class GaussianSummary:
    """p(x) = Σ_k π_k N(x | μ_k, Σ_k). This, and nothing else about its images, leaves a device.

    Attributes:
        weights: float64 (K,), π, sum 1.
        means: float64 (K, d), μ.
        covariances: float64, (K, d) variances if diagonal, else (K, d, d).
        n: number of different samples the mixture was fitted on.
    """

    weights: np.ndarray
    means: np.ndarray
    covariances: np.ndarray
    n: int

    def component_log_densities(self, points: np.ndarray) -> np.ndarray:
        """Returns log π_k + log N(x | μ_k, Σ_k), float64 (n, K), of points (n, d)."""
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
        """Returns log p(x), float64 (n,), by log-sum-exp over the components."""
        return logsumexp(self.component_log_densities(points), axis=1)

    def check(self, dim: int, min_support: float) -> None:
        """Raises DataError unless this is a mixture of dimension `dim` whose components are all supported."""
        k = len(self.weights) if self.weights.ndim == 1 else 0
        shapes = ((k, dim), (k, dim, dim))
        wrong = ""
        if k == 0 or self.weights.ndim != 1 or self.means.shape != shapes[0] or self.covariances.shape not in shapes:
            given = f"{self.weights.shape}, {self.means.shape}, {self.covariances.shape}"
            wrong = f"shapes {given} do not go together in dimension {dim}"
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

    Ours: diagonal covariance by default and `reg_covar` relative to the variance of the
    descriptors. As published: full covariance, K = 2..10. Components that stand for fewer than `min_support` samples
    are merged into their nearest neighbour, moments preserved, since the mean of one sample *is* that sample; and for
    the same reason a sample that is there many times counts once. No sample then makes up more than 1 / `min_support`
    of any component's mean.

    Raises:
        DataError: if there are fewer different samples than `min_support`.
    """
    options = options or SummaryOptions()
    points = distinct(points)
    n = len(points)
    if n < options.min_support:
        raise DataError(f"mixture: {n} different samples are fewer than summary.min-support = {options.min_support}")
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
    """Returns points (n, d) in their order, without those that are the same as an earlier one but for rounding."""
    radius = max(SAME * float(np.median(np.linalg.norm(points, axis=1))), np.finfo(float).tiny)
    # cells first: the pairs among a thousand copies are half a million
    kept = np.sort(np.unique(np.round(points / radius), axis=0, return_index=True)[1])
    later = cKDTree(points[kept]).query_pairs(radius, output_type="ndarray")[:, 1]
    return points[np.delete(kept, later)]


def limit_support(summary: GaussianSummary, min_support: float) -> GaussianSummary:
    """Returns the mixture with every component that stands for fewer than `min_support` samples merged away.

    The weakest component goes into the one with the nearest mean; weight, mean and covariance of the pair are those of
    their sum, so the first two moments of the whole mixture stay what they were.
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
