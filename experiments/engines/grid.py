"""What the engines of this project share: the nodes of a simulation, how a node answers, and how a run is begun."""

from __future__ import annotations

import math
import secrets
import time
import traceback
import uuid
from collections.abc import Iterable

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.supercore.constant import NOOP_FEDERATION_ID
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from tapfl.options import Scalar

WORKER_LOST, CLIENT_APP_RAISED = 0, 2  # Flower's codes: what may be sent again, and what would only be raised again


class LocalGrid(Grid):
    """A Grid whose nodes are numbers in this process; their ids are random, as they are in every Flower run.

    Attributes:
        partitions: partition id by node id.
    """

    def __init__(self, run_config: dict[str, Scalar], nodes: int) -> None:
        self._run = Run.create_empty(secrets.randbits(63))
        self._run.federation_id = NOOP_FEDERATION_ID
        self.run_config = run_config
        self.partitions = {secrets.randbits(62): i for i in range(nodes)}

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

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Returns the answers that are there after `timeout` seconds, as Flower's own strategies ask for them."""
        end = math.inf if timeout is None else time.monotonic() + timeout
        waiting, replies = set(self.push_messages(messages)), list[Message]()
        while waiting and time.monotonic() < end:
            arrived = list(self.pull_messages(waiting))
            waiting -= {reply.metadata.reply_to_message_id for reply in arrived}
            replies += arrived
        return replies

    def stamp(self, message: Message) -> str:
        """Gives a message the id by which its answer is known, and the run that it is of; returns the id."""
        message_id = str(uuid.uuid4())
        message.metadata.__dict__["_message_id"] = message_id
        message.metadata.__dict__["_run_id"] = self.run.run_id
        return message_id

    def context(self, node_id: int) -> Context:
        """Returns what a ClientApp is told of its node. Nothing is kept in it from one message to the next."""
        return node_context(self.run.run_id, node_id, self.partitions[node_id], len(self.partitions), self.run_config)


def node_context(run_id: int, node_id: int, partition_id: int, nodes: int, run_config: dict[str, Scalar]) -> Context:
    """Returns the context of a simulated node."""
    return Context(
        run_id=run_id,
        node_id=node_id,
        node_config={"partition-id": partition_id, "num-partitions": nodes},
        state=RecordDict(),
        run_config=dict(run_config),
    )


def answer(client_app: ClientApp, message: Message, context: Context) -> Message:
    """Returns the answer of a ClientApp; an exception of its becomes an error, as in Flower's own simulation."""
    try:
        return client_app(message, context)
    except Exception:
        return Message(Error(CLIENT_APP_RAISED, traceback.format_exc()), reply_to=message)


def serve(server_app: ServerApp, grid: LocalGrid) -> None:
    """Carries out a federation on `grid`. What the ServerApp raises is raised here."""
    run_id = grid.run.run_id
    # Flower stamps every message with the identity of its task; outside of its own processes that is for us to say.
    # Where several runs share this process the last one's id stands there, so the grid stamps its messages again.
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, run_id, 1
    context = Context(run_id=run_id, node_id=0, node_config={}, state=RecordDict(), run_config=dict(grid.run_config))
    server_app(grid, context)
