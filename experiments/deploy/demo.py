"""`tapfl deploy-demo`: server and nodes as processes of their own over TLS, one small federation, checked."""

from __future__ import annotations

import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from experiments.deploy.checks import Check, device_records, outcome
from experiments.deploy.credentials import Credentials, write_node_key, write_private, write_server_credentials
from experiments.deploy.guard import guarded
from experiments.deploy.network import HOST, Node, Operator, start_superlink, start_supernode
from experiments.deploy.processes import Processes, processes
from tapfl.config import RunConfig, Scalar
from tapfl.data.federated import open_private
from tapfl.errors import ConfigError, RunError
from tapfl.models.forward import input_transform

ROOT = Path(__file__).parents[2]
ROUNDS, COMPLETED = 2, "finished:completed"
OPTIONS: dict[str, Scalar] = {
    "devices.count": 2,
    "model.epochs": 20,
    "metric.size": 128,
    "pruning.send": "weights",
    "train.rounds": ROUNDS,
    "faults.exchange-timeout": 180.0,
}
NAMES, OWN_IMAGES = ("9", "7", "5"), 120  # the second node's own classes, in its own order
PROFILES: tuple[dict[str, Scalar], ...] = ({"budget": 0.4, "rank": 4}, {"budget": 0.6, "rank": 6})
JOIN, FINISH = 60.0, 400.0  # seconds for a node to be admitted or refused, and for the run
ADMITTED = "SuperNode ID"  # what a SuperNode says once it is let in
REFUSALS = {  # what Flower says to a node that holds the wrong thing
    "an unregistered key": "Failed to activate SuperNode",
    "another authority": "CERTIFICATE_VERIFY_FAILED",
}


