"""The devices of a run: which node is which device, which devices take part in a round, and the simulated time.

Simulated time is independent of the real time of the simulation. A device downloads, computes and uploads, one after
the other; a phase ends when its slowest device has finished. A training step counts as three forward passes (the
forward pass, and the two matrix products of the backward pass).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
from flwr.common.logger import log
from flwr.serverapp import Grid
from timm.models import VisionTransformer
from torch import nn

from strategies.exchange import ROUNDING, Answers, R, Request, exchange, hands_out_groups, wait_for_nodes, window_of
from strategies.records import DeviceRecord, FailureLine, Line, TrafficLine, added, append_lines
from strategies.state import FederationState
from tapfl.config import NEW_HEADS, DeviceOptions, RunConfig, TrainOptions
from tapfl.errors import ConfigError
from tapfl.personalize.methods import method_of
from tapfl.profiles import DeviceProfile, max_rank
from tapfl.run_folder import RunFolder
from tapfl.seeds import numpy_generator
from tapfl.wire import ENVELOPE, LONGEST_NAMES, Hello, HelloReply

BACK = 2  # cost of the backward pass, in forward passes
# Limits of a group with `train.together = auto`: its number of devices; the ratio of the MACs of its widest to those of
# its smallest device; the MACs of a device's step (forward pass of a batch). With these limits `tapfl bench together`
# is a third faster for the digits (2e7 to 4e7 MACs); DeiT-T at 64 px (4.5e8 and more) is 13 % slower in stacks of
# three. Where between these sizes the gain ends was not measured.
AT_MOST, LIKE, SMALL = 10, 1.6, 2e8


class Fleet:
    """The connected devices. Node ids are random, so nothing is ever sorted by them."""

    def __init__(self, grid: Grid, config: RunConfig, folder: RunFolder) -> None:
        self.grid, self.config, self.folder = grid, config, folder
        self.nodes: dict[int, int] = {}  # node id by partition id
        self.holds_backbone: set[int] = set()  # devices that have the dense backbone in their own cache
        self.classes: dict[int, tuple[str, ...]] = {}  # class names of each device, for a new head
        self._seen: set[int] = set()  # node ids

    def meet(self, hello: Hello) -> dict[int, DeviceRecord]:
        """Waits for the devices of a new run, and returns a record of each.

        Raises:
            RunError: if the nodes are not connected in time, or too few of them answer.
        """
        records = {}
        for node, record in self._introduce(self._wait(), hello, {}, self.config.faults.min_success):
            self.nodes[record.device], records[record.device] = node, record
        return dict(sorted(records.items()))

    def learn_holders(self, state: FederationState, hello: Hello) -> FederationState:
        """Asks the known devices whether they have the backbone in `hello`; without an answer, no is assumed."""
        request = self._hello(hello, max(self.nodes) + 1)
        state, replies = self.ask(state, "hello", dict.fromkeys(self.nodes, request), min_success=0)
        self.holds_backbone = {i for i, reply in replies.items() if reply.holds_backbone}
        return state

    def meet_again(self, hello: Hello, known: Mapping[int, DeviceRecord], resumed: bool = False) -> None:
        """Asks the new nodes which devices they are, because a device that was restarted has another node id.

        Args:
            resumed: whether the run was just resumed; then all nodes are new, and the call waits for them.

        Raises:
            RunError: as `meet`, if resumed.
            ConfigError: if resumed and a device has another profile, or another number of images that must not change.
        """
        nodes = self._wait() if resumed else sorted(set(self.grid.get_node_ids()) - self._seen)
        if not nodes:
            return
        for node, met in self._introduce(nodes, hello, known, self.config.faults.min_success if resumed else 0.0):
            i, record = met.device, known.get(met.device)
            samples = record and (record.train_samples if not self.config.data.changing else met.train_samples)
            if not record:
                log(logging.WARNING, "device %d: ignored, because it is not one of the devices of round zero", i)
            elif (record.profile, samples) == (met.profile, met.train_samples):
                self.nodes[i] = node
            else:
                had, has = (f"{each.train_samples} images and {each.profile!r}" for each in (record, met))
                if resumed:
                    raise ConfigError(f"resume: device {i} had {had}; now it has {has}")
                log(logging.WARNING, "device %d: ignored, because it had %s; now it has %s", i, had, has)

    def ask(
        self,
        state: FederationState,
        phase: str,
        requests: Mapping[int, Request[R]],
        *,
        known: Mapping[int, R] | None = None,
        waited: float = 0.0,
        min_success: float | None = None,
        groups: Sequence[Sequence[int]] = (),
    ) -> tuple[FederationState, dict[int, R]]:
        """Sends the requests, records traffic and failures, and returns the new state and the answers.

        Args:
            known: answers from before the run was resumed; these devices are not asked again.
            waited: least duration of the phase, in simulated seconds.
            min_success: replaces `faults.min-success`; with 0, no device needs to answer.
            groups: devices that step together (`groups_of`).

        Raises:
            RunError: if the share of devices that answered is below `min_success`.
        """
        known = known or {}
        sent = {i: request for i, request in requests.items() if i in self.nodes and i not in known}
        answers = self._exchange(self.nodes, sent, phase, groups)
        answers.replies |= known
        for i in requests.keys() - sent.keys() - known.keys():
            answers.failures[i] = "is not connected"
        state, lines = account(state, phase, requests, answers, waited)
        append_lines(self.folder.path, *lines)
        return state, answers.require(phase, self.config.faults.min_success if min_success is None else min_success)

    def _wait(self) -> list[int]:
        nodes = wait_for_nodes(self.grid, self.config.devices.count, self.config.node_timeout)
        if not self.config.devices.count and len(nodes) == 2:
            log(logging.INFO, 'two nodes, the default of Flower; for ten: --federation-config "num-supernodes=10"')
        return nodes

    def _introduce(
        self, nodes: Sequence[int], hello: Hello, known: Mapping[int, DeviceRecord], min_success: float
    ) -> Iterator[tuple[int, DeviceRecord]]:
        """Yields each node with the record of its device; if two nodes claim to be the same device, only the first."""
        count = max(len(nodes), 1 + max(known, default=0))
        request = self._hello(hello, count)
        unknown = dict(enumerate(nodes))  # which devices they are is in their answers
        answers = self._exchange(unknown, dict.fromkeys(unknown, request), "hello", what="node")
        self._seen |= set(nodes)
        met: set[int] = set()
        for position, reply in answers.require("hello", min_success).items():
            if (i := reply.partition_id) in met:
                log(logging.WARNING, "node %d: ignored, because another node is device %d already", position, i)
                continue
            met.add(i)
            if reply.holds_backbone:
                self.holds_backbone.add(i)
            else:
                self.holds_backbone.discard(i)  # its cache may be gone since it was met
            self.classes[i] = reply.named(self._asks_classes)
            yield (
                nodes[position],
                DeviceRecord(
                    device=i,
                    profile=self._profile(reply, count),
                    train_samples=reply.train_samples,
                    bytes_down=dict(hello.bytes_by_kind),
                    bytes_up=dict(reply.bytes_by_kind),
                ),
            )

    def _hello(self, hello: Hello, count: int) -> Request[HelloReply]:
        """Returns the request to introduce itself, for one of `count` devices."""
        asked = self._asks_classes

        def check(reply: HelloReply) -> object:
            return self._profile(reply, count), reply.named(asked)

        return Request(hello, HelloReply, check, max_bytes=ENVELOPE + (LONGEST_NAMES if asked else 0))

    def _profile(self, reply: HelloReply, count: int) -> DeviceProfile:
        return reply.profile(count, max_rank(self.config.devices), fewest=0 if self.config.data.changing else 1)

    @property
    def _asks_classes(self) -> bool:
        return self.config.model.head in NEW_HEADS

    def _exchange(
        self,
        nodes: Mapping[int, int],
        requests: Mapping[int, Request[R]],
        phase: str,
        groups: Sequence[Sequence[int]] = (),
        what: str = "device",
    ) -> Answers[R]:
        faults, window = self.config.faults, window_of(self.grid, self.config.window)
        limits: dict[str, Any] = {"timeout": faults.exchange_timeout, "retries": faults.retries, "window": window}
        return exchange(self.grid, nodes, requests, phase, **limits, groups=groups, what=what)


def account(
    state: FederationState, phase: str, requests: Mapping[int, Request[R]], answers: Answers[R], waited: float = 0.0
) -> tuple[FederationState, list[Line]]:
    """Returns the state with the bytes, failures and simulated time of a phase added, and the lines that record them.

    All requests count as sent. The phase takes as long as its slowest device, but at least `waited` seconds.
    """
    downs = {i: answers.sent.get(i) or request.bytes_by_kind for i, request in requests.items()}
    state = state.with_sent(downs)
    changes: dict[int, dict[str, object]] = {}
    lines: list[Line] = []
    for i, reply in sorted(answers.replies.items()):
        record, down, up = state.devices[i], downs[i], reply.bytes_by_kind
        took = seconds(record.profile, down.total(), requests[i].macs, up.total())
        waited = max(waited, took)
        changes[i] = {"bytes_up": added(record.bytes_up, up)}
        round = getattr(reply, "round", state.round)  # replies of round zero and between rounds have no such field
        lines.append(
            TrafficLine(phase=phase, round=round, device=i, down=dict(down), up=dict(up), simulated_seconds=took)
        )
    for i, reason in sorted(answers.failures.items()):
        changes[i] = {"failures": state.devices[i].failures + 1}
        lines.append(FailureLine(phase=phase, device=i, reason=reason))
    return replace(state.with_devices(changes), simulated_seconds=state.simulated_seconds + waited), lines


class ClientSample(NamedTuple):
    """The devices of a round by partition id, in order."""

    asked: tuple[int, ...]  # get the adapters, train and answer
    away: tuple[int, ...]  # are not available when the round begins
    dropped: tuple[int, ...]  # get the adapters, but drop out before they answer


def sample_clients(
    profiles: Mapping[int, DeviceProfile], options: DeviceOptions, seed: int, round: int
) -> ClientSample:
    """Returns a sample of the available devices: the share `participation` of them (at least one), minus dropouts.

    Each device has its own random generator, so that its draws do not depend on which other devices exist.
    """

    def chance(what: str, i: int) -> float:
        return float(numpy_generator(seed, what, round, i).random())

    sometimes = [i for i in sorted(profiles) if profiles[i].availability < 1]  # others need no draw, which takes 20 µs
    away = tuple(i for i in sometimes if chance("availability", i) >= profiles[i].availability)
    available = sorted(profiles.keys() - away)
    # rounds half up, unlike `round`; ROUNDING because 0.7 * 45 is less than 31.5 in floating point
    wanted = max(1, int(options.participation * len(available) + 0.5 + ROUNDING))
    sampled = sorted(sorted(available, key=lambda i: chance("participation", i))[:wanted])
    dropped = tuple(i for i in sampled if chance("dropout", i) < options.dropout)
    return ClientSample(tuple(i for i in sampled if i not in dropped), away, dropped)


def seconds(profile: DeviceProfile, bytes_down: int, macs: float, bytes_up: int) -> float:
    """Returns the seconds that a device takes to download `bytes_down`, compute `macs` and upload `bytes_up`."""
    return bytes_down / profile.download + macs / profile.compute + bytes_up / profile.upload


def training_macs(macs: int, trained: float, evaluated: int, models: int, adapted: float = 1.0) -> float:
    """Returns the MACs of a round on one device; the backward pass ends at the first block that has adapters.

    Args:
        macs: MACs of one image in the device's model.
        trained: number of images on which each model is trained, repetitions included.
        evaluated: number of images on which the shared and the personal model are evaluated.
        models: number of models that are trained.
        adapted: share of the MACs in the first block with adapters and all later ones.
    """
    return macs * ((1 + BACK * adapted) * models * trained + 2 * evaluated)


def groups_of(macs: Mapping[int, int], options: TrainOptions) -> list[list[int]]:
    """Returns the groups of devices that step together. They depend only on the plans, not on the number of workers.

    Devices of similar size are grouped, because all devices of a group are padded to the widest. The groups with the
    largest devices come first, so that the last groups are small and all workers finish at about the same time.

    Args:
        macs: MACs per image of each device that trains.
    """
    order = sorted(macs, key=lambda i: (macs[i], i), reverse=True)
    if options.together != "auto":
        groups = [order[start : start + options.together] for start in range(0, len(order), options.together)]
    else:
        small = [i for i in order if macs[i] * options.batch <= SMALL]
        runs = _of_like_size(small, macs)
        groups = [part.tolist() for run in runs for part in np.array_split(run, math.ceil(len(run) / AT_MOST))]
    return [sorted(group) for group in groups if len(group) > 1]


def reason_for_single(config: RunConfig, grid: Grid | None = None, backbone: nn.Module | None = None) -> str:
    """Returns why devices cannot step together; empty if they can. What is not given is not considered.

    Raises:
        ConfigError: if they cannot, and `train.together` is a number above 1.
    """
    wanted, why = config.train.together, ""
    if grid is not None and not hands_out_groups(grid):
        why = "this engine hands out single messages; only inprocess and ray hand out groups"
    elif not method_of(own := config.personalize, config.adapters, config.train.rounds).together:
        cause = f"alpha-per = {own.alpha_per!r}" if own.method == "apfl" else f"method = {own.method!r}"
        why = f"personalize.{cause} trains each device by itself"
    elif config.compute.precision == "fast":
        why = "compute.precision = 'fast' trains each device by itself"
    elif backbone is not None and not isinstance(backbone, VisionTransformer):
        why = f"{type(backbone).__name__} trains each device by itself, unlike ViT and DeiT"
    if why and wanted not in (1, "auto"):
        raise ConfigError(f"train.together = {wanted}: {why}; accepted: 1, auto")
    return why


def _of_like_size(order: Sequence[int], macs: Mapping[int, int]) -> Iterator[list[int]]:
    """Splits `order` (largest first) into runs whose first device has at most LIKE times the MACs of any other."""
    run: list[int] = []
    for i in order:
        if run and macs[run[0]] > LIKE * macs[i]:
            yield run
            run = []
        run.append(i)
    if run:
        yield run
