"""The state of a federation after a round: all that the server knows, and at the same time its checkpoint.

``server/round-NNNN.safetensors`` holds the global adapters and the server's optimiser as tensors, and the rest as JSON
in its metadata, so a state is there as a whole or not at all. The last two are kept.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from strategies.records import VERSION, ByKind, CurvePoint, DeviceRecord, added
from tapfl.adapters.rules import ServerState
from tapfl.config import RunConfig, binding
from tapfl.errors import ConfigError, PlanError
from tapfl.store import RunFolder, content_hash, read_about, read_tensors, seal, unseal, write_tensors

PARAMS, OPTIMIZER = "params:", "optimizer:"


class Cost(NamedTuple):
    """Simulated seconds since the start, and bytes of all devices each way."""

    seconds: float
    bytes_up: int
    bytes_down: int


@dataclass(frozen=True)
class FederationState:
    """The server after `round` rounds; 0: after round zero.

    Attributes:
        server: global adapters and the server's optimiser.
        devices: what is known of each, by partition id, in that order.
        plans: checksum of the plan of each device that has its model, in the same order.
        curve: mean personal accuracy, of the rounds before.
        simulated_seconds: since the start.
        metrics_bytes: length of metrics.jsonl.
    """

    round: int
    server: ServerState
    devices: Mapping[int, DeviceRecord]
    plans: Mapping[int, str]
    curve: Sequence[CurvePoint] = ()
    simulated_seconds: float = 0.0
    metrics_bytes: int = 0

    @property
    def cost(self) -> Cost:
        """What the run has cost so far."""
        records = self.devices.values()
        up, down = sum(sum(r.bytes_up.values()) for r in records), sum(sum(r.bytes_down.values()) for r in records)
        return Cost(self.simulated_seconds, up, down)

    def with_devices(self, changes: Mapping[int, Mapping[str, Any]]) -> FederationState:
        """Returns the state with other values in the records of some devices."""
        changed = {i: self.devices[i].model_copy(update=dict(values)) for i, values in changes.items()}
        return replace(self, devices={**self.devices, **changed})

    def with_sent(self, bytes_by_kind: Mapping[int, ByKind]) -> FederationState:
        """Returns the state after so much was sent to some devices."""
        return self.with_devices(
            {i: {"bytes_down": added(self.devices[i].bytes_down, sent)} for i, sent in bytes_by_kind.items()}
        )


def save_checkpoint(folder: RunFolder, config: RunConfig, state: FederationState) -> None:
    """Writes the state, and drops those older than the one before it."""
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
    write_tensors(folder.server.path(state.round), tensors, {"checkpoint": seal(about, tensors)})
    folder.server.keep((state.round - 1, state.round))


def load_checkpoint(folder: RunFolder, config: RunConfig) -> FederationState | None:
    """Returns the last state of a run, or None if it did not get through round zero.

    Raises:
        ConfigError: if it has another version, was written under other options, or has more rounds than asked for.
        PlanError: if the file is damaged.
    """
    rounds = folder.server.rounds()
    if not rounds:
        return None
    file = folder.server.path(rounds[-1])
    tensors = read_tensors(file)
    try:
        about = unseal(read_about(file).get("checkpoint", "{}"), tensors, str(file), round=rounds[-1])
    except PlanError as error:
        raise PlanError(f"{error}; without this file the run goes on from the checkpoint before") from None
    if about.get("version") != VERSION:
        version = about.get("version", "none")
        raise ConfigError(f"resume: {file} has version {version}; accepted: {VERSION}; start the run anew")
    if about.get("config") != config_hash(config.flat()):
        raise ConfigError(f"resume: {file} was written under other options than those of config.json beside it")
    if about["round"] > config.train.rounds:
        raise ConfigError(f"train.rounds = {config.train.rounds}: the run has done {about['round']} already")
    return FederationState(
        round=about["round"],
        server=ServerState(_with_prefix(tensors, PARAMS), _with_prefix(tensors, OPTIMIZER)),
        devices={each["device"]: DeviceRecord.model_validate_json(json.dumps(each)) for each in about["records"]},
        plans=dict(about["plans"]),
        curve=tuple(CurvePoint(**point) for point in about["curve"]),
        simulated_seconds=about["simulated"],
        metrics_bytes=about["metrics_bytes"],
    )


def config_hash(flat: Mapping[str, Any]) -> str:
    """Returns the name of the options that can change a result."""
    return content_hash(json.dumps(binding(flat), sort_keys=True))


def _with_prefix(tensors: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
