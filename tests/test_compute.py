"""Processor and precision: the options, what they refuse, and the accuracy of `fast`."""

from __future__ import annotations

import json
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from backbones import Tiny, kept_units, plan_of, random_kept
from PIL import Image
from recording import Recording
from safetensors.torch import save_file
from test_inprocess_run import tapfl
from torch import nn
from torch.nn import functional as F

from experiments.bench import gpu, gpu_parts
from experiments.bench.accuracy import accuracies, pictures
from experiments.engines.actor import processors
from experiments.engines.ray import ActorPool
from strategies.binding import PROCESSOR, require_same_processor
from tapfl.adapters import lora
from tapfl.adapters.layout import device_layout, gather_all, global_shapes
from tapfl.adapters.lora import AdaptedModel, MergedLora
from tapfl.adapters.rules import initial
from tapfl.compute import HERE, Compute, home
from tapfl.config import AdapterOptions, ComputeOptions, PruningOptions, TrainOptions
from tapfl.errors import ConfigError
from tapfl.personalize.method import Trainee
from tapfl.pruning.pipeline import prune_model, pruning_task
from tapfl.pruning.surgery import shrink
from tapfl.run_folder import RunFolder
from tapfl.training import Params

FAST = Compute(precision="fast")


def no_gpu(monkeypatch: pytest.MonkeyPatch, cuda: str | None) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", cuda)


