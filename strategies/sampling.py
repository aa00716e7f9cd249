"""Who takes part in a round: drawn by partition id, from generators of (seed, round), never from what happened."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from tapfl.config import DeviceOptions
from tapfl.profiles import DeviceProfile
from tapfl.seeds import numpy_generator


@dataclass(frozen=True)
class Turnout:
    """The devices of a round, by partition id, in order.

    Attributes:
        asked: those that the server sends its message to.
        away: not available when the round began.
        dropped: asked, and lost before they could answer.
    """

    asked: tuple[int, ...]
    away: tuple[int, ...]
    dropped: tuple[int, ...]


def turnout(profiles: Mapping[int, DeviceProfile], options: DeviceOptions, seed: int, round: int) -> Turnout:
    """Returns who takes part: of those that are there a share of `participation` (at least one), less the dropouts.

    Each device has a chance of its own, so that a device more or less changes nothing for the others.
    """

    def chance(what: str, i: int) -> float:
        return float(numpy_generator(seed, what, round, i).random())

    present = [i for i in sorted(profiles) if chance("availability", i) < profiles[i].availability]
    away = tuple(i for i in sorted(profiles) if i not in present)
    wanted = max(1, round_half_up(options.participation * len(present)))
    sampled = sorted(sorted(present, key=lambda i: chance("participation", i))[:wanted])
    dropped = tuple(i for i in sampled if chance("dropout", i) < options.dropout)
    return Turnout(tuple(i for i in sampled if i not in dropped), away, dropped)


def round_half_up(value: float) -> int:
    """Returns the nearest whole number; a half goes up, unlike Python's `round`."""
    return int(value + 0.5)
