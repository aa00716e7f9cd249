"""Loggers show a run's metrics in TensorBoard and MLflow. They cannot change or stop a run.

They read metrics.jsonl, and only lines that a checkpoint has made final, because a point cannot be deleted after it
was sent. Each point is sent once: after a resume the logger is asked which points it has.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from typing import Any, NamedTuple, Protocol

from flwr.common.logger import log

from strategies.records import DeviceLine, DriftLine, Line, RoundLine, TrafficLine, read_metrics
from tapfl.config import FREE_OPTIONS, LogOptions, RunConfig
from tapfl.errors import ConfigError
from tapfl.options import Scalar
from tapfl.run_folder import RunFolder
from tapfl.store import write_json

POSITION = ("kind", "round", "device")  # fields of a line that locate its numbers and are not logged themselves
DEVICE = "device-"
RESULTS = ("round/personal_accuracy", "round/global_accuracy")  # shown in TensorBoard's table of hyperparameters
CURVES = ("personal_accuracy", "global_accuracy", "alpha", "next_loss", "simulated_seconds")  # charts of all devices
HPARAMS = "_hparams_/session_start_info"

# MLflow's client gives up quickly and sends no usage data, unless the environment says otherwise
ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_DISABLE_TELEMETRY": "true",
}
METRICS_AT_ONCE, PARAMS_AT_ONCE = 1000, 100  # MLflow's limits per request


class Point(NamedTuple):
    """One value of a curve; the step is the round."""

    tag: str
    step: int
    value: float


Held = set[tuple[str, int]]  # (tag, step) of the points that a logger has


class Logger(Protocol):
    """A destination of points. Any exception means that it cannot be reached, and the run continues without it."""

    def held(self) -> Held: ...  # the points that it has, including those from before the run was resumed

    def add(self, points: Sequence[Point]) -> None: ...  # once this returns, the points survive a crash of the process

    def close(self, finished: bool) -> None: ...  # `finished`: whether the run is finished


def require_loggers(options: LogOptions) -> None:
    """Raises ConfigError if a logger in the options is not installed, or cannot be reached."""
    if options.tensorboard and find_spec("tensorboard") is None:
        raise ConfigError(
            "log.tensorboard = true: needs TensorBoard, of the extra tapfl[tensorboard]; or set it to false"
        )
    if not options.mlflow:
        return
    option = f"log.mlflow = {options.mlflow!r}"
    if find_spec("mlflow") is None:
        raise ConfigError(f"{option}: needs MLflow, of the extra tapfl[mlflow]; or leave it empty")
    try:
        found = _client(options.mlflow).get_experiment_by_name(options.mlflow_experiment)
    except Exception as error:  # its type depends on what is at the URI
        raise ConfigError(
            f"{option}: cannot be used ({_in_short(error)}); accepted: http(s)://HOST:PORT, "
            f"sqlite:////FOLDER/mlflow.db, or leave it empty"
        ) from None
    if found is not None and found.lifecycle_stage != "active":
        raise ConfigError(
            f"log.mlflow-experiment = {options.mlflow_experiment!r}: exists, but is deleted; restore it or give another"
        )


@contextmanager
def loggers(config: RunConfig, folder: RunFolder) -> Iterator[Callable[[], None]]:
    """Opens the loggers in the options. Yields a function to call whenever lines of metrics.jsonl have become final."""
    asked = (("log.tensorboard", config.log.tensorboard, EventFiles), ("log.mlflow", config.log.mlflow, Tracking))
    feeds = [Feed(option, partial(logger, folder, config), folder) for option, wanted, logger in asked if wanted]

    def bring() -> None:
        for feed in feeds:
            feed.bring()

    finished = False
    bring()
    try:
        yield bring
        finished = True
    finally:
        for feed in feeds:
            feed.close(finished)


class Feed:
    """Sends a logger the points that it does not have yet.

    If the logger fails, a warning is logged once, and later calls try again at growing intervals.

    Args:
        option: name of the option that enables the logger, for the warning.
        open: creates the logger, or reopens the one from before the run was resumed.
        folder: the run's folder.
    """

    def __init__(self, option: str, open: Callable[[], Logger], folder: RunFolder) -> None:
        self._option, self._open, self._folder = option, open, folder.path
        self._logger: Logger | None = None
        self._held: Held | None = None  # None: ask the logger; after a failure too, as some points may have arrived
        self._brought = 0  # bytes of metrics.jsonl that were sent
        self._pause = self._left = 0  # calls of `bring` to skip after a failure: in total, and still to come

    def bring(self) -> None:
        """Sends all lines of metrics.jsonl that were not sent yet."""
        if self._left:
            self._left -= 1
        else:
            self._try(self._bring)

    def close(self, finished: bool) -> None:
        """Closes the logger. If the run is finished, its last lines are sent first; otherwise they are not final."""

        def end() -> None:
            if finished:
                self._bring()
            if self._logger is not None:
                self._logger.close(finished)

        self._try(end)

    def _bring(self) -> None:
        logger = self._logger = self._logger or self._open()
        held, self._held = logger.held() if self._held is None else self._held, None
        metrics = read_metrics(self._folder, self._brought)
        points = [point for line in metrics.lines for point in points_of(line)]
        if lacking := [point for point in points if (point.tag, point.step) not in held]:
            logger.add(lacking)
        self._held, self._brought = held, metrics.end

    def _try(self, act: Callable[[], None]) -> None:
        try:
            act()
        except Exception as error:  # of any type: a logger must not stop the run
            if not self._pause:
                warning = "%s: %s; the run continues without this logger and tries again; metrics.jsonl has all values"
                log(logging.WARNING, warning, self._option, _in_short(error))
            self._pause = self._left = 2 * self._pause or 1


def points_of(line: Line) -> list[Point]:
    """Returns the points of a line of metrics.jsonl, by its kind:

    ```
    round    round/NAME for every number of the line
    device   NAME/device-NN for every number of the line
    drift    drift/device-NN
    traffic  simulated_seconds/device-NN, bytes_up/device-NN, bytes_down/device-NN, of training and the evaluation;
             not of messages in round zero and between rounds, of which a round has several
    ```

    Lines of other kinds (failures, absences) have no numbers and give no points.
    """
    values = line.model_dump(exclude=set(POSITION), exclude_none=True)
    numbers = {name: value for name, value in values.items() if isinstance(value, int | float)}
    match line:
        case RoundLine():
            return [Point(f"round/{name}", line.round, value) for name, value in numbers.items()]
        case TrafficLine() if line.phase in (f"round {line.round}", "evaluation"):
            numbers |= {"bytes_up": sum(line.up.values()), "bytes_down": sum(line.down.values())}
        case DeviceLine() | DriftLine():
            pass
        case _:
            return []
    return [Point(f"{name}/{DEVICE}{line.device:02d}", line.round, value) for name, value in numbers.items()]


def hyperparameters(config: RunConfig) -> dict[str, Scalar]:
    """Returns the options that can change a result, except those that name a file or folder of this machine."""
    paths = config.paths()
    return {
        name: value for name, value in config.flat().items() if not name.startswith(FREE_OPTIONS) and name not in paths
    }


class EventFiles:
    """The `Logger` of TensorBoard: one chart per tag, and under CUSTOM SCALARS charts with all devices' curves."""

    def __init__(self, folder: RunFolder, config: RunConfig) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._path = folder.path / "tensorboard"
        named = self._path.is_dir() and HPARAMS in self._events().summary_metadata
        if any(self._path.glob(f"events.out.tfevents.{int(time.time()):010d}.*")):
            time.sleep(1)  # event files are read in the order of their names, which begin with the second of opening
        self._writer = SummaryWriter(str(self._path))
        if not named:
            self._name_run(config)

    def held(self) -> Held:
        events = self._events()
        return {(tag, event.step) for tag in events.Tags()["scalars"] for event in events.Scalars(tag)}

    def add(self, points: Sequence[Point]) -> None:
        for point in points:
            self._writer.add_scalar(point.tag, point.value, point.step)
        self._writer.flush()

    def close(self, finished: bool) -> None:
        self._writer.close()

    def _events(self) -> Any:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        return EventAccumulator(str(self._path), size_guidance={"scalars": 0}).Reload()  # 0: all points

    def _name_run(self, config: RunConfig) -> None:
        """Writes the hyperparameters into the files of this run; `add_hparams` would create a second run for them."""
        from torch.utils.tensorboard.summary import hparams

        for summary in hparams(hyperparameters(config), dict.fromkeys(RESULTS, 0.0)):
            self._writer._get_file_writer().add_summary(summary)
        charts = {name: ["Multiline", [f"{name}/{DEVICE}.*"]] for name in CURVES}
        self._writer.add_custom_scalars({"devices": charts})


