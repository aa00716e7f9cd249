"""Ray with GPUs that it only counts: placement of actors, and a worker whose GPU is lost. No GPU is used."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from test_inprocess_run import content, tapfl
from test_ray_engine import on_ray

from experiments.engines.cluster import prepare_environment, ray_folder
from experiments.engines.ray import ActorPool

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def two_gpus() -> Iterator[None]:
    prepare_environment()
    import ray

    with ray_folder() as folder:
        ray.init(
            address="local", num_cpus=4, num_gpus=2, include_dashboard=False, log_to_driver=False, _temp_dir=folder
        )
        yield
        ray.shutdown()


def test_two_actors_share_a_gpu_and_know_their_share(two_gpus: None) -> None:
    import ray

    def place(_: object) -> tuple[str, float]:
        from clients.client_app import gpu_share

        (gpu,) = ray.get_runtime_context().get_accelerator_ids()["GPU"]
        return gpu, gpu_share()

    with ActorPool(gpus=0.5) as workers:
        found = ray.get([actor.__ray_call__.remote(place) for actor in workers._actors])
    assert Counter(gpu for gpu, _ in found) == {"0": 2, "1": 2} and {share for _, share in found} == {0.5}


def test_a_worker_whose_gpu_is_lost_ends_and_its_message_is_sent_again(
    two_gpus: None, cache: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert tapfl("--out", str(tmp_path / "here"), cache=cache).exit_code == 0
    with ActorPool(count=2, gpus=0.5) as workers:
        found = on_ray(workers, tmp_path / "run", cache, "faulty_apps:broken_gpu")
    assert found == content(tmp_path / "here")
    assert "device 1: AcceleratorError: CUDA error: an illegal memory access was encountered; sent again" in " ".join(
        caplog.messages
    ).replace("torch.", "")
    worker = Path("/proc") / (tmp_path / "broken").read_text()
    deadline = time.monotonic() + 10
    while worker.exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not worker.exists() and worker.name != str(os.getpid())
