"""Pruned models on disk: complete or absent, refused if anything was changed; and plans applied to other weights."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from backbones import CLASSES, SWIN, VIT, Tiny, plan_of, planned, scramble, tiny

from tapfl.config import PruningOptions
from tapfl.errors import PlanError
from tapfl.models.backbone import BackboneSpec, build
from tapfl.models.cost import measure_cost
from tapfl.models.forward import example_input
from tapfl.models.prunable import prunable_layers
from tapfl.pruning.basis import canonical_basis
from tapfl.pruning.plan import PruningPlan, checksum_of, load_plan, read_plan
from tapfl.pruning.surgery import apply_plan, load_pruned, rebuild, save_pruned, shrink
from tapfl.store import pack_tensors, read_tensors, sha256_of, write_tensors

FAMILIES = ["vit", "deit", "swin"]


def a_plan(backbone: Tiny, budget: float = 0.5) -> PruningPlan:
    return planned(
        backbone.model, backbone.spec, backbone.inputs, budget, PruningOptions(criterion="tap", align=2), batch=4
    )


@pytest.fixture
def saved(vit: Tiny, tmp_path: Path) -> Path:
    plan = a_plan(vit)
    save_pruned(shrink(vit.model, plan), plan, tmp_path / "pruned")
    return tmp_path / "pruned"


@pytest.mark.parametrize("family", FAMILIES)
def test_saved_and_loaded_is_the_same_model(family: str, families: dict[str, Tiny], tmp_path: Path) -> None:
    backbone = families[family]
    plan = a_plan(backbone, 0.6)
    small = shrink(backbone.model, plan)
    save_pruned(small, plan, tmp_path)
    assert load_plan(tmp_path)[0] == plan
    torch.manual_seed(99)  # the loader's initial values must not remain
    loaded = load_pruned(tmp_path)
    assert torch.equal(loaded(backbone.inputs), small(backbone.inputs))
    assert {name: tuple(t.shape) for name, t in loaded.state_dict().items()} == {
        name: tuple(t.shape) for name, t in small.state_dict().items()
    }
    assert not loaded.training
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    assert measure_cost(loaded) == plan.cost


def test_saved_twice_is_the_same_to_the_bit(saved: Path, vit: Tiny, tmp_path: Path) -> None:
    plan = a_plan(vit)
    for attempt in map(str, range(4)):
        save_pruned(shrink(vit.model, plan), plan, tmp_path / attempt)
        for file in saved.iterdir():
            assert file.read_bytes() == (tmp_path / attempt / file.name).read_bytes()


def test_the_folder_holds_no_dense_weights(saved: Path, vit: Tiny) -> None:
    assert sorted(file.name for file in saved.iterdir()) == ["model.safetensors", "plan.json"]
    plan, _ = load_plan(saved)
    header = 6000
    assert (saved / "model.safetensors").stat().st_size < 4 * plan.cost.params + header < 4 * plan.dense.params


def test_a_model_that_lost_branches_can_be_saved(vit: Tiny, tmp_path: Path) -> None:
    none = torch.empty(0, dtype=torch.int64)
    plan = plan_of(vit, {"blocks.0.attn": none, "blocks.1.mlp": none})
    small = shrink(vit.model, plan)
    save_pruned(small, plan, tmp_path)
    assert torch.equal(load_pruned(tmp_path)(vit.inputs), small(vit.inputs))


def test_a_model_with_counters_can_be_saved_and_sent(tmp_path: Path) -> None:
    """BatchNorm counts its batches in integers."""
    args = {"img_size": 32, "embed_dim": 32, "depth": 1, "num_heads": 2}
    spec = BackboneSpec(name="vit_small_resnet26d_224", args=args, num_classes=CLASSES)
    model = build(spec, seed=0)
    hybrid = Tiny(spec, model, prunable_layers(model), example_input(model))
    plan = plan_of(hybrid, {"blocks.0.mlp": torch.arange(8)})
    small = shrink(model, plan)
    save_pruned(small, plan, tmp_path)
    for same in (load_pruned(tmp_path), rebuild(plan, (tmp_path / "model.safetensors").read_bytes())):
        assert torch.equal(same(hybrid.inputs), small(hybrid.inputs))
    state = small.state_dict()
    counter = next(name for name in state if name.endswith("num_batches_tracked"))
    with pytest.raises(PlanError, match=rf"{counter}: expected torch\.int64, found torch\.float32"):
        rebuild(plan, pack_tensors(state | {counter: torch.tensor(1.0)}))


def test_truncated_weights_are_refused(saved: Path) -> None:
    file = saved / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(PlanError, match=r"model\.safetensors: is not a complete safetensors file"):
        load_pruned(saved)


def test_weights_of_another_plan_are_refused(saved: Path, vit: Tiny, tmp_path: Path) -> None:
    other = a_plan(vit, 0.7)
    save_pruned(shrink(vit.model, other), other, tmp_path / "other")
    (tmp_path / "other" / "model.safetensors").replace(saved / "model.safetensors")
    with pytest.raises(PlanError, match=r"is not the file that plan\.json was written with"):
        load_pruned(saved)


@pytest.mark.parametrize("name", ["plan.json", "model.safetensors"])
def test_a_missing_file_is_named(name: str, saved: Path) -> None:
    (saved / name).unlink()
    with pytest.raises(PlanError, match=f"{name}: cannot be read"):
        load_pruned(saved)


@pytest.mark.parametrize("content", ["", "{", "[1]", "3", "null", "{}", '{"sha256": "0"}', "\udcff"])
def test_an_invalid_plan_is_refused(content: str, saved: Path) -> None:
    (saved / "plan.json").write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(PlanError, match="plan"):
        load_pruned(saved)


def test_an_invalid_field_of_a_plan_is_named(saved: Path) -> None:
    content = json.loads((saved / "plan.json").read_text())
    content["layers"][1]["kept"] = "all"
    (saved / "plan.json").write_text(json.dumps(content))
    with pytest.raises(PlanError, match=r"layers\.1\.kept"):
        load_plan(saved)


Content = dict[str, Any]


def edit(folder: Path, change: Callable[[Content], object], sign: bool = True) -> None:
    """Changes plan.json, and its checksum as well unless the change should be detected."""
    content = json.loads((folder / "plan.json").read_text())
    change(content)
    if sign:
        own = {key: value for key, value in content.items() if key not in ("checksum", "sha256")}
        content["checksum"] = checksum_of(own)
    (folder / "plan.json").write_text(json.dumps(content))


def keeping(position: int, kept: Callable[[list[int]], list[int]]) -> Callable[[Content], object]:
    return lambda content: content["layers"][position].update(kept=kept(content["layers"][position]["kept"]))


def arguments(**changed: object) -> Callable[[Content], object]:
    return lambda content: content["backbone"]["args"].update(changed)


def test_a_checksum_does_not_depend_on_the_order_of_keys() -> None:
    assert checksum_of({"a": 1, "b": [2, {"c": 3, "d": 4}]}) == checksum_of({"b": [2, {"d": 4, "c": 3}], "a": 1})
    assert checksum_of({"a": 1}) != checksum_of({"a": 2})


@pytest.mark.parametrize(
    "change",
    [
        keeping(1, lambda kept: kept[:-1]),
        lambda content: content["provenance"].update(budget=0.1),
        lambda content: content["cost"].update(macs=1),
        lambda content: content.update(checksum="0" * 64),
    ],
)
def test_an_edited_plan_is_detected(change: Callable[[Content], object], saved: Path) -> None:
    edit(saved, change, sign=False)
    for look in (load_plan, load_pruned, read_plan):
        with pytest.raises(PlanError, match=r"plan\.json: was edited or damaged"):
            look(saved)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            keeping(1, lambda kept: kept[:-1]),
            r"model\.safetensors: does not fit its plan \(blocks\.0\.mlp\.fc1\.weight: ex",
        ),
        (keeping(0, lambda kept: kept[:-1]), r"plan\.json: blocks\.0\.attn: every head that stays"),
        (
            keeping(1, lambda kept: [*kept, 128]),
            r"layers\.1\.kept: kept units of blocks\.0\.mlp must .* lie in 0\.\.127",
        ),
        (keeping(1, lambda kept: [*kept, 10**30]), r"layers\.1\.kept: .* lie in 0\.\.127"),
        (keeping(1, lambda kept: kept[::-1]), r"layers\.1\.kept: .* sorted"),
        (
            lambda content: content["layers"].pop(),
            r"plan\.json: .*\(blocks\.1\.mlp: expected none, found ffn of 128 units",
        ),
        (lambda content: content["layers"].append(content["layers"][0]), r"layers\.4: blocks\.0\.attn occurs twice"),
        (
            lambda content: content["layers"][0].update(units=48),
            r"blocks\.0\.attn: expected attention of 48 units, found",
        ),
        (lambda content: content["layers"][0].update(width=3), r"plan\.json: layers\.0\.width: Extra"),
        (lambda content: content.update(pickle="x"), r"plan\.json: pickle: Extra inputs are not permitted"),
        (lambda content: content.pop("cost"), r"plan\.json: cost: Field required"),
        (lambda content: content.pop("sha256"), r"plan\.json: is not the plan of a saved model \(it has no 'sha256'"),
        (
            lambda content: content["backbone"].update(name="vgg11", args={}),
            r"plan\.json: .*'vgg11': is timm's VGG",
        ),
        (lambda content: content["backbone"].update(name="vit_none"), r"plan\.json: .*timm has no such model"),
        (lambda content: content["layers"][0].update(importance=float("nan")), r"plan\.json: is not a plan \(NaN"),
        (arguments(checkpoint_path="x.pth"), r"backbone\.args: checkpoint_path: is not an argument of the arch"),
        (
            arguments(act_layer="nope"),
            r"plan\.json: .*timm cannot build vit_tiny_patch16_224 with them \(KeyError: 'nope'\)",
        ),
        (
            arguments(patch_size=64),
            r"plan\.json: vit_tiny_patch16_224 cannot be cut by .* \(RuntimeError: Calculated",
        ),
        # models that would take gigabytes or hours to build
        (arguments(depth=10**9), r"backbone\.args: depth = 1000000000: is beyond 65536"),
        (arguments(depth=60000), r"plan\.json: the backbone has more than \d+ parameter tensors"),
        (arguments(embed_dim=65536), r"plan\.json: the backbone has more than 2147483648 parameters"),
        (
            arguments(embed_dim=64),
            r"plan\.json: .*does not fit this model \(blocks\.0\.attn: expected attention of 32",
        ),
        (
            arguments(img_size=4096),
            r"does not fit its plan \(pos_embed: expected \[1, 4194305, 32\], found \[1, 17, 32\]",
        ),
    ],
)
def test_a_plan_that_asks_for_another_model_is_refused(
    change: Callable[[Content], object], message: str, saved: Path
) -> None:
    """Although its checksum is right, and quickly for any size of the model."""
    edit(saved, change)
    start = time.process_time()
    with pytest.raises(PlanError, match=message) as caught:
        load_pruned(saved)
    assert "\n" not in str(caught.value)
    assert time.process_time() - start < 5


def test_the_size_of_computed_masks_is_bounded(tmp_path: Path) -> None:
    """The parameters of a Swin do not grow with its image, but its masks do."""
    backbone = tiny(SWIN)
    plan = plan_of(backbone, {})
    save_pruned(backbone.model, plan, tmp_path / "swin")
    edit(tmp_path / "swin", arguments(img_size=32768))
    with pytest.raises(PlanError, match=r"plan\.json: swin_tiny.* needs .* elements for its masks"):
        load_pruned(tmp_path / "swin")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(value: float, saved: Path, vit: Tiny, tmp_path: Path) -> None:
    state = read_tensors(saved / "model.safetensors")
    state["blocks.1.mlp.fc1.bias"][3] = value
    write_tensors(saved / "model.safetensors", state)
    edit(saved, lambda content: content.update(sha256=sha256_of(saved / "model.safetensors")))
    message = r"blocks\.1\.mlp\.fc1\.bias: holds values that are not finite"
    with pytest.raises(PlanError, match=rf"model\.safetensors: .*{message}"):
        load_pruned(saved)
    plan = a_plan(vit)
    small = shrink(vit.model, plan)
    with torch.no_grad():
        small.get_parameter("blocks.1.mlp.fc1.bias")[3] = value
    with pytest.raises(PlanError, match=message):
        save_pruned(small, plan, tmp_path / "broken")
    assert not (tmp_path / "broken").exists()


def test_a_model_that_is_not_the_plans_is_not_saved(vit: Tiny, tmp_path: Path) -> None:
    with pytest.raises(
        PlanError, match=r"model to be saved \(blocks\.0\.attn\.qkv\.weight: expected .*, found \[96, 32\]"
    ):
        save_pruned(vit.model, a_plan(vit), tmp_path / "wrong")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("swapped", ["plan.json", "model.safetensors"])
def test_equal_widths_do_not_make_two_models_exchangeable(swapped: str, saved: Path, vit: Tiny, tmp_path: Path) -> None:
    """Not even if all weights are the same, because the weights' file contains the plan's checksum."""
    plan = load_plan(saved)[0].model_copy(update={"provenance": {"data": "elsewhere"}})
    save_pruned(load_pruned(saved), plan, tmp_path / "other")
    (tmp_path / "other" / swapped).replace(saved / swapped)
    with pytest.raises(PlanError, match=r"is not the file that plan\.json was written with"):
        load_pruned(saved)


# ---------------------------------------------------------------- whole or not at all


def test_an_existing_model_is_not_overwritten(saved: Path, vit: Tiny) -> None:
    before = {file.name: file.read_bytes() for file in saved.iterdir()}
    other = a_plan(vit, 0.7)
    small = shrink(vit.model, other)
    with pytest.raises(PlanError, match=r"pruned: exists already, with model\.safetensors in it"):
        save_pruned(small, other, saved)
    assert {file.name: file.read_bytes() for file in saved.iterdir()} == before
    save_pruned(small, other, saved, replace=True)
    assert load_plan(saved)[0] == other and measure_cost(load_pruned(saved)) == other.cost
    assert [file.name for file in saved.parent.iterdir()] == ["pruned"]


def test_a_folder_that_is_not_a_model_is_not_replaced(saved: Path, vit: Tiny) -> None:
    (saved / "notes.txt").write_text("mine")
    plan = a_plan(vit)
    with pytest.raises(PlanError, match=r"give a new folder, or that of a pruned model alone"):
        save_pruned(shrink(vit.model, plan), plan, saved, replace=True)
    assert (saved / "notes.txt").read_text() == "mine" and load_plan(saved)[0] == plan


@pytest.mark.parametrize(("step", "replace"), [*((i, False) for i in range(1, 6)), *((i, True) for i in range(1, 7))])
def test_a_save_that_fails_at_any_step_leaves_the_old_or_nothing(
    step: int, replace: bool, vit: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = a_plan(vit)
    small = shrink(vit.model, plan)
    folder = tmp_path / "pruned"
    if replace:
        save_pruned(small, plan.model_copy(update={"provenance": {"version": "old"}}), folder)
    steps = 0

    def failing(real: Callable[..., object]) -> Callable[..., object]:
        def call(*arguments: object) -> object:
            nonlocal steps
            steps += 1
            if steps == step:
                raise OSError(28, "No space left on device")
            return real(*arguments)

        return call

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", failing(os.replace))
        patch.setattr(os, "fsync", failing(os.fsync))
        with pytest.raises(PlanError, match=r"pruned: cannot be written \(No space left"):
            save_pruned(small, plan, folder, replace)
    assert [file.name for file in tmp_path.iterdir()] == (["pruned"] if replace else [])
    if replace:
        assert load_plan(folder)[0].provenance == {"version": "old"}
        load_pruned(folder)


# ---------------------------------------------------------------- plans for other weights


def test_a_plan_prunes_other_weights_of_its_backbone_in_the_same_way(saved: Path, tmp_path: Path) -> None:
    other = scramble(build(VIT), seed=7)
    plan = load_plan(saved)[0]
    bare = tmp_path / "00.json"
    bare.write_text(plan.model_dump_json())
    x = torch.randn(2, 1, 8, 8)
    for source in (plan, saved, str(saved / "plan.json"), bare):
        assert torch.equal(apply_plan(source, other)(x), shrink(other, plan)(x))


def test_a_plan_made_in_another_basis_is_not_reapplied(vit: Tiny) -> None:
    plan = a_plan(vit).model_copy(update={"provenance": {"basis": "canonical"}})
    with pytest.raises(PlanError, match="was made in the canonical basis of the heads"):
        apply_plan(plan, vit.model)
    turned = canonical_basis(vit.model, vit.layers, vit.inputs.split(4))
    assert measure_cost(apply_plan(plan, turned)) == plan.cost


def test_a_plan_contains_its_layers(vit: Tiny) -> None:
    plan = a_plan(vit)
    assert plan.layer("blocks.1.mlp").units == 128
    with pytest.raises(PlanError, match=r"has no layer blocks\.7\.mlp"):
        plan.layer("blocks.7.mlp")
