"""Surgery: the smaller model is the masked one, costs what the plan says, and lives on disk alone."""

from __future__ import annotations

import copy
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from backbones import SWIN, VIT, VIT_ARGS, Tiny, kept_units, masked, plan_of, planned, random_kept, scramble, tiny
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from timm.layers import SwiGLU
from torch import Tensor, nn

from tapfl.config import PruningOptions
from tapfl.errors import ModelError, PlanError
from tapfl.models.backbone import BackboneSpec, build
from tapfl.models.cost import measure_cost
from tapfl.models.forward import segments
from tapfl.models.prunable import prunable_layers
from tapfl.models.units import LinearCut, SelfAttention
from tapfl.pruning.basis import canonical_basis
from tapfl.pruning.plan import PruningPlan, checksum_of, load_plan, read_plan
from tapfl.pruning.surgery import apply_plan, load_pruned, save_pruned, shrink
from tapfl.store import read_tensors, sha256_of, write_tensors

FAMILIES = ["vit", "deit", "swin"]


def distance(backbone: Tiny, kept: dict[str, Tensor], model: nn.Module | None = None) -> float:
    """Largest difference of the logits of the shrunk and of the masked model."""
    model = backbone.model if model is None else model
    small = shrink(model, plan_of(backbone, kept))
    with torch.no_grad():
        got = small(backbone.inputs)
        with masked(model, backbone.layers, kept):
            want = model(backbone.inputs)
        dense = model(backbone.inputs)
    assert len(kept) == 0 or (want - dense).abs().max() > 1e-3  # the mask must matter
    return float((got - want).abs().max())


def unfused(model: nn.Module) -> nn.Module:
    model = copy.deepcopy(model)
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False
    return model


@pytest.mark.parametrize("share", [0.9, 0.5, 0.2])
@pytest.mark.parametrize("fused", [True, False], ids=["fused", "unfused"])
@pytest.mark.parametrize("family", FAMILIES)
def test_shrunk_equals_masked(family: str, fused: bool, share: float, families: dict[str, Tiny]) -> None:
    backbone = families[family]
    model = backbone.model if fused else unfused(backbone.model)
    assert distance(backbone, random_kept(backbone.layers, share), model) <= 1e-5


