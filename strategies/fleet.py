"""The devices of a run: which node is which, and what their answers do to the state of the federation."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from flwr.common.logger import log
from flwr.serverapp import Grid

from strategies.exchange import Answers, R, Request, exchange, wait_for_nodes
from strategies.records import DeviceRecord, FailureLine, Line, TrafficLine, added, append_lines
from strategies.simulation import seconds
from strategies.state import FederationState
from tapfl.config import RunConfig
from tapfl.errors import ConfigError
from tapfl.profiles import DeviceProfile, max_rank
from tapfl.store import RunFolder
from tapfl.wire import ENVELOPE, Hello, HelloReply


class Met(NamedTuple):
    """A node that has introduced itself as device `i`."""

    i: int
    node: int
    profile: DeviceProfile
    reply: HelloReply

    def is_same(self, record: DeviceRecord) -> bool:
        return (record.profile, record.train_samples) == (self.profile, self.reply.train_samples)


class Fleet:
    """The connected devices. Node ids are random, so nothing is ever ordered by them.

    Attributes:
        nodes: node id by partition id.
        holds_backbone: devices that have the dense backbone in a cache of their own.
    """

    def __init__(self, grid: Grid, config: RunConfig, folder: RunFolder) -> None:
        self.grid, self.config, self.folder = grid, config, folder
        self.nodes: dict[int, int] = {}
        self.holds_backbone: set[int] = set()
        self._seen: set[int] = set()  # nodes

    def meet(self, hello: Hello) -> dict[int, DeviceRecord]:
        """Waits for the devices of a new run, and returns a record of each.

        Raises:
            RunError: if the nodes are not there in time, or too few of them answer.
        """
        records = {}
        for met in self._introduce(self._wait(), hello, {}, self.config.faults.min_success):
            self.nodes[met.i] = met.node
            if met.reply.holds_backbone:
                self.holds_backbone.add(met.i)
            records[met.i] = DeviceRecord(
                device=met.i,
                profile=met.profile,
                train_samples=met.reply.train_samples,
                bytes_down=dict(hello.bytes_by_kind),
                bytes_up=dict(met.reply.bytes_by_kind),
            )
        return dict(sorted(records.items()))

    def meet_again(self, hello: Hello, known: Mapping[int, DeviceRecord], resumed: bool = False) -> None:
        """Learns which of the known devices the new nodes are: a device that was restarted has another node id.

        Args:
            resumed: the run was: all nodes are new, and are waited for.

        Raises:
            RunError: as `meet`, if resumed.
            ConfigError: if resumed and a device has another profile or other images now.
        """
        nodes = self._wait() if resumed else sorted(set(self.grid.get_node_ids()) - self._seen)
        if not nodes:
            return
        for met in self._introduce(nodes, hello, known, self.config.faults.min_success if resumed else 0.0):
            record = known.get(met.i)
            if record and met.is_same(record):
                self.nodes[met.i] = met.node
            elif record and resumed:
                raise ConfigError(
                    f"resume: device {met.i} had {record.train_samples} images and {record.profile!r}; now it has "
                    f"{met.reply.train_samples} and {met.profile!r}"
                )
            else:
                log(logging.WARNING, "device %d: is none of those of round zero; left out", met.i)

    def ask(
        self,
        state: FederationState,
        phase: str,
        requests: Mapping[int, Request[R]],
        *,
        known: Mapping[int, R] | None = None,
        waited: float = 0.0,
        min_success: float | None = None,
    ) -> tuple[FederationState, dict[int, R]]:
        """Sends the requests; returns the state after it and the answers, and records traffic and failures.

        Args:
            known: answers from before the run was resumed; these devices are not asked again.
            waited: simulated seconds that the phase takes at least.
            min_success: in place of the option's; 0 accepts that nobody answers.

        Raises:
            RunError: if fewer answered than `min_success` of them.
        """
        known = known or {}
        sent = {i: request for i, request in requests.items() if i in self.nodes and i not in known}
        answers = self._exchange(self.nodes, sent, phase)
        answers.replies |= known
        for i in requests.keys() - sent.keys() - known.keys():
            answers.failures[i] = "is not connected"
        state, lines = account(state, phase, requests, answers, waited)
        append_lines(self.folder.path, *lines)
        return state, answers.require(phase, self.config.faults.min_success if min_success is None else min_success)

    def _wait(self) -> list[int]:
        nodes = wait_for_nodes(self.grid, self.config.devices.count, self.config.node_timeout)
        if not self.config.devices.count and len(nodes) == 2:
            log(logging.INFO, 'two nodes, Flower\'s default; for ten: --federation-config "num-supernodes=10"')
        return nodes

    def _introduce(
        self, nodes: Sequence[int], hello: Hello, known: Mapping[int, DeviceRecord], min_success: float
    ) -> Iterator[Met]:
        """Yields the devices that the nodes are; of two nodes that claim to be one device, the first."""
        count, rank = max(len(nodes), 1 + max(known, default=0)), max_rank(self.config.devices)

        def check(reply: HelloReply) -> None:
            reply.profile(count, rank)

        request = Request(hello, HelloReply, check, max_bytes=ENVELOPE)
        answers = self._exchange(dict(enumerate(nodes)), dict.fromkeys(range(len(nodes)), request), "hello")
        self._seen |= set(nodes)
        met: set[int] = set()
        for position, reply in answers.require("hello", min_success).items():
            if (i := reply.partition_id) in met:
                log(logging.WARNING, "node %d: says it is device %d, which is there already; left out", position, i)
                continue
            met.add(i)
            yield Met(i, nodes[position], reply.profile(count, rank), reply)

    def _exchange(self, nodes: Mapping[int, int], requests: Mapping[int, Request[R]], phase: str) -> Answers[R]:
        timeout, retries = self.config.faults.exchange_timeout, self.config.faults.retries
        return exchange(self.grid, nodes, requests, phase, timeout=timeout, retries=retries, window=self.config.window)


def account(
    state: FederationState, phase: str, requests: Mapping[int, Request[R]], answers: Answers[R], waited: float = 0.0
) -> tuple[FederationState, list[Line]]:
    """Returns the state with bytes, failures and simulated time of a phase counted, and the lines that record them.

    All requests count as sent. The phase takes as long as its slowest device, and at least `waited` seconds.
    """
    downs = {i: request.bytes_by_kind for i, request in requests.items()}
    state = state.with_sent(downs)
    changes: dict[int, dict[str, object]] = {}
    lines: list[Line] = []
    for i, reply in sorted(answers.replies.items()):
        record, down, up = state.devices[i], downs[i], reply.bytes_by_kind
        took = seconds(record.profile, down.total(), requests[i].macs, up.total())
        waited = max(waited, took)
        changes[i] = {"bytes_up": added(record.bytes_up, up)}
        round = getattr(requests[i].message, "round", 0)
        lines.append(
            TrafficLine(phase=phase, round=round, device=i, down=dict(down), up=dict(up), simulated_seconds=took)
        )
    for i, reason in sorted(answers.failures.items()):
        changes[i] = {"failures": state.devices[i].failures + 1}
        lines.append(FailureLine(phase=phase, device=i, reason=reason))
    return replace(state.with_devices(changes), simulated_seconds=state.simulated_seconds + waited), lines
