"""Differential privacy: ε agrees with an exact formula."""

from __future__ import annotations

import math
from importlib.machinery import ModuleSpec

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq
from scipy.stats import norm as gaussian

from tapfl import privacy
from tapfl.errors import ConfigError
from tapfl.privacy import epsilon


def exact_epsilon(z: float, rounds: int, delta: float) -> float:
    """Returns ε of k composed Gaussian mechanisms: Balle and Wang 2018, arXiv 1805.06530, Theorem 8, with μ = √k/z."""
    mu = math.sqrt(rounds) / z

    def excess(value: float) -> float:
        second = math.exp(value + gaussian.logcdf(-mu / 2 - value / mu))
        return float(gaussian.cdf(mu / 2 - value / mu) - second - delta)

    return float(brentq(excess, 0, mu**2 / 2 + 20 * mu, xtol=1e-12)) if excess(0) > 0 else 0.0


@pytest.mark.parametrize(
    ("z", "rounds", "delta", "value"),
    [
        (1.0, 1, 1e-5, 4.3771780957),
        (1.0, 10, 1e-5, 17.8565868301),
        (10.0, 1000, 1e-5, 17.8565868301),
        (2.0, 100, 1e-5, 33.1037323359),
        (5.0, 10, 1e-6, 2.9216005904),
        (0.1, 10, 1e-5, 633.9298513),
        (0.03, 10, 1e-5, 6004.134246),
        (100.0, 1, 1e-5, 0.0272194198),
    ],
)
def test_epsilon_is_the_exact_one_and_never_below(z: float, rounds: int, delta: float, value: float) -> None:
    exact = exact_epsilon(z, rounds, delta)
    assert exact == pytest.approx(value, rel=1e-4)
    assert exact * (1 - 1e-12) <= epsilon(z, rounds, delta) <= exact * 1.001


@settings(max_examples=5)
@given(z=st.floats(0.05, 50), rounds=st.integers(1, 300), delta=st.sampled_from([1e-3, 1e-5, 1e-8]))
def test_epsilon_is_an_upper_bound_that_falls_with_noise_and_rises_with_rounds(
    z: float, rounds: int, delta: float
) -> None:
    found, exact = epsilon(z, rounds, delta), exact_epsilon(z, rounds, delta)
    assert exact - 1e-12 <= found <= max(exact * 1.001, exact + 1e-5)
    assert epsilon(z * 1.1, rounds, delta) < found or found == 0
    assert epsilon(z, rounds + 1, delta) > found * 0.999
    assert epsilon(z, rounds, delta / 10) >= found * 0.999


def test_without_noise_there_is_no_guarantee_and_without_rounds_no_loss() -> None:
    assert epsilon(0.0, 1, 1e-5) == epsilon(1e-3, 1000, 1e-5) == math.inf
    assert epsilon(0.0, 0, 1e-5) == 0.0
    assert epsilon(0.002, 4, 1e-5) < math.inf  # the smallest noise that counts


def test_without_the_accountant_noise_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def lacks(name: str) -> ModuleSpec | None:
        return None

    monkeypatch.setattr(privacy, "find_spec", lacks)
    with pytest.raises(ConfigError, match=r"privacy\.dp-noise: needs dp-accounting, of the extra tapfl\[dp\]"):
        epsilon(1.25, 3, 1e-5)
