"""A SuperLink, SuperNodes and the operator's `flwr`, each with its own credentials, folder and environment."""

from __future__ import annotations

import datetime
import json
import os
import ssl
import subprocess
import sys
import time
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomli_w
import trustme
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

from experiments.deploy.processes import Processes
from tapfl.errors import RunError
from tapfl.options import Scalar

HOST = "127.0.0.1"
CONNECTION = "deployment"
PROGRAMS = Path(sys.executable).parent
LIFETIME = datetime.timedelta(days=30)
START, SUBMIT = 60.0, 120.0  # time limits in seconds: until a SuperLink answers, and for a command of the operator
PASSED_ON = ("PATH", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "SSL_CERT_FILE", "SSL_CERT_DIR")
REFUSED = "TAPFL_REFUSED_FOLDER"
SITECUSTOMIZE = f'''"""Refuses access to the folder {REFUSED}."""
import os, sys

refused = os.environ["{REFUSED}"] + os.sep

def refuse(event, arguments):
    if event == "open" or event.startswith("os."):
        for path in arguments:
            if isinstance(path, (str, bytes)) and (os.path.abspath(os.fsdecode(path)) + os.sep).startswith(refused):
                raise PermissionError(f"{{event}} of {{os.fsdecode(path)}}: is not this node's")

sys.addaudithook(refuse)
'''


def write_private(path: Path, content: bytes) -> Path:
    """Writes a file that only its owner can read. Raises FileExistsError if it exists."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(content)
    return path


def write_server_credentials(folder: Path, hosts: Sequence[str]) -> Path:
    """Writes ``server.crt`` and ``server.key`` for a server with the host names `hosts`.

    Returns:
        ``ca.crt``, with which nodes verify the server. This authority signs only this certificate, and its key is never
        written to disk.
    """
    authority = trustme.CA(path_length=0)
    issued = authority.issue_cert(*hosts, not_after=datetime.datetime.now(datetime.UTC) + LIFETIME)
    write_private(folder / "server.crt", issued.cert_chain_pems[0].bytes())
    write_private(folder / "server.key", issued.private_key_pem.bytes())
    return write_private(folder / "ca.crt", authority.cert_pem.bytes())


def write_node_key(folder: Path) -> tuple[Path, Path]:
    """Writes a node's NIST P-384 key pair, ``node.key`` and ``node.pub`` in OpenSSH's format; returns both paths."""
    key = ec.generate_private_key(ec.SECP384R1())
    public = key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)
    return (
        write_private(folder / "node.key", key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption())),
        write_private(folder / "node.pub", public + b"\n"),
    )


def environment(folder: Path, more: Mapping[str, str] | None = None) -> dict[str, str]:
    """Returns an environment as on a separate machine: home, caches and temporary files are all in `folder`."""
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
        "PYTHONUNBUFFERED": "1",  # because logs are read while they are written
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        **(more or {}),
    }


def guarded(folder: Path, refused: Path) -> dict[str, str]:
    """Returns environment variables with which Python refuses access to the folder `refused`.

    They prove that a node needs nothing from the server's folder, although both belong to the same user on the same
    machine. Before anything else Python imports the ``sitecustomize`` that is written to `folder`; its audit hook
    (PEP 578) cannot be removed.
    """
    folder.mkdir(parents=True)
    (folder / "sitecustomize.py").write_text(SITECUSTOMIZE)
    return {"PYTHONPATH": str(folder), REFUSED: str(refused)}


@dataclass(frozen=True)
class Node:
    """A SuperNode: its folder, with `ca.crt` and `node.key`, its configuration, and further environment variables."""

    folder: Path
    config: Mapping[str, Scalar]
    more: Mapping[str, str]

    @property
    def environment(self) -> dict[str, str]:
        return environment(self.folder, self.more)

    def is_refused(self, file: Path) -> bool:
        """Returns whether Python cannot open `file` in the node's environment; this process can read it."""
        file.read_bytes()
        command = [sys.executable, "-c", "import sys; open(sys.argv[1], 'rb')", str(file)]
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=60, check=False)
        return done.returncode == 1 and "PermissionError" in done.stderr and "is not this node's" in done.stderr


def start_superlink(processes: Processes, folder: Path, port: int) -> subprocess.Popen[bytes]:
    """Starts a SuperLink with TLS that admits only registered nodes. `folder` has its credentials.

    Raises:
        RunError: if it does not answer over TLS in time.
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


def start_supernode(processes: Processes, node: Node, superlink: int, port: int) -> subprocess.Popen[bytes]:
    """Starts a SuperNode, which verifies the server with `ca.crt` and identifies itself with its key."""
    command = [
        str(PROGRAMS / "flower-supernode"),
        *("--superlink", f"{HOST}:{superlink}", "--host", HOST, "--port", str(port)),
        *("--root-certificates", str(node.folder / "ca.crt")),
        *("--auth-supernode-private-key", str(node.folder / "node.key")),
        *("--node-config", " ".join(f"{key}={json.dumps(value)}" for key, value in node.config.items())),
    ]
    return processes.start(command, node.environment, node.folder)


class Operator:
    """Registers nodes and submits runs, from a folder with `ca.crt`."""

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

    def status(self, run: int) -> str:
        """Returns status and details of a run; only ``finished:completed`` if the ServerApp completed."""
        (found,) = self._flwr("list", CONNECTION, "--run-id", str(run))["runs"]
        details = str(found.get("status-details", ""))
        return f"{found['status']} {'' if details == 'N/A' else details}".strip()

    def follow(self, processes: Processes, run: int, limit: float) -> Path:
        """Waits for a run to end; returns the log file of its ServerApp.

        Raises:
            RunError: after `limit` seconds, or if the SuperLink or a SuperNode ends.
        """
        command = [str(PROGRAMS / "flwr"), "log", str(run), CONNECTION, "--stream"]
        streaming = processes.start(command, self._environment, self.folder)
        ended = processes.wait(streaming, limit) is not None
        log = processes.end(streaming)
        if not ended:
            raise RunError(f"run {run} has not ended after {limit:g} s")
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
        output = done.stdout.decode(errors="replace")
        try:
            answer: dict[str, Any] = json.loads(output[output.index("{") :])
        except ValueError:
            answer = {}
        if done.returncode or not answer.get("success", False):
            raise RunError(f"flwr {' '.join(arguments[:2])}: {answer.get('error-message') or output.strip()[-500:]}")
        return answer
