"""A process and all that came from it: its CPU time and memory as Linux counts them, and its end."""

from __future__ import annotations

import os
import signal
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class _Process:
    """What /proc/PID/stat says; seconds include those of children that ended and were waited for."""

    pid: int
    parent: int
    started: int
    seconds: float


class ProcessTree:
    """The processes below `root`, itself included, as they are at each call."""

    def __init__(self, root: int) -> None:
        self.root = root
        self._seen: dict[int, int] = {}

    def processes(self) -> list[_Process]:
        """Returns those that are alive, parents before their children."""
        children: dict[int, list[_Process]] = {}
        for folder in Path("/proc").glob("[0-9]*"):
            if process := _read(int(folder.name)):
                children.setdefault(process.parent, []).append(process)
        root = _read(self.root)
        found = [root] if root else []
        for process in found:
            found.extend(children.get(process.pid, []))
        self._seen |= {process.pid: process.started for process in found}
        return found

    def cpu_seconds(self) -> float:
        """Returns user and system time of all of them, and of those that have ended."""
        return sum(process.seconds for process in self.processes())

    def memory_bytes(self) -> int:
        """Returns their proportional set size: pages that several of them share count once."""
        return sum(_pss(process.pid) for process in self.processes())

    def root_bytes(self) -> int:
        """Returns that of the first alone."""
        return _pss(self.root)

    def end(self, patience: float = 10.0) -> None:
        """Ends whatever of the tree is alive, also what lost its parent since it was last seen."""
        self.processes()
        for number in (signal.SIGTERM, signal.SIGKILL):
            for pid in self._alive():
                with suppress(ProcessLookupError):
                    os.kill(pid, number)
            until = time.monotonic() + patience
            while self._alive() and time.monotonic() < until:
                time.sleep(0.05)

    def _alive(self) -> list[int]:
        """The processes seen so far that are there; one that only took the number of another is not among them."""
        now = {pid: _read(pid) for pid in self._seen}
        return [pid for pid, process in now.items() if process and process.started == self._seen[pid]]


def _read(pid: int) -> _Process | None:
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    fields = text.rpartition(")")[2].split()  # the name before may hold blanks; state is the first field after it
    if fields[0] in "ZX":
        return None
    return _Process(pid, int(fields[1]), int(fields[19]), sum(map(int, fields[11:15])) / TICKS)


def _pss(pid: int) -> int:
    with suppress(OSError):
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    return 0
