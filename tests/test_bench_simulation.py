"""`tapfl bench simulation`: all variants do the same work, and the time of whole process trees is measured."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import set_peft_model_state_dict
from torch.nn.utils import parameters_to_vector

from clients.client_app import app as client_app
from experiments.bench import engines
from experiments.bench.bare_loop import LoopWorker, average
from experiments.bench.engines import LIMIT, ProcessTree, Timing, engine, measure, ratio, simulation
from experiments.bench.flower_apps import build, drive
from experiments.bench.workload import ROUND_LINE, FederationOptions, Workload
from experiments.engines.local import run_inprocess
from strategies.server_app import app as server_app
from strategies.state import load_checkpoint
from tapfl.adapters.peft_format import peft_name
from tapfl.config import RunConfig
from tapfl.errors import ConfigError, RunError
from tapfl.options import read_toml
from tapfl.run_folder import RunFolder

MODEL = "img_size=8,patch_size=4,embed_dim=16,depth=2,num_heads=2"
BURN = "import time\nwhile time.process_time() < {seconds}: pass\n"


def small(**options: int) -> FederationOptions:
    return FederationOptions(**{"rounds": 2, "repeats": 1, "batch": 8, **options}, model_args=MODEL)


@pytest.fixture(scope="module")
def workload(tmp_path_factory: pytest.TempPathFactory) -> Workload:
    return Workload.prepare(tmp_path_factory.mktemp("workload"), 2, small(samples=16))


def test_every_device_has_the_requested_number_of_images(workload: Workload) -> None:
    assert [len(workload.part(i, part)[1]) for i in range(2) for part in ("train", "test")] == [16, 4, 16, 4]


def test_the_average_is_weighted_by_samples_in_the_order_of_devices() -> None:
    vectors = {1: np.array([3.0, 0.0], np.float32), 0: np.array([0.0, 1.0], np.float32)}
    np.testing.assert_array_equal(average(vectors, [1, 3]), np.array([2.25, 0.25], np.float32))


@pytest.mark.parametrize("merged", [True, False])
def test_the_loop_by_hand_ends_with_the_adapters_of_the_federation(
    workload: Workload, merged: bool, tmp_path: Path
) -> None:
    run_inprocess(server_app, client_app, {**workload.config.flat(), "out": str(tmp_path / "run")}, 2)
    checkpoint = load_checkpoint(RunFolder(tmp_path / "run"), workload.config)
    assert checkpoint is not None
    theirs = checkpoint.server.params
    worker, initial = LoopWorker(workload, merged), workload.initial()
    vector = parameters_to_vector([initial[name] for name in worker.params]).numpy()
    for t in (1, 2):
        vector = average({i: worker.turn(t, i, vector.copy())[0] for i in range(2)}, [16, 16])
    wanted = parameters_to_vector([theirs[name] for name in worker.params]).numpy()
    start = parameters_to_vector([initial[name] for name in worker.params]).numpy()
    assert np.abs(wanted - start).max() > 1e-3
    np.testing.assert_allclose(vector, wanted, atol=1e-4)


def test_the_usual_app_has_the_same_adapters(workload: Workload) -> None:
    model, initial = build(workload).eval(), workload.initial()
    given = {name: torch.randn_like(theta) for name, theta in initial.items()}
    result = set_peft_model_state_dict(model, {peft_name(name): theta for name, theta in given.items()})
    assert not result.unexpected_keys
    worker, x = LoopWorker(workload, merged=True), workload.part(0, "test")[0]
    for name, parameter in worker.params.items():
        parameter.data = given[name]
    torch.testing.assert_close(model(x), worker.model(x), rtol=1e-4, atol=1e-4)


def test_a_process_tree_counts_running_and_ended_children() -> None:
    child = f"import subprocess, sys, time; subprocess.run([sys.executable, '-c', {BURN.format(seconds=0.3)!r}]);"
    running = (
        f"subprocess.Popen([sys.executable, '-c', {BURN.format(seconds=60)!r}]); print(1, flush=True); time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", child + running], stdout=subprocess.PIPE)
    tree = ProcessTree(process.pid)
    try:
        assert process.stdout is not None
        process.stdout.readline()
        before = tree.cpu_seconds()
        assert before > 0.2  # of ended processes; Linux counts in ticks and rounds down
        until = time.monotonic() + 30
        while tree.cpu_seconds() < before + 0.1:
            assert time.monotonic() < until
            time.sleep(0.05)
        assert 5e6 < sum(tree.memory_bytes()) < 5e8
        assert len(tree.processes()) == 2
    finally:
        tree.end()
        process.wait()
    assert tree.processes() == []


def test_a_run_is_timed_from_its_second_round_on(tmp_path: Path) -> None:
    note = f"open(sys.argv[1] + '/metrics.jsonl', 'a').write({ROUND_LINE + chr(10)!r})"
    rounds = f"for t in (0.8, 0.3, 0.3):\n time.sleep(t)\n {note}\n"
    code = f"import os, sys, time\nos.mkdir(sys.argv[1])\n{rounds}time.sleep(0.5)"
    began = time.monotonic()
    timing = measure(["-c", code, str(tmp_path / "out")], tmp_path / "out", 3)
    assert timing.wall > 0.28 and timing.startup > 0.4 and timing.cpu < 0.2
    assert timing.startup + 3 * timing.wall < time.monotonic() - began


def test_a_variant_that_fails_says_why(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="ended with 1: ValueError: no"):
        measure(["-c", "raise ValueError('no')"], tmp_path / "out", 2)


def test_rounds_too_short_to_be_timed_are_refused() -> None:
    some, none = Timing(1.0, 2.0, 0.0, 0, 0), Timing(0.5, 0.0, 0.0, 0, 0)
    assert ratio([some], [none], "wall") == "2.00" and ratio([some] * 2, [none, some], "wall") == "1.50 (1.00–2.00)"
    with pytest.raises(RunError, match=r"too short to measure its cpu seconds; use more --devices, --samples"):
        ratio([some], [none], "cpu")


@pytest.mark.slow
def test_all_variants_in_one_table() -> None:
    rows = list(simulation(devices=[2], options=small(rounds=3, samples=400)))
    assert [row["variant"] for row in rows] == [LIMIT, "with plain LoRA", "tapfl run", "usual Flower app"]
    assert rows[0]["CPU / limit"] == "1.00" and all(float(row["peak GB"]) > 0.2 for row in rows)


@pytest.mark.slow
def test_an_engine_is_compared_with_the_loop() -> None:
    rows = list(simulation(devices=[2], options=small(rounds=3, samples=400, workers=1), variant=["inprocess"]))
    assert [row["variant"] for row in rows] == [LIMIT, "inprocess"]


def test_the_engine_bench_runs_a_federation(monkeypatch: pytest.MonkeyPatch) -> None:
    """In this process, which has imported what a new one takes many seconds to."""

    def driven(arguments: Sequence[str], out: Path, rounds: int) -> Timing:
        named, work, folder, _, workers = arguments[2:]
        drive(named, work, RunConfig.from_flat(read_toml(Path(folder) / "config.toml")).flat(), out, int(workers))
        assert (out / "metrics.jsonl").read_text().count(ROUND_LINE) == rounds == 3
        return Timing(1.5, 1.0, 2.5, 0, 0)

    monkeypatch.setattr(engines, "measure", driven)
    (row,) = engine(devices=[2], options=small(rounds=3, workers=1), variant=["inprocess"])
    assert (row["engine"], float(row["wall s a round"]), float(row["start-up s"])) == ("inprocess", 1.5, 2.5)


@pytest.mark.slow
def test_the_engine_bench_measures_a_federation_in_one_process() -> None:
    (row,) = engine(devices=[2], options=small(rounds=3, workers=1), variant=["inprocess"])
    assert row["engine"] == "inprocess" and float(row["wall s a round"]) >= 0 and float(row["start-up s"]) > 0


def test_an_unknown_engine_is_refused() -> None:
    with pytest.raises(ConfigError, match="accepted: inprocess, forked, flower, ray, ray warm"):
        list(engine(options=small(), variant=["spark"]))
