"""How far the devices of a federation are apart, in three numbers that are 0 where all are alike.

Each comes from what is known in another place: the server knows how many images a device has and its mixture; how many
of each class only the device, and the reader of a simulation's folder.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tapfl.summary.mixture import GaussianSummary


def quantity_shift(images: Sequence[int]) -> float:
    """Returns the Gini coefficient of the devices' numbers of images, in [0, 1): Σ_ij |n_i - n_j| / (2 N Σ_i n_i).

    0: all have as many; near 1: one device of very many has nearly all (Gini 1912).
    """
    n = np.sort(np.asarray(images, dtype=np.float64))
    ranks = np.arange(1, len(n) + 1)
    return float(((2 * ranks - len(n) - 1) * n).sum() / (len(n) * n.sum()))


def label_shift(counts: np.ndarray) -> float:
    """Returns the mean over devices of the total variation distance ½ Σ_c |p_i(c) - p(c)|, in [0, 1).

    It is the share of a device's images that would need another class for the device to have the classes in the shares
    of all images: half of what Zhao et al. (2018, arXiv 1806.00582) call the earth mover's distance of a device.

    Args:
        counts: (devices, classes), images of each class on each device, at least one on each.
    """
    shares, whole = counts / counts.sum(1, keepdims=True), counts.sum(0) / counts.sum()
    return float(0.5 * np.abs(shares - whole).sum(1).mean())


def feature_shift(mixtures: Sequence[GaussianSummary]) -> float:
    """Returns the mean over devices of d²(N(m_i, C_i), N(m, C)) / tr C, with the moments of the mixtures.

    d² = |m_i - m|² + tr(C_i + C - 2 (C^½ C_i C^½)^½) is the squared Fréchet distance of two normal distributions
    (Dowson and Landau 1982), as in the FID of Heusel et al. (2017, arXiv 1706.08500). (m_i, C_i) are the moments of a
    device's mixture, (m, C) those of all mixtures together, weighted by their samples. Divided by the variance of all
    descriptors it has no unit; 1 would be a device as far away as a descriptor is from the mean.

    Args:
        mixtures: of at least one device, in one dimension.
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
    """Returns the mean (d,) and the covariance (d, d) of a mixture as a whole."""
    own = mixture.covariances
    full = own if own.ndim == 3 else own[:, :, None] * np.eye(own.shape[1])
    return _pooled(mixture.weights, mixture.means, full)


def _pooled(weights: np.ndarray, means: np.ndarray, covariances: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns mean and covariance of distributions (k, d), (k, d, d) that are mixed with these weights."""
    mean = weights @ means
    apart = means - mean
    return mean, np.einsum("k,kij->ij", weights, covariances) + (weights[:, None] * apart).T @ apart
