"""Sends messages to many devices and collects their answers: a window of requests in flight, retries, and checks."""

from __future__ import annotations

import logging
import math
import re
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Generic, NamedTuple, TypeVar

from flwr.app import Message
from flwr.common.logger import log
from flwr.serverapp import Grid

from tapfl.errors import RunError, WireError
from tapfl.progress import stage
from tapfl.wire_format import WireMessage

R = TypeVar("R", bound=WireMessage)

CLIENT_RAISED = 2  # Flower's code for an exception in the ClientApp; a retry would only raise it again
RETRY_AFTER = 2.0  # seconds, times the number of attempts; a worker that died is back within seconds
ROUNDING = 1e-9  # tolerance for a share of devices: 0.28 * 25 is more than 7 in floating point
POLL_FIRST, POLL_LAST = 0.01, 0.2  # seconds between two polls, growing while nothing arrives


@dataclass(frozen=True)
class Request(Generic[R]):
    """A message to one device, and the requirements for its answer.

    Attributes:
        content: the message, or a function that makes it when it is sent.
        check: raises WireError for an answer that must not be used.
        max_bytes: largest size of the answer.
        macs: what the device computes for the answer, for the simulated time.
        cached_bytes: part of the message that the simulated device found in a cache of this machine; a real device
            would have downloaded it, so it counts as sent.
    """

    content: WireMessage | Callable[[], WireMessage]
    reply_type: type[R]
    check: Callable[[R], object]
    max_bytes: float = math.inf
    macs: float = 0.0
    cached_bytes: int = 0

    @property
    def message(self) -> WireMessage:
        return self.content() if callable(self.content) else self.content

    def bytes_of(self, message: WireMessage) -> Counter[str]:
        """Returns the bytes by kind of `message`, this request's message, which is costly to make a second time."""
        return message.bytes_by_kind + Counter({message.kind: self.cached_bytes})

    @property
    def bytes_by_kind(self) -> Counter[str]:
        return self.bytes_of(self.message)


@dataclass
class Answers(Generic[R]):
    """The results of an exchange, by partition id.

    Attributes:
        sent: bytes by kind of each message that was sent.
        replies: the answers that passed their check.
        failures: for the other devices, why there is no answer.
        what: what the numbers are of, for the log.
    """

    sent: dict[int, Counter[str]] = field(default_factory=dict)
    replies: dict[int, R] = field(default_factory=dict)
    failures: dict[int, str] = field(default_factory=dict)
    what: str = "device"

    def __len__(self) -> int:
        return len(self.replies) + len(self.failures)

    def fail(self, i: int, reason: str) -> None:
        self.failures[i] = _printable(reason)
        log(logging.WARNING, "%s %d: %s", self.what, i, self.failures[i])

    def require(self, phase: str, min_success: float) -> dict[int, R]:
        """Returns the replies in the order of their partition ids.

        Raises:
            RunError: if `min_success` is above 0, and there is no reply or the share of requests with a reply is below
                `min_success`.
        """
        if min_success and (not self.replies or len(self.replies) < min_success * len(self) - ROUNDING):
            reasons = sorted(set(self.failures.values())) or ["nothing was sent"]
            few = f"only {len(self.replies)} of {len(self)} devices succeeded, faults.min-success = {min_success:g}"
            raise RunError(f"{phase}: {few if self.replies else 'no device answered'}; {reasons[0]}")
        return dict(sorted(self.replies.items()))


def wait_for_nodes(grid: Grid, count: int, timeout: float) -> list[int]:
    """Returns the ids of the connected nodes, once there are `count`; with 0, once their number is stable for 1 s.

    Raises:
        RunError: if they are not connected within `timeout` seconds, or more than `count` are.
    """
    end = time.monotonic() + timeout
    seen, since = -1, time.monotonic()
    with stage("nodes") as advance:
        while True:
            nodes = sorted(grid.get_node_ids())
            now = time.monotonic()
            if len(nodes) != seen:
                seen, since = len(nodes), now
                advance(seen, count)
            if count and seen > count:
                raise RunError(f"devices.count = {count}, but {seen} nodes are connected; use 0 for all of them")
            if (count and seen == count) or (not count and seen and now - since >= 1.0):
                return nodes
            if now >= end:
                wanted = f"devices.count = {count}" if count else "at least one device was expected"
                raise RunError(f"{wanted}, but {seen} nodes are connected after {timeout:g} s (node-timeout)")
            time.sleep(0.05)


class Attempt(NamedTuple):
    """The `number`-th attempt to send requests to devices that step together, not before the time `start`."""

    devices: tuple[int, ...]
    number: int = 1
    start: float = 0.0


def _attempts(requests: Mapping[int, Request[R]], groups: Sequence[Sequence[int]]) -> deque[Attempt]:
    """Returns the first attempts: the groups in their order, then every other device by itself."""
    together = [tuple(i for i in group if i in requests) for group in groups]
    apart = sorted(requests.keys() - {i for group in together for i in group})
    return deque(Attempt(group) for group in (*filter(None, together), *((i,) for i in apart)))


