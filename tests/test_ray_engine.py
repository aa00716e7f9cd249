"""The Ray engine: the same bits as in one process, also on warm actors and if actors die."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, Context, Message, RecordDict
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.supercore.task_identity import TaskIdentity
from ray.exceptions import RayActorError
from test_inprocess_run import SMALL, content, tapfl

from experiments.engines.actor import Answer
from experiments.engines.cluster import EngineLostError, require_reachable
from experiments.engines.local import WORKER_LOST
from experiments.engines.ray import ActorPool, RayGrid
from experiments.jobs.federation import Engine, carry_out, in_process, on_actors
from experiments.jobs.pool import Job, ThreadPool
from experiments.preflight import absolute_paths
from experiments.search.settings import Search, SearchOptions
from experiments.search.space import SearchSpace
from experiments.search.study import run_search
from strategies.server_app import app as server_app
from tapfl.config import RunConfig
from tapfl.errors import ConfigError, RunError
from tapfl.options import parse_assignment


@pytest.fixture(scope="module")
def workers() -> Iterator[ActorPool]:
    with ActorPool(count=2) as warm:
        yield warm


@pytest.fixture(scope="module")
def one_process(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("runs") / "inprocess"
    assert tapfl("--out", str(folder), cache=cache).exit_code == 0
    return content(folder)


def on_ray(workers: ActorPool, folder: Path, cache: Path, client_app: str = "", **changes: object) -> dict[str, bytes]:
    options: dict[str, object] = dict(option.split("=", 1) for option in SMALL)
    config = RunConfig.from_flat(options | changes | {"out": str(folder), "cache": str(cache)})
    apps = {"client_app": client_app} if client_app else {}
    workers.run(server_app, absolute_paths(config).flat(), config.devices.count, **apps)
    assert json.loads((folder / "summary.json").read_text())["devices"]
    return content(folder)


def test_simultaneous_runs_on_warm_actors_give_the_bits_of_one_process(
    workers: ActorPool, cache: Path, tmp_path: Path, one_process: dict[str, bytes]
) -> None:
    """Each first trains its own backbone, whose weights are drawn from torch's global generator."""
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(
            lambda seed: on_ray(workers, tmp_path / f"run-{seed}", tmp_path / "cache", seed=seed), (0, 1)
        )
    assert first == one_process != second


@pytest.mark.slow
def test_a_search_has_the_same_result_on_ray(workers: ActorPool, cache: Path, tmp_path: Path) -> None:
    """Same trials, same values, same best options, and the same run folders."""
    shared = dict(parse_assignment(o) for o in SMALL if "rounds" not in o) | {"cache": str(cache)}
    settings = SearchOptions(max_rounds=2, eta=2, brackets=1)
    space = {
        "train.learning-rate": {"low": 1e-3, "high": 1e-2, "log": True},
        "pruning.tau": {"low": 0.1, "high": 1.0},
    }
    search = Search(settings, SearchSpace.parse(space, shared), shared)

    @contextmanager
    def on(engine: Engine, jobs: int) -> Iterator[tuple[ThreadPool, Engine]]:
        with closing(ThreadPool(jobs)) as pool:
            yield pool, engine

    run_search(search, "s", tmp_path / "here", lambda: on(in_process, 1))
    run_search(search, "s", tmp_path / "ray", lambda: on(partial(on_actors, actors=workers), 2))
    here, ray = tmp_path / "here", tmp_path / "ray"
    for name in ("trials.csv", "best.toml"):
        assert (here / name).read_text() == (ray / name).read_text()
    runs = [folder.name for folder in sorted((here / "trials").glob("[0-9]*")) if folder.is_dir()]
    assert len(runs) == 2
    for run in runs:
        assert content(here / "trials" / run) == content(ray / "trials" / run)
        assert "mean personal accuracy" in (ray / "trials" / f"{run}.log").read_text()


