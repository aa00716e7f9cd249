"""`tapfl deploy-demo`: runs a small federation with server and nodes as processes over TLS, and checks every step."""

from __future__ import annotations

import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from experiments.deploy.network import (
    HOST,
    Node,
    Operator,
    guarded,
    start_superlink,
    start_supernode,
    write_node_key,
    write_private,
    write_server_credentials,
)
from experiments.deploy.processes import Processes, processes
from strategies.records import read_summary
from tapfl.config import RunConfig
from tapfl.data.federated import open_private
from tapfl.errors import ConfigError, RunError
from tapfl.models.forward import input_transform
from tapfl.options import Scalar

ROOT = Path(__file__).parents[2]
ROUNDS, COMPLETED = 2, "finished:completed"
OPTIONS: dict[str, Scalar] = {
    "devices.count": 2,
    "model.epochs": 20,
    "metric.size": 128,
    "pruning.send": "weights",
    "train.rounds": ROUNDS,
    "personalize.from-round": ROUNDS,  # so that nodes have a state to store
    "faults.exchange-timeout": 180.0,
}
NAMES, OWN_IMAGES = ("9", "7", "5"), 120  # the second node's own classes, in its own order
PROFILES: tuple[dict[str, Scalar], ...] = ({"budget": 0.4, "rank": 4}, {"budget": 0.6, "rank": 6})
JOIN, FINISH = 180.0, 1200.0  # seconds for a node to be admitted or refused, and for the run
ADMITTED = "SuperNode ID"  # a SuperNode logs this once it is admitted
REFUSALS = {  # what Flower logs for a node with the wrong credentials
    "an unregistered key": "Failed to activate SuperNode",
    "another authority": "CERTIFICATE_VERIFY_FAILED",
}


@dataclass(frozen=True)
class Check:
    """Something that was promised, whether it holds, and what was found."""

    promise: str
    kept: bool
    found: str = ""


class Demo:
    """A demonstration in an empty folder, in which it creates `server/`, `operator/` and a folder for each node."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.server = folder, folder / "server"
        self._began = time.monotonic()

    def carry_out(self) -> list[Check]:
        """Starts all processes, runs the federation, ends all processes, and returns the checks.

        Raises:
            RunError: if the federation fails, so that there is nothing to check.
        """
        if not (ROOT / "pyproject.toml").is_file():
            raise ConfigError(f"deploy-demo: {ROOT} has no pyproject.toml; it needs a checkout of the project")
        with processes(str(self.folder)) as running:
            nodes, refused = self._federation(running)
        left = running.left()
        self._print("all processes have ended")
        return [
            *refused,
            Check("the ServerApp completed", True, COMPLETED),
            *outcome(self.server, nodes, ROUNDS),
            *self._own_images(),
            Check("no process is left", not left, ", ".join(map(str, left))),
        ]

    def _federation(self, running: Processes) -> tuple[list[Node], list[Check]]:
        authority = write_server_credentials(self.server, [HOST])
        with ExitStack() as reserved:
            superlink, *ports = (free_port(reserved) for _ in range(5))
        start_superlink(running, self.server, superlink)
        self._print(f"SuperLink at https://{HOST}:{superlink}, which admits only registered nodes")
        operator = Operator(_with_authority(self.folder / "operator", authority), superlink)
        nodes = [self._node(i, authority) for i in range(2)]
        for node in nodes:
            operator.register(node.folder / "node.pub")
        started = [start_supernode(running, node, superlink, ports.pop()) for node in nodes]
        self._print("two SuperNodes started, their keys registered")
        refused = [self._refused(running, what, authority, superlink, ports.pop()) for what in REFUSALS]
        self._wait_for_nodes(running, started)
        run = operator.submit(ROOT, OPTIONS | {"out": str(self.server / "run")})
        self._print(f"run {run} submitted: {ROUNDS} rounds, pruned weights sent")
        log, status = operator.follow(running, run, FINISH), operator.status(run)
        self._print(f"run {run}: {status}")
        if status != COMPLETED:
            raise RunError(f"the run ended as {status}; the end of {log}:\n{log.read_text()[-2000:]}")
        return nodes, refused

    def _node(self, i: int, authority: Path) -> Node:
        """Creates a node's folder. The second node has its own images, the first uses its part of `data.source`."""
        folder = _with_authority(self.folder / f"node-{i}", authority)
        write_node_key(folder)
        config: dict[str, Scalar] = {
            "partition-id": i,
            "num-partitions": 2,
            **PROFILES[i],
            "storage": str(folder / "storage"),
        }
        if i == 1:
            config["data"] = str(folder / "images.npz")
            _write_images(folder / "images.npz")
        return Node(folder, config, guarded(folder / "guard", self.server))

    def _refused(self, running: Processes, what: str, authority: Path, superlink: int, port: int) -> Check:
        """Starts a node that must not be admitted, and checks that it is refused."""
        folder = self.folder / what.replace(" ", "-")
        if what == "another authority":
            authority = write_server_credentials(folder / "elsewhere", [HOST])
        write_node_key(_with_authority(folder, authority))
        process = start_supernode(running, Node(folder, {"partition-id": 0, "num-partitions": 2}, {}), superlink, port)
        code = running.wait(process, JOIN)
        log = running.end(process).read_text(errors="replace")
        kept = code not in (None, 0) and REFUSALS[what] in log and ADMITTED not in log
        self._print(f"a SuperNode with {what}: {'refused' if kept else 'NOT refused'}")
        return Check(f"a node with {what} is refused", kept, f"exit code {code}")

    def _wait_for_nodes(self, running: Processes, nodes: list[subprocess.Popen[bytes]]) -> None:
        end = time.monotonic() + JOIN
        while not all(ADMITTED in running.output(node) for node in nodes):
            running.require_alive()
            if time.monotonic() > end:
                raise RunError(f"the SuperNodes have not joined after {JOIN:g} s; see the logs in {self.folder}")
            time.sleep(0.2)

    def _own_images(self) -> Iterator[Check]:
        records = read_summary(self.server / "run").devices
        images, classes = records[1].train_samples + records[1].test_samples, records[1].classes
        own = (images, classes) == (OWN_IMAGES, len(NAMES))
        yield Check("node-1: trained on its own images", own, f"{images} images of {classes} classes")
        for record in records:
            up, down = (sum(side.values()) for side in (record.bytes_up, record.bytes_down))
            before, after = record.pruned_accuracy, record.personal_accuracy
            accuracy = f"accuracy {before:.3f} as pruned, {after:.3f} personal"
            self._print(f"device {record.device}: {accuracy}; {up:,} bytes up, {down:,} bytes down")

    def _print(self, text: str) -> None:
        print(f"{time.monotonic() - self._began:6.1f} s  {text}", flush=True)


