"""Benchmarks: the reference implementations compute the same as what they are compared with."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from backbones import VIT, Tiny, tiny_of_family
from typer.testing import CliRunner

from experiments import cli
from experiments.bench import adapters, round_zero
from experiments.bench.adapters import (
    ROBUST_PRODUCTS,
    VARIANTS,
    DeepCopies,
    PeftStep,
    Work,
    apfl,
    random_round,
    rows_of,
    step_of,
)
from experiments.bench.cli import BENCHES
from experiments.bench.data import data, generated_jpeg, torch_loader
from experiments.bench.latency import latency
from experiments.bench.local_training import DIGITS, Device
from experiments.bench.scores import loop_terms, plain_layer_importance
from experiments.bench.timing import peak_process_bytes, peak_tensor_bytes, side_by_side
from experiments.bench.together import together
from tapfl.adapters.stack import flat
from tapfl.compute import HERE
from tapfl.config import AdapterOptions, RunConfig
from tapfl.data.sources import load_images
from tapfl.errors import ConfigError
from tapfl.models.backbone import BackboneSpec
from tapfl.models.forward import input_transform
from tapfl.personalize.method import LocalResult
from tapfl.personalize.methods import FedAvg
from tapfl.personalize.together import all_of
from tapfl.pruning.layer_importance import layer_importance
from tapfl.pruning.scores import terms


@pytest.mark.parametrize("heads", [0, 1, 2])
@pytest.mark.parametrize("hoisted", [False, True])
def test_the_loops_compute_the_vectorised_terms(heads: int, hoisted: bool) -> None:
    generator = torch.Generator().manual_seed(heads)
    X = torch.randn(9, 5, 8, generator=generator)
    P = torch.randn(9, 4, generator=generator).softmax(-1)
    reference, fused = loop_terms(X, P, heads, hoisted=hoisted), terms(X, P, heads)
    for name in ("rel", "red", "act"):
        torch.testing.assert_close(getattr(fused, name), getattr(reference, name), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("hoisted", [False, True])
def test_a_loop_over_every_third_channel_returns_those_channels(hoisted: bool) -> None:
    generator = torch.Generator().manual_seed(3)
    X, P = torch.randn(9, 5, 8, generator=generator), torch.randn(9, 4, generator=generator).softmax(-1)
    whole, part = (loop_terms(X, P, 2, every, hoisted) for every in (1, 3))
    for name in ("rel", "red", "act"):
        torch.testing.assert_close(getattr(part, name), getattr(whole, name)[::3])


def test_the_plain_implementation_gives_the_cached_layer_importance() -> None:
    t: Tiny = tiny_of_family("vit")
    kept = {layer.name: torch.arange(0, layer.units, 2) for layer in t.layers}
    plain = plain_layer_importance(t.model, t.layers, kept, t.inputs)
    cached = layer_importance(t.model, t.layers, kept, t.inputs, len(t.inputs))
    assert plain == pytest.approx(cached, rel=1e-4)


def test_variants_take_turns() -> None:
    order: list[str] = []
    seconds = side_by_side({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, repeats=3)
    assert order == ["a", "b"] * 3 and set(seconds) == {"a", "b"}


def test_tensor_memory_is_the_peak_of_tensors_alive_at_once() -> None:
    given = torch.zeros(500)

    def work() -> None:
        first = torch.zeros(1000) + 1  # two of 4000 bytes for a moment
        del first
        second = torch.zeros(1000)
        second.view(10, 100).add_(given[0])  # a view, without own memory
        assert torch.zeros(100).sum() == 0

    assert peak_tensor_bytes(work) in range(8000, 8020)


def test_process_memory_includes_what_is_written() -> None:
    grown = peak_process_bytes(lambda: torch.ones(10_000_000))
    assert grown is None or 35e6 < grown < 80e6


SHALLOW = [
    "model.args=img_size=8,patch_size=2,in_chans=1,embed_dim=32,depth=2,num_heads=2",
    "metric.size=64",
    "pruning.align=1",
]


@pytest.mark.parametrize("probe", [pytest.param("own", marks=pytest.mark.slow), "pool"])
def test_a_row_for_every_number_of_devices(probe: str) -> None:
    rows = list(round_zero.devices([1, 2], [probe], ["wanda"], SHALLOW))
    assert [(row["criterion"], row["probe"], row["devices"]) for row in rows] == [("wanda", probe, c) for c in "12"]
    for row in rows:
        total, plans, pool = (float(row[name]) for name in ("s a device", "plans, s a device", "pool s"))
        assert total == pytest.approx(plans + pool / int(row["devices"]), abs=0.02)


def test_the_probe_bench_compares_both_ways(tmp_path: Path) -> None:
    options = [*SHALLOW, f"cache={tmp_path}", "model.epochs=1", "data.public-share=0.15"]
    rows = list(round_zero.probe([0], 2, [0.5, 0.7], [0.1], options))
    assert [row["budget"] for row in rows] == ["0.5", "0.7"]
    for row in rows:
        own, pool, difference = (float(row[name].split(" ")[0]) for name in round_zero.MEASURES[-3:])
        assert pool - own == pytest.approx(difference, abs=2e-3)
        assert 0.5 < float(row["kept alike"]) <= 1 and -1 <= float(row["ρ ffn"]) <= 1


@pytest.mark.slow
def test_the_noise_bench_has_a_row_for_every_noise(tmp_path: Path) -> None:
    options = [*SHALLOW, f"cache={tmp_path}", "model.epochs=15", "metric.size=128"]
    none, much = round_zero.noise([0.0, 1e3], 11.0, [0], 3, options)
    assert (none["noise"], much["noise"]) == ("0", "1000")
    shares = {rule: [float(part) for part in none[rule].split(", ")] for rule in list(none)[2:]}
    assert all(1 >= mean >= worst >= 0 for mean, worst in shares.values())
    assert shares["density-ratio"][0] > float(much["density-ratio"].split(", ")[0]) + 0.2
    assert none["random"] == much["random"]


@pytest.mark.slow
def test_the_latency_bench_has_a_row_for_the_dense_model_and_each_share() -> None:
    dense, half = latency(["deit_tiny_patch16_224"], [32], [0.5], [1, 2], unit_shape=["heads"], repeats=1)
    assert dense["MACs"] == "100.0%" and dense["torch ×2"].startswith("1.00, ")
    assert 49.5 <= float(half["MACs"].rstrip("%")) <= 50
    assert all(half[f"{engine} ×{batch}"].endswith(" ms") for engine in ("torch", "onnxruntime") for batch in (1, 2))


def test_the_aggregation_bench_has_a_row_for_every_rule_and_both_forms_of_flex(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapters, "peak_process_bytes", lambda work: None)  # takes seconds in a large process
    rows = {row["aggregation"]: row for row in rows_of(random_round(VIT, 2), VARIANTS | ROBUST_PRODUCTS, 1)}
    assert set(VARIANTS) <= set(rows) and {"flex, median", "flex, trimmed mean"} <= set(rows)
    assert {row["devices"] for row in rows.values()} == {"2"}
    assert all(float(row["s"]) >= 0 and row["peak MB"] == "?" for row in rows.values())
    # ranks 4 and 6, and the previous 8 for units without a holder, on the largest linear layer, 128 by 32
    assert rows["flex SVDs, all thin"]["largest form"] == f"{(4 + 6 + 8) * (128 + 32) / 1e3:.0f} k"
    assert rows["flex SVDs, all dense"]["largest form"] == f"{128 * 32 / 1e3:.0f} k"


def test_the_devices_of_the_aggregation_bench_differ_as_by_default() -> None:
    met = random_round(VIT, 6)
    ranks = [update.params["blocks.0.attn.qkv.lora_A"].shape[0] for update in met.updates]
    widths = [update.params["blocks.0.mlp.fc1.lora_B"].shape[0] for update in met.updates]
    assert ranks == [4, 6, 8] * 2
    assert widths[0] < widths[1] < widths[2] < 128 and widths[:3] == widths[3:]
    rows = [update.layout["blocks.0.mlp.fc1.lora_B"].index[0] for update in met.updates]
    assert not torch.equal(rows[0], rows[3])
    moved = met.aggregate(AdapterOptions(rule="fedit"))
    assert moved.keys() == met.params.keys() and not torch.equal(moved["head.bias"], met.params["head.bias"])


TINY = BackboneSpec(
    name="vit_tiny_patch16_224",
    args={"img_size": 8, "patch_size": 4, "in_chans": 1, "embed_dim": 8, "depth": 1, "num_heads": 2},
    num_classes=4,
)


def test_a_step_of_stock_peft_is_a_step_of_fedavg() -> None:
    torch.manual_seed(0)
    work = Work.of(TINY, 2, 3)
    stock, ours, adapted = PeftStep(work), step_of(work, FedAvg()), work.adapted()
    leaves = {name: theta.clone().requires_grad_() for name, theta in work.params.items()}
    gradients = torch.autograd.grad(work.loss(lambda x: adapted(leaves, x)), list(leaves.values()))
    losses = [(float(stock()), float(ours()))]
    for name, gradient in zip(leaves, gradients, strict=True):
        torch.testing.assert_close(stock.trained[name].grad, gradient, rtol=1e-5, atol=1e-6)
    losses += [(float(stock()), float(ours())) for _ in range(4)]
    for theirs, mine in losses:
        assert mine == pytest.approx(theirs, rel=1e-4)
    assert losses[-1][0] < 0.95 * losses[0][0]  # each step continues from the last one


def test_deep_copies_do_the_work_of_two_models() -> None:
    work = Work.of(TINY, 2, 3)
    copies, alone = DeepCopies(work, 1.0), PeftStep(work)
    for _ in range(2):
        copies()
        alone()
    for name, theta in alone.trained.items():  # with α = 1, v is trained in the same way as w
        torch.testing.assert_close(copies.w.trained[name], theta)
        torch.testing.assert_close(copies.v.trained[name], theta)


def test_the_apfl_bench_has_a_row() -> None:
    (row,) = apfl(["digits"], [64, 128], batch=2, rank=1, steps=1, repeats=1)
    assert row["model"] == "digits" and row["batch"] == "2"
    assert all(float(row[name]) > 0 for name in ("two peft ms", "deep copies", "frozen", "APFL"))


@pytest.mark.parametrize("method", ["fedavg", "apfl"])
def test_the_loop_over_devices_by_hand_ends_where_they_end_together(method: str) -> None:
    devices = [
        Device.random(DIGITS, 12, HERE, budget, rank, seed) for seed, (budget, rank) in enumerate([(0.5, 6), (0.7, 8)])
    ]
    outcomes = all_of([device.task(method, 6, epochs=2) for device in devices])
    for device, outcome in zip(devices, outcomes, strict=True):
        assert isinstance(outcome, LocalResult) and outcome.upload
        start = flat(device.start)
        for mine, theirs in zip(
            (outcome.upload, outcome.personal and outcome.personal.params), device.by_hand(method, 6, 2), strict=True
        ):
            assert (mine is None) == (not theirs)
            if mine:
                wanted = flat(theirs).detach()
                assert (flat(mine) - wanted).norm() <= 0.01 * (wanted - start).norm()


def test_the_bench_of_devices_together_has_a_row_for_every_method() -> None:
    rows = list(together(devices=3, at_once="3", samples=4, batch=4, repeats=1))
    assert [(row["method"], row["groups"]) for row in rows] == [("fedavg", "1 × 3"), ("apfl", "1 × 3")]
    assert all(float(row[name].split(" ")[0]) > 0 for row in rows for name in ("together / loop", "stacking"))
    with pytest.raises(ConfigError, match=r"train\.together"):
        list(together(at_once="many"))


def test_every_benchmark_is_a_command_with_its_functions_options() -> None:
    shown = CliRunner().invoke(cli.app, ["bench", "--help"]).output
    shallow = [part for option in SHALLOW for part in ("--set", option)]
    assert all(name in shown for name in BENCHES)
    done = CliRunner().invoke(
        cli.app, ["bench", "devices", "--devices", "1", "--criterion", "wanda", *shallow, "--json"]
    )
    assert json.loads(done.output.splitlines()[-1])["devices"] == "1"
    assert "No such command 'scorings'" in CliRunner().invoke(cli.app, ["bench", "scorings"]).output


def test_torch_s_loader_reads_the_same_pixels(tmp_path: Path) -> None:
    (tmp_path / "images" / "a").mkdir(parents=True)
    file = tmp_path / "images" / "a" / "1.jpg"
    file.write_bytes(generated_jpeg(0, 60))
    assert 60_000 <= file.stat().st_size < 90_000
    source = str(tmp_path / "images")
    config = RunConfig.from_flat({"model.name": "deit_tiny_patch16_224", "model.args": "", "data.source": source})
    transform = input_transform(config.model)
    (theirs,) = torch_loader(config, [0], threads=1)
    ours = transform(load_images(source, transform, tmp_path / "cache").read())
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-6)


@pytest.mark.slow
def test_a_source_is_opened_and_compared_with_torch_s_loader(tmp_path: Path) -> None:
    (row,) = data(images=200, devices=2, kilobytes=20, threads=[1], repeats=1, folder=tmp_path)
    assert row["images"] == "200" and row["devices"] == "2"
    assert all(float(row[name]) > 0 for name in ("until hello s", "command MB", "worker MB", "images/s"))
    assert len(list((tmp_path / "images-200-20kB").rglob("*.jpg"))) == 200