def test_a_search_whose_actors_are_lost_ends_without_failing_a_trial(cache: Path, tmp_path: Path) -> None:
    shared = dict(parse_assignment(o) for o in SMALL) | {"cache": str(cache)}
    actors = ActorPool()
    actors.lost = "no Ray actor is left"
    with closing(ThreadPool(1)) as pool:
        future = pool.submit(Job(carry_out, (shared, tmp_path / "0000", partial(on_actors, actors=actors))))
        with pytest.raises(EngineLostError, match="no Ray actor is left"):
            future.result(timeout=60)


def test_flowers_own_strategies_run_on_it(workers: ActorPool) -> None:
    """They use `send_and_receive` and average the replies."""
    server, results = ServerApp(), []

    @server.main()
    def fedavg(grid: Grid, context: Context) -> None:
        start = ArrayRecord({"w": Array(np.zeros(2))})
        results.append(FedAvg(fraction_evaluate=0.0, min_available_nodes=3).start(grid, start, num_rounds=2))

    workers.run(server, {}, 3, client_app="faulty_apps:adds_its_number")
    np.testing.assert_allclose(results[0].arrays["w"].numpy(), [2.0, 2.0])  # each round adds (0 + 1 + 2) / 3


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"count": 999}, "--workers 999 .* there is room for [0-9]+, on 1 machine"),
        ({"gpus": 1000.0}, "--actor-gpus 1000: there is room for 0"),
        ({"cpus": 0.0}, "needs --workers"),
    ],
)
def test_more_resources_than_available_are_refused_immediately(
    workers: ActorPool, asked: dict[str, float], said: str
) -> None:
    with pytest.raises(ConfigError, match=said), ActorPool(**asked):  # type: ignore[arg-type]
        pass