@settings(max_examples=25, phases=[Phase.generate])  # shrinking a failure would take minutes
@given(data=st.data())
def test_shrunk_equals_masked_at_any_width_with_heads_and_branches_gone(
    data: st.DataObject, families: dict[str, Tiny]
) -> None:
    backbone = families[data.draw(st.sampled_from(FAMILIES))]
    kept: dict[str, Tensor] = {}
    for layer in backbone.layers:
        heads = data.draw(st.sets(st.integers(0, layer.heads - 1)), label=f"heads of {layer.name}")
        dims = data.draw(st.integers(1, layer.units_per_head))
        generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
        units = [
            torch.randperm(layer.units_per_head, generator=generator)[:dims] + head * layer.units_per_head
            for head in sorted(heads)
        ]
        kept[layer.name] = torch.cat([*units, torch.empty(0, dtype=torch.int64)]).sort().values
    small = shrink(backbone.model, plan_of(backbone, kept))
    with masked(backbone.model, backbone.layers, kept):
        torch.testing.assert_close(small(backbone.inputs), backbone.model(backbone.inputs), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_whole_heads_can_go(family: str, families: dict[str, Tiny]) -> None:
    backbone = families[family]
    kept = {}
    for layer in backbone.layers:
        if layer.kind == "attention":  # the last head alone stays, without its first dim
            kept[layer.name] = torch.arange(layer.units - layer.units_per_head + 1, layer.units)
    assert distance(backbone, kept) <= 1e-5
    attention = shrink(backbone.model, plan_of(backbone, kept)).get_submodule(backbone.layers[0].name)
    assert attention.num_heads == 1
    if family == "swin":
        assert attention.relative_position_bias_table.shape == (13 * 13, 1)


@pytest.mark.parametrize("family", FAMILIES)
def test_whole_branches_can_go(family: str, families: dict[str, Tiny]) -> None:
    backbone = families[family]
    none = torch.empty(0, dtype=torch.int64)
    kept = {layer.name: none for layer in backbone.layers[1::2][:1] + backbone.layers[2::2]}
    assert distance(backbone, kept) <= 1e-5


def test_the_softmax_scale_trap(vit: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the factor sqrt(k/d) on q the output is off, by far more than the tolerance of the tests above."""
    whole = SelfAttention.cuts

    def trapped(self: SelfAttention, kept: Tensor) -> list[LinearCut]:
        return [LinearCut(cut.linear, cut.side, cut.index) for cut in whole(self, kept)]

    kept = random_kept(vit.layers, 0.5)
    assert distance(vit, kept) <= 1e-5
    monkeypatch.setattr(SelfAttention, "cuts", trapped)
    assert distance(vit, kept) > 1e-2


def test_the_dense_model_is_left_as_it_was(swin: Tiny) -> None:
    state = {name: tensor.clone() for name, tensor in swin.model.state_dict().items()}
    small = shrink(swin.model, plan_of(swin, random_kept(swin.layers, 0.5)))
    with torch.no_grad():
        for parameter in small.parameters():
            parameter.fill_(7)
    assert all(torch.equal(tensor, state[name]) for name, tensor in swin.model.state_dict().items())


@pytest.mark.parametrize("family", FAMILIES)
def test_segments_in_turn_are_the_model(family: str, families: dict[str, Tiny]) -> None:
    backbone = families[family]
    x = backbone.inputs
    for _, step in segments(backbone.model):
        x = step(x)
    assert torch.equal(x, backbone.model(backbone.inputs))
    assert {layer.block for layer in backbone.layers} < {name for name, _ in segments(backbone.model)}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("budget", "floor"), [(0.9, 0.05), (0.5, 0.05), (0.45, 0.0)])
def test_the_shrunk_model_costs_what_the_plan_says(
    family: str, budget: float, floor: float, families: dict[str, Tiny]
) -> None:
    backbone = families[family]
    options = PruningOptions(align=1, floor=floor, ratio="adaptive", tau=0.3)
    plan = planned(backbone.model, backbone.spec, backbone.inputs, budget, options, batch=4)
    small = shrink(backbone.model, plan)
    assert measure_cost(small) == plan.cost
    assert measure_cost(backbone.model) == plan.dense
    assert 0.995 * budget * plan.dense.macs <= plan.cost.macs <= budget * plan.dense.macs
    assert {name: len(units) for name, units in kept_units(plan).items()} == plan.widths


@pytest.mark.parametrize("family", FAMILIES)
def test_a_plan_without_some_branches_costs_what_it_says(family: str, families: dict[str, Tiny]) -> None:
    """With pruning.floor = 0 a branch may go as a whole, and with Swin its table of position biases."""
    backbone = families[family]
    options = PruningOptions(align=8, floor=0.0, ratio="uniform")
    dense = measure_cost(backbone.model)
    fixed = dense.macs - sum(layer.macs_per_unit * layer.units for layer in backbone.layers)
    plan = planned(backbone.model, backbone.spec, backbone.inputs, fixed / dense.macs, options, batch=4)
    assert set(plan.widths.values()) == {0}
    assert measure_cost(shrink(backbone.model, plan)) == plan.cost


@pytest.mark.parametrize("option", ["qkv_bias", "proj_bias"])
def test_the_plan_of_a_model_without_some_biases_costs_what_it_says(option: str) -> None:
    spec = BackboneSpec(name=VIT.name, args=VIT_ARGS | {option: False}, num_classes=10)
    backbone = tiny(spec)
    plan = planned(backbone.model, spec, backbone.inputs, 0.5, PruningOptions(align=2), batch=4)
    assert measure_cost(shrink(backbone.model, plan)) == plan.cost
    assert distance(backbone, kept_units(plan)) <= 1e-5


def test_measured_cost_is_that_of_the_arithmetic(vit: Tiny) -> None:
    tokens, width, hidden = 17, 32, 128
    block = tokens * (4 * width * width + 2 * width * hidden) + 2 * tokens * tokens * width
    assert measure_cost(vit.model).macs == 16 * 4 * width + 2 * block + width * 10
    assert measure_cost(vit.model).params == sum(p.numel() for p in vit.model.parameters())


@pytest.mark.parametrize(
    ("kept", "message"),
    [
        (list(range(1, 32)), "every head that stays must keep the same number of dims"),
        ([*range(8), *range(16, 20)], "every head that stays must keep the same number of dims"),
        ([3, 1, 17, 18], "sorted, unique and lie in 0..31"),
        ([1, 1, 17, 18], "sorted, unique and lie in 0..31"),
        ([1, 32], "sorted, unique and lie in 0..31"),
        ([-1, 16], "sorted, unique and lie in 0..31"),
    ],
)
def test_a_plan_that_cannot_be_carried_out_is_refused(kept: list[int], message: str, vit: Tiny) -> None:
    with pytest.raises(PlanError, match=rf"blocks\.0\.attn: .*{message}"):
        shrink(vit.model, plan_of(vit, {"blocks.0.attn": torch.tensor(kept)}))


def test_a_plan_for_another_model_is_refused(vit: Tiny, swin: Tiny) -> None:
    with pytest.raises(PlanError, match=f"plan for {swin.spec.name}: does not fit this model"):
        shrink(vit.model, plan_of(swin, {}))


@pytest.mark.parametrize("option", ["qk_norm", "scale_attn_norm"])
def test_attention_with_norms_is_refused_by_name(option: str) -> None:
    model = build(BackboneSpec(name=VIT.name, args=VIT_ARGS | {option: True}, num_classes=10))
    with pytest.raises(ModelError, match=r"blocks\.0\.attn: cannot be pruned exactly; .*without norms"):
        prunable_layers(model)


def test_blocks_of_another_layout_are_refused() -> None:
    args = {"img_size": 32, "embed_dim": 32, "depth": 2, "num_heads": 2}
    model = build(
        BackboneSpec(name="vit_small_patch16_18x2_224", args=args, num_classes=10)
    )  # two branches in parallel
    with pytest.raises(ModelError, match="no attention or FFN that can be pruned"):
        prunable_layers(model)


def test_a_pooling_head_with_its_own_mlp_is_left_alone() -> None:
    args = VIT_ARGS | {"class_token": False}
    model = scramble(build(BackboneSpec(name="vit_base_patch16_siglip_224", args=args, num_classes=10)))
    assert [layer.name for layer in prunable_layers(model)] == [
        "blocks.0.attn",
        "blocks.0.mlp",
        "blocks.1.attn",
        "blocks.1.mlp",
    ]


# ---------------------------------------------------------------- on disk


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
    torch.manual_seed(99)  # whatever the loader initialises with must not be seen
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


def test_truncated_weights_are_refused(saved: Path) -> None:
    file = saved / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(PlanError, match=r"model\.safetensors: is not a whole safetensors file"):
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
def test_a_plan_that_is_none_is_refused(content: str, saved: Path) -> None:
    (saved / "plan.json").write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(PlanError, match="plan"):
        load_pruned(saved)


def test_a_plan_with_a_field_that_is_off_names_it(saved: Path) -> None:
    content = json.loads((saved / "plan.json").read_text())
    content["layers"][1]["kept"] = "all"
    (saved / "plan.json").write_text(json.dumps(content))
    with pytest.raises(PlanError, match=r"layers\.1\.kept"):
        load_plan(saved)


Content = dict[str, Any]


def edit(folder: Path, change: Callable[[Content], object], sign: bool = True) -> None:
    """Changes plan.json, and its checksum with it unless the change is to be noticed."""
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
def test_an_edited_plan_is_noticed(change: Callable[[Content], object], saved: Path) -> None:
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
        (arguments(checkpoint_path="x.pth"), r"backbone\.args: checkpoint_path: is no argument of the architecture"),
        (
            arguments(act_layer="nope"),
            r"plan\.json: .*timm cannot build vit_tiny_patch16_224 with them \(KeyError: 'nope'\)",
        ),
        (
            arguments(patch_size=64),
            r"plan\.json: vit_tiny_patch16_224 cannot be cut by .* \(RuntimeError: Calculated",
        ),
        # what would take gigabytes or hours to build
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
    """Though its checksum is right; and in no time, whatever the size of what it asks for."""
    edit(saved, change)
    start = time.process_time()
    with pytest.raises(PlanError, match=message) as caught:
        load_pruned(saved)
    assert "\n" not in str(caught.value)
    assert time.process_time() - start < 5


def test_masks_that_no_file_holds_are_bounded(tmp_path: Path) -> None:
    """The parameters of a Swin do not grow with its image; its masks do."""
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
    """Not even if all weights are the same: the weights' file carries the plan's checksum."""
    plan = load_plan(saved)[0].model_copy(update={"provenance": {"data": "elsewhere"}})
    save_pruned(load_pruned(saved), plan, tmp_path / "other")
    (tmp_path / "other" / swapped).replace(saved / swapped)
    with pytest.raises(PlanError, match=r"is not the file that plan\.json was written with"):
        load_pruned(saved)


# ---------------------------------------------------------------- whole or not at all


def test_a_model_that_is_there_is_not_overwritten(saved: Path, vit: Tiny) -> None:
    before = {file.name: file.read_bytes() for file in saved.iterdir()}
    other = a_plan(vit, 0.7)
    small = shrink(vit.model, other)
    with pytest.raises(PlanError, match=r"pruned: exists already, with model\.safetensors in it"):
        save_pruned(small, other, saved)
    assert {file.name: file.read_bytes() for file in saved.iterdir()} == before
    save_pruned(small, other, saved, replace=True)
    assert load_plan(saved)[0] == other and measure_cost(load_pruned(saved)) == other.cost
    assert [file.name for file in saved.parent.iterdir()] == ["pruned"]


def test_what_is_no_model_is_not_replaced(saved: Path, vit: Tiny) -> None:
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


def test_a_plan_cuts_other_weights_of_its_backbone_alike(saved: Path, tmp_path: Path) -> None:
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
    turned = canonical_basis(vit.model, vit.layers, vit.inputs, 4)
    assert measure_cost(apply_plan(plan, turned)) == plan.cost


def test_a_plan_knows_its_layers(vit: Tiny) -> None:
    plan = a_plan(vit)
    assert plan.layer("blocks.1.mlp").units == 128
    with pytest.raises(PlanError, match=r"has no layer blocks\.7\.mlp"):
        plan.layer("blocks.7.mlp")


def test_a_gated_ffn_is_refused_by_name() -> None:
    model = build(VIT)
    model.blocks[1].mlp = SwiGLU(model.embed_dim, 16)
    with pytest.raises(ModelError, match=r"blocks.1.mlp: cannot be pruned exactly"):
        prunable_layers(model)


def test_a_hook_on_the_dense_branch_is_none_on_the_shrunk_one() -> None:
    model = build(VIT)
    layer = prunable_layers(model)[0]
    seen: list[str] = []
    branch = model.get_submodule(layer.name)
    branch.register_forward_hook(lambda *_: seen.append("dense"))
    small = layer.shrink(branch, torch.arange(0, layer.units, 2))
    small(torch.zeros(1, layer.tokens, layer.embed_dim))
    assert not seen
    branch(torch.zeros(1, layer.tokens, layer.embed_dim))
    assert seen == ["dense"]
