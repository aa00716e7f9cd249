"""Client-level differential privacy of the uploaded adapters: what the noise is worth.

Two runs are neighbours if in the rounds of one device its updates are there, or zero in their place. The Gaussian
mechanism (Dwork and Roth 2014, Appendix A) adds N(0, (z · clip)²) to the sum of the clipped updates.
"""

from __future__ import annotations

import math
from functools import lru_cache
from importlib.util import find_spec

from tapfl.errors import ConfigError

LEAST_NOISE = 1e-3  # of z/√rounds: ε is above 500,000 there, and e^ε soon no number


def require_accountant() -> None:
    """Raises ConfigError unless the package is there that says what the noise is worth."""
    if find_spec("dp_accounting") is None:
        raise ConfigError("privacy.dp-noise: needs dp-accounting; pip install 'tapfl[dp]'; or leave it at 0")


@lru_cache(maxsize=4096)
def epsilon(noise_multiplier: float, rounds: int, delta: float) -> float:
    """Returns ε of (ε, δ)-differential privacy for a device whose updates went into `rounds` rounds.

    By the accountant of privacy loss distributions: never below the true value, and above it by at most 0.1 %, or 1e-5.
    Adaptive rounds compose as Gaussian mechanisms do, k of noise z to one of z/√k (Dong, Roth and Su 2019, arXiv
    1905.02383, Corollary 3.3). No amplification by sampling.

    Args:
        noise_multiplier: z, standard deviation of the noise on the sum over the clip.
        rounds: k, in which the device took part, adaptive as they are.
        delta: δ in (0, 1).

    Returns:
        0 for a device that never took part, ∞ without noise or with next to none: no guarantee.

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

    # losses have mean 1/2z²: a grid as fine as this has at most a million points, where a fixed one runs out of memory
    accountant = PLDAccountant(value_discretization_interval=max(1e-4, 1e-5 / z**2))
    return float(accountant.compose(GaussianDpEvent(z)).get_epsilon(delta))
