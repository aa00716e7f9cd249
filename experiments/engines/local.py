"""A Flower Grid whose nodes this project simulates: the base class of the engines' grids, and the in-process one."""

from __future__ import annotations

import math
import secrets
import time
import traceback
import uuid
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.constant import SUPERLINK_NODE_ID
from flwr.serverapp import Grid, ServerApp
from flwr.supercore.constant import NOOP_FEDERATION_ID
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from tapfl.options import Scalar

WORKER_LOST, CLIENT_APP_RAISED = 0, 2  # Flower's error codes; after the first, `strategies.exchange` retries


def empty_run() -> Run:
    """Returns a run with a random id, outside any of Flower's federations."""
    run = Run.create_empty(secrets.randbits(63))
    run.federation_id = NOOP_FEDERATION_ID
    return run


class LocalGrid(Grid):
    """A Grid whose nodes have random ids, as in every Flower run. Subclasses deliver messages and replies.

    Attributes:
        partitions: partition id by node id.
        workers: number of processes that answer; 0: this process answers.
        waiting: groups of messages that no worker has yet.
    """

    def __init__(self, run_config: dict[str, Scalar], nodes: int, workers: int = 0) -> None:
        self._run = empty_run()
        self.run_config = run_config
        self.workers = workers
        self.partitions = {secrets.randbits(62): i for i in range(nodes)}
        self.waiting: deque[list[Message]] = deque()
        self._had: dict[int, Any] = {}  # the worker that got each node's last message

    def set_run(self, run: Run) -> None:
        self._run = run

    @property
    def run(self) -> Run:
        return self._run

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        return list(self.partitions)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        return [message_id for message in messages for message_id in self.push_group([message])]

    def push_group(self, messages: Sequence[Message]) -> Sequence[str]:
        """Sends messages that one worker answers together."""
        self.waiting.append(list(messages))
        return [self.stamp(message) for message in messages]

    def next_for(self, worker: Any) -> list[Message]:
        """Removes and returns the waiting group that a worker gets next.

        A group of a device that this worker answered for last is preferred, because its model and images are in the
        worker's caches; otherwise it is the oldest group. No result depends on the choice.
        """
        waiting = ((self._had.get(group[0].metadata.dst_node_id), group) for group in self.waiting)
        group = next((group for last, group in waiting if last is worker), self.waiting[0])
        self.waiting.remove(group)
        self._had |= {message.metadata.dst_node_id: worker for message in group}
        return group

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Returns the replies that arrive within `timeout` seconds; Flower's own strategies call this."""
        end = math.inf if timeout is None else time.monotonic() + timeout
        waiting, replies = set(self.push_messages(messages)), list[Message]()
        while waiting and time.monotonic() < end:
            arrived = list(self.pull_messages(waiting))
            waiting -= {reply.metadata.reply_to_message_id for reply in arrived}
            replies += arrived
        return replies

    def stamp(self, message: Message) -> str:
        """Sets the id of a message, to which its reply refers, and the id of its run; returns the message's id."""
        message_id = str(uuid.uuid4())
        message.metadata.__dict__["_message_id"] = message_id
        message.metadata.__dict__["_run_id"] = self.run.run_id
        return message_id

    def context(self, node_id: int) -> Context:
        """Returns the context that a ClientApp gets with a message; no state is kept between messages."""
        node: dict[str, Scalar] = {"partition-id": self.partitions[node_id], "num-partitions": len(self.partitions)}
        return Context(self.run.run_id, node_id, node, RecordDict(), dict(self.run_config))


def answer_group(client_app: ClientApp, messages: Sequence[Message], contexts: Sequence[Context]) -> list[Message]:
    """Returns the replies of a ClientApp to the messages of a group.

    An exception becomes an error message for each of them, as in Flower's own simulation.
    """
    if len(messages) > 1 and not hasattr(client_app, "answer_together"):
        return [answer_group(client_app, [message], [own])[0] for message, own in zip(messages, contexts, strict=True)]
    try:
        if len(messages) == 1:
            return [client_app(messages[0], contexts[0])]
        return list(client_app.answer_together(messages, contexts))  # type: ignore[attr-defined]
    except Exception:
        return lost(messages, traceback.format_exc(), CLIENT_APP_RAISED)


def lost(messages: Iterable[Message], reason: str, code: int = WORKER_LOST) -> list[Message]:
    """Returns error messages in place of replies that will never come."""
    return [Message(Error(code, reason), reply_to=message) for message in messages]


def server_context(run_id: int, run_config: Mapping[str, Scalar]) -> Context:
    """Returns the context of a run's ServerApp, and sets the identity with which Flower stamps its messages.

    The identity is global to the process. If several runs share the process, it is that of the last run, and
    `LocalGrid.stamp` corrects the run's id in each message.
    """
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, run_id, SUPERLINK_NODE_ID
    return Context(run_id, 0, {}, RecordDict(), dict(run_config))


def serve(server_app: ServerApp, grid: LocalGrid) -> None:
    """Runs a federation on `grid`. Raises whatever the ServerApp raises."""
    server_app(grid, server_context(grid.run.run_id, grid.run_config))


class InProcessGrid(LocalGrid):
    """Answers messages in this process, one group at a time, whenever replies are pulled."""

    def __init__(self, client_app: ClientApp, run_config: dict[str, Scalar], nodes: int) -> None:
        super().__init__(run_config, nodes)
        self._client_app = client_app

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Returns the replies to the oldest wanted group only, so that the caller can show progress."""
        wanted = set(message_ids)
        group = next((group for group in self.waiting if group[0].metadata.message_id in wanted), None)
        if group is None:
            return []
        self.waiting.remove(group)
        contexts = [self.context(message.metadata.dst_node_id) for message in group]
        return answer_group(self._client_app, group, contexts)


def run_inprocess(server_app: ServerApp, client_app: ClientApp, run_config: dict[str, Scalar], nodes: int) -> None:
    """Runs a federation in this process. Raises whatever the ServerApp raises."""
    serve(server_app, InProcessGrid(client_app, run_config, nodes))