def test_a_fully_used_cluster_is_refused_after_a_short_time(
    workers: ActorPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    monkeypatch.setattr("experiments.engines.ray.FREE", 1.0)

    everything = ray.cluster_resources()["CPU"]
    with pytest.raises(RunError, match="the Ray cluster is in use"), ActorPool(count=1, cpus=everything):
        pass


# the last test with these actors, so that nothing waits for the new one
def test_a_killed_actor_is_restarted_and_its_messages_are_sent_again(
    workers: ActorPool, cache: Path, tmp_path: Path, one_process: dict[str, bytes], caplog: pytest.LogCaptureFixture
) -> None:
    assert on_ray(workers, tmp_path / "run", cache, "faulty_apps:mortal") == one_process
    assert (tmp_path / "died").exists() and "sent again" in caplog.text


@pytest.mark.parametrize("address", ["ray://head:10001", "head", "127.0.0.1:port"])
def test_an_invalid_address_is_refused(address: str) -> None:
    with pytest.raises(ConfigError, match="must be HOST:PORT"):
        require_reachable(address)


def test_a_cluster_that_does_not_answer_is_refused_in_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    """The port belongs to a program other than Ray."""
    monkeypatch.setattr("experiments.engines.cluster.REACH", 1.0)
    with socket.create_server(("127.0.0.1", 0)) as server:
        began, port = time.monotonic(), server.getsockname()[1]
        with pytest.raises(ConfigError, match=f"127.0.0.1:{port}: no Ray cluster answers"):
            require_reachable(f"127.0.0.1:{port}")
        assert time.monotonic() - began < 6


def test_options_of_ray_are_refused_with_other_engines(cache: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="only with --engine ray"):
        tapfl("--out", str(tmp_path / "run"), "--address", "head:6379", cache=cache)
    assert not (tmp_path / "run").exists()


class NotedActor:
    """Stands in for a Ray actor, and records whose message it got."""

    def __init__(self, taken: list[int]) -> None:
        self.taken = taken

    @property
    def answer(self) -> NotedActor:
        return self

    def remote(self, app: str, messages: list[Message], *rest: object) -> list[Message]:
        self.taken += [message.metadata.dst_node_id for message in messages]
        return messages


@pytest.fixture
def unstarted(monkeypatch: pytest.MonkeyPatch) -> ActorPool:
    """An ActorPool without Ray; the test decides when its calls are done."""
    monkeypatch.setattr(ActorPool, "_watch", lambda self, ref, done: None)
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1
    return ActorPool()


def queued(workers: ActorPool, count: int) -> tuple[RayGrid, int, list[Message]]:
    """Returns a federation with one node and waiting messages, its node, and the messages."""
    grid = RayGrid(workers, "apps:app", {}, 1)
    (node,) = grid.partitions
    messages = [Message(RecordDict(), node, "train") for _ in range(count)]
    for message in messages:
        grid.stamp(message)
    for message in messages:
        workers._queue(grid, [message])
    return grid, node, messages


def test_federations_take_turns(unstarted: ActorPool) -> None:
    """Two federations with waiting messages alternate, however many messages the first one has."""
    handed: list[int] = []
    (_, first, _), (_, second, _) = queued(unstarted, 5), queued(unstarted, 2)
    for _ in range(7):
        unstarted._at[NotedActor(handed)] = set()
        unstarted._hand_out()
    assert handed == [first, second, first, second, first, first, first]


def test_a_busy_actor_gets_its_next_message_but_the_last_ones_wait_for_a_free_actor(unstarted: ActorPool) -> None:
    handed: list[list[int]] = [[], []]
    actors = [NotedActor(taken) for taken in handed]
    grid, _, messages = queued(unstarted, 6)
    unstarted._at = {actor: set() for actor in actors}

    def told(number: int) -> list[int]:
        """Lets the second actor answer a message; returns how many messages each actor was given."""
        done = Future[Answer]()
        done.set_result(([Message(RecordDict(), reply_to=messages[number])], []))
        unstarted._answered(actors[1], grid, [messages[number]], done)
        unstarted._hand_out()
        return [len(taken) for taken in handed]

    unstarted._hand_out()
    assert [len(taken) for taken in handed] == [2, 2]
    assert told(1) == [2, 2]
    assert told(3) == [2, 3]


def test_an_actor_that_dies_is_awaited_once(unstarted: ActorPool, monkeypatch: pytest.MonkeyPatch) -> None:
    awaited: list[object] = []
    monkeypatch.setattr(unstarted, "_await", awaited.append)
    actor, (grid, _, messages) = NotedActor([]), queued(unstarted, 3)
    unstarted._at = {actor: set()}
    unstarted._hand_out()
    lost = Future[Answer]()
    lost.set_exception(RayActorError())
    unstarted._answered(actor, grid, [messages[0]], lost)
    unstarted._answered(actor, grid, [messages[1]], lost)
    unstarted._hand_out()
    assert awaited == [actor]
    assert len(actor.taken) == 2
    replies = list(grid.pull_messages([message.metadata.message_id for message in messages]))
    assert [reply.error.code for reply in replies] == [WORKER_LOST, WORKER_LOST]


def test_an_actor_prefers_the_devices_that_it_had_last(unstarted: ActorPool) -> None:
    grid = RayGrid(unstarted, "apps:app", {}, 4)
    nodes, taken = list(grid.partitions), ([], [])
    actors = [NotedActor(each) for each in taken]
    for order in (nodes, nodes[::-1]):
        for node in order:
            unstarted._queue(grid, [Message(RecordDict(), node, "train")])
        for group in grid.waiting:
            grid.stamp(group[0])
        for _ in range(2):
            unstarted._at = {actor: set() for actor in actors}
            unstarted._hand_out()
    first, second = taken
    assert sorted(first[:2]) == sorted(first[2:]) and sorted(second[:2]) == sorted(second[2:])
    assert sorted(first[:2] + second[:2]) == sorted(nodes)


def test_a_group_is_a_single_call_of_one_actor_and_is_lost_as_a_whole(unstarted: ActorPool) -> None:
    grid = RayGrid(unstarted, "apps:app", {}, 3)
    messages = [Message(RecordDict(), node, "train") for node in grid.partitions]
    actor, ids = NotedActor([]), [grid.stamp(message) for message in messages]
    unstarted._at = {actor: set()}
    unstarted._queue(grid, messages)
    unstarted._hand_out()
    assert actor.taken == list(grid.partitions)
    lost = Future[Answer]()
    lost.set_exception(RuntimeError("gone"))
    unstarted._answered(actor, grid, messages, lost)
    assert [reply.error.code for reply in grid.pull_messages(ids)] == [WORKER_LOST] * 3
