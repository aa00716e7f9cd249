"""What a run is told by: bytes by kind, seconds by phase, a record a device, and the summary of all."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from strategies.simulated import CurvePoint, bytes_to_accuracy, time_to_accuracy
from tapfl.profiles import DeviceProfile
from tapfl.store import write_json
from tapfl.wire import WireMessage


@dataclass
class DeviceRecord:
    """What is known of one device at the end; shares and accuracies in [0, 1]."""

    device: int
    profile: DeviceProfile
    train_samples: int
    test_samples: int = 0
    classes: int = 0
    held_classes: list[bool] | None = None
    generic: bool = False  # its plan is that of the whole pool, since it gave no mixture
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
    rounds: int = 0  # whose answer came through
    last_round: int = 0  # of these the last: the device goes on from its own state after it

    def sent(self, message: WireMessage) -> None:
        self.bytes_down += message.bytes_by_kind

    def received(self, message: WireMessage) -> None:
        self.bytes_up += message.bytes_by_kind

    def table(self) -> dict[str, Any]:
        """Returns the record as JSON holds it; `of_table` is the inverse."""
        return vars(self) | {"profile": self.profile.model_dump()}

    @classmethod
    def of_table(cls, table: Mapping[str, Any]) -> DeviceRecord:
        counters = {side: Counter(table[side]) for side in ("bytes_up", "bytes_down")}
        return cls(**{**table, **counters, "profile": DeviceProfile.of(table["profile"])})


class Clock:
    """Wall seconds by phase and by round, kept in ``timing.json``; a run that goes on adds to those that it had."""

    def __init__(self, file: Path) -> None:
        self.file = file
        try:
            before = json.loads(file.read_text())
            self.seconds: dict[str, float] = {name: float(value) for name, value in before["seconds"].items()}
            self.rounds: dict[str, float] = {name: float(value) for name, value in before["rounds"].items()}
        except (OSError, ValueError, LookupError, AttributeError, TypeError, RecursionError):
            self.seconds, self.rounds = {}, {}  # a new run, or one whose times are lost: no reason not to go on

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        start, before = time.monotonic(), self.seconds.get(name, 0.0)
        try:
            yield
        finally:
            self.seconds[name] = before + time.monotonic() - start

    @contextmanager
    def round(self, number: int) -> Iterator[None]:
        """Times a round, and keeps the times when it has ended."""
        start = time.monotonic()
        yield
        took = time.monotonic() - start
        self.rounds[str(number)] = took
        self.seconds["rounds"] = self.seconds.get("rounds", 0.0) + took
        write_json(self.file, {"seconds": self.seconds, "rounds": self.rounds})


def _mean(values: list[float]) -> float:
    return float(np.mean(values)) if values else 0.0


def worst_decile(values: list[float]) -> float:
    """Returns the mean over the worst tenth of the devices (at least one)."""
    return float(np.mean(sorted(values)[: -(-len(values) // 10)]))


def summarise(
    records: Mapping[int, DeviceRecord],
    seconds: Mapping[str, float],
    dense_params: int,
    rounds: int,
    curve: Sequence[CurvePoint],
    epsilon: Callable[[int], float | None],
) -> dict[str, Any]:
    """Returns the content of `summary.json`.

    ``full_model_bytes`` is what one device would send in all if it sent the dense model, fp32, in every round.

    Args:
        curve: of the mean personal accuracy, after round zero and after each round.
        epsilon: of differential privacy after so many rounds; None: there is no guarantee.
    """
    done = [record for record in records.values() if record.params]
    up, down = (
        {record.device: sum(getattr(record, side).values()) for record in done} for side in ("bytes_up", "bytes_down")
    )
    accuracies = {
        name: _mean([getattr(record, name) for record in done])
        for name in ("pruned_accuracy", "global_accuracy", "personal_accuracy")
    }
    return {
        "dense_accuracy": _mean([record.dense_accuracy for record in done if not record.generic]),
        **accuracies,
        "personal_accuracy_worst_decile": worst_decile([record.personal_accuracy for record in done]),
        "bytes_up": sum(up.values()),
        "bytes_down": sum(down.values()),
        "adapter_bytes_up_per_round": float(np.mean([r.bytes_up.get("adapters", 0) / rounds for r in done])),
        "full_model_bytes": 4 * dense_params * rounds,
        "failures": sum(record.failures for record in records.values()),
        "epsilon": max((e for r in done if (e := epsilon(r.rounds)) is not None), default=None),
        "simulated_seconds": curve[-1].seconds,
        "time_to_accuracy": time_to_accuracy(curve),
        "bytes_to_accuracy": bytes_to_accuracy(curve),
        "curve": [point._asdict() for point in curve],
        "seconds": {name: round(value, 3) for name, value in seconds.items()},
        "devices": [record.table() | {"epsilon": epsilon(record.rounds)} for record in records.values()],
    }