def demonstrate(folder: Path) -> None:
    """Runs the demonstration in `folder` and prints its steps and checks. Raises RunError if a check fails."""
    checks = Demo(folder).carry_out()
    for check in checks:
        print(f"{'ok  ' if check.kept else 'FAIL'}  {check.promise}{f' ({check.found})' if check.found else ''}")
    if broken := [check.promise for check in checks if not check.kept]:
        raise RunError(f"deploy-demo: {len(broken)} of {len(checks)} checks failed: {'; '.join(broken)}")


def outcome(server: Path, nodes: list[Node], rounds: int) -> Iterator[Check]:
    """Yields the checks of the files in the folders of server and nodes after `rounds` rounds.

    Args:
        server: the server's folder, with `run/` and `cache/`.
        nodes: in the order of their partition ids.
    """
    records = read_summary(server / "run").devices
    failures = sum(record.failures for record in records)
    yield Check("all devices took part, and nothing failed", len(records) == len(nodes) and not failures)
    yield Check("the server has no device's folder", not (server / "run" / "devices").exists())
    (backbone,) = (server / "cache" / "backbones").iterdir()
    for node, record in zip(nodes, records, strict=False):
        name, down, storage = node.folder.name, record.bytes_down, node.folder / "storage"
        received, sent = node.folder / "cache" / "backbones" / backbone.name, down.get("weights", 0)
        same = received.is_file() and received.read_bytes() == backbone.read_bytes()
        wanted = (
            "pruned/model.safetensors",
            f"state/round-{rounds:04d}.safetensors",
            "personal/adapter_config.json",
        )
        missing = [file for file in wanted if not (storage / file).is_file()]
        macs = f"{record.macs_share:.1%} of the MACs"
        yield Check(f"{name}: received the backbone over the network", same, f"{down.get('backbone', 0):,} bytes")
        yield Check(f"{name}: received its pruned weights", sent > 4 * record.params, f"{sent:,} bytes")
        yield Check(f"{name}: stores model, state and personal adapter", not missing, ", ".join(missing))
        yield Check(f"{name}: cannot open the server's files", node.is_refused(server / "run" / "summary.json"))
        yield Check(f"{name}: is within its budget", record.macs_share <= float(node.config["budget"]), macs)


def free_port(reserved: ExitStack) -> int:
    """Returns an unused port, which is not returned again while `reserved` is open."""
    listener = reserved.enter_context(socket.socket())
    listener.bind((HOST, 0))
    return int(listener.getsockname()[1])


def _with_authority(folder: Path, authority: Path) -> Path:
    write_private(folder / "ca.crt", authority.read_bytes())
    return folder


def _write_images(file: Path) -> None:
    """Writes private digits of three classes, named as in the public pool, as a device's own images."""
    config = RunConfig()
    digits = open_private(config.data, input_transform(config.model), config.seed, file.parent)
    chosen = np.flatnonzero(np.isin(digits.labels, [digits.classes.index(name) for name in NAMES]))[:OWN_IMAGES]
    labels = [NAMES.index(digits.classes[label]) for label in digits.labels[chosen]]
    np.savez(file, images=digits.read(chosen), labels=np.array(labels), classes=np.array(NAMES))
