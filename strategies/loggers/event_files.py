"""TensorBoard: event files in the run's folder, under `tensorboard`.

A run that goes on adds a file to those that are there, which TensorBoard reads as one. Points that they hold already
are not written again, so nothing has to be purged.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from strategies.loggers.logger import hyperparameters
from strategies.loggers.points import DEVICE, Point
from tapfl.config import RunConfig
from tapfl.errors import ConfigError
from tapfl.store import RunFolder

RESULTS = ("round/personal_accuracy", "round/global_accuracy")  # beside the hyperparameters
CURVES = ("personal_accuracy", "global_accuracy", "alpha", "next_loss", "simulated_seconds")  # of all devices in one
HPARAMS = "_hparams_/session_start_info"


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