class Demo:
    """One demonstration in an empty folder, which then holds `server/`, `operator/` and a folder a node."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.server = folder, folder / "server"
        self._began = time.monotonic()

    def carry_out(self) -> list[Check]:
        """Starts all, runs the federation, ends all, and returns what was checked.

        Raises:
            RunError: if it does not come to the point at which there is something to check.
        """
        if not (ROOT / "pyproject.toml").is_file():
            raise ConfigError(f"deploy-demo: {ROOT} has no pyproject.toml; it is run from a checkout of the project")
        with processes(str(self.folder)) as running:
            nodes, refused, status = self._federation(running)
        left = running.left()
        self._say("all processes have ended")
        return [
            *refused,
            Check("the ServerApp came to its end", status[0] == COMPLETED, " ".join(status).strip()),
            *self._outcome(nodes),
            Check("no process is left", not left, ", ".join(map(str, left))),
        ]

    def _federation(self, running: Processes) -> tuple[list[Node], list[Check], tuple[str, str]]:
        credentials = write_server_credentials(self.server, [HOST])
        with ExitStack() as reserved:
            superlink, *ports = (free_port(reserved) for _ in range(5))
        start_superlink(running, self.server, superlink)
        self._say(f"SuperLink at https://{HOST}:{superlink}, which admits registered nodes alone")
        operator = Operator(_with_authority(self.folder / "operator", credentials), superlink)
        nodes = [self._node(i, credentials) for i in range(2)]
        for node in nodes:
            operator.register(node.folder / "node.pub")
        started = [start_supernode(running, node, superlink, ports.pop()) for node in nodes]
        self._say("two SuperNodes started, their keys registered")
        refused = [self._refused(running, what, credentials, superlink, ports.pop()) for what in REFUSALS]
        self._joined(running, started)
        run = operator.submit(ROOT, OPTIONS | {"out": str(self.server / "run")})
        self._say(f"run {run} submitted: {ROUNDS} rounds, pruned weights sent")
        log, status = operator.follow(running, run, FINISH), operator.status(run)
        self._say(f"run {run}: {' '.join(status).strip()}")
        if status[0] != COMPLETED:
            raise RunError(f"the run ended as {' '.join(status).strip()}; the end of {log}:\n{log.read_text()[-2000:]}")
        return nodes, refused, status

    def _node(self, i: int, credentials: Credentials) -> Node:
        """Makes a node's folder. The second node has images of its own, the first takes its part of `data.source`."""
        folder = _with_authority(self.folder / f"node-{i}", credentials)
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

    def _refused(self, running: Processes, what: str, credentials: Credentials, superlink: int, port: int) -> Check:
        """Starts a node that must not be let in, and looks whether it is not."""
        folder = self.folder / what.replace(" ", "-")
        if what == "another authority":
            credentials = write_server_credentials(folder / "elsewhere", [HOST])
        write_node_key(_with_authority(folder, credentials))
        process = start_supernode(running, Node(folder, {"partition-id": 0, "num-partitions": 2}, {}), superlink, port)
        code = running.wait(process, JOIN)
        said = running.end(process).read_text(errors="replace")
        kept = code not in (None, 0) and REFUSALS[what] in said and ADMITTED not in said
        self._say(f"a SuperNode with {what}: {'refused' if kept else 'NOT refused'}")
        return Check(f"a node with {what} is refused", kept, f"exit code {code}")

    def _joined(self, running: Processes, nodes: list[subprocess.Popen[bytes]]) -> None:
        end = time.monotonic() + JOIN
        while not all(ADMITTED in running.said(node) for node in nodes):
            running.require_alive()
            if time.monotonic() > end:
                raise RunError(f"the SuperNodes have not joined after {JOIN:g} s; their logs lie in {self.folder}")
            time.sleep(0.2)

    def _outcome(self, nodes: list[Node]) -> Iterator[Check]:
        yield from outcome(self.server, nodes, ROUNDS)
        records = device_records(self.server)
        held, classes = records[1]["train_samples"] + records[1]["test_samples"], records[1]["classes"]
        mine = (held, classes) == (OWN_IMAGES, len(NAMES))
        yield Check("node-1: trained on its own images", mine, f"{held} images of {classes} classes")
        for record in records:
            up, down = (sum(record[side].values()) for side in ("bytes_up", "bytes_down"))
            before, after = record["pruned_accuracy"], record["personal_accuracy"]
            accuracy = f"accuracy {before:.3f} as pruned, {after:.3f} personal"
            self._say(f"device {record['device']}: {accuracy}; {up:,} bytes up, {down:,} bytes down")

    def _say(self, text: str) -> None:
        print(f"{time.monotonic() - self._began:6.1f} s  {text}", flush=True)


def demonstrate(folder: Path) -> None:
    """Carries the demonstration out in `folder` and prints what it did.

    Raises:
        RunError: if anything is not as promised.
    """
    checks = Demo(folder).carry_out()
    for check in checks:
        print(f"{'ok  ' if check.kept else 'FAIL'}  {check.promise}{f' ({check.found})' if check.found else ''}")
    if broken := [check.promise for check in checks if not check.kept]:
        raise RunError(f"deploy-demo: {len(broken)} of {len(checks)} checks failed: {'; '.join(broken)}")


def free_port(reserved: ExitStack) -> int:
    """Returns a port that nobody uses, and keeps it from being given twice while `reserved` is open."""
    listener = reserved.enter_context(socket.socket())
    listener.bind((HOST, 0))
    return int(listener.getsockname()[1])


def _with_authority(folder: Path, credentials: Credentials) -> Path:
    write_private(folder / "ca.crt", credentials.authority.read_bytes())
    return folder


def _write_images(file: Path) -> None:
    """Writes private digits of three classes, named as the pool names them, as a device's own images."""
    config = RunConfig()
    digits = open_private(config.data, input_transform(config.model), config.seed, file.parent)
    chosen = np.flatnonzero(np.isin(digits.labels, [digits.classes.index(name) for name in NAMES]))[:OWN_IMAGES]
    labels = [NAMES.index(digits.classes[label]) for label in digits.labels[chosen]]
    np.savez(file, images=digits.images[chosen], labels=np.array(labels), classes=np.array(NAMES))
