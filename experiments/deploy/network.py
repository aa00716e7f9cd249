"""A SuperLink, SuperNodes and the operator's `flwr`, each with folders, home and environment of its own."""

from __future__ import annotations

import json
import os
import ssl
import subprocess
import sys
import time
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomli_w

from experiments.deploy.processes import Processes
from tapfl.config import Scalar
from tapfl.errors import RunError

HOST = "127.0.0.1"
CONNECTION = "deployment"
PROGRAMS = Path(sys.executable).parent
START, SUBMIT = 60.0, 120.0  # seconds for a SuperLink to answer, and for one command of the operator
PASSED_ON = ("PATH", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "SSL_CERT_FILE", "SSL_CERT_DIR")


def environment(folder: Path, more: Mapping[str, str] | None = None) -> dict[str, str]:
    """Returns the environment of a machine whose only folder is `folder`: home, caches and temporary files in it."""
    inherited = {name: os.environ[name] for name in PASSED_ON if name in os.environ}
    for name in ("home", "tmp"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    return {
        **inherited,
        "PATH": f"{PROGRAMS}:{inherited.get('PATH', os.defpath)}",
        "HOME": str(folder / "home"),
        "TMPDIR": str(folder / "tmp"),
        "FLWR_HOME": str(folder / "flwr"),
        "TAPFL_CACHE": str(folder / "cache"),
        "OMP_NUM_THREADS": "1",
        "PYTHONUNBUFFERED": "1",  # logs are read while they grow
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        **(more or {}),
    }


def start_superlink(processes: Processes, folder: Path, port: int) -> subprocess.Popen[bytes]:
    """Starts a SuperLink with TLS that admits registered nodes alone. `folder` holds its credentials.

    Raises:
        RunError: if it does not answer, over TLS, in time.
    """
    command = [
        str(PROGRAMS / "flower-superlink"),
        *("--host", HOST, "--port", str(port)),
        *("--ssl-ca-certfile", str(folder / "ca.crt")),
        *("--ssl-certfile", str(folder / "server.crt"), "--ssl-keyfile", str(folder / "server.key")),
        "--enable-supernode-auth",
        "--disable-runtime-dependency-installation",
    ]
    process = processes.start(command, environment(folder), folder)
    context = ssl.create_default_context(cafile=str(folder / "ca.crt"))
    end = time.monotonic() + START
    while time.monotonic() < end:
        processes.require_alive()
        try:
            with urllib.request.urlopen(f"https://{HOST}:{port}/health", timeout=5, context=context):
                return process
        except OSError:
            time.sleep(0.2)
    raise RunError(f"the SuperLink at {HOST}:{port} does not answer after {START:g} s")


@dataclass(frozen=True)
class Node:
    """A SuperNode: its folder, which holds `ca.crt` and `node.key`, and its configuration."""

    folder: Path
    config: Mapping[str, Scalar]
    more: Mapping[str, str]

    @property
    def environment(self) -> dict[str, str]:
        return environment(self.folder, self.more)


def start_supernode(processes: Processes, node: Node, superlink: int, port: int) -> subprocess.Popen[bytes]:
    """Starts a SuperNode that knows the server by its authority, and makes itself known by its key."""
    command = [
        str(PROGRAMS / "flower-supernode"),
        *("--superlink", f"{HOST}:{superlink}", "--host", HOST, "--port", str(port)),
        *("--root-certificates", str(node.folder / "ca.crt")),
        *("--auth-supernode-private-key", str(node.folder / "node.key")),
        *("--node-config", " ".join(f"{key}={json.dumps(value)}" for key, value in node.config.items())),
    ]
    return processes.start(command, node.environment, node.folder)


class Operator:
    """The one who registers nodes and submits runs, from a folder that holds `ca.crt`."""

    def __init__(self, folder: Path, superlink: int) -> None:
        self.folder, self._environment = folder, environment(folder)
        connection = {"address": f"{HOST}:{superlink}", "root-certificates": str(folder / "ca.crt")}
        (folder / "flwr").mkdir(parents=True)
        (folder / "flwr" / "config.toml").write_text(
            tomli_w.dumps({"superlink": {"default": CONNECTION, CONNECTION: connection}})
        )

    def register(self, public_key: Path) -> None:
        """Admits the node with this key. Raises RunError if the SuperLink refuses it."""
        self._flwr("supernode", "register", str(public_key), CONNECTION)

    def submit(self, app: Path, options: Mapping[str, Scalar]) -> int:
        """Submits a run of the app in folder `app` and returns its id. Raises RunError if it is refused."""
        file = self.folder / "run.toml"
        file.write_text(tomli_w.dumps(dict(options)))
        return int(self._flwr("run", str(app), CONNECTION, "--run-config", str(file))["run-id"])

    def status(self, run: int) -> tuple[str, str]:
        """Returns (status, details): ``finished:completed`` alone means that the ServerApp came to its end."""
        (found,) = self._flwr("list", CONNECTION, "--run-id", str(run))["runs"]
        details = str(found.get("status-details", ""))
        return str(found["status"]), "" if details == "N/A" else details

    def follow(self, processes: Processes, run: int, limit: float) -> Path:
        """Waits for a run to end; returns the file with what its ServerApp logged.

        Raises:
            RunError: after `limit` seconds, or if SuperLink or a SuperNode ends.
        """
        command = [str(PROGRAMS / "flwr"), "log", str(run), CONNECTION, "--stream"]
        streaming = processes.start(command, self._environment, self.folder)
        ended = processes.wait(streaming, limit) is not None
        log = processes.end(streaming)
        if not ended:
            raise RunError(f"run {run} is not done after {limit:g} s")
        return log

    def _flwr(self, *arguments: str) -> dict[str, Any]:
        done = subprocess.run(
            [str(PROGRAMS / "flwr"), *arguments, "--format", "json"],
            cwd=self.folder,
            env=self._environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=SUBMIT,
            check=False,
        )
        said = done.stdout.decode(errors="replace")
        try:
            answer: dict[str, Any] = json.loads(said[said.index("{") :])
        except ValueError:
            answer = {}
        if done.returncode or not answer.get("success", False):
            raise RunError(f"flwr {' '.join(arguments[:2])}: {answer.get('error-message') or said.strip()[-500:]}")
        return answer
