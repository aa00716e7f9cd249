"""Trials in worker processes of this machine, each of one thread, which live as long as the search.

A worker that is lost is started anew, and its job is given to the new one. None outlives this process, however that
ends.
"""

from __future__ import annotations

import multiprocessing
import os
import queue
import signal
import sys
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from pathlib import Path

from experiments.search.trials import Job
from tapfl.errors import RunError, TapflError

LOST = 3  # so many workers may be lost over one job
SPAWN = multiprocessing.get_context("spawn")


class Worker:
    """A process that carries out one job after another."""

    def __init__(self) -> None:
        self._ours, theirs = SPAWN.Pipe()
        self._process: SpawnProcess = SPAWN.Process(target=_serve, args=(theirs,), daemon=True)
        self._process.start()
        theirs.close()  # or a worker's end would not be noticed

    def __call__(self, job: Job) -> dict[str, float]:
        """Raises EOFError or OSError if the worker is lost."""
        self._ours.send(job)
        result = self._ours.recv()
        if isinstance(result, BaseException):
            raise result
        return dict(result)

    def end(self) -> None:
        self._process.kill()
        self._process.join()


class Workers:
    """`Trials` on `count` processes."""

    def __init__(self, count: int) -> None:
        os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the workers, which read it before torch is there
        self._threads = ThreadPoolExecutor(count)
        self._idle: queue.SimpleQueue[Worker | None] = queue.SimpleQueue()
        for _ in range(count):
            self._idle.put(None)  # a worker is started when there is work for it
        self._lock = threading.Lock()
        self._busy: set[Worker] = set()
        self._closed = False

    def submit(self, job: Job) -> Future[dict[str, float]]:
        return self._threads.submit(self._carry_out, job)

    def close(self) -> None:
        with self._lock:
            self._closed = True
            for worker in list(self._busy):
                worker.end()
        self._threads.shutdown(wait=True, cancel_futures=True)
        while not self._idle.empty():
            if idle := self._idle.get():
                idle.end()

    def _carry_out(self, job: Job) -> dict[str, float]:
        idle = self._idle.get()
        try:
            for _ in range(LOST):
                worker = self._started(idle)
                idle = worker
                try:
                    return worker(job)
                except (EOFError, OSError):
                    worker.end()
                    idle = None
                finally:
                    self._busy.discard(worker)
            raise RunError(f"{LOST} workers were lost over this run")
        finally:
            self._idle.put(idle)

    def _started(self, worker: Worker | None) -> Worker:
        with self._lock:
            if self._closed:
                raise RunError("the search was ended")
            started = worker or Worker()
            self._busy.add(started)
            return started


def _serve(connection: Connection) -> None:
    """The worker's life. Ctrl-C is for the driver to answer, which ends the workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_the_driver, daemon=True).start()
    from experiments.search.federation import carry_out

    while True:
        try:
            job: Job = connection.recv()
        except EOFError:
            return
        _say_to(job.folder.with_suffix(".log"))
        try:
            connection.send(carry_out(job))
        except TapflError as error:
            connection.send(error)
        except Exception as error:
            connection.send(RunError(f"{type(error).__name__}: {error}"))


def _end_with_the_driver() -> None:
    driver = multiprocessing.parent_process()
    assert driver is not None
    driver.join()
    os._exit(1)


def _say_to(log: Path) -> None:
    """Sends what a run says to its log; whoever looks for why a trial failed finds it there."""
    log.parent.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    with log.open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
