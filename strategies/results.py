"""Wall time by phase and round, and the summary of a run."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from strategies.records import CurvePoint, DeviceRecord, Summary
from strategies.simulated import bytes_to_accuracy, time_to_accuracy
from tapfl.store import write_json


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
) -> Summary:
    """Returns the summary of a run.

    Args:
        curve: of the mean personal accuracy, after round zero and after each round.
        epsilon: of differential privacy after so many rounds; None: no guarantee.
    """
    done = [record for record in records.values() if record.params]

    def mean(name: str) -> float:
        return _mean([getattr(record, name) for record in done])

    return Summary(
        dense_accuracy=_mean([record.dense_accuracy for record in done if not record.generic]),
        pruned_accuracy=mean("pruned_accuracy"),
        global_accuracy=mean("global_accuracy"),
        personal_accuracy=mean("personal_accuracy"),
        personal_accuracy_worst_decile=worst_decile([record.personal_accuracy for record in done]),
        bytes_up=sum(sum(record.bytes_up.values()) for record in done),
        bytes_down=sum(sum(record.bytes_down.values()) for record in done),
        adapter_bytes_up_per_round=float(np.mean([r.bytes_up.get("adapters", 0) / rounds for r in done])),
        full_model_bytes=4 * dense_params * rounds,
        failures=sum(record.failures for record in records.values()),
        epsilon=max((e for r in done if (e := epsilon(r.rounds)) is not None), default=None),
        simulated_seconds=curve[-1].seconds,
        time_to_accuracy=time_to_accuracy(curve),
        bytes_to_accuracy=bytes_to_accuracy(curve),
        curve=list(curve),
        seconds={name: round(value, 3) for name, value in seconds.items()},
        devices=[record.model_copy(update={"epsilon": epsilon(record.rounds)}) for record in records.values()],
    )
