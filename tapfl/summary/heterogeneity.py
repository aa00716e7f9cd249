"""Three measures of the heterogeneity of a federation's devices; each is 0 if all devices are equal.

The server knows the number of images and the mixture of each device (quantity and feature shift). Class counts (label
shift) are known only to the device, and to readers of a simulation's folder.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tapfl.summary.mixture import GaussianSummary


def quantity_shift(images: Sequence[int]) -> float:
    """Returns the Gini coefficient of the devices' numbers of images, in [0, 1): Σ_ij |n_i - n_j| / (2 N Σ_i n_i).

    0: all devices have equally many; near 1: one of very many devices has nearly all (Gini 1912).
    """
    n = np.sort(np.asarray(images, dtype=np.float64))
    ranks = np.arange(1, len(n) + 1)
    return float(((2 * ranks - len(n) - 1) * n).sum() / (len(n) * n.sum()))


def label_shift(counts: np.ndarray) -> float:
    """Returns the mean over devices of the total variation distance ½ Σ_c |p_i(c) - p(c)|, in [0, 1).

    For one device, it is the fraction of its images that would need another class so that its class frequencies equal
    those of all images. It is half of what Zhao et al. (2018, arXiv 1806.00582) call the earth mover's distance.

    Args:
        counts: number of images of each class on each device (devices, classes); every device has at least one image.
    """
    shares, whole = counts / counts.sum(1, keepdims=True), counts.sum(0) / counts.sum()
    return float(0.5 * np.abs(shares - whole).sum(1).mean())


def feature_shift(mixtures: Sequence[GaussianSummary]) -> float:
    """Returns the mean over devices of d²(N(m_i, C_i), N(m, C)) / tr C, with the moments of the mixtures.

    d² = |m_i - m|² + tr(C_i + C - 2 (C^½ C_i C^½)^½) is the squared Fréchet distance of two normal distributions
    (Dowson and Landau 1982), as in the FID of Heusel et al. (2017, arXiv 1706.08500). (m_i, C_i) are the moments of a
    device's mixture, and (m, C) those of all mixtures together, weighted by their samples. Division by the total
    variance of all descriptors makes the result dimensionless; at 1, a device would be as far away as a typical
    descriptor is from the mean.

    Args:
        mixtures: of at least one device, all of the same dimension.
    """
    moments = [_moments(mixture) for mixture in mixtures]
    n = np.array([mixture.n for mixture in mixtures], dtype=np.float64)
    means, covariances = (np.stack(parts) for parts in zip(*moments, strict=True))
    mean, covariance = _pooled(n / n.sum(), means, covariances)
    values, vectors = np.linalg.eigh(covariance)
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    traces = [np.sqrt(np.linalg.eigvalsh(root @ own @ root).clip(0)).sum() for own in covariances]
    total = np.trace(covariance)
    squares = ((means - mean) ** 2).sum(1) + np.trace(covariances, axis1=1, axis2=2) + total - 2 * np.array(traces)
    return float(max(0.0, squares.mean() / total))


def _moments(mixture: GaussianSummary) -> tuple[np.ndarray, np.ndarray]:
    """Returns the mean (d,) and the covariance (d, d) of a whole mixture."""
    own = mixture.covariances
    full = own if own.ndim == 3 else own[:, :, None] * np.eye(own.shape[1])
    return _pooled(mixture.weights, mixture.means, full)


def _pooled(weights: np.ndarray, means: np.ndarray, covariances: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns mean and covariance of the mixture of k distributions, given weights (k,) and their moments."""
    mean = weights @ means
    deviations = means - mean
    return mean, np.einsum("k,kij->ij", weights, covariances) + (weights[:, None] * deviations).T @ deviations
