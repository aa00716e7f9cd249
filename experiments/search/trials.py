"""Where the runs of a search are carried out: the one thing that an engine has to offer."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from tapfl.errors import RunError
from tapfl.options import Scalar


@dataclass(frozen=True)
class Job:
    """One rung of one configuration.

    Attributes:
        options: of the run, dotted, without its folder and its rounds.
        folder: of the run; one that is there goes on from its checkpoint.
        rounds: after which it is to end.
    """

    options: Mapping[str, Scalar]
    folder: Path
    rounds: int


def run_folder(folder: Path, number: int) -> Path:
    """Returns where the run of a trial is."""
    return folder / f"{number:04d}"


class EngineLostError(RunError):
    """Nothing is left that could carry a trial out, which is no configuration's fault: the search ends."""


class Trials(Protocol):
    """Carries out jobs, several at once."""

    def submit(self, job: Job) -> Future[dict[str, float]]:
        """Starts a job as soon as there is room; its result are the measures of `objective.measures_of`.

        The future raises a TapflError if the run failed, which is the configuration's fault; `EngineLostError`, and
        anything else, ends the search.
        """

    def close(self) -> None:
        """Ends whatever is at work, at once. A run that is ended goes on from its checkpoint another time."""
