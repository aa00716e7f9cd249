"""What a run is told by: bytes by kind, seconds by phase, a record a device, and the summary of all."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tapfl.wire import WireMessage


@dataclass
class DeviceRecord:
    """What is known of one device at the end; shares and accuracies in [0, 1]."""

    device: int
    budget: float
    rank: int
    train_samples: int
    test_samples: int = 0
    classes: int = 0
    macs: int = 0
    macs_share: float = 0.0
    params: int = 0
    params_share: float = 0.0
    dense_accuracy: float = 0.0
    pruned_accuracy: float = 0.0
    global_accuracy: float = 0.0
    personal_accuracy: float = 0.0
    alpha: float = 0.0
    bytes_up: Counter[str] = field(default_factory=Counter)
    bytes_down: Counter[str] = field(default_factory=Counter)
    failures: int = 0

    def sent(self, message: WireMessage) -> None:
        self.bytes_down += message.bytes_by_kind

    def received(self, message: WireMessage) -> None:
        self.bytes_up += message.bytes_by_kind


class Clock:
    """Seconds by phase."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        start = time.monotonic()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.monotonic() - start


def worst_decile(values: list[float]) -> float:
    """Returns the mean over the worst tenth of the devices (at least one)."""
    return float(np.mean(sorted(values)[: -(-len(values) // 10)]))


def summarise(
    records: Mapping[int, DeviceRecord], seconds: Mapping[str, float], dense_params: int, rounds: int
) -> dict[str, Any]:
    """Returns the content of `summary.json`.

    ``full_model_bytes`` is what one device would send in all if it sent the dense model, fp32, in every round.
    """
    done = [record for record in records.values() if record.params]
    up, down = (
        {record.device: sum(getattr(record, side).values()) for record in done} for side in ("bytes_up", "bytes_down")
    )
    accuracies = {
        name: float(np.mean([getattr(record, name) for record in done]))
        for name in ("dense_accuracy", "pruned_accuracy", "global_accuracy", "personal_accuracy")
    }
    return {
        **accuracies,
        "personal_accuracy_worst_decile": worst_decile([record.personal_accuracy for record in done]),
        "bytes_up": sum(up.values()),
        "bytes_down": sum(down.values()),
        "adapter_bytes_up_per_round": float(np.mean([r.bytes_up.get("adapters", 0) / rounds for r in done])),
        "full_model_bytes": 4 * dense_params * rounds,
        "failures": sum(record.failures for record in records.values()),
        "seconds": {name: round(value, 3) for name, value in seconds.items()},
        "devices": [vars(record) for record in records.values()],
    }
