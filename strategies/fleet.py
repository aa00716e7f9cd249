"""The devices of a run as the server knows them: which node is which, what was said to them, and what was lost."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Callable, Mapping

from flwr.common.logger import log
from flwr.serverapp import Grid

from strategies.exchange import Answers, R, exchange, wait_for_nodes
from strategies.records import DeviceRecord, FailureLine, TrafficLine, added, append_line
from strategies.simulated import Spent, seconds
from tapfl.config import RunConfig
from tapfl.errors import ConfigError
from tapfl.profiles import DeviceProfile, max_rank
from tapfl.progress import stage
from tapfl.store import RunFolder
from tapfl.wire import ENVELOPE, Hello, HelloReply, WireMessage


class Fleet:
    """Sends messages to devices by partition id, and keeps their records.

    Attributes:
        records: what is known of each device, by partition id, in that order.
        holds_backbone: whether a device has the dense backbone in a cache of its own.
        simulated: seconds that the run would have taken so far on devices of these profiles.
    """

    def __init__(self, grid: Grid, config: RunConfig, folder: RunFolder) -> None:
        self.grid, self.config, self.folder = grid, config, folder
        self.records: dict[int, DeviceRecord] = {}
        self.holds_backbone: dict[int, bool] = {}
        self.simulated = 0.0
        self._nodes: dict[int, int] = {}
        self._met: set[int] = set()

    def meet(self, backbone_key: str, known: Mapping[int, DeviceRecord] | None = None) -> None:
        """Learns which node is which device. Node ids are random, so nothing is ever ordered by them.

        Args:
            known: the records of the run that goes on.

        Raises:
            RunError: if the nodes are not there in time, or too few of them answer.
            ConfigError: if a device of the run that goes on has another profile now.
        """
        nodes = wait_for_nodes(self.grid, self.config.devices.count, self.config.node_timeout)
        if not self.config.devices.count and len(nodes) == 2:
            log(logging.INFO, 'two nodes, Flower\'s default; for ten: --federation-config "num-supernodes=10"')
        self.records = dict(known or {})
        hello = Hello(backbone_key)
        for i, (node, reply, profile) in self._introduce(nodes, hello, self._min_success).items():
            self._nodes[i] = node
            self.holds_backbone[i] = reply.holds_backbone
            if known is None:
                self.records[i] = DeviceRecord(
                    device=i,
                    profile=profile,
                    train_samples=reply.train_samples,
                    bytes_down=dict(hello.bytes_by_kind),
                    bytes_up=dict(reply.bytes_by_kind),
                )
            elif i not in known:
                log(logging.WARNING, "device %d: was not there in round zero; left out", i)
            elif (known[i].profile, known[i].train_samples) != (profile, reply.train_samples):
                raise ConfigError(
                    f"resume: device {i} had {known[i].train_samples} images and {known[i].profile!r}; now it has "
                    f"{reply.train_samples} and {profile!r}"
                )
        self.records = dict(sorted(self.records.items()))

    def meet_again(self, backbone_key: str) -> None:
        """Learns the nodes that came since: a device that was started anew has another node id."""
        if newcomers := sorted(set(self.grid.get_node_ids()) - self._met):
            for i, (node, reply, profile) in self._introduce(newcomers, Hello(backbone_key), 0.0).items():
                record = self.records.get(i)
                if record and (record.profile, record.train_samples) == (profile, reply.train_samples):
                    self._nodes[i] = node
                else:
                    log(logging.WARNING, "device %d: is none of those of round zero; left out", i)

    def _introduce(
        self, nodes: list[int], hello: Hello, min_success: float
    ) -> dict[int, tuple[int, HelloReply, DeviceProfile]]:
        """Returns node, answer and profile by partition id; of two nodes that say they are one device, the first."""
        devices, rank = max(len(nodes), 1 + max(self.records, default=0)), max_rank(self.config.devices)

        def check(position: int, reply: HelloReply) -> None:
            reply.profile(devices, rank)

        addressed = dict(enumerate((node, hello) for node in nodes))
        answers = self._exchange("hello", addressed, HelloReply, check, lambda i: ENVELOPE)
        self._met |= set(nodes)
        found: dict[int, tuple[int, HelloReply, DeviceProfile]] = {}
        for position, reply in answers.require("hello", min_success).items():
            i = reply.partition_id
            if i in found:
                log(logging.WARNING, "node %d: says it is device %d, which is there already; left out", position, i)
                continue
            found[i] = (nodes[position], reply, reply.profile(devices, rank))
        return found

    def ask(
        self,
        what: str,
        outgoing: Mapping[int, WireMessage],
        reply_type: type[R],
        check: Callable[[int, R], None],
        *,
        known: Mapping[int, R] | None = None,
        work: Callable[[int], float] = lambda i: 0.0,
        unsent: Callable[[int], int] = lambda i: 0,
        limit: Callable[[int], float] = lambda i: math.inf,
        at_least: float = 0.0,
        min_success: float | None = None,
        round: int = 0,
    ) -> dict[int, R]:
        """Returns the answers that pass `check`, by partition id and in that order; counts bytes, time and failures.

        Args:
            known: answers that were given before this run was killed; they are not asked for again.
            work: MACs that the message makes a device compute, for the simulated time.
            unsent: bytes that a device found in a cache on this machine, and would have had to download elsewhere; they
                count as the message's own.
            limit: bytes that an answer of this device may have.
            at_least: simulated seconds that the phase takes in any case.
            min_success: in place of the option's; 0 accepts that nobody answers.
            round: for the lines about traffic in metrics.jsonl.

        Raises:
            RunError: if no device answered, or fewer than `faults.min-success` of them.
        """
        known = known or {}
        addressed = {i: (self._nodes[i], m) for i, m in outgoing.items() if i in self._nodes and i not in known}
        answers = self._exchange(what, addressed, reply_type, check, limit)
        for i, reply in known.items():
            check(i, reply)
            answers.replies[i] = reply
        for i in outgoing.keys() - addressed.keys() - known.keys():
            answers.failures[i] = "is not connected"
        slowest = at_least
        downs = {i: message.bytes_by_kind + Counter({message.kind: unsent(i)}) for i, message in outgoing.items()}
        for i, down in downs.items():
            self.records[i].bytes_down = added(self.records[i].bytes_down, down)
        for i, reply in sorted(answers.replies.items()):
            down, up = downs[i], reply.bytes_by_kind
            self.records[i].bytes_up = added(self.records[i].bytes_up, up)
            took = seconds(self.records[i].profile, down.total(), work(i), up.total())
            slowest = max(slowest, took)
            line = TrafficLine(phase=what, round=round, device=i, down=dict(down), up=dict(up), simulated_seconds=took)
            append_line(self.folder.path, line)
        for i, reason in sorted(answers.failures.items()):
            self.lost(i, what, reason)
        self.simulated += slowest
        return answers.require(what, self._min_success if min_success is None else min_success)

    def lost(self, i: int, what: str, reason: str) -> None:
        """Notes that a device did not come through."""
        self.records[i].failures += 1
        append_line(self.folder.path, FailureLine(phase=what, device=i, reason=reason))

    @property
    def spent(self) -> Spent:
        """What the run has cost so far."""
        up, down = (
            sum(sum(getattr(record, side).values()) for record in self.records.values())
            for side in ("bytes_up", "bytes_down")
        )
        return Spent(self.simulated, up, down)

    @property
    def _min_success(self) -> float:
        return self.config.faults.min_success

    def _exchange(
        self,
        what: str,
        addressed: Mapping[int, tuple[int, WireMessage]],
        reply_type: type[R],
        check: Callable[[int, R], None],
        limit: Callable[[int], float] = lambda i: math.inf,
    ) -> Answers[R]:
        with stage(what) as advance:
            return exchange(
                self.grid,
                addressed,
                reply_type,
                check,
                timeout=self.config.faults.exchange_timeout,
                retries=self.config.faults.retries,
                window=self.config.window,
                group=what,
                limit=limit,
                arrived=lambda count: advance(count, len(addressed), "devices"),
            )
