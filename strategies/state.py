"""The state of a federation after a round, its checkpoint, and the accuracies and the summary made from it.

``server/round-NNNN.safetensors`` contains the global adapters and the server's optimiser as tensors, and everything
else that the server knows as JSON in the metadata, so that a state is written completely or not at all. The last two
checkpoints are kept.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from pydantic import TypeAdapter

from strategies.records import (
    VERSION,
    AbsenceLine,
    ByKind,
    CurvePoint,
    DeviceLine,
    DeviceRecord,
    Line,
    RoundLine,
    Summary,
    added,
    milestones,
)
from tapfl.adapters.rules import ServerState
from tapfl.config import RunConfig, binding
from tapfl.errors import ConfigError, PlanError
from tapfl.privacy import epsilon
from tapfl.run_folder import RunFolder
from tapfl.store import content_hash, part_of, read_sealed, write_json, write_sealed
from tapfl.summary.heterogeneity import feature_shift, quantity_shift
from tapfl.summary.mixture import GaussianSummary
from tapfl.wire import EvaluateReply, TrainReply

PARAMS, OPTIMIZER = "params:", "optimizer:"
Replies = Mapping[int, TrainReply] | Mapping[int, EvaluateReply]
R = TypeVar("R", TrainReply, EvaluateReply)
TIMES = TypeAdapter(dict[str, dict[str, float]])
MEASURES = ("global_accuracy", "personal_accuracy", "reference_accuracies", "alpha")


@dataclass(frozen=True)
class FederationState:
    """The server after `round` rounds; 0: after round zero."""

    round: int
    server: ServerState  # global adapters and the server's optimiser
    devices: Mapping[int, DeviceRecord]  # by partition id, sorted
    plans: Mapping[int, str]  # checksum of its plan for each device that has its model, in the same order
    curve: Sequence[CurvePoint] = ()  # mean personal accuracy after each earlier round
    simulated_seconds: float = 0.0  # since the start
    metrics_bytes: int = 0  # length of metrics.jsonl

    @property
    def bytes_up(self) -> int:
        return sum(sum(record.bytes_up.values()) for record in self.devices.values())

    @property
    def bytes_down(self) -> int:
        return sum(sum(record.bytes_down.values()) for record in self.devices.values())

    def with_devices(self, changes: Mapping[int, Mapping[str, Any]]) -> FederationState:
        """Returns the state with changed values in the records of some devices."""
        changed = {i: self.devices[i].model_copy(update=dict(values)) for i, values in changes.items()}
        return replace(self, devices={**self.devices, **changed})

    def with_sent(self, bytes_by_kind: Mapping[int, ByKind]) -> FederationState:
        """Returns the state after these bytes were sent to some devices."""
        return self.with_devices(
            {i: {"bytes_down": added(self.devices[i].bytes_down, sent)} for i, sent in bytes_by_kind.items()}
        )


def save_checkpoint(folder: RunFolder, config: RunConfig, state: FederationState) -> None:
    """Writes a checkpoint of the state, and deletes all others except that of the round before."""
    tensors = {PARAMS + name: tensor for name, tensor in state.server.params.items()}
    tensors |= {OPTIMIZER + name: tensor for name, tensor in state.server.optimizer.items()}
    about = {
        "version": VERSION,
        "round": state.round,
        "config": config_hash(config.flat()),
        "records": [record.model_dump() for record in state.devices.values()],
        "plans": [*state.plans.items()],
        "metrics_bytes": state.metrics_bytes,
        "curve": [point.model_dump() for point in state.curve],
        "simulated": state.simulated_seconds,
    }
    write_sealed(folder.server.path(state.round), tensors, "checkpoint", about)
    folder.server.keep((state.round - 1, state.round))


def load_checkpoint(folder: RunFolder, config: RunConfig) -> FederationState | None:
    """Returns the last state of a run, or None if it did not finish round zero.

    Raises:
        ConfigError: if it has another version, was written with other options, or has more rounds than `train.rounds`.
        PlanError: if the file is damaged.
    """
    rounds = folder.server.rounds()
    if not rounds:
        return None
    file = folder.server.path(rounds[-1])
    try:
        tensors, about = read_sealed(file, "checkpoint", round=rounds[-1])
    except PlanError as error:
        raise PlanError(f"{error}; without this file the run continues from the previous checkpoint") from None
    if (version := about.get("version", "none")) != VERSION:
        raise ConfigError(f"resume: {file} has version {version}; accepted: {VERSION}; start a new run")
    if about.get("config") != config_hash(config.flat()):
        raise ConfigError(f"resume: {file} was written with other options than those in the run's config.json")
    if about["round"] > config.train.rounds:
        raise ConfigError(f"train.rounds = {config.train.rounds}: the run has finished {about['round']} already")
    return FederationState(
        round=about["round"],
        server=ServerState(part_of(tensors, PARAMS), part_of(tensors, OPTIMIZER)),
        devices={entry["device"]: DeviceRecord.model_validate_json(json.dumps(entry)) for entry in about["records"]},
        plans=dict(about["plans"]),
        curve=tuple(CurvePoint(**point) for point in about["curve"]),
        simulated_seconds=about["simulated"],
        metrics_bytes=about["metrics_bytes"],
    )


def config_hash(flat: Mapping[str, Any]) -> str:
    """Returns a hash of the options that can change a result."""
    return content_hash(json.dumps(binding(flat), sort_keys=True))


def evaluated(
    state: FederationState,
    replies: Replies,
    before: FederationState,
    measured: Sequence[str] = MEASURES,
    references: Sequence[str] = (),
) -> tuple[FederationState, list[Line]]:
    """Returns the state with the accuracies after a round, and the lines that record them.

    Devices evaluate before they train, so the accuracies after a round arrive with the answers of the next round.

    Args:
        before: the state at the end of the round.
        measured: which of `MEASURES` the answers have.
        references: names of the `reference_accuracies`.
    """

    def value(reply: TrainReply | EvaluateReply, name: str) -> Any:
        found = getattr(reply, name)
        return (dict(zip(references, found.tolist(), strict=True)) or None) if isinstance(found, np.ndarray) else found

    values = {i: {name: value(reply, name) for name in measured} for i, reply in replies.items()}
    state = state.with_devices(values)
    lines: list[Line] = [
        DeviceLine(round=before.round, device=i, **values[i], next_loss=getattr(reply, "loss", None))
        for i, reply in replies.items()
    ]
    means = {name: _mean_of([measures[name] for measures in values.values()]) for name in measured if values}
    spent, up, down = before.simulated_seconds, before.bytes_up, before.bytes_down
    line = RoundLine(round=before.round, devices=len(replies), simulated_seconds=spent, bytes_up=up, bytes_down=down)
    lines.append(line.model_copy(update=means))
    # devices that were not asked count with their last value, so that the curve does not depend on which ones answer
    accuracy = float(np.mean([state.devices[i].personal_accuracy for i in state.plans]))
    return replace(state, curve=(*state.curve, CurvePoint(seconds=spent, bytes=up + down, accuracy=accuracy))), lines


def present(
    state: FederationState, replies: Mapping[int, R], round: int
) -> tuple[FederationState, dict[int, R], list[Line]]:
    """Returns the state with current numbers of images, answers of devices with enough images, and lines for others.

    If images do not change, all answers are returned.
    """
    active = {i: reply for i, reply in replies.items() if not reply.sits_out}
    names = ("train_samples", "test_samples")
    counts = {i: dict(zip(names, map(int, reply.images), strict=False)) for i, reply in active.items()}
    out = replies.keys() - active.keys()
    lines: list[Line] = [AbsenceLine(round=round, device=i, reason="too few images") for i in sorted(out)]
    return state.with_devices(counts), active, lines


def summarise(
    state: FederationState,
    config: RunConfig,
    seconds: Mapping[str, float],
    dense_params: int,
    mixtures: Sequence[GaussianSummary] = (),
) -> Summary:
    """Returns the summary of a run; the state includes the last evaluation.

    Args:
        seconds: wall time by phase.
        dense_params: parameters of the dense backbone.
        mixtures: mixtures of the devices that sent one.
    """
    known, rounds, reached = state.devices.values(), config.train.rounds, milestones(state.curve)
    records = [record.model_copy(update={"epsilon": _epsilon(config, record.rounds)}) for record in known]
    equipped = [record for record in records if record.params]

    def mean(name: str) -> float:
        return _mean([getattr(record, name) for record in equipped])

    return Summary(
        dense_accuracy=_mean([record.dense_accuracy for record in equipped if not record.generic]),
        pruned_accuracy=mean("pruned_accuracy"),
        global_accuracy=mean("global_accuracy"),
        personal_accuracy=mean("personal_accuracy"),
        reference_accuracies=_mean_of([record.reference_accuracies for record in equipped]),
        personal_accuracy_worst_decile=worst_decile([record.personal_accuracy for record in equipped]),
        bytes_up=state.bytes_up,
        bytes_down=state.bytes_down,
        adapter_bytes_up_per_round=_mean([r.bytes_up.get("adapters", 0) / r.rounds for r in equipped if r.rounds]),
        full_model_bytes=4 * dense_params * rounds,
        failures=sum(record.failures for record in records),
        epsilon=_largest([record.epsilon for record in equipped]),
        quantity_shift=quantity_shift([record.train_samples for record in records]),
        feature_shift=feature_shift(mixtures) if mixtures else None,
        drift=_mean(drifts) if (drifts := [r.drift for r in records if r.drift is not None]) else None,
        simulated_seconds=state.curve[-1].seconds,
        time_to_accuracy={accuracy: point.seconds for accuracy, point in reached.items()},
        bytes_to_accuracy={accuracy: point.bytes for accuracy, point in reached.items()},
        curve=list(state.curve),
        seconds={name: round(value, 3) for name, value in seconds.items()},
        devices=records,
    )


def worst_decile(values: Sequence[float]) -> float:
    """Returns the mean over the worst tenth of the devices (at least one)."""
    return float(np.mean(sorted(values)[: -(-len(values) // 10)]))


class Clock:
    """Wall seconds by phase and by round, stored in ``timing.json``; a resumed run adds to its earlier times."""

    def __init__(self, file: Path) -> None:
        self.file = file
        try:
            times = TIMES.validate_json(file.read_bytes())
            self.seconds, self.rounds = times["seconds"], times["rounds"]
        except (OSError, ValueError, LookupError):
            self.seconds, self.rounds = {}, {}  # a new run, or one whose times are lost, which is no reason to stop

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        start = time.monotonic()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.monotonic() - start

    @contextmanager
    def round(self, number: int) -> Iterator[None]:
        """Measures a round, and writes all times when it has ended."""
        start = time.monotonic()
        with self.phase("rounds"):
            yield
        self.rounds[str(number)] = time.monotonic() - start
        self.write()

    def write(self) -> None:
        write_json(self.file, {"seconds": self.seconds, "rounds": self.rounds})


def _epsilon(config: RunConfig, rounds: int) -> float | None:
    """Returns ε of a device whose answer was used in `rounds` rounds; None: no guarantee."""
    privacy = config.privacy
    value = epsilon(privacy.dp_noise, rounds, privacy.dp_delta) if privacy.dp_noise else math.inf
    return value if math.isfinite(value) else None


def _largest(epsilons: Sequence[float | None]) -> float | None:
    """Returns the largest ε; None, no guarantee, is larger than any number."""
    known = [value for value in epsilons if value is not None]
    return max(known) if known and len(known) == len(epsilons) else None


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if values else 0.0


def _mean_of(values: Sequence[Any]) -> Any:
    """Returns the mean over devices of a number, or of each entry of a mapping; None if a device has no value."""
    if not values or any(value is None for value in values):
        return None
    if isinstance(values[0], Mapping):
        return {name: _mean([value[name] for value in values]) for name in values[0]}
    return _mean(values)
