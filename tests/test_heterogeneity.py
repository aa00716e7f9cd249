"""The three measures of how much devices differ, against values computed by hand and by scipy."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.linalg import sqrtm

from tapfl.summary.heterogeneity import feature_shift, label_shift, quantity_shift
from tapfl.summary.mixture import GaussianSummary


def test_equal_devices_have_no_shift() -> None:
    mixture = GaussianSummary(np.array([0.5, 0.5]), np.eye(2), np.ones((2, 2)), 50)
    assert quantity_shift([40, 40, 40]) == 0
    assert label_shift(np.array([[2, 4], [10, 20]])) == 0
    assert feature_shift([mixture, mixture]) == pytest.approx(0, abs=1e-12)
    assert quantity_shift([7]) == label_shift(np.array([[3, 4]])) == 0


def test_quantity_is_the_gini_coefficient() -> None:
    n = [10, 20, 70]
    assert quantity_shift(n) == pytest.approx(sum(abs(a - b) for a in n for b in n) / (2 * 3 * 100)) == 0.4
    assert quantity_shift([1] * 99 + [10**9]) == pytest.approx(0.99, abs=1e-6)


def test_labels_are_by_total_variation() -> None:
    disjoint = np.array([[30, 0, 0], [0, 30, 0], [0, 0, 30]])
    assert label_shift(disjoint) == pytest.approx(2 / 3)  # on each, two thirds of the images would have to change
    assert label_shift(np.array([[3, 1], [1, 3]])) == pytest.approx(0.25)


def test_features_are_by_the_distance_of_frechet() -> None:
    """Two devices of unequal size, one with two components and one with a full covariance."""
    generator = np.random.default_rng(0)
    root = generator.standard_normal((3, 3))
    first = GaussianSummary(np.array([0.3, 0.7]), generator.standard_normal((2, 3)), np.full((2, 3), 0.5), 30)
    second = GaussianSummary(np.ones(1), generator.standard_normal((1, 3)), (root @ root.T)[None], 90)
    drawn = [_drawn(first, 300_000, generator), _drawn(second, 900_000, generator)]
    whole = np.concatenate(drawn)
    mean, covariance = whole.mean(0), np.cov(whole.T)
    want = np.mean([_frechet(np.mean(x, 0), np.cov(x.T), mean, covariance) for x in drawn]) / np.trace(covariance)
    assert feature_shift([first, second]) == pytest.approx(want, rel=0.02)


def test_features_have_no_unit_and_no_origin() -> None:
    def moved(scale: float, by: float) -> float:
        pair = [(0.0, 1.0, 10), (3.0, 2.0, 20)]
        return feature_shift(
            [
                GaussianSummary(np.ones(1), np.array([[scale * m + by]]), np.array([[scale**2 * c]]), n)
                for m, c, n in pair
            ]
        )

    assert moved(1, 0) > 0.1
    assert moved(100, -7) == pytest.approx(moved(1, 0))


def _drawn(mixture: GaussianSummary, n: int, generator: np.random.Generator) -> np.ndarray:
    counts = (mixture.weights * n).astype(int)
    parts = []
    for k, mean, own in zip(counts, mixture.means, mixture.covariances, strict=True):
        parts.append(generator.multivariate_normal(mean, own if own.ndim == 2 else np.diag(own), size=k))
    return np.concatenate(parts)


def _frechet(m: np.ndarray, c: np.ndarray, mean: np.ndarray, covariance: np.ndarray) -> float:
    return float(((m - mean) ** 2).sum() + np.trace(c + covariance - 2 * sqrtm(c @ covariance).real))
