"""Metric sets: every rule gives distinct positions, and the density ratio finds the device's images."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tapfl.config import MetricOptions, SummaryOptions
from tapfl.errors import ConfigError
from tapfl.seeds import numpy_generator
from tapfl.summary.metric_set import RULES, pick_metric_set
from tapfl.summary.mixture import GaussianSummary, fit_mixture

D, CLUSTERS = 4, 8


def pool_points(seed: int = 0, each: int = 40) -> tuple[np.ndarray, np.ndarray]:
    """Descriptors of a pool with eight slightly overlapping clusters, and the cluster of each."""
    generator = np.random.default_rng(seed)
    centres = 4 * generator.standard_normal((CLUSTERS, D))
    labels = np.repeat(np.arange(CLUSTERS), each)
    return centres[labels] + generator.standard_normal((len(labels), D)), labels


def pick(rule: str, size: int, device: GaussianSummary, pool: GaussianSummary, points: np.ndarray, seed: int = 0):
    options = MetricOptions(rule=rule, size=size, batch=4)
    return pick_metric_set(device, pool, points, options, numpy_generator(seed, "metric"))


@pytest.fixture(scope="module")
def scene() -> tuple[GaussianSummary, GaussianSummary, np.ndarray, np.ndarray]:
    """A device with clusters 1 and 5 (other samples than the pool's), and the pool's mixture, points and clusters."""
    points, labels = pool_points()
    own = np.random.default_rng(1)
    centres = 4 * np.random.default_rng(0).standard_normal((CLUSTERS, D))
    images = np.concatenate([centres[c] + own.standard_normal((n, D)) for c, n in ((1, 45), (5, 15))])
    return fit_mixture(images, SummaryOptions(), 0), fit_mixture(points, SummaryOptions(), 0), points, labels


@settings(max_examples=25)
@given(
    rule=st.sampled_from(sorted(RULES)),
    quarters=st.integers(1, 20),
    k=st.integers(1, 4),
    spread=st.sampled_from([1.0, 1e4]),
    seed=st.integers(0, 1000),
)
def test_every_rule_gives_the_requested_number_of_distinct_positions(
    rule: str, quarters: int, k: int, spread: float, seed: int
) -> None:
    generator = np.random.default_rng(seed)
    points = spread * generator.standard_normal((80, 3))
    weights = generator.dirichlet(np.full(k, 0.3)) * 0.99 + 0.01 / k
    device = GaussianSummary(weights / weights.sum(), generator.standard_normal((k, 3)), np.full((k, 3), 0.1), 50)
    pool = GaussianSummary(np.ones(1), np.zeros((1, 3)), np.ones((1, 3)), 80)
    chosen = pick(rule, 4 * quarters, device, pool, points, seed)
    assert chosen.dtype == np.int64
    assert len(chosen) == len(set(chosen.tolist())) == 4 * quarters
    assert chosen.min() >= 0
    assert chosen.max() < 80


@pytest.mark.parametrize("rule", sorted(RULES))
def test_a_rule_is_a_function_of_its_generator(rule: str, scene: tuple) -> None:
    device, pool, points, _ = scene
    np.testing.assert_array_equal(pick(rule, 64, device, pool, points), pick(rule, 64, device, pool, points))


def test_random_depends_only_on_the_seed(scene: tuple) -> None:
    device, pool, points, _ = scene
    first = pick("random", 64, device, pool, points, seed=0)
    assert (first != pick("random", 64, device, pool, points, seed=1)).any()
    np.testing.assert_array_equal(first, pick("random", 64, pool, device, points, seed=0))


def test_the_heaviest_component_chooses_first() -> None:
    """Components at 0 and 1 with weights 1 : 3, so quotas of 1 and 3 points; component 1 picks first."""
    device = GaussianSummary(np.array([0.25, 0.75]), np.array([[0.0], [1.0]]), np.ones((2, 1)), 40)
    points = np.array([[2.2], [1.0], [0.9], [-3.0]])
    assert pick("component-quota", 4, device, device, points).tolist() == [1, 2, 0, 3]


def test_top_likelihood_is_the_largest_best_first(scene: tuple) -> None:
    device, pool, points, _ = scene
    chosen = pick("top-likelihood", 40, device, pool, points)
    scores = device.log_likelihood(points)
    np.testing.assert_array_equal(scores[chosen], np.sort(scores)[::-1][:40])


def test_density_ratio_is_the_largest_ratio(scene: tuple) -> None:
    device, pool, points, _ = scene
    chosen = pick("density-ratio", 40, device, pool, points)
    ratio = device.log_likelihood(points) - pool.log_likelihood(points)
    assert ratio[chosen].min() >= np.delete(ratio, chosen).max()


def test_quota_gives_each_component_its_share() -> None:
    """Three distant components with weights .62/.25/.13: of 20 samples 12.4, 5 and 2.6, rounded to 12, 5 and 3."""
    centres = np.array([[0.0, 0], [100, 0], [0, 100]])
    device = GaussianSummary(np.array([0.62, 0.25, 0.13]), centres, np.ones((3, 2)), 100)
    labels = np.repeat(np.arange(3), 30)
    points = centres[labels] + np.random.default_rng(0).standard_normal((90, 2))
    chosen = pick("component-quota", 20, device, device, points)
    assert np.bincount(labels[chosen], minlength=3).tolist() == [12, 5, 3]
    for k, count in enumerate((12, 5, 3)):  # and the likeliest within a component
        members = np.flatnonzero(labels == k)
        best = members[np.argsort(((points[members] - centres[k]) ** 2).sum(1))[:count]]
        assert set(chosen[labels[chosen] == k]) == set(best)


def test_quota_covers_a_component_that_top_likelihood_passes_over() -> None:
    device = GaussianSummary(np.array([0.6, 0.4]), np.array([[0.0], [50.0]]), np.array([[0.01], [9.0]]), 100)
    points = np.concatenate([np.linspace(-0.1, 0.1, 40), np.linspace(45, 55, 40)])[:, None]
    assert (pick("top-likelihood", 20, device, device, points) < 40).all()
    assert (pick("component-quota", 20, device, device, points) >= 40).sum() == 8


@pytest.mark.parametrize("rule", ["density-ratio", "top-likelihood", "component-quota"])
def test_the_device_s_clusters_are_found_far_better_than_at_random(rule: str, scene: tuple) -> None:
    device, pool, points, labels = scene
    found = labels[pick(rule, 40, device, pool, points)]
    random = labels[pick("random", 40, device, pool, points)]
    own = np.isin(found, (1, 5)).mean()
    assert own > 0.8 > 0.5 > np.isin(random, (1, 5)).mean()
    assert {1, 5} <= set(found.tolist())


def test_a_set_larger_than_the_pool_is_refused(scene: tuple) -> None:
    device, pool, points, _ = scene
    with pytest.raises(ConfigError, match=r"recovery-size = 324: the public pool has 320 images"):
        pick("random", 324, device, pool, points)


def test_with_one_component_quotas_are_top_likelihood(scene: tuple) -> None:
    _, pool, points, *_ = scene
    device = fit_mixture(points[:40], SummaryOptions(max_components=1), 0)
    chosen = [
        pick_metric_set(device, pool, points, MetricOptions(rule=rule, size=32, batch=4))  # type: ignore[arg-type]
        for rule in ("component-quota", "top-likelihood")
    ]
    np.testing.assert_array_equal(*chosen)
