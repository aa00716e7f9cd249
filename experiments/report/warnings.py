"""Warnings about the result of a run: each says what was found and what to try."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd

from experiments.report import series
from experiments.report.reading import Run, named
from strategies.records import DeviceLine
from tapfl.personalize.methods import BEGIN_LATER

BOUND = 0.01  # an α closer than this to 0 or 1 counts as at the bound
LEARNT = 1e-3  # mean training loss below which a device has memorised its images
LOSS = 0.01  # drop in accuracy that is worth a warning
ALONE = ("local", "pooled")  # methods that share nothing


class Finding(NamedTuple):
    found: str
    advice: str


def warnings_of(run: Run) -> list[Finding]:
    """Returns the warnings of a run, at most one of each kind."""
    checks: Sequence[Callable[[Run], Finding | None]]
    checks = (disjoint, worse_than_start, falling, by_heart, not_begun, alpha_at_bound)
    return [finding for check in checks if run.equipped and (finding := check(run))]


def shares(run: Run) -> bool:
    return run.config.get("personalize.method") not in ALONE


def disjoint(run: Run) -> Finding | None:
    """Warns if no class is on two devices, the head is shared, and the loss does not use the devices' class counts."""
    held = [set(np.flatnonzero(device.held_classes)) for device in run.equipped if device.held_classes]
    held = held or [set(np.flatnonzero(images.train)) for images in run.images.values()]
    apart = len(held) > 1 and all(not (left & right) for left, right in itertools.combinations(held, 2))
    head = run.config.get("adapters.head")
    informed = run.config.get("train.label-prior") == "counts"
    if not apart or head == "personal" or informed or not shares(run):
        return None
    return Finding(
        f"No class is on two devices, and the head is shared (adapters.head = {head}). Each device then teaches "
        "the shared model that there are no classes but its own, and the updates of the devices conflict.",
        "adapters.head=personal or train.label-prior=counts",
    )


def worse_than_start(run: Run) -> Finding | None:
    """Warns if the shared model is worse at the end than the pruned models were before training."""
    mean = series.accuracies(run).mean()
    if not shares(run) or not run.rounds or not mean["global"] < mean["pruned"] - LOSS:
        return None
    return Finding(
        f"The shared model ends at an accuracy of {mean['global']:.3f}, below the pruned models before training "
        f"({mean['pruned']:.3f}).",
        "a lower train.learning-rate, fewer train.epochs, or adapters.head=personal",
    )


def falling(run: Run) -> Finding | None:
    """Warns if accuracy has fallen since its best round while the training loss went on falling."""
    curves = series.curves(run)
    accuracy = curves[curves["kind"] == "personal"].groupby("round")["accuracy"].mean()
    losses = training_losses(run)
    if len(accuracy) < 3 or len(losses) < 2:
        return None
    best, last = int(accuracy.idxmax()), int(accuracy.index[-1])
    since = losses[losses.index >= best]
    if accuracy[best] - accuracy[last] < LOSS or len(since) < 2 or since.iloc[-1] >= since.iloc[0]:
        return None
    return Finding(
        f"Mean personal accuracy has fallen from {accuracy[best]:.3f} after round {best} to {accuracy[last]:.3f} while "
        "the training loss went on falling: the devices overfit.",
        "fewer train.rounds (chosen with data.evaluate=validation), a lower train.learning-rate, train.augment",
    )


def by_heart(run: Run) -> Finding | None:
    """Warns of devices whose training loss is close to 0."""
    last = {line.device: line.next_loss for line in run.of(DeviceLine) if line.next_loss is not None}
    known = sorted(device for device, loss in last.items() if loss < LEARNT)
    if not known:
        return None
    return Finding(
        f"The training loss of {named(known)} is below {LEARNT:g}: further rounds only memorise these images.",
        "fewer train.epochs or train.rounds, train.label-smoothing, train.augment",
    )


def not_begun(run: Run) -> Finding | None:
    """Warns if personal parameters would begin only after the last round."""
    first, rounds = run.config.get("personalize.from-round"), run.config["train.rounds"]
    if run.config.get("personalize.method") not in BEGIN_LATER or not isinstance(first, int) or first <= rounds:
        return None
    return Finding(
        f"No device has a personal model: personalize.from-round is {first}, and the run has {rounds} rounds.",
        "a smaller personalize.from-round, more train.rounds, or personalize.method=fedavg, which holds out no images",
    )


def alpha_at_bound(run: Run) -> Finding | None:
    """Warns of devices on which APFL's α has reached 0 or 1."""
    if run.config.get("personalize.method") != "apfl" or not_begun(run):
        return None
    trained = [device for device in run.equipped if device.rounds]
    low = [device.device for device in trained if device.alpha < BOUND]
    high = [device.device for device in trained if device.alpha > 1 - BOUND]
    if not low and not high:
        return None
    parts = [
        f"α is {bound} on {named(devices)}: {meaning}"
        for bound, devices, meaning in (
            (0, low, "only the shared model is used there"),
            (1, high, "only the personal model is used there"),
        )
        if devices
    ]
    return Finding(
        "; ".join(parts) + ".",
        "compare with personalize.method=fedavg" if low and not high else "compare with personalize.method=local",
    )


def training_losses(run: Run) -> pd.Series:
    """Returns the mean training loss over devices, indexed by round."""
    lines = [line for line in run.of(DeviceLine) if line.next_loss is not None]
    frame = pd.DataFrame({"round": [line.round + 1 for line in lines], "loss": [line.next_loss for line in lines]})
    return frame.groupby("round")["loss"].mean()
