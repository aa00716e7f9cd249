"""What a federation records beside its state: accuracies after each round, wall time, and the summary at the end."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np

from strategies.records import CurvePoint, DeviceLine, Line, RoundLine, Summary
from strategies.simulation import milestones
from strategies.state import Cost, FederationState
from tapfl.config import RunConfig
from tapfl.privacy import epsilon
from tapfl.store import write_json
from tapfl.wire import EvaluateReply, TrainReply

Replies = Mapping[int, TrainReply] | Mapping[int, EvaluateReply]
MEASURES = ("global_accuracy", "personal_accuracy", "alpha")


def evaluated(state: FederationState, round: int, replies: Replies, cost: Cost) -> tuple[FederationState, list[Line]]:
    """Returns the state with the accuracies after `round`, and the lines that record them.

    Devices report how they did before they train again, so those after a round come with the answers of the next one.

    Args:
        cost: of the run when that round had ended.
    """
    values = {i: {name: getattr(reply, name) for name in MEASURES} for i, reply in replies.items()}
    state = state.with_devices(values)
    lines: list[Line] = [
        DeviceLine(round=round, device=i, **values[i], next_loss=getattr(reply, "loss", None))
        for i, reply in replies.items()
    ]
    means = {name: float(np.mean([each[name] for each in values.values()])) for name in MEASURES if values}
    line = RoundLine(
        round=round,
        devices=len(replies),
        simulated_seconds=cost.seconds,
        bytes_up=cost.bytes_up,
        bytes_down=cost.bytes_down,
    )
    lines.append(line.model_copy(update=means))
    # devices that were not asked count with their last value: the curve must not follow who happens to answer
    accuracy = float(np.mean([state.devices[i].personal_accuracy for i in state.plans]))
    point = CurvePoint(seconds=cost.seconds, bytes=cost.bytes_up + cost.bytes_down, accuracy=accuracy)
    return replace(state, curve=(*state.curve, point)), lines


def summarise(state: FederationState, config: RunConfig, seconds: Mapping[str, float], dense_params: int) -> Summary:
    """Returns the summary of a run whose last evaluation is in the state.

    Args:
        seconds: wall time by phase.
        dense_params: parameters of the dense backbone.
    """
    records, rounds = state.devices.values(), config.train.rounds
    equipped = [record for record in records if record.params]
    bounds = {record.device: _epsilon(config, record.rounds) for record in records}
    reached = milestones(state.curve)

    def mean(name: str) -> float:
        return _mean([getattr(record, name) for record in equipped])

    return Summary(
        dense_accuracy=_mean([record.dense_accuracy for record in equipped if not record.generic]),
        pruned_accuracy=mean("pruned_accuracy"),
        global_accuracy=mean("global_accuracy"),
        personal_accuracy=mean("personal_accuracy"),
        personal_accuracy_worst_decile=worst_decile([record.personal_accuracy for record in equipped]),
        bytes_up=sum(sum(record.bytes_up.values()) for record in equipped),
        bytes_down=sum(sum(record.bytes_down.values()) for record in equipped),
        adapter_bytes_up_per_round=float(np.mean([r.bytes_up.get("adapters", 0) / rounds for r in equipped])),
        full_model_bytes=4 * dense_params * rounds,
        failures=sum(record.failures for record in records),
        epsilon=max((e for r in equipped if (e := bounds[r.device]) is not None), default=None),
        simulated_seconds=state.curve[-1].seconds,
        time_to_accuracy={accuracy: point.seconds for accuracy, point in reached.items()},
        bytes_to_accuracy={accuracy: point.bytes for accuracy, point in reached.items()},
        curve=list(state.curve),
        seconds={name: round(value, 3) for name, value in seconds.items()},
        devices=[record.model_copy(update={"epsilon": bounds[record.device]}) for record in records],
    )


def worst_decile(values: Sequence[float]) -> float:
    """Returns the mean over the worst tenth of the devices (at least one)."""
    return float(np.mean(sorted(values)[: -(-len(values) // 10)]))


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


def _epsilon(config: RunConfig, rounds: int) -> float | None:
    """Returns ε of a device whose answer was used in so many rounds; None: no guarantee."""
    privacy = config.privacy
    value = epsilon(privacy.dp_noise, rounds, privacy.dp_delta) if privacy.dp_noise else math.inf
    return value if math.isfinite(value) else None


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if values else 0.0
