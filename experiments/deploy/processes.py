"""Starts, monitors and ends the processes of a deployment, including the processes that they start themselves."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import NoReturn

import psutil

from tapfl.errors import RunError

MARK = "TAPFL_DEPLOYMENT"  # environment variable of every process of a deployment; child processes inherit it
PATIENCE = 10.0  # seconds between SIGTERM and SIGKILL
LINES = 15


class Processes:
    """The processes of one deployment. Each logs to a file in its own folder.

    Flower's SuperLink and SuperNodes start further processes, some in their own sessions. All of them are found by the
    variable `MARK` in their environment, whose value is `mark`.
    """

    def __init__(self, mark: str) -> None:
        self.mark = mark
        self._started: dict[subprocess.Popen[bytes], Path] = {}

    def start(self, command: Sequence[str], environment: Mapping[str, str], folder: Path) -> subprocess.Popen[bytes]:
        """Starts a process in `folder`. Its output goes to a file there, named after the program."""
        log = folder / f"{Path(command[0]).name}.log"
        with log.open("ab") as file:
            process = subprocess.Popen(
                command,
                cwd=folder,
                env={**environment, MARK: self.mark},
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C reaches only the parent, which then ends them in order
            )
        self._started[process] = log
        return process

    def output(self, process: subprocess.Popen[bytes]) -> str:
        """Returns the output of a process so far."""
        return self._started[process].read_text(encoding="utf-8", errors="replace")

    def wait(self, process: subprocess.Popen[bytes], limit: float) -> int | None:
        """Waits for a process to end and returns its exit code, or None after `limit` seconds.

        Raises:
            RunError: if another process ends meanwhile.
        """
        end = time.monotonic() + limit
        while process.poll() is None and time.monotonic() < end:
            self.require_alive(but=process)
            time.sleep(0.2)
        return process.poll()

    def require_alive(self, but: subprocess.Popen[bytes] | None = None) -> None:
        """Raises RunError with the last lines of its log if a started process other than `but` has ended."""
        for process in self._started:
            if process is not but and process.poll() is not None:
                last = "\n".join(self.output(process).splitlines()[-LINES:])
                raise RunError(f"{Path(str(process.args[0])).name} ended with {process.returncode}:\n{last}")  # type: ignore[index]

    def end(self, process: subprocess.Popen[bytes]) -> Path:
        """Ends one process and returns its log. Child processes that survive it are ended by `end_all`."""
        process.terminate()
        try:
            process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        return self._started.pop(process)

    def left(self) -> list[int]:
        """Returns the ids of all living processes of this deployment."""
        return [process.pid for process in self._marked()]

    def end_all(self) -> None:
        """Ends the started processes, the last one first, then all other processes of the deployment."""
        for started in reversed(self._started):
            started.terminate()
        _wait_until(lambda: all([process.poll() is not None for process in self._started]))  # noqa: C419 (polls each)
        end_processes(self._marked)
        self._started.clear()

    def _marked(self) -> list[psutil.Process]:
        found = []
        for started in self._started:
            started.poll()  # reaps it if it has ended
        for process in psutil.process_iter():
            with suppress(psutil.Error):  # it has ended meanwhile, is a zombie, or belongs to another user
                if process.environ().get(MARK) == self.mark:
                    found.append(process)
        return found


@contextmanager
def processes(mark: str) -> Iterator[Processes]:
    """Yields the processes of a deployment and ends all of them after the block, also after an error or a signal."""
    running = Processes(mark)
    before = {number: signal.signal(number, _leave) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield running
    finally:
        before[signal.SIGINT] = signal.getsignal(signal.SIGINT)
        for number in before:
            signal.signal(number, signal.SIG_IGN)  # a second Ctrl-C must not leave some of them running
        running.end_all()
        for number, handler in before.items():
            signal.signal(number, handler)


def end_processes(find: Callable[[], list[psutil.Process]]) -> None:
    """Ends the processes that `find` returns: SIGTERM, then SIGKILL for those left after `PATIENCE` seconds."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        for process in find():
            with suppress(psutil.NoSuchProcess):
                process.send_signal(number)
        _wait_until(lambda: not find())


def _wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE
    while not condition() and time.monotonic() < end:
        time.sleep(0.1)


def _leave(number: int, frame: FrameType | None) -> NoReturn:
    sys.exit(128 + number)
