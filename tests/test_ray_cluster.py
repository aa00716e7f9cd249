"""The Ray engine on a cluster with two nodes, one of which is killed during a run."""

from __future__ import annotations

import os
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from test_inprocess_run import content, tapfl
from test_ray_engine import on_ray

from experiments.engines.cluster import prepare_environment
from experiments.engines.ray import ActorPool


@pytest.fixture
def two_nodes(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, Any]]:
    """A head that only this driver uses, and two nodes with one CPU each; yields (address, the cluster)."""
    prepare_environment()
    import ray
    from ray.cluster_utils import Cluster

    folder = Path(f"/tmp/tapfl-test-{os.getpid()}")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    cluster = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False, "temp_dir": str(folder)}
    )
    try:
        for name in ("one", "two"):
            cluster.add_node(num_cpus=1, resources={name: 1})
        yield cluster.address, cluster
    finally:
        ray.shutdown()
        cluster.shutdown()
        subprocess.run(["rm", "-rf", str(folder)], check=False)


@pytest.mark.slow
def test_killing_a_node_during_a_run_changes_nothing(
    two_nodes: tuple[str, Any], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    address, cluster = two_nodes
    cache, folder = tmp_path / "cache", tmp_path / "run"
    assert tapfl("--out", str(tmp_path / "whole"), cache=cache, options=["train.rounds=6"]).exit_code == 0
    import ray

    with ActorPool(address) as workers:
        deadline = time.monotonic() + 120
        while len(workers._at) < 2 and time.monotonic() < deadline:  # both nodes are busy when one is killed
            time.sleep(0.1)
        assert len(workers._at) == 2

        def kill() -> None:
            while not (folder / "server" / "round-0002.safetensors").exists():
                time.sleep(0.02)
            cluster.remove_node(victim, allow_graceful=False)
            killed.set()

        victim, killed = cluster.list_all_nodes()[-1], threading.Event()
        killer = threading.Thread(target=kill)
        killer.start()
        found = on_ray(workers, folder, cache, **{"train.rounds": 6})
        killer.join()
        assert killed.is_set()
    assert found == content(tmp_path / "whole")
    assert not ray.is_initialized()
    host, _, port = address.partition(":")
    with socket.create_connection((host, int(port)), timeout=5):
        pass  # the cluster still runs, because a joined cluster is only disconnected
