"""A run's folder: its files, and the lock of the process that works in it."""

from __future__ import annotations

import fcntl
import json
import re
import shutil
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import IO, Any

from tapfl.errors import ConfigError
from tapfl.store import home_folder, remove_leftovers, write_json


@contextmanager
def only_one(out: Path, what: str) -> Iterator[None]:
    """Locks a folder against other processes within the context, creating it if necessary.

    A new folder that is still empty at the end is removed.

    Args:
        what: what another process would be, for the message.

    Raises:
        ConfigError: if another process has locked it.
    """
    new = not out.exists()
    out.mkdir(parents=True, exist_ok=True)
    with _held(out, f"--out {out}: another {what}") as lock:
        try:
            yield
        finally:
            if new and [file.name for file in out.glob("*")] == [Path(lock.name).name]:
                Path(lock.name).unlink()
                out.rmdir()


def _held(folder: Path, other: str) -> IO[str]:
    """Returns an open file that locks a folder until the file is closed or this process ends.

    Raises:
        ConfigError: if it cannot be locked, or another process has locked it; then the message begins with `other`.
    """
    lock = (folder / ".lock").open("w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        lock.close()
        if isinstance(error, BlockingIOError):
            raise ConfigError(f"{other} is using this folder") from None
        why = f"this folder cannot be locked ({error.strerror}); accepted: one on a file system that has locks"
        raise ConfigError(f"{other.partition(': ')[0]}: {why}") from None
    return lock


def run_path(out: str, run_id: int) -> Path:
    """Returns a run's folder: `out`, or a default that both server and devices derive from Flower's run id."""
    return Path(out) if out else home_folder("out") / "tapfl-runs" / str(run_id)


class Versions:
    """Files of a folder by round: ``round-NNNN.safetensors``."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, round: int) -> Path:
        return self.folder / f"round-{round:04d}.safetensors"

    def rounds(self) -> list[int]:
        """Returns the rounds that have a version, in order."""
        matches = (re.fullmatch(r"round-(\d+)\.safetensors", file.name) for file in self.folder.glob("*"))
        return sorted(int(match[1]) for match in matches if match)

    def keep(self, rounds: Collection[int]) -> None:
        """Removes all versions except those of the given rounds."""
        for round in self.rounds():
            if round not in rounds:
                self.path(round).unlink(missing_ok=True)


class RunFolder:
    """A run's folder. It is a context manager that holds the lock while a run works in it.

    ```
    config.json inputs.json       the resolved options; fingerprints of the images and files that they name
    versions.json                 the versions of the packages, and the kind of processor
    summaries/NN.safetensors      the mixture that each device sent
    plans/NN.json NN.safetensors  each device's plan, and its weights if the plan alone does not determine them
    metric-sets/NN.json           number of public images of each class in the metric set of each plan, and in the pool
    start.safetensors             the adapters of the warm start, if there is one
    server/round-NNNN.safetensors the server's state after each of the last two rounds: `strategies.state`
    devices/NN/                   a device's own storage; in a deployment it is on the device
    metrics.jsonl                 one line per device and round, one per round, and one per failure
    timing.json                   wall-clock seconds by phase and by round
    tensorboard/ mlflow.json      event files, and the id of the MLflow run, if these loggers are on
    summary.json                  the results of the whole run, written last
    ```
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock: IO[str] | None = None  # held until the context or this process ends
        self._new = False

    @classmethod
    def create(cls, path: Path) -> RunFolder:
        """Creates the folder. Raises ConfigError if it exists, so that no run is overwritten."""
        try:
            path.mkdir(parents=True)
        except FileExistsError:
            raise ConfigError(f"out = {str(path)!r}: exists already; give a folder that does not exist") from None
        except OSError as error:
            raise ConfigError(f"out = {str(path)!r}: cannot be created ({error.strerror})") from None
        folder = cls(path)
        folder._lock, folder._new = _held(path, f"out = {str(path)!r}: another run"), True
        return folder

    @classmethod
    def reopen(cls, path: Path) -> RunFolder:
        """Returns the folder of a run to resume. Raises ConfigError if it contains no run, or a run works in it."""
        folder = cls(path)
        folder.config()
        folder._lock = _held(path, f"out = {str(path)!r}: another run")
        remove_leftovers(path)
        return folder

    def config(self) -> dict[str, Any]:
        """Returns the options of the run. Raises ConfigError if the folder contains no run."""
        try:
            options = json.loads((self.path / "config.json").read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise ConfigError(f"resume: {self.path} is not a run's folder (config.json: {error})") from None
        if not isinstance(options, dict):
            raise ConfigError(f"resume: {self.path} is not a run's folder (config.json holds no options)")
        return options

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._lock:
            self._lock.close()
        if self._new and not (self.path / "config.json").exists():  # nothing to resume
            shutil.rmtree(self.path, ignore_errors=True)

    def write_versions(self, besides: Mapping[str, str]) -> None:
        """Records the version of every package that can affect results, and other factors in `besides`."""
        packages = ("tapfl", "torch", "timm", "peft", "flwr", "flwr-datasets", "ray", "numpy", "scikit-learn")
        write_json(self.path / "versions.json", {name: metadata.version(name) for name in packages} | dict(besides))

    @property
    def server(self) -> Versions:
        return Versions(self.path / "server")

    def metric_set(self, partition_id: int) -> Path:
        """Returns the file with the class counts of the metric set of a device's plan."""
        return self.path / "metric-sets" / f"{partition_id:02d}.json"

    def device(self, partition_id: int) -> Path:
        """Returns the storage folder of a simulated device."""
        return self.path / "devices" / f"{partition_id:02d}"
