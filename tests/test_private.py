"""Clipping and noise on a device's moments: calibrated, always a valid mixture, and no effect at 0."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clients.client_app import device_of
from tapfl.config import MetricOptions, RunConfig, SummaryOptions
from tapfl.errors import ConfigError
from tapfl.seeds import numpy_generator
from tapfl.summary.metric_set import pick_metric_set
from tapfl.summary.mixture import GaussianSummary, add_noise, clip_points, device_mixture, fit_mixture

D, CLIP = 6, 6.0


def device_points(classes: tuple[int, ...], each: int = 20, seed: int = 0) -> np.ndarray:
    """Returns descriptors of some of ten classes, most of which are within the clip."""
    centres = np.random.default_rng(99).standard_normal((10, D)) * 2
    generator = np.random.default_rng(seed)
    return np.concatenate([centres[c] + 0.4 * generator.standard_normal((each, D)) for c in classes])


def options(**changes: object) -> SummaryOptions:
    return SummaryOptions(**{"max_components": 4, **changes})  # type: ignore[arg-type]


def same(a: GaussianSummary, b: GaussianSummary) -> bool:
    parts = ((a.weights, b.weights), (a.means, b.means), (a.covariances, b.covariances))
    return a.n == b.n and all(np.array_equal(x, y) for x, y in parts)


def test_without_noise_no_bit_changes() -> None:
    points = device_points((1, 5))
    drawn = int(numpy_generator(3, "mixture", 2).integers(2**31))
    assert same(device_mixture(points, options(), 3, 2), fit_mixture(points, options(), drawn))
    longest = float(np.linalg.norm(points, axis=1).max()) + 1
    assert same(device_mixture(points, options(clip=longest), 3, 2), fit_mixture(points, options(), drawn))


def test_every_device_draws_its_own_noise_and_a_secret_hides_it() -> None:
    noisy = options(clip=CLIP, noise=0.1)
    found = [device_mixture(device_points((1, 5)), noisy, 3, i) for i in (0, 0, 1)]
    assert same(found[0], found[1]) and not same(found[0], found[2])
    hidden = [device_mixture(device_points((1, 5)), noisy, 3, 0, secret) for secret in ("a", "a", "b")]
    assert same(hidden[0], hidden[1]) and not same(hidden[0], hidden[2]) and not same(hidden[0], found[0])


def test_a_node_may_have_a_secret() -> None:
    """It is in the node's own configuration, which Flower never sends, and not in the device's output."""
    node = {"partition-id": 1, "num-partitions": 3, "secret": "open sesame"}
    context = SimpleNamespace(run_config=RunConfig().flat(), run_id=1, node_config=node)
    device = device_of(context)  # type: ignore[arg-type]
    assert device.secret == "open sesame" and "sesame" not in repr(device)


@given(seed=st.integers(0, 10**6), n=st.integers(1, 20), norm=st.floats(1e-3, 1e3))
def test_clipped_points_keep_their_direction(seed: int, n: int, norm: float) -> None:
    points = np.random.default_rng(seed).standard_normal((n, D)) * 10
    points[0] = 0
    clipped = clip_points(points, norm)
    before, after = np.linalg.norm(points, axis=1), np.linalg.norm(clipped, axis=1)
    np.testing.assert_allclose(after, np.minimum(before, norm), rtol=1e-12)
    np.testing.assert_allclose(clipped * before[:, None], points * after[:, None], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("covariance", ["diag", "full"])
def test_the_noise_has_the_stated_size(covariance: str) -> None:
    """With so many samples that no repair is needed, the result is the moments plus noise of √3 z (1, R, R²)."""
    n, z = 10**9, 0.5
    whole = np.broadcast_to(np.eye(2), (1, 2, 2)) if covariance == "full" else np.ones((1, 2))
    summary = GaussianSummary(np.ones(1), np.array([[1.0, -2.0]]), whole, n)
    drawn = [add_noise(summary, CLIP, z, np.random.default_rng(i)) for i in range(1500)]
    sums = n * (np.array([mixture.means[0] for mixture in drawn]) - summary.means[0])
    # the noise of the count moves the mean by -μ/n for each sample, independently of the noise of the sums
    expected = np.sqrt(3) * z * np.sqrt(CLIP**2 + summary.means[0] ** 2)
    np.testing.assert_allclose(sums.std(axis=0), expected, rtol=0.05)
    np.testing.assert_allclose(sums.mean(axis=0), 0, atol=5 * expected.max() / np.sqrt(1500))
    # Σ = Q/N - μμᵀ: of the squares R², of the sums 2μ R, of the count 2μ² - (Σ + μ²), each over n
    variance = n * np.array([np.atleast_2d(m.covariances[0])[0, 0] - 1 for m in drawn])
    mu = summary.means[0, 0]
    spread = np.sqrt(3) * z * np.sqrt(CLIP**4 + (2 * mu * CLIP) ** 2 + (mu**2 - 1) ** 2)
    assert variance.std() == pytest.approx(spread, rel=0.05)


def test_one_sample_moves_the_moments_at_most_by_the_sensitivity() -> None:
    """The sensitivity is √3 for (r, r x/R, r x xᵀ/R²) of one sample, whose shares r over the components sum to 1."""
    generator = np.random.default_rng(0)
    for _ in range(300):
        r = generator.dirichlet(np.full(4, 0.1))
        x = clip_points(generator.standard_normal((1, D)) * 10, CLIP)[0] / CLIP
        moved = np.concatenate([r, np.outer(r, x).ravel(), np.outer(r, np.outer(x, x)).ravel()])
        assert np.linalg.norm(moved) <= np.sqrt(3) + 1e-12


@settings(max_examples=20)
@given(
    seed=st.integers(0, 10**6),
    k=st.integers(1, 5),
    full=st.booleans(),
    n=st.integers(5, 200),
    noise=st.floats(1e-6, 1e3),
    clip=st.floats(1e-3, 1e3),
)
def test_the_noisy_mixture_is_always_valid_and_supported(
    seed: int, k: int, full: bool, n: int, noise: float, clip: float
) -> None:
    points = np.random.default_rng(seed).standard_normal((n, 3)) * np.random.default_rng(seed).choice([0.01, 1, 100])
    noisy = options(clip=clip, noise=noise, max_components=k, covariance="full" if full else "diag")
    mixture = device_mixture(points, noisy, seed, 0)
    mixture.check(3, noisy.min_support)
    assert np.linalg.norm(mixture.means, axis=1).max() <= clip * (1 + 1e-9)
    assert np.isfinite(mixture.log_likelihood(points)).all()
    if full:
        np.linalg.cholesky(mixture.covariances)


def test_the_metric_set_still_finds_the_classes() -> None:
    labels = np.repeat(np.arange(10), 40)
    pool_points = device_points(tuple(range(10)), 40, seed=7)
    pool = fit_mixture(pool_points, SummaryOptions(), 0)
    quota = MetricOptions(rule="component-quota", size=60, batch=4)

    def share(noise: float, seed: int) -> float:
        mixture = device_mixture(device_points((1, 5)), options(clip=CLIP, noise=noise), seed, 0)
        return float(np.isin(labels[pick_metric_set(mixture, pool, pool_points, quota)], (1, 5)).mean())

    shares = {noise: [share(noise, seed) for seed in range(4)] for noise in (0.0, 0.1, 100.0)}
    assert min(shares[0.0]) > 0.95 and min(shares[0.1]) > 0.85
    assert np.mean(shares[100.0]) < 0.4  # this much noise hides everything


def test_noise_without_a_clip_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"summary: noise=0\.5 needs clip above 0"):
        RunConfig.from_flat({"summary.noise": 0.5})
