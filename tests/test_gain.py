"""`tapfl bench gain`: the models of a run against the dense model, in size, MACs and latency."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_inprocess_run import TINY
from torch import nn
from typer.testing import CliRunner

from experiments import cli
from experiments.bench import latency
from experiments.bench.latency import Measured, measure_gain
from tapfl.config import ModelOptions, PruningOptions, RunConfig
from tapfl.errors import ConfigError
from tapfl.models.backbone import build, spec_of
from tapfl.models.forward import example_input
from tapfl.pruning.pipeline import prune_model, pruning_task
from tapfl.pruning.surgery import save_pruned
from tapfl.store import write_json

BUDGETS = {0: 0.3, 1: 0.6, 2: 0.3}  # by device; 0 and 2 keep different units, but the same number


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The part of a run's folder that this command reads."""
    folder = tmp_path_factory.mktemp("runs") / "one"
    write_json(folder / "config.json", RunConfig.from_flat({"model.args": TINY}).flat())
    spec = spec_of(ModelOptions(args=TINY), tuple("abcdefghij"))
    dense = build(spec).requires_grad_(False)
    options = PruningOptions(criterion="random", ratio="uniform", align=1)
    for device, budget in BUDGETS.items():
        task = pruning_task(dense, example_input(dense, 4), budget, options, batch=4, seed=device)
        pruned = prune_model(task, spec, provenance={"budget": budget}, seed=device)
        save_pruned(pruned.model, pruned.plan, folder / "devices" / f"{device:02d}" / "pruned")
    return folder


def test_devices_with_equal_shapes_share_a_row(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latency, "_onnx", lambda model, plan, batch: model)  # the command's test exports models
    dense, small, middle = measure_gain(run, repeats=2)
    assert [model.devices for model in (dense, small, middle)] == [(), (0, 2), (1,)]
    assert small.macs < 0.3 * dense.macs < middle.macs < 0.6 * dense.macs
    assert small.params < middle.params < dense.params and small.file_bytes < middle.file_bytes < dense.file_bytes
    assert dense.params * 4 < dense.file_bytes < dense.params * 4 * 1.1 + 10_000
    weights = run / "devices" / "00" / "pruned" / "model.safetensors"
    assert small.file_bytes == weights.stat().st_size
    for model in (dense, small, middle):
        assert {engine: len(times) for engine, times in model.milliseconds.items()} == {"torch": 2, "onnxruntime": 2}
        assert all((times > 0).all() for times in model.milliseconds.values())


def test_a_speed_up_is_that_of_the_same_turn() -> None:
    dense = Measured((), "", 100, 50, 200, {"torch": np.array([4.0, 40.0, 6.0])})
    small = Measured((3,), "0.5", 50, 30, 120, {"torch": np.array([2.0, 10.0, 2.0])})
    row = small.numbers(dense)
    assert row["torch_speed_up"] == 3.0 and row["torch_ms"] == 2.0 and row["torch_ms_q3"] == 6.0
    assert (row["macs_share"], row["params_share"], row["file_share"]) == (0.5, 0.6, 0.6)


def test_the_command_writes_numbers_and_a_table_with_a_caption(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, made = latency._onnx, []

    def once(model: nn.Module, *arguments: Any, **named: Any) -> Any:
        """An export takes seconds, so only the first model is exported."""
        made.append(model if made else real(model, *arguments, **named))
        return made[-1]

    monkeypatch.setattr(latency, "_onnx", once)
    arguments = ["bench", "gain", str(run), "--repeats", "1", "--device", "1"]
    threads = torch.get_num_threads()
    try:
        done = CliRunner().invoke(cli.app, [*arguments, "--out", str(tmp_path), "--json"], catch_exceptions=False)
    finally:
        torch.set_num_threads(threads)
    said = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    with (tmp_path / "gain.csv").open(newline="") as table:
        rows = list(csv.DictReader(table))
    assert len(made) == 2 and [row["devices"] for row in rows] == ["dense", "1"] == [row["devices"] for row in said]
    assert float(rows[1]["torch_ms"]) == said[1]["torch_ms"]
    text = (tmp_path / "gain.md").read_text()
    assert "`tapfl bench gain RUN --repeats 1`; seed 0" in text and "onnxruntime" in text and str(run) not in text


def test_what_is_not_a_run_or_not_its_device_is_refused(run: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is not a run's folder"):
        measure_gain(tmp_path, 1)
    write_json(tmp_path / "config.json", {})
    with pytest.raises(ConfigError, match="has no models of devices"):
        measure_gain(tmp_path, 1)
    with pytest.raises(ConfigError, match=r"--device 7: accepted: 0, 1, 2"):
        measure_gain(run, 1, [7])
