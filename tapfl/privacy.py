"""Client-level differential privacy of the uploaded adapters: the ε of the noise.

Two runs are neighbours if one device's updates are replaced by zero in all of its rounds. The Gaussian
mechanism (Dwork and Roth 2014, Appendix A) adds N(0, (z · clip)²) to the sum of the clipped updates.
"""

from __future__ import annotations

import math
from functools import lru_cache
from importlib.util import find_spec

from tapfl.errors import ConfigError

LEAST_NOISE = 1e-3  # smallest z/√rounds; below it, ε is above 500,000 and e^ε soon overflows


def require_accountant() -> None:
    """Raises ConfigError if the package that computes ε is not installed."""
    if find_spec("dp_accounting") is None:
        raise ConfigError("privacy.dp-noise: needs dp-accounting, of the extra tapfl[dp]; or leave it at 0")


@lru_cache(maxsize=4096)
def epsilon(noise_multiplier: float, rounds: int, delta: float) -> float:
    """Returns ε of (ε, δ)-differential privacy for a device whose updates were used in `rounds` rounds.

    It is computed by a privacy loss distribution accountant, and is never below the true value, and above it by at most
    0.1 % or 1e-5. Adaptive rounds compose like Gaussian mechanisms: k rounds with noise z are equivalent to one with
    noise z/√k (Dong, Roth and Su 2019, arXiv 1905.02383, Corollary 3.3). Amplification by sampling is not used.

    Args:
        noise_multiplier: z, the standard deviation of the noise on the sum, divided by the clipping norm.
        rounds: k, the number of rounds that the device took part in; later rounds may depend on earlier ones.
        delta: δ in (0, 1).

    Returns:
        ε; 0 for a device that never took part, and ∞ (no guarantee) with little or no noise.

    Raises:
        ConfigError: without the extra `dp`.
    """
    if not rounds:
        return 0.0
    z = noise_multiplier / math.sqrt(rounds)
    if z < LEAST_NOISE:
        return math.inf
    require_accountant()
    from dp_accounting import GaussianDpEvent
    from dp_accounting.pld import PLDAccountant

    # the privacy loss has mean 1/2z²; with this step the grid has at most a million points, with a fixed one too many
    accountant = PLDAccountant(value_discretization_interval=max(1e-4, 1e-5 / z**2))
    return float(accountant.compose(GaussianDpEvent(z)).get_epsilon(delta))
