"""Loggers show a run's metrics in TensorBoard and MLflow. They cannot change or stop a run.

They read finished lines of metrics.jsonl: lines are brought only after the checkpoint that makes them final, because
a point cannot be taken back. A point is sent once; what an earlier part of the run sent is asked of the logger.
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

POSITION = ("kind", "round", "device")  # what says where a number belongs, and is none itself
DEVICE = "device-"
RESULTS = ("round/personal_accuracy", "round/global_accuracy")  # beside the hyperparameters
CURVES = ("personal_accuracy", "global_accuracy", "alpha", "next_loss", "simulated_seconds")  # of all devices in one
HPARAMS = "_hparams_/session_start_info"

# MLflow's client gives up quickly and sends no usage data, unless the environment says otherwise
ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_DISABLE_TELEMETRY": "true",
}
METRICS_AT_ONCE, PARAMS_AT_ONCE = 1000, 100  # what MLflow takes in a request


class Point(NamedTuple):
    """One number of one curve; the step is the round."""

    tag: str
    step: int
    value: float


Held = set[tuple[str, int]]  # (tag, step) of the points that a logger has


class Logger(Protocol):
    """Where points go. Any exception means that it cannot be reached; the run goes on without it."""

    def held(self) -> Held: ...  # the points that are there, also those of an earlier part of the run

    def add(self, points: Sequence[Point]) -> None: ...  # when it returns they are kept whatever becomes of the process

    def close(self, finished: bool) -> None: ...  # `finished`: whether the run came to its end


def require_loggers(options: LogOptions) -> None:
    """Raises ConfigError if a logger that is asked for is not installed, or cannot be reached."""
    if options.tensorboard and find_spec("tensorboard") is None:
        raise ConfigError(
            "log.tensorboard = true: needs TensorBoard; pip install 'tapfl[tensorboard]'; or leave it off"
        )
    if not options.mlflow:
        return
    option = f"log.mlflow = {options.mlflow!r}"
    if find_spec("mlflow") is None:
        raise ConfigError(f"{option}: needs MLflow; pip install 'tapfl[mlflow]'; or leave it empty")
    try:
        found = _client(options.mlflow).get_experiment_by_name(options.mlflow_experiment)
    except Exception as error:  # of many kinds, by what is at the URI
        raise ConfigError(
            f"{option}: cannot be used ({_in_short(error)}); accepted: http(s)://HOST:PORT, "
            f"sqlite:////FOLDER/mlflow.db; or leave it empty"
        ) from None
    if found is not None and found.lifecycle_stage != "active":
        raise ConfigError(
            f"log.mlflow-experiment = {options.mlflow_experiment!r}: exists, but is deleted; restore it or give another"
        )


@contextmanager
def loggers(config: RunConfig, folder: RunFolder) -> Iterator[Callable[[], None]]:
    """Opens the loggers that the options ask for. Yields what to call when lines of metrics.jsonl have become final."""
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
    """Brings one logger the lines that it lacks. One that fails is warned of once, and tried again, ever more rarely.

    Args:
        option: that asks for it, for the warning.
        open: makes it, or finds what an earlier part of the run made.
        folder: of the run.
    """

    def __init__(self, option: str, open: Callable[[], Logger], folder: RunFolder) -> None:
        self._option, self._open, self._folder = option, open, folder.path
        self._logger: Logger | None = None
        self._held: Held | None = None  # None: to be asked, as after a failure, when some points may have arrived
        self._brought = 0  # bytes of the file
        self._pause = self._left = 0  # calls of `bring` that are let pass after a failure, and how many still are

    def bring(self) -> None:
        """Brings all lines that there are."""
        if self._left:
            self._left -= 1
        else:
            self._try(self._bring)

    def close(self, finished: bool) -> None:
        """Brings what is missing, and ends the logger; lines of a run that broke off are not final, and not brought."""

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
        except Exception as error:  # of whatever kind: the run is worth more than its pictures
            if not self._pause:
                said = "%s: %s; the run continues without it, metrics.jsonl has everything, and it is tried again"
                log(logging.WARNING, said, self._option, _in_short(error))
            self._pause = self._left = 2 * self._pause or 1


def points_of(line: Line) -> list[Point]:
    """Returns the numbers of a line of metrics.jsonl.

    ```
    round    round/NAME                                          for every number of the line
    device   NAME/device-NN                                      the same
    drift    drift/device-NN                                     the same
    traffic  seconds, up, down: simulated_seconds/device-NN, ...  of the rounds; round zero has several phases
    ```

    Lines of other kinds (failures, absences) hold no numbers and give none.
    """
    values = line.model_dump(exclude=set(POSITION), exclude_none=True)
    numbers = {name: value for name, value in values.items() if isinstance(value, int | float)}
    match line:
        case RoundLine():
            return [Point(f"round/{name}", line.round, value) for name, value in numbers.items()]
        case TrafficLine() if line.round:
            numbers |= {"bytes_up": sum(line.up.values()), "bytes_down": sum(line.down.values())}
        case DeviceLine() | DriftLine():
            pass
        case _:
            return []
    return [Point(f"{name}/{DEVICE}{line.device:02d}", line.round, value) for name, value in numbers.items()]


def hyperparameters(config: RunConfig) -> dict[str, Scalar]:
    """Returns the options that can change a result, without those that name a file or a folder of this machine."""
    paths = config.paths()
    return {
        name: value for name, value in config.flat().items() if not name.startswith(FREE_OPTIONS) and name not in paths
    }


class EventFiles:
    """A `Logger`. TensorBoard shows one card a tag, and under CUSTOM SCALARS the curves of all devices in one."""

    def __init__(self, folder: RunFolder, config: RunConfig) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._path = folder.path / "tensorboard"
        named = self._path.is_dir() and HPARAMS in self._events().summary_metadata
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

        return EventAccumulator(str(self._path), size_guidance={"scalars": 0}).Reload()  # 0: all of them

    def _name_run(self, config: RunConfig) -> None:
        """Writes the hyperparameters into the run's own files: `add_hparams` would make a second run of them."""
        from torch.utils.tensorboard.summary import hparams

        for summary in hparams(hyperparameters(config), dict.fromkeys(RESULTS, 0.0)):
            self._writer._get_file_writer().add_summary(summary)
        charts = {name: ["Multiline", [f"{name}/{DEVICE}.*"]] for name in CURVES}
        self._writer.add_custom_scalars({"devices": charts})