def exchange(
    grid: Grid,
    nodes: Mapping[int, int],
    requests: Mapping[int, Request[R]],
    phase: str,
    *,
    timeout: float,
    retries: int,
    window: int,
    groups: Sequence[Sequence[int]] = (),
    what: str = "device",
) -> Answers[R]:
    """Sends each device its request; returns the answers that passed their check, and the failures.

    Args:
        nodes: node id by partition id.
        phase: name of the stage, and of Flower's message group.
        timeout: seconds for the whole exchange; requests without an answer by then have failed, and later answers are
            ignored.
        retries: how often a request is sent again if its worker was lost.
        window: largest number of requests in flight; a group counts as one. Flower slows down with every message that
            it holds.
        groups: devices whose requests are handed to one worker together; every other device gets its request by
            itself. The lost requests of a group are sent again as a group.
        what: what the numbers are of, for the log.
    """

    def message_to(i: int) -> Message:
        message = requests[i].message
        answers.sent[i] = requests[i].bytes_of(message)
        return Message(message.to_records(), nodes[i], message.type, group_id=phase)

    answers: Answers[R] = Answers(what=what)
    waiting = _attempts(requests, groups)
    in_flight: dict[str, tuple[int, Attempt]] = {}
    lost: dict[Attempt, list[int]] = {}
    end, poll = time.monotonic() + timeout, POLL_FIRST
    with stage(phase) as advance:
        advance(0, len(requests), "devices")
        while waiting or in_flight:
            now = time.monotonic()
            if now >= end:
                for i in (*(i for attempt in waiting for i in attempt.devices), *(i for i, _ in in_flight.values())):
                    answers.fail(i, f"no answer within {timeout:g} s (faults.exchange-timeout)")
                break
            while (attempt := next((one for one in waiting if one.start <= now), None)) is not None:
                if len({one for _, one in in_flight.values()}) >= window:
                    break
                waiting.remove(attempt)
                ids = _push(grid, [message_to(i) for i in attempt.devices])
                in_flight |= {message_id: (i, attempt) for message_id, i in zip(ids, attempt.devices, strict=True)}
            replies = list(grid.pull_messages(list(in_flight))) if in_flight else []
            for reply in replies:
                i, answered = in_flight.pop(reply.metadata.reply_to_message_id, (-1, None))
                if answered is None:
                    log(logging.WARNING, "ignored an answer without a request, or a second answer to the same request")
                    continue
                if reply.has_error() and reply.error.code != CLIENT_RAISED and answered.number <= retries:
                    log(logging.WARNING, "%s %d: %s; sent again", what, i, _reason(reply))
                    lost.setdefault(answered, []).append(i)
                else:
                    _accept(answers, i, reply, requests[i])
                if answered in lost and all(attempt is not answered for _, attempt in in_flight.values()):
                    again = tuple(i for i in answered.devices if i in lost[answered])
                    waiting.append(Attempt(again, answered.number + 1, now + RETRY_AFTER * answered.number))
                advance(len(answers), len(requests), "devices")
            poll = POLL_FIRST if replies else min(poll * 1.5, POLL_LAST)
            if not replies:
                time.sleep(poll)
    return answers


def hands_out_groups(grid: Grid) -> bool:
    """Returns whether a grid can hand several messages to one worker as a group; Flower's own cannot."""
    return hasattr(grid, "push_group")


def window_of(grid: Grid, least: int) -> int:
    """Returns the window: two requests per worker if the engine has a number of workers, but at least `least`."""
    return max(least, 2 * getattr(grid, "workers", 0))


def _push(grid: Grid, messages: list[Message]) -> list[str]:
    pushed = grid.push_group(messages) if len(messages) > 1 else grid.push_messages(messages)  # type: ignore[attr-defined]
    return list(pushed)


def _accept(answers: Answers[R], i: int, reply: Message, request: Request[R]) -> None:
    if reply.has_error():
        answers.fail(i, _reason(reply))
        return
    try:
        answer = request.reply_type.from_records(reply.content, request.max_bytes)
        request.check(answer)
    except WireError as error:
        answers.fail(i, f"refused: {error}")
    else:
        answers.replies[i] = answer


def _reason(reply: Message) -> str:
    """Returns the line with the exception itself from what may be kilobytes of coloured traceback."""
    plain = re.sub(r"\x1b\[[0-9;]*m", "", reply.error.reason or "")
    plain = re.sub(r"((?:Error|Exception):)\s*\n", r"\1 ", plain)  # torch starts some messages on a new line
    lines = [line.strip() for line in plain.splitlines() if line.strip()]
    named = [line for line in lines if re.match(r"[\w.]*(Error|Exception)\b", line)]
    own = [line for line in named if not re.search(r"RayTaskError|ClientAppException", line)]  # only wrappers
    return _printable((own or named or lines or ["no reason given"])[-1])


def _printable(text: str) -> str:
    """Returns a device's text as one line without control characters, for screens, logs and reports."""
    return "".join(sign if sign.isprintable() else " " for sign in text[:300])
