"""Pools of workers: processes of this machine, or threads whose work is done elsewhere (on Ray's actors).

Sweep, search and compare submit `Job`s to a pool. What a job emits reaches the submitter while the job runs; its
result arrives with the future. When a pool is closed, or the command ends for any reason, no worker is left.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar, copy_context
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NoReturn

from experiments.command_line import of_the_system
from experiments.engines.cluster import MachineError
from tapfl.errors import RunError, TapflError

ATTEMPTS = 3  # number of workers that may die during one job before it fails
LOOK = 1.0  # seconds of one wait; short, because a signal that comes just before a wait begins does not interrupt it
GRACE = 5.0  # seconds that a worker has after SIGTERM to end its own processes, before it is killed
SPAWN = multiprocessing.get_context("spawn")  # torch may hang in a forked process

Emit = Callable[[Any], None]


@dataclass(frozen=True)
class Job:
    """A call ``function(emit, *arguments)``. For a process, the function must be importable, the arguments picklable.

    Attributes:
        function: its argument `emit` passes a value to the submitter while the job runs.
        log: file to which everything that the job prints and logs is appended; None: the command's own output.
    """

    function: Callable[..., Any]
    arguments: tuple[Any, ...] = ()
    log: Path | None = None


def first_done(futures: Iterable[Future[Any]]) -> set[Future[Any]]:
    """Waits until at least one future is done, and returns those that are."""
    running = list(futures)
    while not (done := wait(running, LOOK, FIRST_COMPLETED).done):
        pass
    return done


def unheard(value: Any) -> None:
    """Ignores what a job emits."""


class ThreadPool:
    """Executes jobs, `jobs` at a time, on threads of this process, for work that is done elsewhere.

    Threads cannot be killed. Those that are running when the pool is closed end when what they wait for ends.
    """

    def __init__(self, jobs: int) -> None:
        self.jobs = jobs
        self._threads = ThreadPoolExecutor(jobs, thread_name_prefix="job")

    def submit(self, job: Job, listen: Emit = unheard, /) -> Future[Any]:
        """Starts a job as soon as a worker is free; the future raises a `TapflError` if it fails.

        Args:
            listen: called in another thread with each value that the job emits.
        """
        ours = copy_context()  # so that `listen` logs to the log of this thread, not to that of the job
        return self._threads.submit(self._carry_out, job, lambda value: ours.run(listen, value))

    def close(self) -> None:
        """Cancels the waiting jobs."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _carry_out(self, job: Job, emit: Emit) -> Any:
        with own_log(job.log) if job.log else nullcontext():
            return _called(job, emit)


class ProcessPool(ThreadPool):
    """A pool of `jobs` processes that execute one job after another, each with one torch thread.

    A process starts when it is first needed and then stays, so that it imports torch only once. A process that dies is
    replaced, and its job is tried again. No process outlives this one, however it ends.
    """

    def __init__(self, jobs: int) -> None:
        super().__init__(jobs)
        os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the workers, which read it when they import torch
        self._lock = threading.Lock()
        self._processes: dict[int, _Process] = {}  # by the id of the thread that uses it
        self._closed = False

    def close(self) -> None:
        """Ends all jobs immediately, and their workers. A federation can be continued from its checkpoint."""
        super().close()
        with self._lock:
            self._closed = True
            processes = list(self._processes.values())
        for process in processes:
            process.terminate()
        deadline = time.monotonic() + GRACE
        for process in processes:
            process.end(deadline - time.monotonic())
        self._threads.shutdown(wait=True)

    def _carry_out(self, job: Job, emit: Emit) -> Any:
        for _ in range(ATTEMPTS):
            process = self._process()
            try:
                return process.carry_out(job, emit)
            except (EOFError, OSError):
                process.end(0)
                with self._lock:
                    del self._processes[threading.get_ident()]
        raise MachineError(f"{ATTEMPTS} workers died during this job")

    def _process(self) -> _Process:
        with self._lock:
            if self._closed:
                raise RunError("the pool was closed")
            if (thread := threading.get_ident()) not in self._processes:
                self._processes[thread] = _Process()
            return self._processes[thread]


