"""Messages to many devices: refusals, losses, delays, killed workers and duplicates affect only their own device."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Context, Error, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from experiments.engines import flower
from experiments.engines.local import InProcessGrid
from experiments.jobs.federation import on_flower
from strategies import exchange as module
from strategies.exchange import Request, exchange, wait_for_nodes, window_of
from strategies.fleet import Fleet
from tapfl.config import RunConfig
from tapfl.errors import RunError
from tapfl.run_folder import RunFolder
from tapfl.wire import ENVELOPE, Hello, HelloReply, Train, TrainReply

GOOD = TrainReply(
    round=1,
    adapters=np.ones(3, np.float32),
    loss=0.5,
    alpha=0.5,
    global_accuracy=0.9,
    reference_accuracies=np.array([0.7]),
    images=np.zeros(0),
    personal_accuracy=1.0,
)

Answer = Callable[[int, int], TrainReply | Error | None]


class ScriptedGrid(InProcessGrid):
    """Devices answer as a function of (partition id, attempt); None means no answer."""

    def __init__(self, nodes: int, answer: Answer) -> None:
        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1
        super().__init__(self._respond, {}, nodes)
        self.answer, self.attempts, self.in_flight, self.most_in_flight = answer, [0] * nodes, 0, 0

    def _respond(self, message: Message, context: Context) -> Message:
        i = int(context.node_config["partition-id"])
        self.attempts[i] += 1
        answer = self.answer(i, self.attempts[i])
        if isinstance(answer, TrainReply):
            return Message(answer.to_records(), reply_to=message)
        return Message(answer or Error(0, "silent"), reply_to=message)

    def push_group(self, messages: Sequence[Message]) -> Sequence[str]:
        ids = super().push_group(messages)
        self.in_flight += len(ids)
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        replies = [
            reply
            for reply in super().pull_messages(message_ids)
            if not (reply.has_error() and reply.error.reason == "silent")
        ]
        self.in_flight -= len(replies)
        return replies


@pytest.fixture(autouse=True)
def _hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "RETRY_AFTER", 0.01)


def ask(grid: ScriptedGrid, timeout: float = 5.0, window: int = 16) -> module.Answers[TrainReply]:
    nodes = {i: node for node, i in grid.partitions.items()}
    message = Train(1, 0, np.zeros(3, np.float32))
    request = Request(
        message, TrainReply, lambda reply: reply.check(1, references=1, length=3), max_bytes=12 + ENVELOPE
    )
    return exchange(grid, nodes, dict.fromkeys(nodes, request), "round 1", timeout=timeout, retries=3, window=window)


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (replace(GOOD, adapters=np.array([1, np.nan, 1], np.float32)), "finite"),
        (replace(GOOD, adapters=np.ones(4, np.float32)), "shape"),
        (replace(GOOD, adapters=np.ones(3, np.int64)), "float32"),
        (replace(GOOD, loss=math.inf), "not finite"),
        (replace(GOOD, alpha=1.5), "alpha"),
        (replace(GOOD, round=7), "round 7"),
        (replace(GOOD, adapters=np.ones(25_000_000, np.float32)), "at most 4108 are accepted"),
    ],
)
def test_a_bad_upload_is_refused_with_its_reason_and_the_others_count(bad: TrainReply, reason: str) -> None:
    answers = ask(ScriptedGrid(3, lambda i, _: bad if i == 1 else GOOD))
    assert sorted(answers.replies) == [0, 2]
    assert answers.failures[1].startswith("refused") and reason in answers.failures[1]


def test_a_lost_worker_is_retried_and_a_client_that_raises_is_not() -> None:
    lost, raised = Error(0, "ActorDiedError"), Error(2, "Traceback\n  line\nValueError: mine\n")
    grid = ScriptedGrid(3, lambda i, attempt: [GOOD, lost if attempt < 3 else GOOD, raised][i])
    answers = ask(grid)
    assert sorted(answers.replies) == [0, 1] and grid.attempts == [1, 3, 1]
    assert answers.failures == {2: "ValueError: mine"}


def test_the_device_s_own_exception_is_found_in_a_traceback_through_ray() -> None:
    """The traceback is as in Flower's simulation: coloured, nested, with the ClientApp's exception wrapped twice."""
    told = (
        "<class 'ray.exceptions.RayTaskError(ClientAppException)'>:<'\x1b[36mray::ClientAppActor.run()\x1b[39m\n"
        "  File app.py, line 3\nArithmeticError: mine\n\nThe above exception was the direct cause of this:\n\n"
        "flwr.clientapp.client_app.ClientAppException: \nException ClientAppException occurred. Message: mine'>"
    )
    answers = ask(ScriptedGrid(2, lambda i, _: Error(2, told) if i else GOOD))
    assert answers.failures == {1: "ArithmeticError: mine"}


def test_an_exception_message_that_begins_on_a_new_line_is_found() -> None:
    told = "Traceback\n  line\nRuntimeError: \nNo autocast here\nfor this kernel\n"
    answers = ask(ScriptedGrid(2, lambda i, _: Error(2, told) if i else GOOD))
    assert answers.failures == {1: "RuntimeError: No autocast here"}


def test_a_hanging_device_fails_alone() -> None:
    answers = ask(ScriptedGrid(3, lambda i, _: None if i == 0 else GOOD), timeout=0.3)
    assert sorted(answers.replies) == [1, 2] and "no answer within 0.3 s" in answers.failures[0]


def test_no_more_than_the_window_is_in_flight() -> None:
    grid = ScriptedGrid(10, lambda i, _: GOOD)
    assert len(ask(grid, window=3).replies) == 10
    assert grid.most_in_flight == 3


def test_a_phase_without_any_answer_ends_the_run() -> None:
    answers = ask(ScriptedGrid(2, lambda i, _: Error(2, "ValueError: mine")))
    with pytest.raises(RunError, match="no device answered; ValueError: mine"):
        answers.require("round 1", 0.1)
    assert answers.require("round 1", 0) == {}


@pytest.mark.parametrize(("share", "enough"), [(0.5, True), (0.75, True), (0.76, False), (1.0, False)])
def test_fewer_than_the_least_share_end_the_run(share: float, enough: bool) -> None:
    answers = ask(ScriptedGrid(4, lambda i, _: Error(2, "ValueError: mine") if i == 2 else GOOD))
    if enough:
        assert sorted(answers.require("round 1", share)) == [0, 1, 3]
    else:
        with pytest.raises(RunError, match=r"only 3 of 4 devices succeeded, faults.min-success = .*; ValueError: mine"):
            answers.require("round 1", share)


def test_a_share_that_is_met_exactly_is_enough() -> None:
    answers = ask(ScriptedGrid(25, lambda i, _: GOOD if i < 7 else Error(2, "ValueError: mine")), window=25)
    assert len(answers.require("round 1", 0.28)) == 7  # in floating point, 0.28 * 25 is above 7


def test_second_answers_and_answers_without_a_request_are_ignored() -> None:
    class Echo(ScriptedGrid):
        def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
            replies = list(super().pull_messages(message_ids))
            return [*replies, *replies]

    grid = Echo(3, lambda i, _: GOOD)
    assert sorted(ask(grid).replies) == [0, 1, 2] and grid.attempts == [1, 1, 1]


def test_answers_come_in_the_order_of_the_devices() -> None:
    assert list(ask(ScriptedGrid(12, lambda i, _: GOOD), window=5).require("round 1", 1.0)) == list(range(12))


def test_a_wrong_number_of_nodes_ends_the_run() -> None:
    grid = ScriptedGrid(3, lambda i, _: GOOD)
    assert len(wait_for_nodes(grid, 0, 5)) == len(wait_for_nodes(grid, 3, 5)) == 3
    with pytest.raises(RunError, match=r"devices.count = 5, but 3 nodes are connected after 0.1 s"):
        wait_for_nodes(grid, 5, 0.1)
    with pytest.raises(RunError, match=r"devices.count = 2, but 3 nodes are connected"):
        wait_for_nodes(grid, 2, 5)


def test_malformed_records_are_refused() -> None:
    class Stranger(ScriptedGrid):
        def _respond(self, message: Message, context: Context) -> Message:
            return Message(RecordDict(), reply_to=message)

    assert "refused" in ask(Stranger(1, lambda i, _: GOOD)).failures[0]


class GroupGrid(ScriptedGrid):
    """Records which devices one worker got together."""

    def push_group(self, messages: Sequence[Message]) -> Sequence[str]:
        if len(messages) > 1:
            groups.append([self.partitions[message.metadata.dst_node_id] for message in messages])
        return super().push_group(messages)


groups: list[list[int]] = []


def test_a_group_that_is_lost_is_sent_again_as_a_group(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "RETRY_AFTER", 0.0)
    groups.clear()
    grid = GroupGrid(4, lambda i, attempt: GOOD if attempt == 2 or i == 3 else Error(0, "lost"))
    nodes = {i: node for node, i in grid.partitions.items()}
    requests = {i: Request(Train(1, 0, np.ones(3, np.float32)), TrainReply, lambda reply: None) for i in range(4)}
    limits = {"timeout": 20.0, "retries": 1, "window": 2}
    answers = exchange(grid, nodes, requests, "round 1", **limits, groups=[[0, 1, 2]])  # type: ignore[arg-type]
    assert sorted(answers.replies) == [0, 1, 2, 3] and groups == [[0, 1, 2], [0, 1, 2]]


def test_a_group_counts_as_one_request_of_the_window() -> None:
    grid = GroupGrid(9, lambda i, _: GOOD)
    nodes = {i: node for node, i in grid.partitions.items()}
    requests = {i: Request(Train(1, 0, np.ones(3, np.float32)), TrainReply, lambda reply: None) for i in range(9)}
    triples = [[0, 1, 2], [3, 4, 5], [6, 7, 8]]
    limits = {"timeout": 20.0, "retries": 1, "window": 2}
    answers = exchange(grid, nodes, requests, "round 1", **limits, groups=triples)  # type: ignore[arg-type]
    assert len(answers.replies) == 9 and grid.most_in_flight == 6


def test_an_engine_with_many_workers_has_two_requests_for_each() -> None:
    grid = ScriptedGrid(1, lambda i, _: GOOD)
    assert window_of(grid, 16) == 16
    grid.workers = 64
    assert window_of(grid, 16) == 128 and window_of(grid, 1000) == 1000


def test_flowers_engine_gets_a_window_of_two_requests_per_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    windows: list[object] = []
    monkeypatch.setattr(flower, "run_flower", lambda config, nodes, workers, gpus: windows.append(config["window"]))
    for workers in (2, 64):
        on_flower({"window": 16}, 100, workers, 0.0)
    assert windows == [16, 128]


def test_messages_that_are_made_when_they_are_sent_are_not_kept() -> None:
    alive: list[weakref.ref[Train]] = []
    most = 0

    def make(i: int) -> Train:
        nonlocal most
        most = max(most, sum(each() is not None for each in alive))
        message = Train(1, 0, np.full(3, i, np.float32))
        alive.append(weakref.ref(message))
        return message

    requests = {i: Request(partial(make, i), TrainReply, lambda reply: None) for i in range(6)}
    grid = ScriptedGrid(6, lambda i, attempt: GOOD)
    nodes = {i: node for node, i in grid.partitions.items()}
    answers = exchange(grid, nodes, requests, "round 1", timeout=300.0, retries=0, window=2)
    assert len(answers.replies) == 6 and most < 3
    assert len(alive) == 6 and answers.sent[4] == Train(1, 0, np.full(3, 4, np.float32)).bytes_by_kind  # made once each


# -- devices that introduce themselves --------------------------------------------------------------------------------

INTRODUCED = HelloReply(0, "0.5", 4, 5e9, 1e6, 5e6, 1.0, train_samples=50, holds_backbone=True, class_names="[]")


def introducing(*answers: HelloReply | Error) -> InProcessGrid:
    """Returns a grid with new nodes, whose devices answer a hello as given."""

    def respond(message: Message, context: Context) -> Message:
        answer = answers[int(context.node_config["partition-id"])]
        return Message(answer if isinstance(answer, Error) else answer.to_records(), reply_to=message)

    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1
    return InProcessGrid(respond, {}, len(answers))


def test_a_device_that_comes_back_is_met_again_and_told_from_another(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = RunConfig.from_flat({"devices.count": 3, "faults.min-success": 0.5})
    others = [replace(INTRODUCED, partition_id=i) for i in range(3)]
    fleet = Fleet(introducing(others[0], Error(2, "ValueError: mine"), others[2]), config, RunFolder(tmp_path))
    records = fleet.meet(Hello("key"))
    assert sorted(records) == [0, 2] == sorted(fleet.nodes) and fleet.holds_backbone == {0, 2}
    assert "node" in caplog.text and "device" not in caplog.text  # which device has failed is not known
    before = dict(fleet.nodes)
    fleet.grid = introducing(replace(others[0], holds_backbone=False), others[1], replace(others[2], rank=2))
    fleet.meet_again(Hello("key"), records)
    assert fleet.nodes[0] != before[0] and fleet.nodes[2] == before[2]
    assert "device 1: ignored, because it is not one of the devices of round zero" in caplog.text
    assert "device 2: ignored, because it had 50 images and DeviceProfile(" in caplog.text and "rank=2" in caplog.text
    assert 0 not in fleet.holds_backbone  # its cache is gone
