"""Mixtures: golden likelihoods, the support limit that protects single images, and what a server refuses."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from backbones import golden
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.mixture import GaussianMixture

from tapfl.config import SummaryOptions
from tapfl.errors import DataError
from tapfl.summary.metric_set import Projection
from tapfl.summary.mixture import GaussianSummary, distinct, fit_mixture, limit_support


def random_mixture(seed: int, k: int, d: int, full: bool, n: int = 100) -> GaussianSummary:
    generator = np.random.default_rng(seed)
    root = generator.standard_normal((k, d, d))
    covariances = root @ root.swapaxes(1, 2) + 0.1 * np.eye(d) if full else generator.uniform(0.1, 2, (k, d))
    weights = generator.dirichlet(np.full(k, 0.5)) * (1 - 1e-3) + 1e-3 / k
    return GaussianSummary(weights, generator.standard_normal((k, d)) * 3, covariances, n)


def moments(mixture: GaussianSummary) -> tuple[np.ndarray, np.ndarray]:
    """Returns mean and covariance of the whole mixture (only the diagonal, if the covariances are diagonal)."""
    mean = mixture.weights @ mixture.means
    second = np.einsum("k,ki,kj->ij", mixture.weights, mixture.means, mixture.means)
    if mixture.covariances.ndim == 2:
        return mean, mixture.weights @ mixture.covariances + np.diag(second) - mean**2
    return mean, np.tensordot(mixture.weights, mixture.covariances, 1) + second - np.outer(mean, mean)


def test_log_likelihood_is_golden() -> None:
    case = {name: np.array(values) for name, values in golden("mixture").items()}
    mixture = GaussianSummary(case["weights"], case["means"], case["diag_covariances"], 100)
    np.testing.assert_allclose(mixture.log_likelihood(case["points"]), case["log_likelihood"], rtol=1e-10)


@given(seed=st.integers(0, 10**6), k=st.integers(1, 5), d=st.integers(1, 6))
def test_full_equals_diagonal_where_covariances_are_diagonal(seed: int, k: int, d: int) -> None:
    diagonal = random_mixture(seed, k, d, full=False)
    full = replace(diagonal, covariances=np.stack([np.diag(row) for row in diagonal.covariances]))
    points = np.random.default_rng(seed + 1).standard_normal((7, d)) * 4
    np.testing.assert_allclose(
        full.component_log_densities(points), diagonal.component_log_densities(points), rtol=1e-9, atol=1e-9
    )


@pytest.mark.parametrize("kind", ["diag", "full"])
def test_log_likelihood_is_that_of_scikit_learn(kind: str) -> None:
    points = np.random.default_rng(0).standard_normal((80, 3)) * [1, 2, 3]
    fitted = GaussianMixture(3, covariance_type=kind, random_state=0).fit(points)
    ours = GaussianSummary(fitted.weights_, fitted.means_, fitted.covariances_, 80)
    np.testing.assert_allclose(ours.log_likelihood(points), fitted.score_samples(points), rtol=1e-9)


def test_far_points_have_a_finite_likelihood() -> None:
    mixture = random_mixture(0, 3, 2, full=True)
    assert np.isfinite(mixture.log_likelihood(np.full((1, 2), 1e6))).all()


@given(
    seed=st.integers(0, 10**6),
    k=st.integers(1, 8),
    d=st.integers(1, 4),
    full=st.booleans(),
    n=st.integers(5, 60),
    min_support=st.floats(2, 20),
)
def test_limited_support_keeps_moments_and_leaves_no_weak_component(
    seed: int, k: int, d: int, full: bool, n: int, min_support: float
) -> None:
    before = random_mixture(seed, k, d, full, n)
    after = limit_support(before, min_support)
    assert len(after.weights) == 1 or (after.weights * n).min() >= min_support * (1 - 1e-9)
    assert after.n == n
    for found, expected in zip(moments(after), moments(before), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-9)
    if n >= min_support:
        after.check(d, min_support)


def test_the_weakest_component_is_merged_into_the_nearest_one() -> None:
    """100 samples: 60 at 0, 30 at 10, 4 at 11, 6 at 3. The 4 are too few and are merged with the 30."""
    before = GaussianSummary(np.array([0.6, 0.3, 0.04, 0.06]), np.array([[0.0], [10], [11], [3]]), np.ones((4, 1)), 100)
    after = limit_support(before, 5)
    order = after.means[:, 0].argsort()
    np.testing.assert_allclose(after.weights[order], [0.6, 0.06, 0.34])
    np.testing.assert_allclose(after.means[order, 0], [0, 3, (30 * 10 + 4 * 11) / 34])
    np.testing.assert_allclose(after.covariances[order, 0], [1, 1, 1 + 30 * 4 / 34**2])


def test_supported_components_are_not_changed() -> None:
    before = replace(random_mixture(1, 3, 2, full=True), weights=np.array([0.5, 0.3, 0.2]))
    after = limit_support(before, 20)
    np.testing.assert_array_equal(after.means, before.means)
    np.testing.assert_array_equal(after.covariances, before.covariances)


def clusters(sizes: list[int], seed: int = 0, d: int = 3) -> np.ndarray:
    generator = np.random.default_rng(seed)
    centres = 30 * np.eye(max(d, len(sizes)), d)
    return np.concatenate(
        [centre + generator.standard_normal((n, d)) for centre, n in zip(centres, sizes, strict=False)]
    )


@pytest.mark.parametrize("covariance", ["diag", "full"])
def test_well_apart_clusters_are_found(covariance: str) -> None:
    mixture = fit_mixture(clusters([60, 30, 10]), SummaryOptions(covariance=covariance, max_components=5), seed=0)
    assert sorted(np.round(mixture.weights, 6)) == [0.1, 0.3, 0.6]
    assert mixture.n == 100
    mixture.check(3, 5.0)


@pytest.mark.parametrize("most", [1, 2, 3])
def test_there_are_no_more_components_than_asked_for(most: int) -> None:
    mixture = fit_mixture(clusters([30, 30, 30, 30], d=4), SummaryOptions(max_components=most), seed=0)
    assert len(mixture.weights) == most


@pytest.mark.parametrize("alone", [1, 2, 4])
def test_a_single_sample_is_never_a_component(alone: int) -> None:
    """By BIC, an image far from all others would get its own component, whose mean would be the image's descriptor."""
    points = clusters([50, alone])
    mixture = fit_mixture(points, SummaryOptions(max_components=4), seed=0)
    assert (mixture.weights * mixture.n).min() >= 5 - 1e-6
    assert np.linalg.norm(mixture.means - points[-1], axis=1).min() > 5


