"""BOHB's densities: multivariate product kernels over good and bad configurations (Falkner, Klein, Hutter 2018, § 3).

Numbers have Gaussian kernels, categories those of Aitchison and Aitken (1976):
``K(x, x') = 1 − λ`` if they are the same, else ``λ / (c − 1)``, λ ≤ (c − 1) / c.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.special import logsumexp, ndtr, ndtri

MIN_BANDWIDTH = 1e-3
CANDIDATES = 64
WIDER = 3.0  # candidates are drawn with so many bandwidths


@dataclass(frozen=True)
class Density:
    """A kernel density over coordinates of `unit_cube`.

    Attributes:
        points: where the kernels lie, float64 (n, d).
        bandwidths: standard deviation of a number's kernel, λ of a category's, float64 (d,).
        choices: how many choices each parameter has, int64 (d,); 0: it is a number.
    """

    points: np.ndarray
    bandwidths: np.ndarray
    choices: np.ndarray

    @classmethod
    def fit(cls, points: np.ndarray, choices: np.ndarray) -> Density:
        """Returns the density with bandwidths by normal reference, ``1.06 σ n^(−1 / (4 + d))``, at least 1e-3.

        A category has no σ; with two choices coded 0 and 1 it would be √(p (1 − p)), and ``√(½ Σ_c p_c (1 − p_c))``
        is what that becomes with more, whatever their order.
        """
        n, d = points.shape
        spread = np.array([_spread(points[:, j], choices[j]) for j in range(d)])
        bandwidths = np.maximum(1.06 * spread * n ** (-1 / (4 + d)), MIN_BANDWIDTH)
        return cls(points, _at_most_even(bandwidths, choices), choices)

    def log_pdf(self, x: np.ndarray) -> np.ndarray:
        """Returns the logarithm of the density at `x` (m, d), float64 (m,)."""
        difference = x[:, None, :] - self.points[None, :, :]
        gauss = -0.5 * (difference / self.bandwidths) ** 2 - np.log(self.bandwidths * np.sqrt(2 * np.pi))
        others = np.maximum(self.choices - 1, 1)
        same = np.log1p(-np.where(self.choices > 0, self.bandwidths, 0))
        category = np.where(np.abs(difference) < 0.5, same, np.log(self.bandwidths / others))
        kernels = np.where(self.choices > 0, category, gauss).sum(axis=2)
        return logsumexp(kernels, axis=1) - np.log(len(self.points))

    def draw(self, n: int, generator: np.random.Generator) -> np.ndarray:
        """Returns `n` candidates, float64 (n, d): around points of the density, wider, truncated to [0, 1]."""
        centres = self.points[generator.integers(len(self.points), size=n)]
        u, v = generator.random(centres.shape), generator.random(centres.shape)
        width = _at_most_even(WIDER * self.bandwidths, self.choices)
        below, above = ndtr(-centres / width), ndtr((1 - centres) / width)
        numbers = np.clip(centres + width * ndtri(below + u * (above - below)), 0, 1)
        others = np.floor(v * np.maximum(self.choices - 1, 1))  # one of the choices that the centre is not
        moved = others + (others >= centres)
        return np.where(self.choices > 0, np.where(u < width, moved, centres), numbers)


def best_candidate(good: Density, bad: Density, generator: np.random.Generator) -> np.ndarray:
    """Returns the candidate (d,) with the largest l / g of 64 drawn around good points; of equals the first."""
    candidates = good.draw(CANDIDATES, generator)
    return candidates[np.argmax(good.log_pdf(candidates) - bad.log_pdf(candidates))]


def split_counts(n: int, d: int) -> tuple[int, int]:
    """Returns how many of `n` configurations of `d` parameters are good, and how many bad: the best and the worst."""
    least = d + 1
    good = max(least, int(0.15 * n))
    return good, max(least, n - good)


def impute(points: np.ndarray, good: np.ndarray, fallback: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Returns points without NaN: a parameter that a configuration has not is that of a good one that has it.

    Args:
        fallback: uniform points, of the shape of `points`, for what no good one has.
    """
    filled = points.copy()
    for j in range(points.shape[1]):
        missing, had = np.isnan(points[:, j]), good[~np.isnan(good[:, j]), j]
        if missing.any():
            filled[missing, j] = generator.choice(had, missing.sum()) if len(had) else fallback[missing, j]
    return filled


def _spread(column: np.ndarray, choices: int) -> float:
    if not choices:
        return float(column.std())
    shares = np.bincount(column.astype(np.int64), minlength=choices) / len(column)
    return float(np.sqrt(0.5 * (shares * (1 - shares)).sum()))


def _at_most_even(bandwidths: np.ndarray, choices: np.ndarray) -> np.ndarray:
    """λ = (c − 1) / c makes all choices alike; with more, a point would be likelier anywhere but where it is."""
    return np.where(choices > 0, np.minimum(bandwidths, (choices - 1) / np.maximum(choices, 1)), bandwidths)