class Tracking:
    """The `Logger` of MLflow: a run on a tracking server, whose id is kept in ``mlflow.json`` for a resume.

    The hyperparameters are those with which the run began. Models and other files are not sent.
    """

    def __init__(self, folder: RunFolder, config: RunConfig) -> None:
        from mlflow.entities import Param

        self._client = _client(config.log.mlflow)
        self._run_id = self._open(folder, config.log)
        logged = self._client.get_run(self._run_id).data.params
        params = [Param(name, str(value)) for name, value in hyperparameters(config).items() if name not in logged]
        for start in range(0, len(params), PARAMS_AT_ONCE):
            self._client.log_batch(self._run_id, params=params[start : start + PARAMS_AT_ONCE])

    def held(self) -> Held:
        tags = self._client.get_run(self._run_id).data.metrics
        return {(tag, point.step) for tag in tags for point in self._client.get_metric_history(self._run_id, tag)}

    def add(self, points: Sequence[Point]) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        metrics = [Metric(tag, value, now, step) for tag, step, value in points]
        for start in range(0, len(metrics), METRICS_AT_ONCE):
            self._client.log_batch(self._run_id, metrics=metrics[start : start + METRICS_AT_ONCE])

    def close(self, finished: bool) -> None:
        self._client.set_terminated(self._run_id, "FINISHED" if finished else "FAILED")

    def _open(self, folder: RunFolder, options: LogOptions) -> str:
        """Returns the id of the MLflow run, which is created if there was none or it was deleted."""
        file = folder.path / "mlflow.json"
        place = {"uri": options.mlflow, "experiment": options.mlflow_experiment}
        kept = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
        if place.items() <= kept.items() and self._is_active(kept["run"]):
            self._client.update_run(kept["run"], status="RUNNING")
            return str(kept["run"])
        run = self._client.create_run(self._experiment(options.mlflow_experiment), run_name=folder.path.name)
        write_json(file, place | {"run": run.info.run_id})
        return str(run.info.run_id)

    def _is_active(self, run_id: str) -> bool:
        try:
            return bool(self._client.get_run(run_id).info.lifecycle_stage == "active")
        except Exception as error:
            if getattr(error, "error_code", None) != "RESOURCE_DOES_NOT_EXIST":
                raise
            return False

    def _experiment(self, name: str) -> str:
        try:
            return str(self._client.create_experiment(name))
        except Exception as error:
            if getattr(error, "error_code", None) != "RESOURCE_ALREADY_EXISTS":
                raise
            return str(self._client.get_experiment_by_name(name).experiment_id)


def _client(uri: str) -> Any:
    """Returns MLflow's client for a tracking URI. Of this process it changes only the environment and log levels."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    from mlflow import MlflowClient

    for name in ("mlflow", "alembic"):  # they log the creation of a database
        logging.getLogger(name).setLevel(logging.WARNING)
    return MlflowClient(tracking_uri=uri)


def _in_short(error: Exception) -> str:
    text = " ".join(str(getattr(error, "orig", None) or error).split()) or type(error).__name__
    text = text.rpartition("Caused by ")[2].rstrip(")")  # the cause, if a request failed
    return text if len(text) <= 200 else f"{text[:200]}…"
