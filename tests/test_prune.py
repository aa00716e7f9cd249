"""`tapfl prune` and `tapfl inspect` on one backbone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from backbones import SWIN, VIT, Tiny, plan_of, random_kept, scramble, tiny
from PIL import Image
from test_inprocess_run import TINY
from typer.testing import CliRunner

from experiments import cli, pruning
from experiments.picture import kept_widths, picture
from experiments.pruning import inspect
from experiments.pruning import reapply as apply_again
from tapfl import load_pruned
from tapfl.config import ModelOptions, RunConfig
from tapfl.data.sources import load_images
from tapfl.errors import BudgetError, ConfigError, PlanError, TapflError
from tapfl.models.backbone import build
from tapfl.pruning.surgery import save_pruned, shrink
from tapfl.store import write_tensors


def tapfl(*arguments: str) -> str:
    return CliRunner().invoke(cli.app, list(arguments), catch_exceptions=False).stdout


def prune(tmp_path: Path, cache: Path, *arguments: str, budget: str = "0.5") -> str:
    options = [
        f"model.args={TINY}",
        "model.epochs=2",
        "metric.size=64",
        "pruning.align=1",
        f"cache={cache}",
    ]
    sets = [part for option in options for part in ("--set", option)]
    return tapfl("prune", "--budget", budget, "--out", str(tmp_path / "small"), *sets, *arguments)


@pytest.mark.parametrize(
    "how",
    [
        pytest.param(("tap", "none"), marks=pytest.mark.slow),
        ("lowrank-heads", "sequential"),
        pytest.param(("upop-oneshot", "one-pass"), marks=pytest.mark.slow),
    ],
)
def test_a_backbone_is_pruned_saved_and_shown(tmp_path: Path, cache: Path, how: tuple[str, str]) -> None:
    criterion, compensation = how
    said = json.loads(prune(tmp_path, cache, "--criterion", criterion, "--compensation", compensation, "--json"))
    assert 0.4975 <= said["macs"] / said["macs_dense"] <= 0.5
    assert said["provenance"]["criterion"] == criterion and said["provenance"]["compensation"] == compensation
    assert sum(parameter.numel() for parameter in load_pruned(tmp_path / "small").parameters()) == said["params"]
    shown = tapfl("inspect", str(tmp_path / "small"), "--picture", str(tmp_path / "widths.png"))
    assert "blocks.1.mlp" in shown and "ms per image" in shown and f"criterion = {criterion}" in shown
    assert (tmp_path / "widths.png").read_bytes().startswith(b"\x89PNG")


def test_a_budget_may_have_several_limits_and_is_recorded(tmp_path: Path, cache: Path) -> None:
    said = json.loads(
        prune(tmp_path, cache, "--set", "pruning.unit-shape=both", "--json", budget="macs<=60%, params<=0.5")
    )
    assert said["provenance"]["budget"] == "macs<=0.6,params<=0.5"
    assert said["macs"] <= 0.6 * said["macs_dense"]
    assert 0.4975 * said["params_dense"] <= said["params"] <= 0.5 * said["params_dense"]


def test_a_budget_in_milliseconds_is_measured_here(tmp_path: Path, cache: Path) -> None:
    said = json.loads(prune(tmp_path, cache, "--criterion", "magnitude", "--json", budget="latency<=1000ms"))
    assert said["macs"] == said["macs_dense"]


@pytest.mark.parametrize(
    ("arguments", "budget", "error"),
    [
        (("--criterion", "best"), "0.5", ConfigError),
        (("--compensation", "full"), "0.5", ConfigError),
        ((), "1.5", ConfigError),
        ((), "params<=0.5,flops<=0.5", ConfigError),
        ((), "macs<=0.5,params<=100", BudgetError),
        ((), "0.01", BudgetError),
        (("--set", "metric.size=6400"), "0.5", TapflError),
    ],
)
def test_a_refused_command_leaves_no_folder(
    tmp_path: Path, cache: Path, arguments: tuple[str, ...], budget: str, error: type[TapflError]
) -> None:
    with pytest.raises(error):
        prune(tmp_path, cache, *arguments, budget=budget)
    assert not (tmp_path / "small").exists()


@pytest.mark.parametrize(("option", "value"), [("tokens", "merge"), ("tokens", "auto"), ("probe", "pool")])
def test_an_option_that_cannot_work_is_refused_before_the_backbone_is_trained(
    option: str, value: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("experiments.pruning.dense_backbone", lambda *_: pytest.fail("trained first"))
    args = "img_size=16,embed_dim=8,depths=1/1,num_heads=1/1,window_size=2"
    flat = {"model.name": "swin_tiny_patch4_window7_224", "model.args": args, f"pruning.{option}": value}
    config = RunConfig.from_flat(flat | {"cache": str(tmp_path / "cache")})
    with pytest.raises(ConfigError, match=rf"pruning\.{option} = '{value}'"):
        pruning.prune(config, 0.5, tmp_path / "small")


def test_a_budget_that_cannot_be_met_is_refused_before_the_backbone_is_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("experiments.pruning.dense_backbone", lambda *_: pytest.fail("trained first"))
    config = RunConfig.from_flat({"model.args": TINY, "cache": str(tmp_path / "cache")})
    with pytest.raises(BudgetError, match=r"budget 0.001 of the MACs cannot be met: this backbone can go down to"):
        pruning.prune(config, 0.001, tmp_path / "small")


def test_classes_are_not_the_folders_of_natural_devices(tmp_path: Path) -> None:
    digits = load_images("digits")
    for device in ("ann", "bob"):
        for label in range(3):
            (folder := tmp_path / "images" / device / str(label)).mkdir(parents=True)
            for k, image in enumerate(digits.subset(np.flatnonzero(digits.labels == label)[:2]).read()):
                Image.fromarray(image.squeeze()).save(folder / f"{k}.png")
    options = {"data.source": str(tmp_path / "images"), "data.partition": "natural", "cache": str(tmp_path / "cache")}
    options |= {"model.args": TINY, "model.epochs": 1, "metric.size": 8, "metric.batch": 4, "pruning.align": 1}
    plan = pruning.prune(RunConfig.from_flat(options | {"pruning.criterion": "magnitude"}), 0.6, tmp_path / "small")
    assert plan.backbone.num_classes == 3


def test_a_folder_that_is_not_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"plan.json: cannot be read"):
        tapfl("inspect", str(tmp_path))


@pytest.mark.parametrize("family", [pytest.param("vit", marks=pytest.mark.slow), "swin"])
def test_inspecting_a_device_shows_heads_stages_and_costs(family: str, vit: Tiny, tmp_path: Path) -> None:
    backbone = tiny(SWIN) if family == "swin" else vit
    attention, ffn = backbone.layers[:2]
    half = attention.units_per_head // 2
    kept = {attention.name: torch.arange(half), ffn.name: torch.empty(0, dtype=torch.int64)}
    plan = plan_of(backbone, kept)
    importance = tuple(part.model_copy(update={"importance": 0.1}) for part in plan.layers)
    device = tmp_path / "devices" / "03"
    save_pruned(shrink(backbone.model, plan), plan.model_copy(update={"layers": importance}), device / "pruned")
    found = inspect(device, repeats=2)
    assert found["folder"] == str(device / "pruned")
    assert found["bytes"] == (device / "pruned" / "model.safetensors").stat().st_size < found["bytes_dense"]
    widths = {layer["name"]: (layer["width_dense"], layer["width"]) for layer in found["layers"]}
    assert widths[attention.name] == (f"{attention.heads} x {attention.units_per_head}", f"1 x {half}")
    assert widths[ffn.name] == (str(ffn.units), "0")
    assert len({layer["stage"] for layer in found["layers"]}) == (2 if family == "swin" else 1)
    drawn = kept_widths(found)
    rows = [row for name, rows in drawn.data.items() if name != "costs" for row in rows]
    assert [(r["width"], r["importance"]) for r in rows] == [(r["width"], 0.1) for r in found["layers"]]
    assert [row["kept"] for row in rows[:2]] == [half / attention.units, 0]
    picture(found, tmp_path / "look.svg")
    assert f"1 x {half}" in (tmp_path / "look.svg").read_text()
    with pytest.raises(ConfigError, match=r"picture = .*cannot be written"):
        picture(found, tmp_path / "look.svg" / "look.png")


# ---------------------------------------------------------------- a plan applied to other weights


def reapply(tmp_path: Path, *sets: str, plan: str = "small", out: str = "other") -> dict[str, Any]:
    options = [part for option in sets for part in ("--set", option)]
    said = tapfl("prune", "--plan", str(tmp_path / plan), "--out", str(tmp_path / out), *options, "--json")
    return json.loads(said)


def test_a_plan_is_applied_to_other_weights(vit: Tiny, tmp_path: Path) -> None:
    plan = plan_of(vit, random_kept(vit.layers, 0.5)).model_copy(update={"provenance": {"compensation": "sequential"}})
    save_pruned(shrink(vit.model, plan), plan, tmp_path / "small")
    other = scramble(build(VIT), seed=5)
    write_tensors(tmp_path / "w.safetensors", other.state_dict())
    said = reapply(tmp_path, f"model.weights={tmp_path / 'w.safetensors'}")
    assert said["provenance"]["plan"] == plan.checksum[:16] and "compensation" not in said["provenance"]
    small = load_pruned(tmp_path / "other")
    assert torch.equal(small(vit.inputs), shrink(other, plan)(vit.inputs))
    options = ModelOptions(weights=str(tmp_path / "w.safetensors"))
    warnings = apply_again(tmp_path / "small", options, names_backbone=False, out=tmp_path / "third")
    assert len(warnings) == 1 and "compensation = sequential" in warnings[0]
    assert apply_again(tmp_path / "other", options, names_backbone=False, out=tmp_path / "fourth") == []
    turned = plan.model_copy(update={"provenance": {"basis": "canonical"}})
    save_pruned(shrink(vit.model, turned), turned, tmp_path / "turned")
    with pytest.raises(PlanError, match="was made in the canonical basis"):
        apply_again(tmp_path / "turned", options, names_backbone=False, out=tmp_path / "fifth")


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        ((), "model.weights = '': --plan needs weights"),
        (("model.weights={}/none",), "there is no such file"),
        (("model.weights={}/small/model.safetensors",), r"blocks\.0\.attn\.qkv\.weight: .*\[48, 32\].*\[96, 32\]"),
        (("model.weights={}/headless.safetensors",), r"has no head\.weight for 10 classes"),
        (("model.weights={}/w.pth", "model.name=deit_tiny_patch16_224"), "the plan is for vit_tiny_patch16_224"),
        (
            ("model.weights={}/w.pth", "model.head=rows", "model.head-rows={}/rows.json"),
            "a plan has only the number of classes",
        ),
        (("model.weights=hub",), r"the head has \d+ classes, but the plan 10"),
    ],
)
def test_weights_that_a_plan_does_not_fit_are_refused(
    sets: tuple[str, ...], message: str, vit: Tiny, tmp_path: Path
) -> None:
    plan = plan_of(vit, random_kept(vit.layers, 0.5))
    save_pruned(shrink(vit.model, plan), plan, tmp_path / "small")
    state = vit.model.state_dict()
    torch.save(state, tmp_path / "w.pth")
    headless = {name: value for name, value in state.items() if "head" not in name}
    write_tensors(tmp_path / "headless.safetensors", headless)
    with pytest.raises(TapflError, match=message):
        reapply(tmp_path, *(text.format(tmp_path) for text in sets))
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("--criterion", "tap"), "pruning.criterion = 'tap'"),
        (("--compensation", "one-pass"), "pruning.compensation = 'one-pass'"),
        (("--recovery", "distill"), "pruning.recovery = 'distill'"),
        (("--set", "pruning.tau=2", "--set", "metric.size=64"), "pruning.tau = 2, metric.size = 64"),
    ],
)
def test_options_that_a_plan_does_not_use_are_refused(arguments: tuple[str, ...], named: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"^{named}: not with --plan, "):
        tapfl("prune", "--plan", str(tmp_path), "--out", str(tmp_path / "small"), *arguments)


def test_a_plan_or_a_budget_but_not_both(tmp_path: Path) -> None:
    for arguments in (("--plan", "x", "--budget", "0.5"), ()):
        with pytest.raises(ConfigError, match="give exactly one of the two"):
            tapfl("prune", "--out", str(tmp_path / "small"), *arguments)
