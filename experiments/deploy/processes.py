"""Processes that are started, watched and ended as one: by their ids, whatever they start in turn, however it goes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import NoReturn

from tapfl.errors import RunError

MARK = "TAPFL_DEPLOYMENT"  # in the environment of all that is started, and of whatever that starts
PATIENCE = 10.0  # seconds between being asked to end and being made to
LINES = 15


class Processes:
    """The processes of one deployment, each with a log in a folder of its own.

    Flower's SuperLink and SuperNodes start further processes, some in sessions of their own. What belongs to this
    deployment is therefore known by a mark in its environment, which Linux shows under ``/proc``.
    """

    def __init__(self, mark: str) -> None:
        self.mark = mark
        self._started: dict[subprocess.Popen[bytes], Path] = {}

    def start(self, command: Sequence[str], environment: Mapping[str, str], folder: Path) -> subprocess.Popen[bytes]:
        """Starts a process in `folder`; what it says goes to a file there, named after the program."""
        log = folder / f"{Path(command[0]).name}.log"
        with log.open("ab") as file:
            process = subprocess.Popen(
                command,
                cwd=folder,
                env={**environment, MARK: self.mark},
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C is for the one who started them, who then ends them in order
            )
        self._started[process] = log
        return process

    def said(self, process: subprocess.Popen[bytes]) -> str:
        """Returns all that a process has said so far."""
        return self._started[process].read_text(encoding="utf-8", errors="replace")

    def wait(self, process: subprocess.Popen[bytes], limit: float) -> int | None:
        """Waits for a process to end and returns its exit code; None after `limit` seconds.

        Raises:
            RunError: as `require_alive`, for all others.
        """
        end = time.monotonic() + limit
        while process.poll() is None and time.monotonic() < end:
            self.require_alive(but=process)
            time.sleep(0.2)
        return process.poll()

    def require_alive(self, but: subprocess.Popen[bytes] | None = None) -> None:
        """Raises RunError, with its last words, if a process that was started (`but` that one) has ended."""
        for process in self._started:
            if process is not but and process.poll() is not None:
                last = "\n".join(self.said(process).splitlines()[-LINES:])
                raise RunError(f"{Path(str(process.args[0])).name} ended with {process.returncode}:\n{last}")  # type: ignore[index]

    def end(self, process: subprocess.Popen[bytes]) -> Path:
        """Ends one process and forgets it; returns its log. What it started ends with it, or in `end_all`."""
        process.terminate()
        try:
            process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        return self._started.pop(process)

    def left(self) -> list[int]:
        """Returns the ids of all processes that carry the mark, zombies not counted."""
        needle = f"{MARK}={self.mark}".encode()
        found = []
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                if needle in (entry / "environ").read_bytes().split(b"\0"):
                    found.append(int(entry.name))
            except OSError:  # gone since, or not ours
                continue
        return found

    def end_all(self) -> None:
        """Ends the processes, the last started first, then whatever else carries the mark."""
        for process in reversed(self._started):
            process.terminate()
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end and self._reap():
            time.sleep(0.1)
        for force in (signal.SIGTERM, signal.SIGKILL):
            end = time.monotonic() + PATIENCE
            for pid in self.left():
                _signal(pid, force)
            while time.monotonic() < end and (self.left() or self._reap()):
                time.sleep(0.1)
        self._started.clear()

    def _reap(self) -> bool:
        return any([process.poll() is None for process in self._started])  # noqa: C419 (all of them are asked)


def _signal(pid: int, number: int) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return


@contextmanager
def processes(mark: str) -> Iterator[Processes]:
    """Gives the processes of one deployment, which end with the block: well, badly, or by a signal."""
    running = Processes(mark)
    before = {number: signal.signal(number, _leave) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield running
    finally:
        before[signal.SIGINT] = signal.getsignal(signal.SIGINT)
        for number in before:
            signal.signal(number, signal.SIG_IGN)  # a second Ctrl-C must not leave half of them behind
        running.end_all()
        for number, handler in before.items():
            signal.signal(number, handler)


def _leave(number: int, frame: FrameType | None) -> NoReturn:
    sys.exit(128 + number)
