"""Start-up time of a command that computes nothing: the help, and an option that is refused."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence

import numpy as np

from experiments.bench.timing import Repeats, Row
from experiments.output import command
from tapfl.errors import RunError

COMMANDS = (("--help",), ("run", "--set", "train.rounds=many"))


def start(repeats: Repeats = 5) -> Iterator[Row]:
    """Wall and CPU seconds of commands that compute nothing, compared with a Python that does nothing."""
    arguments = {"python -c pass": ("-c", "pass")}
    arguments |= {command(*parts): ("-m", "experiments.cli", *parts) for parts in COMMANDS}
    taken = {name: np.array([_seconds(parts) for _ in range(repeats + 1)])[1:] for name, parts in arguments.items()}
    for name, seconds in taken.items():
        wall, cpu = np.median(seconds, axis=0)
        yield {"command": name, "wall s": f"{wall:.2f}", "CPU s": f"{cpu:.2f}"}


def _seconds(arguments: Sequence[str]) -> tuple[float, float]:
    """Returns wall and CPU seconds of Python with these arguments."""
    before, began = os.times(), time.monotonic()
    ended = subprocess.run([sys.executable, *arguments], capture_output=True, text=True)
    wall, after = time.monotonic() - began, os.times()
    if ended.returncode not in (0, 2):
        raise RunError(f"{' '.join(arguments)}: ended with {ended.returncode}: {ended.stderr[-200:]}")
    used = after.children_user + after.children_system - before.children_user - before.children_system
    return wall, used
