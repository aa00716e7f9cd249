"""A Grid over long-lived Ray actors, which serve any number of federations, also several at once.

Ray places the actors, and restarts them if they or their machine die. A message that is lost with an actor is answered
with an error, and `strategies.exchange` sends it again. Messages wait in this process until an actor is free;
federations take turns. The only state of a device here is its node id and its partition id.
"""

from __future__ import annotations

import logging
import os
import queue
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from typing import Any

from flwr.app import Message
from flwr.common.logger import log
from flwr.serverapp import ServerApp

from experiments.engines.actor import CLIENT_APP, Actor, Answer, Processors, log_all, processors, versions
from experiments.engines.cluster import EngineLostError, ray_cluster
from experiments.engines.local import CLIENT_APP_RAISED, WORKER_LOST, LocalGrid, lost, serve
from tapfl.errors import ConfigError, RunError
from tapfl.options import Scalar
from tapfl.progress import stage

START = 180.0  # seconds within which the first actor must be ready; it imports torch, perhaps on a busy machine
FREE = 6.0  # seconds within which a shared cluster must have room for one actor
PATIENCE = 0.5  # seconds that `pull_messages` waits for a reply; between calls `exchange` checks its time limits


class RayGrid(LocalGrid):
    """One federation on an `ActorPool`. Only the pool's thread accesses `waiting`."""

    def __init__(self, pool: ActorPool, client_app: str, run_config: dict[str, Scalar], nodes: int) -> None:
        super().__init__(run_config, nodes, pool.size)
        self.client_app = client_app
        self._pool = pool
        self._replies: dict[str, Message] = {}
        self._news = threading.Condition()

    def push_group(self, messages: Sequence[Message]) -> Sequence[str]:
        ids = [self.stamp(message) for message in messages]
        self._pool.queue(self, list(messages))
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Returns the replies that have arrived; waits for up to `PATIENCE` if there is none.

        Raises:
            EngineLostError: if no actor is left.
        """
        wanted = list(message_ids)
        with self._news:
            self._news.wait_for(lambda: any(i in self._replies for i in wanted), PATIENCE if wanted else 0)
            found = [self._replies.pop(i) for i in wanted if i in self._replies]
        if not found and self._pool.lost:
            raise EngineLostError(self._pool.lost)
        return found

    def deliver(self, reply: Message) -> None:
        with self._news:
            self._replies[reply.metadata.reply_to_message_id] = reply
            self._news.notify_all()


class ActorPool:
    """Long-lived Ray actors, as a context manager. `run` runs a federation on them; any number of threads may call it.

    The state of actors and waiting messages belongs to one thread, which handles one event after the other.

    Args:
        address: address of a Ray cluster, as `ray_cluster` takes it; empty: a local Ray.
        count: number of actors; 0: as many as there is room for.
        cpus, gpus: resources that Ray reserves for each actor; with fractions, actors share a CPU or GPU.

    Raises:
        ConfigError: if the cluster has no room for `count` actors, or not even for one.
        RunError: if no actor starts, all have other versions of packages, or the whole cluster is in use.
    """

    def __init__(self, address: str = "", count: int = 0, cpus: float = 1.0, gpus: float = 0.0) -> None:
        self.lost = ""  # why no actor is left
        self._address, self._count, self._needs = address, count, {"CPU": cpus, "GPU": gpus}
        self.processors: set[Processors] = set()  # of the actors
        self._actors: list[Any] = []
        self._at: dict[Any, set[str]] = {}  # for each actor that is running, the first message id of each of its groups
        self._turns: deque[RayGrid] = deque()  # federations with waiting messages
        self._events: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._first: Future[None] = Future()  # done when the first actor is ready
        self._stack = ExitStack()

    def __enter__(self) -> ActorPool:
        with stage("Ray and its actors"), ExitStack() as stack:
            stack.enter_context(ray_cluster(self._address))
            count = self._room()
            self._require_free()
            thread = threading.Thread(target=self._work, name="actors", daemon=True)
            stack.callback(self._stop, thread)
            thread.start()
            self._start(count)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    @property
    def size(self) -> int:
        """Number of actors that were started and have not been given up."""
        return len(self._actors)

    def run(
        self, server_app: ServerApp, run_config: dict[str, Scalar], nodes: int, client_app: str = CLIENT_APP
    ) -> None:
        """Runs a federation. Raises whatever the ServerApp raises.

        Raises:
            ConfigError: if `compute.deterministic` is set and the machines have different kinds of processor.
        """
        self._require_one_kind(run_config)
        grid = RayGrid(self, client_app, run_config, nodes)
        try:
            serve(server_app, grid)
        finally:
            self._events.put(grid.waiting.clear)

    def _require_one_kind(self, run_config: dict[str, Scalar]) -> None:
        on_gpu = run_config.get("compute.device", "cpu") != "cpu"
        kinds = sorted({pair[on_gpu] for pair in [processors(), *self.processors]})
        if len(kinds) > 1 and run_config.get("compute.deterministic"):
            accepted = "machines with one kind of processor"
            raise ConfigError(f"compute.deterministic = true: there are {'; '.join(kinds)}; accepted: {accepted}")
        if len(kinds) > 1:
            log(logging.WARNING, "the last bits of results depend on which machine computes them: %s", "; ".join(kinds))

    def queue(self, grid: RayGrid, group: list[Message]) -> None:
        """Sends a group of messages to an actor as soon as one is free; the replies are delivered to `grid`."""
        self._events.put(partial(self._queue, grid, group))

    # -- start and stop -----------------------------------------------------------------------------------------------

    def _room(self) -> int:
        """Returns the number of actors to start; by default as many as the CPUs and GPUs of each machine allow."""
        import ray

        machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        needed = {kind: share for kind, share in self._needs.items() if share}
        if (gpus := self._needs["GPU"]) > 1 and gpus % 1:
            raise ConfigError(f"--actor-gpus {gpus:g}: must be whole above 1; accepted: a fraction below 1, or 1, 2, …")
        if not needed and not self._count:
            raise ConfigError("--actor-cpus 0 --actor-gpus 0: needs --workers, the number of actors")
        fits = [[int(machine.get(kind, 0) / share + 1e-9) for kind, share in needed.items()] for machine in machines]
        room = sum(min(times, default=self._count) for times in fits)
        if room < max(self._count, 1):
            cpus, gpus = (sum(machine.get(kind, 0) for machine in machines) for kind in self._needs)
            needs = "--actor-cpus {CPU:g} --actor-gpus {GPU:g}".format(**self._needs)
            available = f"{len(machines)} machine(s) with {cpus:g} CPUs and {gpus:g} GPUs"
            raise ConfigError(f"--workers {self._count} with {needs}: there is room for {room}, on {available}")
        return self._count or room

    def _start(self, count: int) -> None:
        import ray

        actor = ray.remote(Actor).options(
            num_cpus=self._needs["CPU"],
            num_gpus=self._needs["GPU"],
            max_restarts=-1,
            max_task_retries=0,
            runtime_env={"env_vars": {"PYTHONPATH": os.pathsep.join(_own_paths())}},
        )
        self._actors = [actor.remote() for _ in range(count)]
        for started in self._actors:
            self._events.put(partial(self._await, started))
        try:
            self._first.result(timeout=START)
        except TimeoutError:
            raise RunError(f"no Ray actor was ready within {START:g} s") from None

    def _require_free(self) -> None:
        """Raises RunError unless the cluster, which may be shared, has room for one actor within `FREE` seconds."""
        import ray

        end = time.monotonic() + FREE
        while any((free := ray.available_resources()).get(kind, 0) < share for kind, share in self._needs.items()):
            if time.monotonic() > end:
                have, needs = (
                    f"{part.get('CPU', 0):g} CPUs and {part.get('GPU', 0):g} GPUs" for part in (free, self._needs)
                )
                raise RunError(f"the Ray cluster is in use: {have} are free, but an actor needs {needs}")
            time.sleep(0.2)

    def _stop(self, thread: threading.Thread) -> None:
        import ray

        self.lost = self.lost or "the actors were stopped"
        self._events.put(None)
        thread.join()
        for actor in self._actors:
            with suppress(Exception):  # the cluster may be gone
                ray.kill(actor)

    # -- the pool's thread --------------------------------------------------------------------------------------------

    def _work(self) -> None:
        try:
            while (event := self._events.get()) is not None:
                event()
                self._hand_out()
        except Exception as error:  # raised by Ray; without this, every federation would wait forever
            self._lose(f"{type(error).__name__}: {error}")

    def _watch(self, ref: Any, done: Callable[[Future[Any]], None]) -> None:
        ref.future().add_done_callback(lambda future: self._events.put(partial(done, future)))

    def _queue(self, grid: RayGrid, group: list[Message]) -> None:
        if not grid.waiting:
            self._turns.append(grid)
        grid.waiting.append(group)

    def _hand_out(self) -> None:
        while self._turns and (actor := self._taker()) is not None:
            grid = self._turns.popleft()
            if not grid.waiting:  # its federation has ended
                continue
            group = grid.next_for(actor)
            if grid.waiting:
                self._turns.append(grid)
            self._at[actor].add(group[0].metadata.message_id)
            contexts = [grid.context(message.metadata.dst_node_id) for message in group]
            ref = actor.answer.remote(grid.client_app, group, contexts)
            self._watch(ref, partial(self._answered, actor, grid, group))

    def _taker(self) -> Any | None:
        """Returns the actor that gets the next group, or None if the group has to wait.

        A busy actor gets one more group in advance, so that it is not idle while its reply and the next message are
        transferred. The last groups wait for the first actor that becomes free.
        """
        if not self._at:
            return None
        actor = min(self._at, key=lambda candidate: len(self._at[candidate]))
        waiting = sum(len(grid.waiting) for grid in self._turns)
        return actor if len(self._at[actor]) < (2 if waiting > len(self._at) else 1) else None

    def _answered(self, actor: Any, grid: RayGrid, group: list[Message], future: Future[Answer]) -> None:
        from ray.exceptions import RayActorError, RayTaskError

        error = future.exception()
        if error is None:
            replies, logged = future.result()
            log_all(logged)
        else:
            code = CLIENT_APP_RAISED if isinstance(error, RayTaskError) else WORKER_LOST
            replies = lost(group, f"{type(error).__name__}: {error}", code)
        first = group[0].metadata.message_id
        if first in self._at.get(actor, ()):  # otherwise the group was lost earlier, when its actor died
            if isinstance(error, RayActorError):
                del self._at[actor]
                self._await(actor)
            else:
                self._at[actor].remove(first)
        for reply in replies:
            grid.deliver(reply)

    def _await(self, actor: Any) -> None:
        """Waits until Ray has started or restarted an actor, even if there is no room for it for a long time."""
        self._watch(actor.ready.options(max_task_retries=-1).remote(), partial(self._ready, actor))

    def _ready(self, actor: Any, future: Future[tuple[dict[str, str], Processors]]) -> None:
        ours, error = versions(), future.exception()
        theirs, kinds = (ours, ("", "")) if error else future.result()
        if error is None and theirs == ours:
            self._at[actor] = set()
            self.processors.add(kinds)
        else:
            differ = "" if error else ", ".join(f"{n} {theirs[n]}, not {ours[n]}" for n in ours if theirs[n] != ours[n])
            log(logging.WARNING, "a Ray actor is not used: %s", differ or error)
            self._actors.remove(actor)
            if not self._actors:
                self._lose(f"no Ray actor is left: {differ or str(error).strip().splitlines()[-1]}")
        if self._at and not self._first.done():
            self._first.set_result(None)

    def _lose(self, why: str) -> None:
        self.lost = self.lost or why
        if not self._first.done():
            self._first.set_exception(RunError(self.lost))


def _own_paths() -> list[str]:
    """Returns the module search paths outside the Python installation, which an actor needs as well."""
    own = (path for path in sys.path if path and not Path(path).is_relative_to(sys.prefix))
    return [path for path in own if not Path(path).is_relative_to(sys.base_prefix)]
