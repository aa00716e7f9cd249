"""Starts Ray: sets its environment, and connects to a cluster or starts a local Ray."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

from tapfl.errors import ConfigError, RunError, message_of

# settings that Flower and Ray read when they are imported
ENVIRONMENT = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_worker_niceness": "0",  # with Ray's default, 15, any other process would starve the workers
}
REACH = 5.0  # seconds within which a cluster must answer; Ray itself would retry for minutes


class MachineError(RunError):
    """The machine failed, not the federation: a worker process died, or a file could not be read or written."""


class EngineLostError(MachineError):
    """No worker is left, so the whole command ends."""


def prepare_environment() -> None:
    """Sets the variables of `ENVIRONMENT` that are not set already."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)


def ray_folder() -> AbstractContextManager[str]:
    """Returns a folder for the sockets and logs of a local Ray, which is removed at the end of the block.

    Its path is short, because a socket's path is limited to 107 bytes. RAY_TMPDIR overrides it and is not removed.
    """
    if folder := os.environ.get("RAY_TMPDIR"):
        return nullcontext(folder)
    parent = "/tmp" if Path("/tmp").is_dir() else None
    return tempfile.TemporaryDirectory(prefix="tapfl-ray-", dir=parent, ignore_cleanup_errors=True)


@contextmanager
def ray_cluster(address: str = "") -> Iterator[None]:
    """Connects this process to a Ray cluster until the end of the block.

    If this process is connected already, that connection is used and stays open.

    Args:
        address: ``HOST:PORT`` of a cluster's head, or ``auto`` for the cluster that this machine is part of; empty:
            RAY_ADDRESS if it is set, otherwise a local Ray, which is stopped at the end.

    Raises:
        ConfigError: if there is no cluster at `address`.
        RunError: if Ray refuses the connection, for instance because of another version.
    """
    prepare_environment()
    import ray

    if ray.is_initialized():
        yield
        return
    address = require_reachable(address)
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR", "configure_logging": True}
    with ExitStack() as stack:
        if address == "local":
            options |= {"include_dashboard": False, "_temp_dir": stack.enter_context(ray_folder())}
        stack.callback(ray.shutdown)
        try:
            ray.init(address=address, **options)
        except Exception as error:  # its type depends on the version of Ray
            if address == "auto" and isinstance(error, ConnectionError):
                reason = "this machine is not part of a Ray cluster; see docs/clusters.md"
                raise ConfigError(f"--address auto: {reason}") from None
            raise RunError(f"--address {address}: {message_of(error)}") from None
        yield


def require_reachable(address: str) -> str:
    """Returns the address that `ray_cluster` connects to: ``local``, ``auto`` or ``HOST:PORT``.

    Raises:
        ConfigError: if it is not valid, or no cluster answers there.
    """
    address = address or os.environ.get("RAY_ADDRESS") or "local"
    if address in ("local", "auto"):
        return address
    import grpc

    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or "/" in host:
        raise ConfigError(f"--address {address}: must be HOST:PORT of the cluster's head, or auto")
    with grpc.insecure_channel(address) as channel:
        try:
            grpc.channel_ready_future(channel).result(timeout=REACH)
        except grpc.FutureTimeoutError:
            raise ConfigError(f"--address {address}: no Ray cluster answers there within {REACH:g} s") from None
    return address
