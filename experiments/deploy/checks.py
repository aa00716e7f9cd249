"""What a deployment promised, and whether it is so: read from the folders that server and nodes have left."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.deploy.guard import is_refused
from experiments.deploy.network import Node


@dataclass(frozen=True)
class Check:
    """One thing that was promised, whether it is so, and what was found."""

    promise: str
    kept: bool
    found: str = ""


def device_records(server: Path) -> list[dict[str, Any]]:
    """Returns what the server's summary says of each device. Raises OSError if there is none."""
    records: list[dict[str, Any]] = json.loads((server / "run" / "summary.json").read_text())["devices"]
    return records


def outcome(server: Path, nodes: list[Node], rounds: int) -> Iterator[Check]:
    """Yields what is to be seen after a run of `rounds` rounds with pruned weights sent.

    Args:
        server: the server's folder, with `run/` and `cache/`.
        nodes: in the order of their partition ids.
    """
    records = device_records(server)
    failures = sum(record["failures"] for record in records)
    yield Check("all devices took part, and nothing failed", len(records) == len(nodes) and not failures)
    yield Check("the server has no device's folder", not (server / "run" / "devices").exists())
    (backbone,) = (server / "cache" / "backbones").iterdir()
    for node, record in zip(nodes, records, strict=False):
        name, down, storage = node.folder.name, record["bytes_down"], node.folder / "storage"
        received, sent = node.folder / "cache" / "backbones" / backbone.name, down.get("weights", 0)
        same = received.is_file() and received.read_bytes() == backbone.read_bytes()
        wanted = (
            "pruned/model.safetensors",
            f"state/round-{rounds:04d}.safetensors",
            "personal/adapter_config.json",
        )
        missing = [file for file in wanted if not (storage / file).is_file()]
        macs = f"{record['macs_share']:.1%} of the MACs"
        yield Check(f"{name}: got the backbone over the wire", same, f"{down.get('backbone', 0):,} bytes")
        yield Check(f"{name}: was sent its pruned weights", sent > 4 * record["params"], f"{sent:,} bytes")
        yield Check(f"{name}: keeps model, state and personal adapter", not missing, ", ".join(missing))
        yield Check(f"{name}: cannot open the server's files", is_refused(node, server / "run" / "summary.json"))
        yield Check(f"{name}: is within its budget", record["macs_share"] <= float(node.config["budget"]), macs)