def test_the_fit_is_a_function_of_points_and_seed() -> None:
    first, second = (fit_mixture(clusters([30, 30]), SummaryOptions(), seed=3) for _ in range(2))
    np.testing.assert_array_equal(first.means, second.means)
    np.testing.assert_array_equal(first.covariances, second.covariances)


@pytest.mark.parametrize(
    ("points", "different"), [(np.zeros((20, 3)), 1), (np.ones((20, 3)), 1), (np.eye(4), 4), (np.eye(4)[:3], 3)]
)
def test_too_few_different_samples_are_refused(points: np.ndarray, different: int) -> None:
    with pytest.raises(DataError, match=rf"{different} distinct samples are fewer than summary\.min-support = 5"):
        fit_mixture(points, SummaryOptions(), seed=0)


@given(
    seed=st.integers(0, 10**6), n=st.integers(1, 30), copies=st.integers(0, 30), scale=st.sampled_from([1e-3, 1.0, 1e4])
)
def test_copies_count_once_up_to_rounding(seed: int, n: int, copies: int, scale: float) -> None:
    generator = np.random.default_rng(seed)
    points = scale * generator.standard_normal((n, 8))
    again = points[generator.integers(n, size=copies)]
    rounded = again * (1 + 1e-6 * generator.uniform(-1, 1, again.shape))
    np.testing.assert_array_equal(distinct(np.concatenate([points, rounded])), points)


