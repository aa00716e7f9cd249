"""Messages to many devices and their answers, with a window in flight, retries, and a check of all that arrives."""

from __future__ import annotations

import logging
import math
import re
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from flwr.app import Message
from flwr.common.logger import log
from flwr.serverapp import Grid

from tapfl.errors import RunError, WireError
from tapfl.progress import stage
from tapfl.wire import WireMessage

R = TypeVar("R", bound=WireMessage)

CLIENT_RAISED = 2  # Flower's code for an exception in the ClientApp: it would only be raised again
RETRY_AFTER = 2.0  # a worker that died is back within seconds; what was sent to it meanwhile is sent again
POLL_FIRST, POLL_LAST = 0.01, 0.2


@dataclass
class Answers(Generic[R]):
    """What came back, by partition id: the answers that passed their check, and why the others are missing."""

    replies: dict[int, R] = field(default_factory=dict)
    failures: dict[int, str] = field(default_factory=dict)

    def require(self, what: str, min_success: float) -> dict[int, R]:
        """Returns the replies in the order of their partition ids.

        Raises:
            RunError: if there are fewer than the share `min_success` of those that were asked; above 0 that is one
                at least.
        """
        asked = len(self.replies) + len(self.failures)
        if min_success and (not self.replies or len(self.replies) < min_success * asked):
            reasons = sorted(set(self.failures.values())) or ["nothing was sent"]
            few = f"{len(self.replies)} of {asked} devices came through, faults.min-success = {min_success:g}"
            raise RunError(f"{what}: {few if self.replies else 'no device answered'}; {reasons[0]}")
        return dict(sorted(self.replies.items()))


def wait_for_nodes(grid: Grid, count: int, timeout: float) -> list[int]:
    """Returns the ids of the nodes that are there: exactly `count` of them, or with 0 as many as stay the same for 1 s.

    Raises:
        RunError: if they are not there in `timeout` seconds, or more than `count` are.
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


def exchange(
    grid: Grid,
    outgoing: Mapping[int, tuple[int, WireMessage]],
    reply_type: type[R],
    check: Callable[[int, R], None],
    *,
    timeout: float,
    retries: int,
    window: int,
    group: str,
    limit: Callable[[int], float] = lambda partition_id: math.inf,
    arrived: Callable[[int], None] = lambda count: None,
) -> Answers[R]:
    """Sends each device its message and returns the answers that pass `check`.

    Args:
        outgoing: (node id, message) by partition id.
        check: raises WireError for an answer that must not be used.
        timeout: seconds for all of it; what has not arrived by then counts as failed and is not looked at later.
        retries: how often a message is sent again whose worker was lost.
        window: messages in flight at once; Flower's state slows down with every message that lies in it.
        group: shown by Flower, the round.
        limit: bytes that an answer of this device may have.
        arrived: called with the number of devices that are done, first with 0.
    """
    answers: Answers[R] = Answers()
    waiting = deque((partition_id, 1, 0.0) for partition_id in sorted(outgoing))
    in_flight: dict[str, tuple[int, int]] = {}
    end, poll = time.monotonic() + timeout, POLL_FIRST
    arrived(0)
    while waiting or in_flight:
        now = time.monotonic()
        if now >= end:
            for partition_id in [p for p, *_ in waiting] + [p for p, _ in in_flight.values()]:
                _fail(answers, partition_id, f"no answer within {timeout:g} s (faults.exchange-timeout)")
            return answers
        ready = [entry for entry in waiting if entry[2] <= now][: window - len(in_flight)]
        for entry in ready:
            waiting.remove(entry)
            node, message = outgoing[entry[0]]
            outgoing_message = Message(message.to_records(), node, message.type, group_id=group)
            (message_id,) = grid.push_messages([outgoing_message])
            in_flight[message_id] = (entry[0], entry[1])
        replies = list(grid.pull_messages(list(in_flight))) if in_flight else []
        for reply in replies:
            flown = in_flight.pop(reply.metadata.reply_to_message_id, None)
            if flown is None:
                log(logging.WARNING, "an answer to nothing that was asked, or a second one: not looked at")
                continue
            partition_id, attempt = flown
            if reply.has_error() and reply.error.code != CLIENT_RAISED and attempt <= retries:
                log(logging.WARNING, "device %d: %s; sent again", partition_id, _reason(reply.error.reason))
                waiting.append((partition_id, attempt + 1, now + RETRY_AFTER * attempt))
            elif reply.has_error():
                _fail(answers, partition_id, _reason(reply.error.reason))
            else:
                _accept(answers, partition_id, reply, reply_type, check, limit(partition_id))
            arrived(len(answers.replies) + len(answers.failures))
        poll = POLL_FIRST if replies else min(poll * 1.5, POLL_LAST)
        if not replies:
            time.sleep(poll)
    return answers


def _accept(
    answers: Answers[R],
    partition_id: int,
    reply: Message,
    reply_type: type[R],
    check: Callable[[int, R], None],
    limit: float,
) -> None:
    try:
        answer = reply_type.from_records(reply.content, limit)
        check(partition_id, answer)
    except WireError as error:
        _fail(answers, partition_id, f"refused: {error}")
    else:
        answers.replies[partition_id] = answer


def _fail(answers: Answers[R], partition_id: int, reason: str) -> None:
    reason = _shown(reason)
    answers.failures[partition_id] = reason
    log(logging.WARNING, "device %d: %s", partition_id, reason)


def _reason(text: str | None) -> str:
    """The last line of what may be kilobytes of coloured traceback: the exception itself."""
    plain = re.sub(r"\x1b\[[0-9;]*m", "", text or "")
    lines = [line.strip() for line in plain.splitlines() if line.strip()]
    named = [line for line in lines if re.match(r"[\w.]*(Error|Exception)\b", line)]
    own = [line for line in named if not re.search(r"RayTaskError|ClientAppException", line)]  # what they only wrap
    return _shown((own or named or lines or ["no reason given"])[-1])


def _shown(text: str) -> str:
    """What a device says goes to screens, logs and reports: one line that commands no terminal."""
    return "".join(sign if sign.isprintable() else " " for sign in text[:300])