@pytest.mark.parametrize(
    ("cuda", "why"), [(None, "torch was built without CUDA"), ("13.2", "torch finds no usable GPU")]
)
def test_a_missing_device_is_refused(cuda: str | None, why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    no_gpu(monkeypatch, cuda)
    with pytest.raises(ConfigError, match=f"compute.device = 'cuda': {why}.*; accepted: auto, cpu"):
        Compute.of(ComputeOptions(device="cuda"))
    assert Compute.of(ComputeOptions(device="auto", deterministic=True)) == Compute(deterministic=True)


def test_a_run_on_a_missing_device_leaves_nothing(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    no_gpu(monkeypatch, None)
    with pytest.raises(ConfigError, match="torch was built without CUDA"):
        tapfl("--out", str(tmp_path / "run"), cache=cache, options=["compute.device=cuda"])
    assert not (tmp_path / "run").exists()


def test_a_gpu_without_bfloat16_computes_exactly_or_not_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "Tesla T4")
    with pytest.raises(ConfigError, match=r"compute\.precision = 'fast': Tesla T4 does not compute in bfloat16"):
        Compute.of(ComputeOptions(device="cuda", precision="fast"))
    assert Compute.of(ComputeOptions(device="auto")).device == torch.device("cuda", 0)


def test_on_the_cpu_nothing_is_copied_and_keys_do_not_change() -> None:
    x, model = torch.ones(2, requires_grad=True), nn.Linear(2, 2)
    assert HERE.put(x) is x and HERE.put(model) is model and HERE.put(None) is None
    assert home({"x": x})["x"].requires_grad is False and home(None) is None
    assert HERE.marks == () and FAST.marks == (HERE.kind, "fast")
    assert isinstance(HERE.forward(), nullcontext)


def test_seconds_are_those_of_this_thread() -> None:
    assert 0 < HERE.seconds(lambda: sum(range(10**5))) < 1


# -- the kind of processor --------------------------------------------------------------------------------------------


@pytest.fixture
def elsewhere(tmp_path: Path) -> RunFolder:
    (tmp_path / "versions.json").write_text(json.dumps({"torch": "2.15.0", PROCESSOR: "another processor"}))
    return RunFolder(tmp_path)


def test_a_run_resumed_on_another_processor_warns(elsewhere: RunFolder, caplog: pytest.LogCaptureFixture) -> None:
    require_same_processor(elsewhere, HERE)
    assert f"computed on another processor so far, now on {HERE.kind}" in caplog.text


def test_a_deterministic_run_is_not_resumed_on_another_processor(
    elsewhere: RunFolder, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(ConfigError, match=r"compute\.deterministic = true: .* another processor, but this is"):
        require_same_processor(elsewhere, Compute(deterministic=True))
    (elsewhere.path / "versions.json").write_text(json.dumps({PROCESSOR: HERE.kind}))
    require_same_processor(elsewhere, Compute(deterministic=True))
    (elsewhere.path / "versions.json").unlink()  # written by an older version, so nothing is known
    require_same_processor(elsewhere, Compute(deterministic=True))
    assert not caplog.text


def test_actors_on_other_processors_are_named_or_refused(caplog: pytest.LogCaptureFixture) -> None:
    pool = ActorPool()
    pool.processors.add((processors()[0], "another GPU"))
    pool._require_one_kind({"compute.deterministic": True})  # their CPUs are of one kind
    pool._require_one_kind({"compute.device": "auto"})
    assert "the last bits of results depend" in caplog.text and "another GPU" in caplog.text
    with pytest.raises(ConfigError, match=r"compute\.deterministic = true: there are .*another GPU"):
        pool._require_one_kind({"compute.device": "auto", "compute.deterministic": True})


# -- fast -------------------------------------------------------------------------------------------------------------


def after_one_step(adapted: AdaptedModel, start: Params, x: torch.Tensor) -> tuple[Params, Trainee]:
    train = TrainOptions(learning_rate=1e-4)
    trainee = Trainee.of(start, train, frozenset(start))
    trainee.apply(trainee.gradients(F.cross_entropy(adapted(trainee.params, x), torch.tensor([3, 1, 4, 1]))))
    return trainee.values(), trainee


def test_a_fast_step_is_an_exact_step_to_a_few_percent(vit: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compares the adapters after a step of Adam by their effect on the logits; adapters and optimiser are float32."""
    plan = plan_of(vit, random_kept(vit.layers, 0.5))
    shapes = global_shapes(vit.model, vit.layers, 4)
    layout = device_layout(shapes, vit.layers, plan, 4)
    whole = initial(AdapterOptions(), shapes, vit.layers, vit.model, torch.Generator().manual_seed(0))
    start, small = gather_all(whole, layout), shrink(vit.model, plan)
    exact = AdaptedModel(small, layout, 2.0)
    before, (want, _) = exact(start, vit.inputs), after_one_step(exact, start, vit.inputs)
    with monkeypatch.context() as patch:
        patch.setattr(MergedLora, "apply", lambda *_: pytest.fail("merged in bfloat16"))
        fast = AdaptedModel(small, layout, 2.0, FAST.reduced)
        got, trainee = after_one_step(fast, start, vit.inputs)
        assert fast(start, vit.inputs).dtype == torch.float32
    assert {theta.dtype for theta in got.values()} == {torch.float32}
    moments = [v for state in trainee.optimizer.state.values() for v in state.values() if v.dim()]
    assert moments and {moment.dtype for moment in moments} == {torch.float32}
    change, wanted = exact(got, vit.inputs) - before, exact(want, vit.inputs) - before
    assert (change - wanted).norm() <= 0.05 * wanted.norm()


def test_a_small_update_survives_outside_the_product_but_not_merged() -> None:
    """W₀ has the size of a trained linear layer, B that after a step of Adam at 1e-5; merged, most of B is lost."""
    draw = torch.Generator().manual_seed(0)
    W, A, x = (torch.randn(shape, generator=draw) for shape in ((192, 192), (8, 192), (64, 192)))
    W, A, B = W * 0.05, A / 192**0.5, 1e-5 * torch.randn(192, 8, generator=draw).sign()
    effect, zero = 2 * (x @ A.T) @ B.T, torch.zeros_like(B)
    low = W.bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        beside = lora.plain_lora(x, low, None, A, B, 2.0) - lora.plain_lora(x, low, None, A, zero, 2.0)
    merged = (x.bfloat16() @ (W + 2 * B @ A).bfloat16().T - x.bfloat16() @ low.T).float()
    assert (beside - effect).norm() <= 0.02 * effect.norm()
    assert (merged - effect).norm() >= effect.norm()


def test_fast_plans_keep_nearly_the_same_units(vit: Tiny) -> None:
    options = PruningOptions(criterion="tap", align=1)  # tap+ has to decide near ties, of which a random model has many
    task = pruning_task(vit.model, torch.cat([vit.inputs, vit.inputs.flip(0) / 2]), 0.6, options, batch=4)
    exact = kept_units(prune_model(task, vit.spec).plan)
    fast = kept_units(prune_model(replace(task, compute=FAST), vit.spec).plan)
    both = sum(len(set(exact[name].tolist()) & set(fast[name].tolist())) for name in exact)
    assert both >= 0.98 * sum(map(len, exact.values()))


def test_a_fast_run_finishes(cache: Path, tmp_path: Path) -> None:
    options = ["compute.precision=fast", "train.rounds=1", "train.steps=1", "model.epochs=1", "devices.count=2"]
    done = tapfl("--out", str(tmp_path / "run"), cache=cache, options=options)
    assert done.exit_code == 0, done.output
    assert json.loads((tmp_path / "run" / "versions.json").read_text())[PROCESSOR] == HERE.kind


# -- the script for a GPU ---------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_script_for_a_gpu_runs_on_the_cpu(tmp_path: Path) -> None:
    out = tmp_path / "gpu.jsonl"
    assert gpu.main([str(out), "--device", "cpu", "--small"]) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert {row["about"] for row in rows} == set(gpu_parts.PARTS) and not any("failed" in row for row in rows)
    differences = {row["adapters"]: row["largest difference"] for row in rows if "adapters" in row}
    assert set(differences.values()) == {0.0}  # the CPU against itself
    assert all(row["kept alike"] == 1 for row in rows if "kept alike" in row)
    found = {(row["computed"], row["when"]): row["accuracy"] for row in rows if row.get("images") == "digits"}
    assert len(found) == 9 and found["cpu", "after round 2"] > 0.5
    for when in ("after the cut", "after round 2"):
        assert found["exact", when] == found["cpu", when]
        assert found["fast", when] == pytest.approx(found["cpu", when], abs=0.02)


def test_its_parts_measure_at_the_size_of_a_test(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Compute, "recorder", property(lambda way: Recording() if way.graphs else None))
    rows = list(gpu_parts.steps(replace(gpu_parts.SMALL, step=2, repeats=1), HERE))
    assert {(row["method"], row["precision"]) for row in rows} == {
        (method, precision) for method in gpu_parts.METHODS for precision in ("exact", "fast")
    }
    ordinary = [row for row in rows if "ms" in row]
    assert len(rows) == 2 * len(ordinary) and all(row["ms"] > 0 for row in ordinary)
    assert all(row["ms as a graph"] > 0 and row["ms to record it"] > 0 for row in rows if row not in ordinary)


def test_the_accuracy_of_pictures_is_on_devices_with_their_own_classes(tmp_path: Path, deit: Tiny) -> None:
    save_file(deit.model.state_dict(), tmp_path / "weights.safetensors")
    for label in range(4):
        (tmp_path / "pictures" / f"class {label}").mkdir(parents=True)
        for i in range(8):
            pixels = np.random.default_rng([label, i]).integers(0, 256, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "pictures" / f"class {label}" / f"{i}.png")
    spec = deit.spec.model_copy(update={"num_classes": 2})
    given = str(tmp_path / "pictures"), tmp_path / "weights.safetensors", spec
    made = list(pictures(*given, devices=2, images=8, cache=tmp_path / "cache"))
    assert [len(each.inputs) for each in made] == [16, 16] and made[0].labels[:4].tolist() == [0, 1, 0, 1]
    seen = [{x.numpy().tobytes() for x in each.inputs} for each in made]
    assert len(seen[0]) == len(seen[1]) == 16 and not seen[0] & seen[1]
    found = dict(accuracies(made[0], HERE))
    assert list(found) == ["after the cut", "after round 1", "after round 2"]
    assert all(0 <= share <= 1 for share in found.values())


def test_gpu_utilisation_is_read_from_its_tool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with gpu_parts.watched() as nothing:
        pass
    tool, begun = tmp_path / gpu_parts.WATCH[0], tmp_path / "begun"
    lines = "echo '40, 1000'\necho '[N/A], 9000'\necho '60, 3000'"
    tool.write_text(f"#!/bin/sh\n{lines}\n: > {begun}\nexec /bin/sleep 60\n")
    tool.chmod(0o700)
    with gpu_parts.watched() as seen:
        while not begun.exists():
            time.sleep(0.01)
    assert (nothing, seen) == ({}, {"GPU busy %": 50, "MB of all processes": 3000})


def test_a_part_that_takes_too_long_leaves_its_results(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(gpu_parts.PARTS, "steps", (gpu_parts.steps, 0.0))
    assert list(gpu.rows_of("steps", gpu_parts.SMALL, HERE)) == [{"failed": "took more than 0 s"}]
