"""Surgery: the shrunk model equals the masked model, and costs what the plan says."""

from __future__ import annotations

import copy

import pytest
import torch
from backbones import SWIN, VIT, VIT_ARGS, Tiny, kept_units, masked, plan_of, planned, random_kept, scramble, tiny
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from timm.layers import SwiGLU
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from tapfl.config import PruningOptions
from tapfl.errors import ModelError, PlanError
from tapfl.models.backbone import BackboneSpec, build
from tapfl.models.cost import measure_cost
from tapfl.models.forward import example_input, segments
from tapfl.models.prunable import prunable_layers
from tapfl.models.units import LinearCut, SelfAttention
from tapfl.pruning.surgery import shrink

FAMILIES = ["vit", "deit", "swin"]


def distance(backbone: Tiny, kept: dict[str, Tensor], model: nn.Module | None = None) -> float:
    """Returns the largest difference between the logits of the shrunk and the masked model."""
    model = backbone.model if model is None else model
    small = shrink(model, plan_of(backbone, kept))
    with torch.no_grad():
        got = small(backbone.inputs)
        with masked(model, backbone.layers, kept):
            want = model(backbone.inputs)
        dense = model(backbone.inputs)
    assert len(kept) == 0 or (want - dense).abs().max() > 1e-3  # the mask must have an effect
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


@settings(max_examples=25, phases=[Phase.generate])  # hypothesis would take minutes to shrink a failure
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
        if layer.kind == "attention":  # only the last head stays, without its first dim
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
    """Without the factor sqrt(k/d) on q the output is wrong, by far more than the tolerance of the tests above."""
    whole = SelfAttention.cuts

    def trapped(self: SelfAttention, kept: Tensor) -> list[LinearCut]:
        return [LinearCut(cut.linear, cut.side, cut.index) for cut in whole(self, kept)]

    kept = random_kept(vit.layers, 0.5)
    assert distance(vit, kept) <= 1e-5
    monkeypatch.setattr(SelfAttention, "cuts", trapped)
    assert distance(vit, kept) > 1e-2


@pytest.mark.parametrize("spec", [SWIN, VIT.model_copy(update={"args": VIT_ARGS | {"act_layer": "prelu"}})])
def test_the_dense_model_is_not_changed(spec: BackboneSpec) -> None:
    dense = tiny(spec)
    state = {name: tensor.clone() for name, tensor in dense.model.state_dict().items()}
    small = shrink(dense.model, plan_of(dense, random_kept(dense.layers, 0.5)))
    with torch.no_grad():
        for parameter in small.parameters():
            parameter.fill_(7)
    assert all(torch.equal(tensor, state[name]) for name, tensor in dense.model.state_dict().items())


@pytest.mark.parametrize("family", FAMILIES)
def test_the_segments_one_after_another_are_the_model(family: str, families: dict[str, Tiny]) -> None:
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


@pytest.mark.parametrize("family", FAMILIES)
def test_a_plan_without_some_branches_costs_what_it_says(family: str, families: dict[str, Tiny]) -> None:
    """With pruning.floor = 0 a whole branch may be removed, and in a Swin its table of position biases too."""
    backbone = families[family]
    options = PruningOptions(align=8, floor=0.0, ratio="uniform")
    dense = measure_cost(backbone.model)
    fixed = dense.macs - sum(layer.macs_per_unit * layer.units for layer in backbone.layers)
    plan = planned(backbone.model, backbone.spec, backbone.inputs, fixed / dense.macs, options, batch=4)
    assert not any(layer.kept for layer in plan.layers)
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


@pytest.mark.parametrize("pool", ["token", "map", "prr"])
def test_measured_cost_is_that_of_torch(pool: str) -> None:
    model = unfused(build(VIT.model_copy(update={"args": VIT_ARGS | {"global_pool": pool}}))).requires_grad_(False)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(example_input(model))
    assert measure_cost(model).macs == counter.get_total_flops() / 2


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
def test_a_plan_that_cannot_be_applied_is_refused(kept: list[int], message: str, vit: Tiny) -> None:
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


def test_a_gated_ffn_is_refused_by_name() -> None:
    model = build(VIT)
    model.blocks[1].mlp = SwiGLU(model.embed_dim, 16)
    with pytest.raises(ModelError, match=r"blocks.1.mlp: cannot be pruned exactly"):
        prunable_layers(model)


def test_hooks_of_the_dense_branch_are_not_on_the_shrunk_one() -> None:
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
