"""No component of a mixture that leaves a device is the descriptor of a single image."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import numpy as np
import pytest
from sklearn.exceptions import ConvergenceWarning
from sklearn.mixture import GaussianMixture

from experiments.compare.scenario import Scenario
from tapfl.config import RunConfig, SummaryOptions
from tapfl.errors import DataError
from tapfl.models.forward import image_features
from tapfl.summary.mixture import REG_COVAR, GaussianSummary, device_mixture, distinct, fit_mixture

DEVICES, LEAST = 10, SummaryOptions().min_support


@pytest.fixture(scope="module")
def scenario(tmp_path_factory: pytest.TempPathFactory) -> Scenario:
    """The digits federation with defaults, except that the backbone is trained for fewer epochs."""
    cache = str(tmp_path_factory.mktemp("cache"))
    return Scenario.of(RunConfig.from_flat({"devices.count": DEVICES, "model.epochs": 1, "cache": cache}))


def own_images(scenario: Scenario, device: int) -> np.ndarray:
    return scenario.private.read(scenario.splits[device].train)


def describe(scenario: Scenario, images: np.ndarray) -> np.ndarray:
    return scenario.pool.projection(image_features(scenario.model, scenario.transform(images).split(16)))


def unprotected(points: np.ndarray) -> GaussianSummary:
    """scikit-learn's mixture with the lowest BIC over K = 2..10, as published, with our regularisation."""
    reg = REG_COVAR * float(points.var(axis=0).mean())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        fits = [
            GaussianMixture(k, covariance_type="diag", reg_covar=reg, n_init=3, random_state=0).fit(points)
            for k in range(2, min(SummaryOptions().max_components, len(points)) + 1)
        ]
    best = min(fits, key=lambda fit: fit.bic(points))
    return GaussianSummary(best.weights_ / best.weights_.sum(), best.means_, best.covariances_, len(points))


def nearest(mixture: GaussianSummary, points: np.ndarray) -> float:
    """Distance of a component's mean to the nearest descriptor, relative to the descriptors' nearest distances."""
    different = distinct(points)
    apart = np.linalg.norm(different[:, None] - different, axis=2)
    np.fill_diagonal(apart, np.inf)
    return float(np.linalg.norm(mixture.means[:, None] - different, axis=2).min() / np.median(apart.min(axis=1)))


def assert_hides_every_image(mixture: GaussianSummary, points: np.ndarray) -> None:
    different = distinct(points)
    log_densities = mixture.component_log_densities(different)
    r = np.exp(log_densities - mixture.log_likelihood(different)[:, None])
    assert (mixture.weights * mixture.n).min() >= LEAST - 1e-6
    assert r.sum(axis=0).min() >= LEAST * 0.99  # the last step of EM moves them by less
    assert np.bincount(r.argmax(axis=1), minlength=len(mixture.weights)).min() >= LEAST
    assert (r / r.sum(axis=0)).max() <= 1 / LEAST * 1.01
    assert nearest(mixture, points) > 0.1
    # as wide as the distances of its images: no variance has collapsed onto one of them
    assert mixture.covariances.sum(axis=1).min() > 0.05 * different.var(axis=0).sum() * LEAST / len(different)


@pytest.mark.parametrize("device", range(DEVICES))
def test_no_component_of_a_digits_device_is_an_image(scenario: Scenario, device: int) -> None:
    points = describe(scenario, own_images(scenario, device))
    assert_hides_every_image(device_mixture(points, SummaryOptions(), 0, device), points)


def with_outlier(scenario: Scenario) -> np.ndarray:
    """A device's descriptors, and the descriptor of an image far from all others."""
    points = describe(scenario, own_images(scenario, 0))
    return np.concatenate([points, 10 * describe(scenario, 255 - own_images(scenario, 0)[:1])])


def with_copies(scenario: Scenario) -> np.ndarray:
    """A device that has one of its images twenty times."""
    images = own_images(scenario, 0)
    return describe(scenario, np.concatenate([images, np.repeat(images[:1], 20, axis=0)]))


def with_six(scenario: Scenario) -> np.ndarray:
    """A device with six images, one of which has another class than the rest."""
    labels = scenario.private.labels[scenario.splits[0].train]
    chosen = np.concatenate([np.flatnonzero(labels == labels[0])[:5], np.flatnonzero(labels != labels[0])[:1]])
    return describe(scenario, own_images(scenario, 0)[chosen])


@pytest.mark.parametrize("adversary", [with_outlier, with_copies, with_six])
def test_scikit_learn_reveals_an_image_and_ours_does_not(
    scenario: Scenario, adversary: Callable[[Scenario], np.ndarray]
) -> None:
    points = adversary(scenario)
    assert nearest(unprotected(points), points) < 1e-3
    assert_hides_every_image(device_mixture(points, SummaryOptions(), 0, 0), points)


def test_a_device_with_copies_of_few_images_is_refused(scenario: Scenario) -> None:
    points = describe(scenario, np.repeat(own_images(scenario, 0)[:4], 16, axis=0))
    with pytest.raises(DataError, match="4 distinct samples"):
        device_mixture(points, SummaryOptions(), 0, 0)


def test_copies_change_nothing(scenario: Scenario) -> None:
    """An image counts once, in whatever batches its copies are; n is the number of distinct images."""
    points = describe(scenario, own_images(scenario, 0))
    found, expected = fit_mixture(with_copies(scenario)), fit_mixture(points)
    assert found.n == expected.n == len(points)
    np.testing.assert_allclose(found.means, expected.means, atol=1e-4)
