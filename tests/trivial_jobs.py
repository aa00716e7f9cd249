"""Jobs for the tests of pools, and a command that executes some."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

from experiments.jobs.pool import Emit, Job, ProcessPool, interruptible
from tapfl.errors import ConfigError


def doubled(emit: Emit, number: int) -> int:
    for part in range(number):
        emit(part)
    print(f"doubling {number}", flush=True)
    return 2 * number


def refused(emit: Emit) -> None:
    raise ConfigError("budget = 1.7: must lie in (0, 1]")


def broken(emit: Emit) -> None:
    raise LookupError("not there")


def on_a_full_disk(emit: Emit) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/data/state")


def worker(emit: Emit) -> int:
    """Returns the id of this process."""
    return os.getpid()


def dying(emit: Emit, file: Path, times: int) -> int:
    """Kills its process `times` times, and then returns how often it was started."""
    with file.open("a") as begun:
        begun.write("x")
    if len(file.read_text()) <= times:
        os.kill(os.getpid(), signal.SIGKILL)
    return len(file.read_text())


def with_a_child(emit: Emit, file: Path) -> None:
    """Runs forever, in a process of its own."""
    child = subprocess.Popen(["sleep", "600"])
    try:
        file.touch()
        child.wait()
    finally:
        child.kill()


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    with interruptible(), closing(ProcessPool(2)) as pool:
        for number in range(3):
            pool.submit(Job(with_a_child, (folder / str(number),), folder / f"{number}.log"))
        time.sleep(600)