class _Process:
    """A worker process, seen from the command."""

    def __init__(self) -> None:
        self._ours, theirs = SPAWN.Pipe()
        self._process = SPAWN.Process(target=_serve, args=(theirs,), daemon=True)
        self._process.start()
        theirs.close()  # otherwise `recv` would not notice that the process has ended

    def carry_out(self, job: Job, listen: Emit) -> Any:
        """Raises EOFError or OSError if the process dies."""
        self._ours.send(job)
        while True:
            kind, value = self._ours.recv()
            if kind == "result":
                return value
            if kind == "error":
                raise value
            listen(value)

    def terminate(self) -> None:
        self._process.terminate()

    def end(self, grace: float) -> None:
        self._process.join(max(0.0, grace))
        self._process.kill()
        self._process.join()


def _serve(connection: Connection) -> NoReturn:
    """Executes jobs until the command ends. The command handles SIGINT and ends its workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # so that a job ends its own processes
    threading.Thread(target=_end_with_the_command, daemon=True).start()
    sending = threading.Lock()

    def send(kind: str, value: Any) -> None:
        with sending:
            connection.send((kind, value))

    try:
        while True:
            job: Job = connection.recv()
            if job.log is not None:
                _print_to(job.log)
            try:
                result = _called(job, lambda value: send("event", value))
            except TapflError as error:
                send("error", error)
            else:
                send("result", result)
    except (EOFError, OSError, SystemExit):
        pass
    finally:
        os._exit(1)  # because a thread of the job may still be running


def _end_with_the_command() -> None:
    command = multiprocessing.parent_process()
    assert command is not None
    command.join()
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(GRACE)
    os._exit(1)


def _called(job: Job, emit: Emit) -> Any:
    """Returns the job's result. Every exception is logged, and raised as a TapflError; an OSError as a MachineError."""
    from flwr.common.logger import log  # slow to import; a refused sweep does not need it

    try:
        return job.function(emit, *job.arguments)
    except TapflError as error:
        log(logging.ERROR, "%s", error)
        raise
    except Exception as error:
        log(logging.ERROR, "%s", traceback.format_exc())
        if isinstance(error, OSError):
            raise MachineError(of_the_system(error)) from None
        raise RunError(f"{type(error).__name__}: {error}") from None


def _print_to(file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    with file.open("a") as stream:
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)


_LOG: ContextVar[Path | None] = ContextVar("log", default=None)


@contextmanager
def own_log(file: Path) -> Iterator[None]:
    """Within the block, everything that this thread logs, and nothing else, goes to `file` instead of the screen."""
    from flwr.common.logger import FLOWER_LOGGER

    for shown in FLOWER_LOGGER.handlers:
        if not isinstance(shown, logging.FileHandler):
            shown.addFilter(_of_no_job)
    file.parent.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(file, encoding="utf-8")  # appends, because the job may continue an earlier one
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    handler.addFilter(lambda record: _LOG.get() == file)
    FLOWER_LOGGER.addHandler(handler)
    token = _LOG.set(file)
    try:
        yield
    finally:
        _LOG.reset(token)
        FLOWER_LOGGER.removeHandler(handler)
        handler.close()


def _of_no_job(record: logging.LogRecord) -> bool:
    return _LOG.get() is None


@contextmanager
def interruptible(go_on: Callable[[], str] = lambda: "the same command") -> Iterator[None]:
    """Ends this process with exit code 130 on SIGINT and on SIGTERM, after the block has ended what it started.

    Args:
        go_on: returns the command that continues the work, for the message; called at the interruption.
    """

    def terminate(number: int, _: object) -> NoReturn:
        raise SystemExit(128 + number)

    in_main = threading.current_thread() is threading.main_thread()  # only the main thread can handle signals
    before = signal.signal(signal.SIGTERM, terminate) if in_main else None
    try:
        yield
    except (KeyboardInterrupt, SystemExit):  # Ray's handler of SIGTERM raises SystemExit too
        if sys.stderr.isatty():
            sys.stderr.write("\x1b[?25h")  # shows the cursor, which a thread may have hidden to draw bars
        print(f"tapfl: interrupted; continue with: {go_on()}", file=sys.stderr, flush=True)
        os._exit(130)  # Ray is stopped by now, but runs in threads of this process would continue
    finally:
        if before is not None:
            signal.signal(signal.SIGTERM, before)
