"""Ray itself: what has to be told to it before it is imported, a cluster to join, or one of this process's own."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tapfl.errors import ConfigError, RunError, message_of

# what Flower and Ray have to be told before they are imported
ENVIRONMENT = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_worker_niceness": "0",  # Ray runs its workers at 15, and then any other process starves them
}
REACH = 5.0  # seconds in which a cluster answers, or is none: Ray itself would go on trying for minutes


def prepare_environment() -> None:
    """Sets what of `ENVIRONMENT` is not set otherwise."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)


@contextmanager
def ray_folder() -> Iterator[str]:
    """Gives a folder for the sockets and logs of a local Ray, and removes it with what is in it.

    Its path is short, because a socket's may have 107 bytes. RAY_TMPDIR names another, which stays.
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
    """Connects this process with a Ray cluster for as long as the block lasts.

    Args:
        address: ``HOST:PORT`` of a cluster's head, or ``auto`` for the one that this machine is part of; empty:
            RAY_ADDRESS, and without it a local Ray, which is stopped at the end. A connection that this process has
            already is used as it is, and left.

    Raises:
        ConfigError: if there is no cluster at `address`.
        RunError: if Ray refuses: another version, or this machine is not part of the cluster.
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
    """Raises ConfigError if `address`, as `ray_cluster` takes it, is that of a cluster, and none answers there."""
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
