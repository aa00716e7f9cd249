"""Messages to many devices and their answers, with a window in flight, retries, and a check of all that arrives."""

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

CLIENT_RAISED = 2  # Flower's code for an exception in the ClientApp: it would only be raised again
RETRY_AFTER = 2.0  # a worker that died is back within seconds; what was sent to it meanwhile is sent again
POLL_FIRST, POLL_LAST = 0.01, 0.2


@dataclass(frozen=True)
class Request(Generic[R]):
    """A message to one device, or what makes it when it is sent, and what its answer must be."""

    content: WireMessage | Callable[[], WireMessage]
    reply_type: type[R]
    check: Callable[[R], object]  # raises WireError for an answer that must not be used
    max_bytes: float = math.inf  # that the answer may have
    macs: float = 0.0  # that the device computes for it, for the simulated time
    cached_bytes: int = 0  # that it found in a cache here and would have downloaded elsewhere: the message's own

    @property
    def message(self) -> WireMessage:
        return self.content() if callable(self.content) else self.content

    def bytes_of(self, message: WireMessage) -> Counter[str]:
        """Returns the bytes by kind of its message, which may be large to make again."""
        return message.bytes_by_kind + Counter({message.kind: self.cached_bytes})

    @property
    def bytes_by_kind(self) -> Counter[str]:
        return self.bytes_of(self.message)


@dataclass
class Answers(Generic[R]):
    """What came back, by partition id: the answers that passed their check, and why the others are missing.

    Attributes:
        sent: bytes by kind of the messages.
    """

    sent: dict[int, Counter[str]] = field(default_factory=dict)
    replies: dict[int, R] = field(default_factory=dict)
    failures: dict[int, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.replies) + len(self.failures)

    def fail(self, i: int, reason: str) -> None:
        self.failures[i] = _printable(reason)
        log(logging.WARNING, "device %d: %s", i, self.failures[i])

    def require(self, phase: str, min_success: float) -> dict[int, R]:
        """Returns the replies in the order of their partition ids.

        Raises:
            RunError: if there are fewer than the share `min_success` of the requests; above 0, at least one.
        """
        if min_success and (not self.replies or len(self.replies) < min_success * len(self)):
            reasons = sorted(set(self.failures.values())) or ["nothing was sent"]
            few = f"{len(self.replies)} of {len(self)} devices came through, faults.min-success = {min_success:g}"
            raise RunError(f"{phase}: {few if self.replies else 'no device answered'}; {reasons[0]}")
        return dict(sorted(self.replies.items()))


def wait_for_nodes(grid: Grid, count: int, timeout: float) -> list[int]:
    """Returns the ids of the connected nodes: exactly `count`, or with 0 as many as stay the same for 1 s.

    Raises:
        RunError: if they are not there within `timeout` seconds, or there are more than `count`.
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
                raise RunError(f"devices.count = {count}, but there are {seen} nodes; give 0 to use them all")
            if (count and seen == count) or (not count and seen and now - since >= 1.0):
                return nodes
            if now >= end:
                wanted = f"devices.count = {count}" if count else "at least one device was expected"
                raise RunError(f"{wanted}, but {seen} nodes are there after {timeout:g} s (node-timeout)")
            time.sleep(0.05)


class Attempt(NamedTuple):
    """The `number`-th time that devices which step together are sent their requests, not before `start`."""

    devices: tuple[int, ...]
    number: int = 1
    start: float = 0.0


def _attempts(requests: Mapping[int, Request[R]], groups: Sequence[Sequence[int]]) -> deque[Attempt]:
    """Returns the first attempts: groups in their order, then all other devices by themselves."""
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
) -> Answers[R]:
    """Sends each device its request; returns the answers that passed their check, and the failures.

    Args:
        nodes: node id by partition id.
        phase: name of the stage, and of Flower's message group.
        timeout: seconds for all of it; what has not arrived by then has failed, and is not looked at later.
        retries: how often a request is sent again whose worker was lost.
        window: requests in flight at once, where a group counts as one; Flower slows down with every message that it
            holds.
        groups: devices that one worker gets at once; all others get their request by themselves. A group that is lost
            is sent again as a group.
    """

    def message_to(i: int) -> Message:
        message = requests[i].message
        answers.sent[i] = requests[i].bytes_of(message)
        return Message(message.to_records(), nodes[i], message.type, group_id=phase)

    answers: Answers[R] = Answers()
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
            while (attempt := next((each for each in waiting if each.start <= now), None)) is not None:
                if len({each for _, each in in_flight.values()}) >= window:
                    break
                waiting.remove(attempt)
                ids = _push(grid, [message_to(i) for i in attempt.devices])
                in_flight |= {message_id: (i, attempt) for message_id, i in zip(ids, attempt.devices, strict=True)}
            replies = list(grid.pull_messages(list(in_flight))) if in_flight else []
            for reply in replies:
                i, answered = in_flight.pop(reply.metadata.reply_to_message_id, (-1, None))
                if answered is None:
                    log(logging.WARNING, "ignored an answer to no request, or a second answer to one")
                    continue
                if reply.has_error() and reply.error.code != CLIENT_RAISED and answered.number <= retries:
                    log(logging.WARNING, "device %d: %s; sent again", i, _reason(reply))
                    lost.setdefault(answered, []).append(i)
                else:
                    _accept(answers, i, reply, requests[i])
                if answered in lost and all(attempt is not answered for _, attempt in in_flight.values()):
                    again = tuple(each for each in answered.devices if each in lost[answered])
                    waiting.append(Attempt(again, answered.number + 1, now + RETRY_AFTER * answered.number))
                advance(len(answers), len(requests), "devices")
            poll = POLL_FIRST if replies else min(poll * 1.5, POLL_LAST)
            if not replies:
                time.sleep(poll)
    return answers


def hands_out_groups(grid: Grid) -> bool:
    """Returns whether a grid can give one worker several messages at once; Flower's own cannot."""
    return hasattr(grid, "push_group")


def window_of(grid: Grid, least: int) -> int:
    """Returns how many requests are in flight at once: two for each worker of an engine that says how many it has."""
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
    """The last line of what may be kilobytes of coloured traceback: the exception itself."""
    plain = re.sub(r"\x1b\[[0-9;]*m", "", reply.error.reason or "")
    plain = re.sub(r"((?:Error|Exception):)\s*\n", r"\1 ", plain)  # torch begins some messages on a line of their own
    lines = [line.strip() for line in plain.splitlines() if line.strip()]
    named = [line for line in lines if re.match(r"[\w.]*(Error|Exception)\b", line)]
    own = [line for line in named if not re.search(r"RayTaskError|ClientAppException", line)]  # what they only wrap
    return _printable((own or named or lines or ["no reason given"])[-1])


def _printable(text: str) -> str:
    """A device's words go to screens, logs and reports: one line that commands no terminal."""
    return "".join(sign if sign.isprintable() else " " for sign in text[:300])