@settings(max_examples=15)
@given(
    seed=st.integers(0, 10**6),
    n=st.integers(10, 40),
    far=st.floats(1, 1e4),
    copies=st.integers(1, 9),
    min_support=st.floats(2, 6),
)
def test_no_sample_makes_up_more_of_a_mean_than_the_limit_allows(
    seed: int, n: int, far: float, copies: int, min_support: float
) -> None:
    """A device's images are around 0, and many copies of one far away: no mean is closer to that than allowed."""
    outlier = np.array([far * 100, 0.0, 0.0])
    points = np.concatenate([np.random.default_rng(seed).uniform(-1, 1, (n, 3)), np.tile(outlier, (copies, 1))])
    mixture = fit_mixture(points, SummaryOptions(min_support=min_support, max_components=4), seed=0)
    assert mixture.means[:, 0].max() <= (outlier[0] + min_support - 1) / min_support * (1 + 1e-9)


def broken(**parts: object) -> GaussianSummary:
    sound = GaussianSummary(np.array([0.5, 0.5]), np.zeros((2, 3)), np.ones((2, 3)), 100)
    return replace(sound, **parts)


def indefinite() -> np.ndarray:
    return np.stack([np.eye(3), np.diag([1.0, 1.0, -1.0])])


def lopsided() -> np.ndarray:
    covariances = np.stack([np.eye(3), np.eye(3)])
    covariances[0, 0, 1] = 0.5
    return covariances


def test_a_valid_mixture_is_accepted() -> None:
    broken().check(3, 5)
    broken(covariances=np.stack([np.eye(3), 2 * np.eye(3)])).check(3, 5)


@pytest.mark.parametrize(
    ("mixture", "message"),
    [
        (broken(means=np.full((2, 3), np.nan)), "not finite"),
        (broken(weights=np.array([np.nan, 0.5])), "not finite"),
        (broken(covariances=np.full((2, 3), np.inf)), "not finite"),
        (broken(weights=np.array([0.5, 0.4])), "sum to 0.9"),
        (broken(weights=np.array([1.5, -0.5])), "must be positive and sum to 1"),
        (broken(weights=np.array([1.0, 0.0])), "must be positive and sum to 1"),
        (broken(covariances=np.array([[1.0, 1, 1], [1, 0, 1]])), "positive definite"),
        (broken(covariances=indefinite()), "positive definite"),
        (broken(covariances=lopsided()), "positive definite"),
        (broken(means=np.zeros((2, 4))), "do not match in dimension 3"),
        (broken(means=np.zeros((2, 4)), covariances=np.ones((2, 4))), "do not match in dimension 3"),
        (broken(covariances=np.ones((2, 3, 2))), "do not match"),
        (broken(weights=np.array([1.0])), "do not match"),
        (broken(weights=np.array([[0.5, 0.5]])), "do not match"),
        (GaussianSummary(np.zeros(0), np.zeros((0, 3)), np.zeros((0, 3)), 100), "do not match"),
        (broken(n=9), "stands for 4.50 samples, at least 5 needed"),
        (broken(weights=np.array([0.96, 0.04])), "stands for 4.00 samples, at least 5 needed"),
        (GaussianSummary(np.ones(1), np.zeros((1, 3)), np.ones((1, 3)), 1), "stands for 1.00 samples"),
    ],
)
def test_invalid_mixtures_are_refused(mixture: GaussianSummary, message: str) -> None:
    with pytest.raises(DataError, match=message):
        mixture.check(3, 5)


def test_the_projection_has_orthonormal_rows_and_centres() -> None:
    features = np.random.default_rng(0).standard_normal((50, 8)) * np.arange(1, 9) + 5
    project = Projection.fit(features, 3)
    np.testing.assert_allclose(project.components @ project.components.T, np.eye(3), atol=1e-6)
    descriptors = project(features)
    assert descriptors.dtype == np.float64
    np.testing.assert_allclose(descriptors.mean(0), 0, atol=1e-5)
    assert (np.diff(descriptors.var(0)) < 0).all()
    assert Projection.fit(features[:5], 32).components.shape == (5, 8)
