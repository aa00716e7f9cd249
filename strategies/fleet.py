"""The devices of a run as the server knows them: which node is which, what was said to them, and what was lost."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping

from flwr.common.logger import log
from flwr.serverapp import Grid

from strategies.exchange import Answers, R, exchange, wait_for_nodes
from strategies.progress import stage
from strategies.results import DeviceRecord
from tapfl.config import RunConfig
from tapfl.store import RunFolder
from tapfl.wire import Hello, HelloReply, WireMessage


class Fleet:
    """Sends messages to devices by partition id, and keeps their records.

    Attributes:
        records: what is known of each device, by partition id, in that order.
        holds_backbone: whether a device has the dense backbone in a cache of its own.
    """

    def __init__(self, grid: Grid, config: RunConfig, folder: RunFolder) -> None:
        self.grid, self.config, self.folder = grid, config, folder
        self.records: dict[int, DeviceRecord] = {}
        self.holds_backbone: dict[int, bool] = {}
        self._nodes: dict[int, int] = {}

    def meet(self, backbone_key: str) -> None:
        """Learns which node is which device. Node ids are random, so nothing is ever ordered by them.

        Raises:
            RunError: if the nodes are not there in time, or none of them answers.
        """
        nodes = wait_for_nodes(self.grid, self.config.devices.count, self.config.node_timeout)
        if not self.config.devices.count and len(nodes) == 2:
            log(logging.INFO, 'two nodes, Flower\'s default; for ten: --federation-config "num-supernodes=10"')
        hello, max_rank = Hello(backbone_key), max(self.config.devices.ranks)
        answers = self._exchange(
            "hello",
            {position: (node, hello) for position, node in enumerate(nodes)},
            HelloReply,
            lambda _, reply: reply.check(len(nodes), max_rank),
        )
        for position, reply in answers.require_any("hello").items():
            i = reply.partition_id
            if i in self._nodes:
                log(logging.WARNING, "node %d: says it is device %d, which is there already; left out", position, i)
                continue
            self._nodes[i] = nodes[position]
            self.holds_backbone[i] = reply.holds_backbone
            self.records[i] = DeviceRecord(i, reply.budget, reply.rank, reply.train_samples)
            self.records[i].sent(hello)
            self.records[i].received(reply)
        self.records = dict(sorted(self.records.items()))

    def ask(
        self,
        what: str,
        outgoing: Mapping[int, WireMessage],
        reply_type: type[R],
        check: Callable[[int, R], None],
        quiet: bool = False,
    ) -> dict[int, R]:
        """Returns the answers that pass `check`, by partition id and in that order; counts bytes and failures.

        Raises:
            RunError: if no device answered.
        """
        addressed = {i: (self._nodes[i], message) for i, message in outgoing.items()}
        answers = self._exchange(what, addressed, reply_type, check, quiet)
        for i, message in outgoing.items():
            self.records[i].sent(message)
        for i, reply in answers.replies.items():
            self.records[i].received(reply)
        for i, reason in answers.failures.items():
            self.records[i].failures += 1
            self.folder.append_metrics(kind="failure", phase=what, device=i, reason=reason)
        return answers.require_any(what)

    def _exchange(
        self,
        what: str,
        addressed: Mapping[int, tuple[int, WireMessage]],
        reply_type: type[R],
        check: Callable[[int, R], None],
        quiet: bool = False,
    ) -> Answers[R]:
        def send(arrived: Callable[[int], None]) -> Answers[R]:
            return exchange(
                self.grid,
                addressed,
                reply_type,
                check,
                timeout=self.config.message_timeout,
                window=self.config.window,
                group=what,
                arrived=arrived,
            )

        if quiet:
            return send(lambda count: None)
        with stage(what, len(addressed)) as advance:
            return send(lambda count: advance(count, "devices"))
