"""Workers that are forked from this process: they share its imports with it, and need no Ray.

A first fork, the *keeper*, is made before the run and does nothing but fork the workers, and another one for each that
dies: it has neither threads nor the state of a run, with which a process is better not forked. A worker ends when its
connection to this process does, so none outlives it, however it ends.
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
from experiments.engines.local import LocalGrid, lost, serve
from tapfl.errors import RunError
from tapfl.options import Scalar

PATIENCE = 0.5  # seconds that `pull_messages` waits for a reply; between calls `exchange` checks its time limits


class ForkedGrid(LocalGrid):
    """Hands waiting messages to workers as they become free.

    Args:
        keeper: from which each new worker's connection comes.
    """

    def __init__(self, keeper: Connection, run_config: dict[str, Scalar], nodes: int, workers: int) -> None:
        super().__init__(run_config, nodes, workers)
        self._keeper = keeper
        self._at: dict[Connection, list[Message]] = {}  # what each worker works at

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Returns the replies that have arrived; waits a moment if there is none.

        Raises:
            RunError: if no worker can be forked any more.
        """
        wanted, replies = set(message_ids), list[Message]()
        for group in [each for each in self.waiting if each[0].metadata.message_id not in wanted]:
            self.waiting.remove(group)  # nobody waits for them any more
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
            raise RunError("the process that forks the workers has ended") from None

    def _hand_out(self) -> None:
        for worker in [each for each, group in self._at.items() if not group][: len(self.waiting)]:
            group = self._at[worker] = self.next_for(worker)
            with suppress(OSError):  # it died; what it was sent is lost
                worker.send((group, [self.context(message.metadata.dst_node_id) for message in group]))

    def _replies_of(self, worker: Connection) -> list[Message]:
        try:
            replies, said = worker.recv()
        except (EOFError, OSError):
            worker.close()
            return lost(self._at.pop(worker), "a worker died")
        log_all(said)
        self._at[worker] = []
        return list(replies)


def run_forked(
    server_app: ServerApp, client_app: ClientApp, run_config: dict[str, Scalar], nodes: int, workers: int
) -> None:
    """Carries out a federation whose devices are in forked workers. Raises whatever the ServerApp raises.

    Args:
        workers: number of processes, with one torch thread each.
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
        os.setpgid(keeper, keeper)  # as it does itself: whoever comes first
    try:
        with closing(ours):
            yield ours
    finally:
        os.killpg(keeper, signal.SIGKILL)
        os.waitpid(keeper, 0)


def _keep(client_app: ClientApp, workers: int, command: Connection) -> NoReturn:
    """Forks the workers, and replaces each that ends by itself; ends when all have ended with the command."""
    try:
        with suppress(OSError):
            os.setpgid(0, 0)  # Ctrl-C is the command's, which ends all of this group
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        there = {_fork(client_app, command) for _ in range(workers)}
        while there:
            process, status = os.wait()
            there.remove(process)
            if status:
                there.add(_fork(client_app, command))
    finally:
        os._exit(0)


def _fork(client_app: ClientApp, command: Connection) -> int:
    """Returns the id of a new worker, whose connection goes to the command; no other process keeps an end of it."""
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
        FLOWER_LOGGER.handlers.clear()  # the command logs what is said here
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
