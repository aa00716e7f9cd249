"""Workers that are forked from this process: they share its imports, and need no Ray.

The first fork, the *keeper*, is made before the run. It only forks the workers, and replaces each that dies. The keeper
has no threads and no state of a run, so that forking it is safe. A worker ends when its connection to this process is
closed, so no worker outlives this process, however that ends.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import traceback
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager, suppress
from multiprocessing.connection import Connection, wait
from multiprocessing.reduction import recv_handle, send_handle
from typing import NoReturn

from flwr.app import Message
from flwr.clientapp import ClientApp
from flwr.common.logger import FLOWER_LOGGER
from flwr.serverapp import ServerApp

from clients.client_app import REPLACED
from experiments.engines.actor import answer_aside, log_all
from experiments.engines.cluster import EngineLostError
from experiments.engines.local import LocalGrid, lost, serve
from tapfl.options import Scalar

PATIENCE = 0.5  # seconds that `pull_messages` waits for a reply; between calls `exchange` checks its time limits


class ForkedGrid(LocalGrid):
    """Hands waiting messages to workers as they become free.

    Args:
        keeper: connection to the keeper, which sends the connection of each new worker.
    """

    def __init__(self, keeper: Connection, run_config: dict[str, Scalar], nodes: int, workers: int) -> None:
        super().__init__(run_config, nodes, workers)
        self._keeper = keeper
        self._at: dict[Connection, list[Message]] = {}  # the group that each worker is computing

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Returns the replies that have arrived; waits for up to `PATIENCE` if there is none.

        Raises:
            EngineLostError: if no more workers can be forked.
        """
        wanted, replies = set(message_ids), list[Message]()
        for group in [group for group in self.waiting if group[0].metadata.message_id not in wanted]:
            self.waiting.remove(group)  # the caller no longer waits for it
        self._hand_out()
        for ready in wait([self._keeper, *self._at], PATIENCE):
            if ready is self._keeper:
                self._at[self._new_worker()] = []
            else:
                replies += self._replies_of(ready)  # type: ignore[arg-type]
        self._hand_out()
        return [reply for reply in replies if reply.metadata.reply_to_message_id in wanted]

    def _new_worker(self) -> Connection:
        try:
            return Connection(recv_handle(self._keeper))
        except (EOFError, OSError, RuntimeError):
            raise EngineLostError("the process that forks the workers has ended") from None

    def _hand_out(self) -> None:
        for worker in [worker for worker, group in self._at.items() if not group][: len(self.waiting)]:
            group = self._at[worker] = self.next_for(worker)
            with suppress(OSError):  # the worker died; `_replies_of` reports the group as lost
                worker.send((group, [self.context(message.metadata.dst_node_id) for message in group]))

    def _replies_of(self, worker: Connection) -> list[Message]:
        try:
            replies, logged = worker.recv()
        except (EOFError, OSError):
            worker.close()
            return lost(self._at.pop(worker), "a worker died")
        log_all(logged)
        self._at[worker] = []
        return list(replies)


def run_forked(
    server_app: ServerApp, client_app: ClientApp, run_config: dict[str, Scalar], nodes: int, workers: int
) -> None:
    """Runs a federation whose devices are simulated in forked workers. Raises whatever the ServerApp raises.

    Args:
        workers: number of processes, each with one torch thread.
    """
    with _keeper(client_app, workers) as keeper:
        serve(server_app, ForkedGrid(keeper, run_config, nodes, workers))


@contextmanager
def _keeper(client_app: ClientApp, workers: int) -> Iterator[Connection]:
    ours, theirs = multiprocessing.Pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    if not (keeper := os.fork()):
        ours.close()
        _keep(client_app, workers, theirs)
    theirs.close()
    with suppress(OSError):
        os.setpgid(keeper, keeper)  # the keeper does the same; either call may come first
    try:
        with closing(ours):
            yield ours
    finally:
        os.killpg(keeper, signal.SIGKILL)
        os.waitpid(keeper, 0)


def _keep(client_app: ClientApp, workers: int, command: Connection) -> NoReturn:
    """Forks the workers and replaces each that dies; ends when all workers have ended because the command has."""
    try:
        with suppress(OSError):
            os.setpgid(0, 0)  # so that Ctrl-C reaches only the command, which then kills this group
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        alive = {_fork(client_app, command) for _ in range(workers)}
        while alive:
            process, status = os.wait()
            alive.remove(process)
            if status:
                alive.add(_fork(client_app, command))
    finally:
        os._exit(0)


def _fork(client_app: ClientApp, command: Connection) -> int:
    """Forks a worker, sends its connection to the command, and returns its id; no other process keeps an end of it."""
    ours, theirs = multiprocessing.Pipe()
    if not (worker := os.fork()):
        command.close()
        ours.close()
        _work(client_app, theirs)
    theirs.close()
    with closing(ours), suppress(OSError):  # the command may have ended
        send_handle(command, ours.fileno(), os.getppid())
    return worker


def _work(client_app: ClientApp, command: Connection) -> NoReturn:
    try:
        import torch

        torch.set_num_threads(1)
        os.environ[REPLACED] = "1"
        FLOWER_LOGGER.handlers.clear()  # the command logs the lines of this worker
        sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__  # as they were before the command drew bars on them
        with suppress(EOFError, OSError):
            while True:
                messages, contexts = command.recv()
                command.send(answer_aside(client_app, messages, contexts))
        os._exit(0)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(1)
