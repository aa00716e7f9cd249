"""What the server knows after a round, in one file: a run that was killed goes on from the last of them.

``server/round-NNNN.safetensors`` holds the global adapters and the server's optimiser as tensors, and everything else
as JSON in its metadata, so that it is there as a whole or not at all. The last two are kept.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from strategies.records import VERSION, CurvePoint, DeviceRecord
from tapfl.adapters.rules import ServerState
from tapfl.config import RunConfig, binding
from tapfl.errors import ConfigError, PlanError
from tapfl.store import RunFolder, content_hash, read_about, read_tensors, seal, unseal, write_tensors

PARAMS, OPTIMIZER = "params:", "optimizer:"


@dataclass(frozen=True)
class Checkpoint:
    """The server after `round` rounds; 0: after round zero.

    Attributes:
        state: global adapters and the server's optimiser.
        records: of the devices, by partition id.
        plans: checksum of the plan of each device that has its model.
        metrics_bytes: length of metrics.jsonl then.
        curve: of the mean personal accuracy, of the rounds before.
        simulated: simulated seconds since the start.
    """

    round: int
    state: ServerState
    records: dict[int, DeviceRecord]
    plans: dict[int, str]
    metrics_bytes: int
    curve: list[CurvePoint]
    simulated: float


def save_checkpoint(folder: RunFolder, config: RunConfig, checkpoint: Checkpoint) -> None:
    """Writes the checkpoint, and drops those older than the one before it."""
    tensors = {PARAMS + name: tensor for name, tensor in checkpoint.state.params.items()}
    tensors |= {OPTIMIZER + name: tensor for name, tensor in checkpoint.state.optimizer.items()}
    about = {
        "version": VERSION,
        "round": checkpoint.round,
        "config": config_hash(config.flat()),
        "records": [record.model_dump() for record in checkpoint.records.values()],
        "plans": [*checkpoint.plans.items()],
        "metrics_bytes": checkpoint.metrics_bytes,
        "curve": [point.model_dump() for point in checkpoint.curve],
        "simulated": checkpoint.simulated,
    }
    write_tensors(folder.server.path(checkpoint.round), tensors, {"checkpoint": seal(about, tensors)})
    folder.server.keep((checkpoint.round - 1, checkpoint.round))


def load_checkpoint(folder: RunFolder, config: RunConfig) -> Checkpoint | None:
    """Returns the last checkpoint of a run, or None if it did not get through round zero.

    Raises:
        ConfigError: if it was written under other options, or has more rounds than are wanted now.
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
    return Checkpoint(
        round=about["round"],
        state=ServerState(_with_prefix(tensors, PARAMS), _with_prefix(tensors, OPTIMIZER)),
        records={each["device"]: DeviceRecord.model_validate_json(json.dumps(each)) for each in about["records"]},
        plans=dict(about.get("plans", [])),
        metrics_bytes=about["metrics_bytes"],
        curve=[CurvePoint(**point) for point in about["curve"]],
        simulated=about["simulated"],
    )


def config_hash(flat: Mapping[str, Any]) -> str:
    """Returns the name of the options that can change a result."""
    return content_hash(json.dumps(binding(flat), sort_keys=True))


def _with_prefix(tensors: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
