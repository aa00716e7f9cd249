"""Shares of GPUs: what is refused, and what a worker does with its share, tested with stand-ins for a GPU."""

from __future__ import annotations

import importlib
import weakref
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from flwr.app import Context, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from clients import client_app
from experiments.command_line import RayOptions
from experiments.engines.flower import run_flower
from experiments.engines.ray import ActorPool
from experiments.jobs.federation import require_gpus
from tapfl.compute import HERE, Compute, free_memory, is_fault, within_memory
from tapfl.config import RunConfig
from tapfl.errors import ConfigError

GPU = torch.device("cuda", 0)


def test_workers_without_a_share_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    none = RayOptions()
    with pytest.raises(ConfigError, match=r"--actor-gpus 0: .*compute.device = 'cuda' need GPUs; accepted: above 0"):
        require_gpus("ray", none, ["cpu", "cuda"])
    require_gpus("inprocess", none, ["cuda"])
    with pytest.raises(ConfigError, match=r"--workers 2: .*compute.device = 'cuda' need GPUs; accepted: --workers 1"):
        require_gpus("inprocess", RayOptions(workers=2), ["cuda"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    require_gpus("flower", none, ["auto"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(ConfigError, match="'auto'"):
        require_gpus("flower", none, ["auto"])
    require_gpus("ray", RayOptions(actor_gpus=0.5), ["cuda", "auto"])


def test_more_gpus_than_available_and_odd_numbers_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    require_gpus("flower", RayOptions(actor_gpus=1.0), ["cuda"])
    with pytest.raises(ConfigError, match="--actor-gpus 2: this machine has 1 GPUs"):
        require_gpus("flower", RayOptions(actor_gpus=2.0), ["cuda"])
    monkeypatch.setattr("ray.nodes", lambda: [])
    with pytest.raises(ConfigError, match=r"--actor-gpus 1\.5: .*accepted: a fraction below 1, or 1, 2"):
        ActorPool(gpus=1.5)._room()


def test_a_worker_without_a_gpu_from_ray_reports_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """With `flwr run` nothing else can detect it."""
    monkeypatch.setattr(Compute, "of", classmethod(lambda cls, options: Compute(GPU)))
    assert client_app._compute({}, RunConfig()).device == GPU
    monkeypatch.setattr(client_app, "gpu_share", lambda: 0.0)
    with pytest.raises(ConfigError, match=r"no share of a GPU; accepted: --actor-gpus \(flwr run: client-resources"):
        client_app._compute({"device": "cuda"}, RunConfig())


def test_flowers_workers_get_their_share(monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {}
    flower = importlib.import_module("flwr.simulation.run_simulation")  # the package has a function with this name
    monkeypatch.setattr(flower, "_run_simulation", lambda **arguments: given.update(arguments["backend_config"]))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    run_flower({}, 4, 3, gpus=0.5)
    assert given["client_resources"] == {"num_cpus": 1, "num_gpus": 0.5}
    assert given["init_args"]["num_cpus"] == 3 and given["init_args"]["num_gpus"] == 2


@pytest.mark.parametrize(("share", "limits"), [(0.25, [(0.25, GPU)]), (1.0, [])])
def test_a_worker_takes_its_share_of_the_memory(
    share: float, limits: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    set_to: list[object] = []
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda *given: set_to.append(given))
    Compute(GPU).prepare(share)
    assert set_to == limits
    assert not torch.backends.cudnn.allow_tf32 and not torch.backends.cuda.matmul.allow_tf32  # exporters call it, too


def test_which_errors_are_gpu_faults() -> None:
    assert is_fault(torch.AcceleratorError("CUDA error: unspecified launch failure"))
    assert is_fault(RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling cublasSgemm"))
    assert not is_fault(torch.OutOfMemoryError("CUDA out of memory."))
    assert not is_fault(torch.AcceleratorError("CUDA error: out of memory"))
    assert not is_fault(RuntimeError("shapes differ")) and not is_fault(ValueError("CUDA error: none"))


@pytest.mark.parametrize(("in_ray", "codes"), [(True, [0, 0]), (False, [2, 2])])
def test_a_group_is_lost_as_a_whole_with_its_gpu(
    in_ray: bool, codes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only in a Ray worker, which can be restarted; in another process the devices fail."""
    ended: list[object] = []
    faults = SimpleNamespace(device_timeout=60.0)
    device = SimpleNamespace(partition_id=0, compute=HERE, config=SimpleNamespace(faults=faults, out="run"))
    device.training = lambda asked: asked
    fault = torch.AcceleratorError("CUDA error: unspecified launch failure")
    monkeypatch.setattr(client_app, "device_of", lambda context: device)
    monkeypatch.setattr(client_app.Train, "from_records", lambda records: None)
    monkeypatch.setattr(client_app, "carried_out", lambda work, say: [ValueError("its own"), fault])
    monkeypatch.setattr(client_app, "_is_ray_worker", lambda: in_ray)
    monkeypatch.setattr(client_app, "gpu_share", lambda: 1.0)
    monkeypatch.setattr(client_app, "time_limit", lambda *given: nullcontext())
    monkeypatch.setattr(
        client_app.threading, "Timer", lambda *given: SimpleNamespace(start=lambda: ended.append(given))
    )
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1
    messages = [Message(RecordDict(), node, "train") for node in (1, 2)]
    contexts = [Context(1, node, {}, RecordDict(), {}) for node in (1, 2)]
    replies = client_app.app.answer_together(messages, contexts)
    assert [reply.error.code for reply in replies] == codes
    assert ("CUDA error" in replies[0].error.reason) == in_ray and "CUDA error" in replies[1].error.reason
    assert bool(ended) == in_ray


@pytest.mark.parametrize("full", [1, 3])
def test_a_device_of_a_group_that_goes_one_by_one_is_tried_again_when_its_memory_is_full(full: int) -> None:
    errors: list[Exception] = [torch.OutOfMemoryError("CUDA out of memory.")] * full

    def train(asked: object) -> str:
        if errors:
            raise errors.pop()
        return f"trained {asked}"

    device: Any = SimpleNamespace(partition_id=3, train=train)
    assert client_app._retried(device, "asked", other := ValueError("its own")) is other  # type: ignore[arg-type]
    answer = client_app._retried(device, "asked", torch.OutOfMemoryError("CUDA out of memory."))  # type: ignore[arg-type]
    assert str(answer).startswith("trained asked" if full == 1 else "device 3: train: the memory is full")


class Held:
    """Stands for the activations of an interrupted pass."""


def test_a_failed_attempt_holds_no_memory_when_the_work_is_tried_again() -> None:
    alive: list[weakref.ref[Held]] = []

    def train() -> int:
        activations = Held()
        cycle = [activations]
        cycle.append(cycle)  # type: ignore[arg-type]
        if not alive:
            alive.append(weakref.ref(activations))
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return sum(each() is not None for each in alive)

    assert within_memory(train, "device 3: train") == 0
    alive.clear()
    try:
        train()
    except torch.OutOfMemoryError as error:
        kept = error
    assert alive[0]() is not None
    free_memory([kept])
    assert alive[0]() is None


def test_workers_leave_some_memory_to_the_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    assert client_app.memory_share() == 1.0
    monkeypatch.setattr(client_app, "_is_ray_worker", lambda: True)
    for share in (0.25, 1.0, 2.0):
        monkeypatch.setattr(client_app, "gpu_share", lambda share=share: share)
        assert client_app.memory_share() == pytest.approx(0.9 * min(share, 1))


def test_a_refused_run_leaves_nothing(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from test_inprocess_run import tapfl

    monkeypatch.setattr("experiments.feasible.Compute", SimpleNamespace(of=lambda options: HERE))
    with pytest.raises(ConfigError, match="--actor-gpus 0"):
        tapfl("--out", str(tmp_path / "run"), "--engine", "ray", cache=cache, options=["compute.device=cuda"])
    assert not (tmp_path / "run").exists()
