"""Loggers show a run's metrics elsewhere: TensorBoard here, MLflow in `strategies.tracking`.

They get the lines of metrics.jsonl only; they change nothing of a run, and cannot stop it. Lines are brought
once a checkpoint has made them final, so nothing has ever to be taken back. What a logger lacks is read from the file.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple, Protocol

from flwr.common.logger import log

from strategies.records import DeviceLine, Line, RoundLine, TrafficLine, read_metrics
from strategies.tracking import Tracking, in_short, require_tracking
from tapfl.config import FREE_OPTIONS, LogOptions, RunConfig
from tapfl.errors import ConfigError
from tapfl.options import Scalar
from tapfl.store import RunFolder

POSITION = ("kind", "round", "device")  # what says where a number belongs, and is none itself
DEVICE = "device-"
RESULTS = ("round/personal_accuracy", "round/global_accuracy")  # beside the hyperparameters
CURVES = ("personal_accuracy", "global_accuracy", "alpha", "next_loss", "simulated_seconds")  # of all devices in one
HPARAMS = "_hparams_/session_start_info"


def require_loggers(options: LogOptions) -> None:
    """Raises ConfigError if a logger that is asked for is not installed, or cannot be reached."""
    if options.tensorboard:
        require_event_files()
    if options.mlflow:
        require_tracking(options)


@contextmanager
def loggers(config: RunConfig, folder: RunFolder) -> Iterator[Callable[[], None]]:
    """Opens the loggers that the options ask for. Gives what to call when lines of metrics.jsonl have become final."""
    feeds: list[Feed] = []
    if config.log.tensorboard:
        feeds.append(Feed("log.tensorboard", partial(EventFiles, folder, config), folder.path))
    if config.log.mlflow:
        feeds.append(Feed("log.mlflow", partial(Tracking, folder, config, hyperparameters(config)), folder.path))

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

    def __init__(self, option: str, open: Callable[[], Logger], folder: Path) -> None:
        self._option, self._open, self._folder = option, open, folder
        self._logger: Logger | None = None
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
        if self._logger is None:
            self._logger = self._open()
        metrics = read_metrics(self._folder, self._brought)
        points = [point for line in metrics.lines for point in points_of(line)]
        if lacking := [point for point in points if not self._logger.has(point.tag, point.step)]:
            self._logger.add(lacking)
        self._brought = metrics.end

    def _try(self, act: Callable[[], None]) -> None:
        try:
            act()
        except Exception as error:  # of whatever kind: the run is worth more than its pictures
            if not self._pause:
                said = "%s: %s; the run goes on without, metrics.jsonl has all of it, and it is tried again"
                log(logging.WARNING, said, self._option, in_short(error))
            self._pause = self._left = 2 * self._pause or 1


class Point(NamedTuple):
    """One number of one curve; the step is the round."""

    tag: str
    step: int
    value: float


def points_of(line: Line) -> list[Point]:
    """Returns the numbers of a line of metrics.jsonl.

    ```
    round    round/NAME                                          for every number of the line
    device   NAME/device-NN                                      the same
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
        case DeviceLine():
            pass
        case _:
            return []
    return [Point(f"{name}/{DEVICE}{line.device:02d}", line.round, value) for name, value in numbers.items()]


class Logger(Protocol):
    """Where points go. Any exception means that it cannot be reached; the run goes on without it."""

    def has(self, tag: str, step: int) -> bool:
        """Says whether that point is there, also if an earlier part of the run brought it."""
        ...

    def add(self, points: Sequence[Point]) -> None:
        """Keeps points; when it returns they are kept whatever becomes of this process."""
        ...

    def close(self, finished: bool) -> None:
        """Ends it; `finished` says whether the run came to its end."""
        ...


def hyperparameters(config: RunConfig) -> dict[str, Scalar]:
    """Returns the options that can change a result, without those that name a file or a folder of this machine."""
    paths = config.paths()
    return {
        name: value for name, value in config.flat().items() if not name.startswith(FREE_OPTIONS) and name not in paths
    }


def require_event_files() -> None:
    """Raises ConfigError without the extra `tensorboard`."""
    if find_spec("tensorboard") is None:
        raise ConfigError(
            "log.tensorboard = true: needs TensorBoard; pip install 'tapfl[tensorboard]'; or leave it off"
        )


class EventFiles:
    """A `Logger`. TensorBoard shows one card a tag, and under CUSTOM SCALARS the curves of all devices in one."""

    def __init__(self, folder: RunFolder, config: RunConfig) -> None:
        from torch.utils.tensorboard import SummaryWriter

        path = folder.path / "tensorboard"
        self._there, named = _held(path)
        self._writer = SummaryWriter(str(path))
        if not named:
            self._name_run(config)

    def has(self, tag: str, step: int) -> bool:
        return (tag, step) in self._there

    def add(self, points: Sequence[Point]) -> None:
        for point in points:
            self._writer.add_scalar(point.tag, point.value, point.step)
        self._writer.flush()

    def close(self, finished: bool) -> None:
        self._writer.close()

    def _name_run(self, config: RunConfig) -> None:
        """Writes the hyperparameters into the run's own files: `add_hparams` would make a second run of them."""
        from torch.utils.tensorboard.summary import hparams

        for summary in hparams(hyperparameters(config), dict.fromkeys(RESULTS, 0.0)):
            self._writer._get_file_writer().add_summary(summary)
        charts = {name: ["Multiline", [f"{name}/{DEVICE}.*"]] for name in CURVES}
        self._writer.add_custom_scalars({"devices": charts})


def _held(path: Path) -> tuple[set[tuple[str, int]], bool]:
    """Returns the points that event files hold, as (tag, step), and whether the hyperparameters are among them."""
    if not path.is_dir():
        return set(), False
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(path), size_guidance={"scalars": 0})  # 0: all of them
    events.Reload()
    scalars = {(tag, event.step) for tag in events.Tags()["scalars"] for event in events.Scalars(tag)}
    return scalars, HPARAMS in events.summary_metadata
