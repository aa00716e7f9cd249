"""A Grid in one process, for tests and debugging: a message is answered when it is sent."""

from __future__ import annotations

import secrets
import traceback
import uuid
from collections.abc import Iterable

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.supercore.constant import NOOP_FEDERATION_ID
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from tapfl.config import Scalar

CLIENT_APP_RAISED = 2


class InProcessGrid(Grid):
    """Nodes are contexts in this process; their ids are random, as they are in every Flower run."""

    def __init__(self, client_app: ClientApp, run_config: dict[str, Scalar], nodes: int, run_id: int) -> None:
        self._run = Run.create_empty(run_id)
        self._client_app = client_app
        self._replies: dict[str, Message] = {}
        self._contexts = {
            secrets.randbits(62): Context(
                run_id=run_id,
                node_id=i,
                node_config={"partition-id": i, "num-partitions": nodes},
                state=RecordDict(),
                run_config=dict(run_config),
            )
            for i in range(nodes)
        }

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
        return list(self._contexts)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        ids = []
        for message in messages:
            message_id = str(uuid.uuid4())
            message.metadata.__dict__["_message_id"] = message_id
            try:
                reply = self._client_app(message, self._contexts[message.metadata.dst_node_id])
            except Exception:
                reply = Message(Error(CLIENT_APP_RAISED, traceback.format_exc()), reply_to=message)
            self._replies[message_id] = reply
            ids.append(message_id)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        return [self._replies.pop(message_id) for message_id in message_ids if message_id in self._replies]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        return self.pull_messages(self.push_messages(messages))


def run_inprocess(server_app: ServerApp, client_app: ClientApp, run_config: dict[str, Scalar], nodes: int) -> None:
    """Carries out a federation in this process. What the ServerApp raises is raised here."""
    run_id = uuid.uuid4().int % 2**63
    # Flower stamps every message with the identity of its task; outside of its own processes that is for us to say
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, run_id, 1
    grid = InProcessGrid(client_app, run_config, nodes, run_id)
    grid.run.federation_id = NOOP_FEDERATION_ID
    context = Context(run_id=run_id, node_id=0, node_config={}, state=RecordDict(), run_config=dict(run_config))
    server_app(grid, context)