class Tracking:
    """A `Logger`: a run on an MLflow server, found again by its id in ``mlflow.json``.

    The hyperparameters are those with which the run began; models and other files are not sent.
    """

    def __init__(self, folder: RunFolder, config: RunConfig) -> None:
        from mlflow.entities import Param

        self._client = _client(config.log.mlflow)
        self._run_id = self._open(folder, config.log)
        there = self._client.get_run(self._run_id).data.params
        params = [Param(name, str(value)) for name, value in hyperparameters(config).items() if name not in there]
        for start in range(0, len(params), PARAMS_AT_ONCE):
            self._client.log_batch(self._run_id, params=params[start : start + PARAMS_AT_ONCE])

    def held(self) -> Held:
        tags = self._client.get_run(self._run_id).data.metrics
        return {(tag, each.step) for tag in tags for each in self._client.get_metric_history(self._run_id, tag)}

    def add(self, points: Sequence[Point]) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        metrics = [Metric(tag, value, now, step) for tag, step, value in points]
        for start in range(0, len(metrics), METRICS_AT_ONCE):
            self._client.log_batch(self._run_id, metrics=metrics[start : start + METRICS_AT_ONCE])

    def close(self, finished: bool) -> None:
        self._client.set_terminated(self._run_id, "FINISHED" if finished else "FAILED")

    def _open(self, folder: RunFolder, options: LogOptions) -> str:
        """Returns the id of this run's MLflow run, a new one if there was none or it was deleted."""
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
    """Returns MLflow's client for a tracking URI; no state of this process is changed but its environment."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    from mlflow import MlflowClient

    for name in ("mlflow", "alembic"):  # a new database is worth no lines on the screen
        logging.getLogger(name).setLevel(logging.WARNING)
    return MlflowClient(tracking_uri=uri)


def _in_short(error: Exception) -> str:
    said = " ".join(str(getattr(error, "orig", None) or error).split()) or type(error).__name__
    said = said.rpartition("Caused by ")[2].rstrip(")")  # of a request that failed, the part that says why
    return said if len(said) <= 200 else f"{said[:200]}…"
