"""Simulated time: what a message would take a device of a given profile, beside the real time of the simulation.

A device downloads, computes and uploads, one after the other; a phase ends with its slowest device. A training step is
counted as three forward passes (the forward pass, and the two products of the backward pass).
"""

from __future__ import annotations

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


def time_to_accuracy(curve: list[tuple[float, float]]) -> dict[str, float]:
    """Returns the simulated seconds at which each accuracy (0.05, 0.10, … as far as it got) was first reached.

    Args:
        curve: (simulated seconds since the start, mean accuracy) after each round.
    """
    reached: dict[str, float] = {}
    for percent in range(5, 101, 5):
        first = next((when for when, accuracy in curve if accuracy * 100 >= percent - 1e-9), None)
        if first is not None:
            reached[f"{percent / 100:.2f}"] = first
    return reached
