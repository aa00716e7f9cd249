"""Differential privacy: the clip bounds what one device can change, and ε is what an exact formula says."""

from __future__ import annotations

import math
from importlib.machinery import ModuleSpec

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq
from scipy.stats import norm as gaussian

from tapfl import privacy
from tapfl.errors import ConfigError
from tapfl.privacy import clip_to_norm, epsilon, l2_norm


def test_an_update_is_clipped_as_a_whole() -> None:
    """‖(3, 4), (12)‖ = 13: clipped to 6.5 every value is halved."""
    update = {"a": torch.tensor([3.0, 4.0]), "b": torch.tensor([[12.0]])}
    clipped = clip_to_norm(update, 6.5)
    torch.testing.assert_close(clipped, {"a": torch.tensor([1.5, 2.0]), "b": torch.tensor([[6.0]])})


def test_a_short_update_stays_bit_for_bit() -> None:
    update = {"a": torch.tensor([3.0, 4.0])}
    assert torch.equal(clip_to_norm(update, 5.0)["a"], update["a"])
    assert torch.equal(clip_to_norm({"a": torch.zeros(3)}, 1e-9)["a"], torch.zeros(3))


@given(
    values=st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=30),
    norm=st.floats(1e-6, 1e6),
    cut=st.integers(0, 30),
)
def test_no_update_is_longer_than_the_clip(values: list[float], norm: float, cut: int) -> None:
    update = {"a": torch.tensor(values[:cut]), "b": torch.tensor(values[cut:])}
    clipped = clip_to_norm(update, norm)
    assert l2_norm(clipped) <= norm
    whole, before = torch.cat(list(clipped.values())).double(), torch.tensor(values, dtype=torch.float64)
    expected = before * min(1.0, norm / float(before.norm())) if before.any() else before
    assert whole.numpy() == pytest.approx(expected.numpy(), rel=1e-5, abs=1e-12)


def test_no_update_at_all_has_no_length() -> None:
    assert clip_to_norm({}, 1.0) == {} and l2_norm({}) == 0


# -- what the noise is worth ------------------------------------------------------------------------------------------


def exact_epsilon(z: float, rounds: int, delta: float) -> float:
    """ε of k Gaussian mechanisms in a row by Balle and Wang 2018, arXiv 1805.06530, Theorem 8, with μ = √k/z."""
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


@settings(max_examples=8)
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
    assert epsilon(0.002, 4, 1e-5) < math.inf  # the least noise that is counted


def test_without_the_accountant_noise_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def lacks(name: str) -> ModuleSpec | None:
        return None

    monkeypatch.setattr(privacy, "find_spec", lacks)
    with pytest.raises(ConfigError, match=r"privacy\.dp-noise: needs dp-accounting; pip install 'tapfl\[dp\]'"):
        epsilon(1.25, 3, 1e-5)
