"""A Grid in one process, for tests and debugging: a message is answered when its answer is asked for."""

from __future__ import annotations

from collections.abc import Iterable

from flwr.app import Message
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp

from experiments.engines.grid import LocalGrid, answer, serve
from tapfl.options import Scalar


class InProcessGrid(LocalGrid):
    """Answers in this process, one message after the other."""

    def __init__(self, client_app: ClientApp, run_config: dict[str, Scalar], nodes: int) -> None:
        super().__init__(run_config, nodes)
        self._client_app = client_app
        self._waiting: dict[str, Message] = {}

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        ids = []
        for message in messages:
            ids.append(self.stamp(message))
            self._waiting[ids[-1]] = message
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Returns one answer, that to the message which was sent first: whoever asks sees how far it is."""
        wanted = set(message_ids)
        first = next((message_id for message_id in self._waiting if message_id in wanted), None)
        if first is None:
            return []
        message = self._waiting.pop(first)
        return [answer(self._client_app, message, self.context(message.metadata.dst_node_id))]


def run_inprocess(server_app: ServerApp, client_app: ClientApp, run_config: dict[str, Scalar], nodes: int) -> None:
    """Carries out a federation in this process. What the ServerApp raises is raised here."""
    serve(server_app, InProcessGrid(client_app, run_config, nodes))
