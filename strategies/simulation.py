"""What is simulated of the devices: who takes part in a round, and the time that work takes on a given profile.

Simulated time stands beside the real time of the simulation. A device downloads, computes and uploads, one after the
other; a phase ends with its slowest device. A training step counts as three forward passes (the forward pass, and the
two products of the backward pass).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from strategies.records import CurvePoint
from tapfl.config import DeviceOptions
from tapfl.profiles import DeviceProfile
from tapfl.seeds import numpy_generator

STEP = 3  # a training step in forward passes


@dataclass(frozen=True)
class ClientSample:
    """The devices of a round by partition id, in order.

    Attributes:
        asked: those that are sent the adapters and will answer.
        away: not available when the round began.
        dropped: sent the adapters, and lost before they could answer.
    """

    asked: tuple[int, ...]
    away: tuple[int, ...]
    dropped: tuple[int, ...]


def sample_clients(
    profiles: Mapping[int, DeviceProfile], options: DeviceOptions, seed: int, round: int
) -> ClientSample:
    """Returns a sample of the available devices: a share of `participation` (at least one), less the dropouts.

    Each device draws from its own generator, so the draws of the others do not depend on which devices exist.
    """

    def chance(what: str, i: int) -> float:
        return float(numpy_generator(seed, what, round, i).random())

    available = [i for i in sorted(profiles) if chance("availability", i) < profiles[i].availability]
    away = tuple(i for i in sorted(profiles) if i not in available)
    wanted = max(1, int(options.participation * len(available) + 0.5))  # a half goes up, unlike Python's `round`
    sampled = sorted(sorted(available, key=lambda i: chance("participation", i))[:wanted])
    dropped = tuple(i for i in sampled if chance("dropout", i) < options.dropout)
    return ClientSample(tuple(i for i in sampled if i not in dropped), away, dropped)


def seconds(profile: DeviceProfile, bytes_down: int, macs: float, bytes_up: int) -> float:
    """Returns how long a device takes for a message of `bytes_down`, work of `macs`, and an answer of `bytes_up`."""
    return bytes_down / profile.download + macs / profile.compute + bytes_up / profile.upload


def training_macs(macs: int, train_samples: int, test_samples: int, epochs: int, models: int) -> float:
    """Returns the MACs of a round on one device.

    Args:
        macs: of one image through the device's model.
        train_samples, test_samples: images; the test part goes through the shared and the personal model.
        epochs: local epochs.
        models: that a step trains.
    """
    return macs * (STEP * models * epochs * train_samples + 2 * test_samples)


def first_at(curve: Sequence[CurvePoint], accuracy: float) -> CurvePoint | None:
    """Returns the first point of a learning curve that reaches an accuracy, or None."""
    return next((point for point in curve if point.accuracy >= accuracy - 1e-9), None)


def milestones(curve: Sequence[CurvePoint]) -> dict[str, CurvePoint]:
    """Returns the first point that reaches each of the accuracies 0.05, 0.10, …, as far as the curve comes."""
    found = {f"{percent / 100:.2f}": first_at(curve, percent / 100) for percent in range(5, 101, 5)}
    return {accuracy: point for accuracy, point in found.items() if point is not None}
