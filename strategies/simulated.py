"""Simulated time: what a message would take a device of a given profile, beside the real time of the simulation.

A device downloads, computes and uploads, one after the other; a phase ends with its slowest device. A training step is
counted as three forward passes (the forward pass, and the two products of the backward pass).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from strategies.records import CurvePoint
from tapfl.profiles import DeviceProfile

STEP = 3  # forward passes' worth of a training step


def seconds(profile: DeviceProfile, bytes_down: int, macs: float, bytes_up: int) -> float:
    """Returns how long a device takes for a message of `bytes_down`, work of `macs`, and an answer of `bytes_up`."""
    return bytes_down / profile.download + macs / profile.compute + bytes_up / profile.upload


def training_macs(macs: int, train_samples: int, test_samples: int, epochs: int, passes: int) -> float:
    """Returns the MACs of a round on one device.

    Args:
        macs: of one image through the device's model.
        train_samples, test_samples: images of its two parts; the test part goes through the shared model and its own.
        epochs: local epochs.
        passes: models that a step trains.
    """
    return macs * (STEP * passes * epochs * train_samples + 2 * test_samples)


class Spent(NamedTuple):
    """What a run has cost so far: simulated seconds since the start, and bytes of all devices, each way."""

    seconds: float
    bytes_up: int
    bytes_down: int


def first_at(curve: Sequence[CurvePoint], accuracy: float) -> CurvePoint | None:
    """Returns the first point of a learning curve that reaches an accuracy, or None."""
    return next((point for point in curve if point.accuracy >= accuracy - 1e-9), None)


def time_to_accuracy(curve: Sequence[CurvePoint]) -> dict[str, float]:
    """Returns the simulated seconds at which each accuracy (0.05, 0.10, … as far as it got) was first reached."""
    return {accuracy: point.seconds for accuracy, point in _milestones(curve).items()}


def bytes_to_accuracy(curve: Sequence[CurvePoint]) -> dict[str, int]:
    """Returns the bytes, up and down, that had been sent when each accuracy (0.05, 0.10, …) was first reached."""
    return {accuracy: point.bytes for accuracy, point in _milestones(curve).items()}


def _milestones(curve: Sequence[CurvePoint]) -> dict[str, CurvePoint]:
    found = {f"{percent / 100:.2f}": first_at(curve, percent / 100) for percent in range(5, 101, 5)}
    return {accuracy: point for accuracy, point in found.items() if point is not None}
