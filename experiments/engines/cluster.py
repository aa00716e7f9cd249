"""Starting Ray: its environment, a cluster to join, or a local Ray of this process."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tapfl.errors import ConfigError, RunError, message_of

# settings of Flower and Ray that they read when they are imported
ENVIRONMENT = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_worker_niceness": "0",  # Ray's default is 15, at which any other process starves the workers
}
REACH = 5.0  # seconds within which a cluster must answer; Ray itself would retry for minutes


def prepare_environment() -> None:
    """Sets the variables of `ENVIRONMENT` that are not set already."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)


@contextmanager
def ray_folder() -> Iterator[str]:
    """Yields a folder for the sockets and logs of a local Ray, and removes it afterwards.

    Its path is short, because a socket's path is limited to 107 bytes. RAY_TMPDIR overrides it and is not removed.
    """
    if given := os.environ.get("RAY_TMPDIR"):
        yield given
        return
    folder = tempfile.mkdtemp(prefix="tapfl-ray-", dir="/tmp" if Path("/tmp").is_dir() else None)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def ray_cluster(address: str = "") -> Iterator[None]:
    """Connects this process to a Ray cluster for as long as the block lasts.

    A connection that this process already has is used and left open.

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
    address = _resolved(address)
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR", "configure_logging": True}
    try:
        if address == "local":
            with ray_folder() as folder:
                ray.init(address="local", include_dashboard=False, _temp_dir=folder, **quiet)
                try:
                    yield
                finally:
                    ray.shutdown()
        else:
            _join(address, quiet)
            yield
    finally:
        ray.shutdown()


def _join(address: str, quiet: dict[str, Any]) -> None:
    import ray

    require_reachable(address)
    try:
        ray.init(address=address, **quiet)
    except ConnectionError:
        raise ConfigError(
            f"--address {address}: this machine is part of no Ray cluster; see docs/clusters.md"
        ) from None
    except Exception as error:  # of many kinds, by version
        raise RunError(f"--address {address}: {message_of(error)}") from None


def require_reachable(address: str) -> None:
    """Raises ConfigError if `address`, as `ray_cluster` takes it, names a cluster that does not answer."""
    import grpc

    address = _resolved(address)
    if address in ("local", "auto"):
        return
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or "/" in host:
        raise ConfigError(f"--address {address}: must be HOST:PORT of the cluster's head, or auto")
    with grpc.insecure_channel(address) as channel:
        try:
            grpc.channel_ready_future(channel).result(timeout=REACH)
        except grpc.FutureTimeoutError:
            raise ConfigError(f"--address {address}: no Ray cluster answers there within {REACH:g} s") from None


def _resolved(address: str) -> str:
    return address or os.environ.get("RAY_ADDRESS") or "local"
