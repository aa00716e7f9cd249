"""MLflow: a run on a tracking server, whose id is kept in the run's folder so that a run that goes on finds it again.

Nothing can be taken back from a server, so a point is sent once: of those that an earlier part of the run may have
sent, the server is asked. Models and other files are not sent. The client is told to be brief with a server that does
not answer, and not to tell its makers what it is used for; the environment may say otherwise.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

from tapfl.config import LogOptions, RunConfig
from tapfl.errors import ConfigError
from tapfl.options import Scalar
from tapfl.store import RunFolder, write_json

T = TypeVar("T")
Point = tuple[str, int, float]  # tag, step, value

ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_DISABLE_TELEMETRY": "true",
}
METRICS_AT_ONCE, PARAMS_AT_ONCE = 1000, 100  # what MLflow takes in a request
ABSENT = "RESOURCE_DOES_NOT_EXIST"


def require_tracking(options: LogOptions) -> None:
    """Raises ConfigError without the extra `mlflow`, or if nothing that can be used is at the URI."""
    if find_spec("mlflow") is None:
        raise ConfigError(
            f"log.mlflow = {options.mlflow!r}: needs MLflow; pip install 'tapfl[mlflow]'; or leave it empty"
        )
    try:
        found = client(options.mlflow).get_experiment_by_name(options.mlflow_experiment)
    except Exception as error:  # of many kinds, by what is at the URI
        raise ConfigError(
            f"log.mlflow = {options.mlflow!r}: cannot be used ({in_short(error)}); accepted: http(s)://HOST:PORT, "
            f"sqlite:////FOLDER/mlflow.db; or leave it empty"
        ) from None
    if found is not None and found.lifecycle_stage != "active":
        raise ConfigError(
            f"log.mlflow-experiment = {options.mlflow_experiment!r}: is there, but deleted; restore it or give another"
        )


def client(uri: str) -> Any:
    """Returns MLflow's client for a tracking URI; no state of this process is changed but its environment."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    from mlflow import MlflowClient

    for name in ("mlflow", "alembic"):  # a new database is worth no lines on the screen
        logging.getLogger(name).setLevel(logging.WARNING)
    return MlflowClient(tracking_uri=uri)


def in_short(error: Exception) -> str:
    """Returns what an exception says, in one line that is not endless."""
    said = " ".join(str(getattr(error, "orig", None) or error).split()) or type(error).__name__
    said = said.rpartition("Caused by ")[2].rstrip(")")  # of a request that failed, the part that says why
    return said if len(said) <= 200 else f"{said[:200]}…"


class Tracking:
    """A `Logger`. The hyperparameters are those with which the run began."""

    def __init__(self, folder: RunFolder, config: RunConfig, hyperparameters: Mapping[str, Scalar]) -> None:
        self._client = client(config.log.mlflow)
        self._file = folder.path / "mlflow.json"
        self._steps: dict[str, set[int]] = {}
        self._run_id, self._new = self._open(folder.path.name, config.log)
        self._name_run(hyperparameters)

    def has(self, tag: str, step: int) -> bool:
        if self._new:
            return False
        if tag not in self._steps:
            self._steps[tag] = {metric.step for metric in self._client.get_metric_history(self._run_id, tag)}
        return step in self._steps[tag]

    def add(self, points: Sequence[Point]) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        try:
            for part in _parts(points, METRICS_AT_ONCE):
                metrics = [Metric(tag, value, now, step) for tag, step, value in part]
                self._client.log_batch(self._run_id, metrics=metrics)
        except Exception:  # some of it may have arrived
            self._new, self._steps = False, {}
            raise

    def close(self, finished: bool) -> None:
        self._client.set_terminated(self._run_id, "FINISHED" if finished else "FAILED")

    def _open(self, name: str, options: LogOptions) -> tuple[str, bool]:
        """Returns the id of this run's MLflow run, and whether it was made just now."""
        place = {"uri": options.mlflow, "experiment": options.mlflow_experiment}
        kept = _read(self._file)
        if place.items() <= kept.items() and self._goes_on(kept["run"]):
            return kept["run"], False
        run = self._client.create_run(self._experiment(options.mlflow_experiment), run_name=name)
        write_json(self._file, place | {"run": run.info.run_id})
        return run.info.run_id, True

    def _goes_on(self, run_id: str) -> bool:
        """Takes up a run that is there; one that was deleted meanwhile is made anew."""
        from mlflow.exceptions import MlflowException

        try:
            if self._client.get_run(run_id).info.lifecycle_stage != "active":
                return False
        except MlflowException as error:
            if error.error_code == ABSENT:
                return False
            raise
        self._client.update_run(run_id, status="RUNNING")
        return True

    def _experiment(self, name: str) -> str:
        from mlflow.exceptions import MlflowException

        if (found := self._client.get_experiment_by_name(name)) is None:
            try:
                return str(self._client.create_experiment(name))
            except MlflowException:  # another run may have made it meanwhile
                found = self._client.get_experiment_by_name(name)
                if found is None:
                    raise
        return str(found.experiment_id)

    def _name_run(self, hyperparameters: Mapping[str, Scalar]) -> None:
        from mlflow.entities import Param

        there = {} if self._new else self._client.get_run(self._run_id).data.params
        params = [Param(name, str(value)) for name, value in hyperparameters.items() if name not in there]
        for part in _parts(params, PARAMS_AT_ONCE):
            self._client.log_batch(self._run_id, params=part)


def _read(file: Path) -> dict[str, str]:
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except OSError:
        return {}


def _parts(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]
