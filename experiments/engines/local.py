"""A Flower Grid whose nodes are simulated by this project: what the engines share, and the one without Ray."""

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

WORKER_LOST, CLIENT_APP_RAISED = 0, 2  # Flower's error codes; `strategies.exchange` sends the first again


def empty_run() -> Run:
    """Returns a run of a random id that is in no federation of Flower's."""
    run = Run.create_empty(secrets.randbits(63))
    run.federation_id = NOOP_FEDERATION_ID
    return run


class LocalGrid(Grid):
    """A Grid whose nodes are numbers; their ids are random, as in every Flower run. Subclasses push and pull messages.

    Attributes:
        partitions: partition id by node id.
        workers: processes that answer; 0: this one does.
        waiting: groups of messages that no worker has yet.
    """

    def __init__(self, run_config: dict[str, Scalar], nodes: int, workers: int = 0) -> None:
        self._run = empty_run()
        self.run_config = run_config
        self.workers = workers
        self.partitions = {secrets.randbits(62): i for i in range(nodes)}
        self.waiting: deque[list[Message]] = deque()
        self._had: dict[int, Any] = {}  # the worker that each node's last message went to

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
        """Sends messages that one worker answers at once."""
        self.waiting.append(list(messages))
        return [self.stamp(message) for message in messages]

    def next_for(self, worker: Any) -> list[Message]:
        """Takes the group that a worker gets next out of those that wait: of a device that it had last, or the oldest.

        It has the model and the images of such a device in its caches; no result depends on it.
        """
        waiting = ((self._had.get(each[0].metadata.dst_node_id), each) for each in self.waiting)
        group = next((each for last, each in waiting if last is worker), self.waiting[0])
        self.waiting.remove(group)
        self._had |= {message.metadata.dst_node_id: worker for message in group}
        return group

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Returns the replies that have arrived after `timeout` seconds; Flower's own strategies call it."""
        end = math.inf if timeout is None else time.monotonic() + timeout
        waiting, replies = set(self.push_messages(messages)), list[Message]()
        while waiting and time.monotonic() < end:
            arrived = list(self.pull_messages(waiting))
            waiting -= {reply.metadata.reply_to_message_id for reply in arrived}
            replies += arrived
        return replies

    def stamp(self, message: Message) -> str:
        """Sets the id of a message, to which its reply refers, and its run's; returns the id."""
        message_id = str(uuid.uuid4())
        message.metadata.__dict__["_message_id"] = message_id
        message.metadata.__dict__["_run_id"] = self.run.run_id
        return message_id

    def context(self, node_id: int) -> Context:
        """Returns the context that a ClientApp gets with a message. It keeps no state from one message to the next."""
        node: dict[str, Scalar] = {"partition-id": self.partitions[node_id], "num-partitions": len(self.partitions)}
        return Context(self.run.run_id, node_id, node, RecordDict(), dict(self.run_config))


def answer_group(client_app: ClientApp, messages: Sequence[Message], contexts: Sequence[Context]) -> list[Message]:
    """Returns the replies of a ClientApp to messages that one worker got at once.

    An exception becomes an error message for each, as in Flower's own simulation.
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

    The identity is global to this process, so if several runs share it the id is that of the last one;
    `LocalGrid.stamp` corrects it.
    """
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, run_id, SUPERLINK_NODE_ID
    return Context(run_id, 0, {}, RecordDict(), dict(run_config))


def serve(server_app: ServerApp, grid: LocalGrid) -> None:
    """Carries out a federation on `grid`. Raises whatever the ServerApp raises."""
    server_app(grid, server_context(grid.run.run_id, grid.run_config))


class InProcessGrid(LocalGrid):
    """Answers in this process, one message after the other, when a reply is asked for."""

    def __init__(self, client_app: ClientApp, run_config: dict[str, Scalar], nodes: int) -> None:
        super().__init__(run_config, nodes)
        self._client_app = client_app

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Returns the replies to the oldest message and its group, so that the caller can show progress."""
        wanted = set(message_ids)
        group = next((each for each in self.waiting if each[0].metadata.message_id in wanted), None)
        if group is None:
            return []
        self.waiting.remove(group)
        contexts = [self.context(message.metadata.dst_node_id) for message in group]
        return answer_group(self._client_app, group, contexts)


def run_inprocess(server_app: ServerApp, client_app: ClientApp, run_config: dict[str, Scalar], nodes: int) -> None:
    """Carries out a federation in this process. Raises whatever the ServerApp raises."""
    serve(server_app, InProcessGrid(client_app, run_config, nodes))
