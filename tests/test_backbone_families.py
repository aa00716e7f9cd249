"""Families of timm that can be pruned: exact for every accepted family; others are refused by name."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from backbones import CLASSES, Tiny, kept_units, masked, plan_of, planned, tiny
from timm.layers import Attention
from timm.models.vision_transformer import ResPostBlock
from torch import Tensor, nn

from tapfl.arguments import parse_args
from tapfl.config import PruningOptions, RunConfig
from tapfl.errors import ConfigError, ModelError
from tapfl.models.backbone import BackboneSpec, build, spec_of
from tapfl.models.cost import measure_cost
from tapfl.models.forward import segments
from tapfl.models.prunable import prunable_layers
from tapfl.pruning.compensation import cut
from tapfl.pruning.criteria.criterion import Selection
from tapfl.pruning.pipeline import pruning_task
from tapfl.pruning.plan import PruningPlan
from tapfl.pruning.surgery import load_pruned, save_pruned, shrink

TINY: dict[str, Any] = {"img_size": 32, "embed_dim": 32, "depth": 2, "num_heads": 2}
SWIN: dict[str, Any] = {"embed_dim": 24, "depths": (2, 2), "num_heads": (2, 4)}
PIT: dict[str, Any] = {"img_size": 64, "base_dims": (12, 12), "depth": (1, 1), "heads": (2, 4)}

# families not in `tests/test_surgery.py`, which has a ViT with class token, a distilled DeiT, a Swin of whole windows
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "vit, pooled": ("vit_tiny_patch16_224", TINY | {"class_token": False, "global_pool": "avg"}),
    "vit, attention pooling": ("vit_base_patch16_siglip_224", TINY),
    "vit, hybrid": ("vit_tiny_r_s16_p8_224", {"img_size": 64, "embed_dim": 64, "depth": 2, "num_heads": 2}),
    "deit": ("deit_tiny_patch16_224", TINY),
    "deit3 with LayerScale": ("deit3_small_patch16_224", TINY | {"init_values": 0.5}),
    "clip": ("vit_base_patch16_clip_quickgelu_224", TINY),
    "flexivit": ("flexivit_small", TINY),
    "dinov2 with registers": ("vit_small_patch14_reg4_dinov2", TINY | {"img_size": 28, "init_values": 0.5}),
    "pooled with registers": ("vit_little_patch16_reg4_gap_256", TINY),
    "swin, padded windows": ("swin_tiny_patch4_window7_224", SWIN | {"img_size": 44}),
    "swin, not square": ("swin_tiny_patch4_window7_224", SWIN | {"img_size": (36, 60), "window_size": 4}),
    "swin s3": ("swin_s3_tiny_224", SWIN | {"img_size": 56, "window_size": (7, 3)}),
    "pit": ("pit_ti_224", PIT),
    "pit, distilled": ("pit_xs_distilled_224", PIT | {"img_size": 60}),
}


@pytest.fixture(scope="module")
def made() -> dict[str, Tiny]:
    """Every family, built once."""
    return {
        family: tiny(BackboneSpec(name=name, args=args, num_classes=CLASSES))
        for family, (name, args) in FAMILIES.items()
    }


@pytest.fixture(params=FAMILIES)
def backbone(request: pytest.FixtureRequest, made: dict[str, Tiny]) -> Tiny:
    return made[request.param]


def with_attention(model: nn.Module, fused: bool) -> nn.Module:
    """A copy that uses one of timm's two code paths; by default timm fuses the attention of ViT but not of Swin."""
    model = copy.deepcopy(model)
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = fused
    return model


def difference(backbone: Tiny, plan: PruningPlan, model: nn.Module) -> float:
    """Largest difference between the logits of the shrunk and the masked model, relative to the largest logit."""
    kept = kept_units(plan)
    with torch.no_grad():
        got, dense = shrink(model, plan)(backbone.inputs), model(backbone.inputs)
        with masked(model, backbone.layers, kept):
            want = model(backbone.inputs)
    assert (want - dense).abs().max() > 1e-3  # the mask must have an effect
    return float((got - want).abs().max() / max(1.0, float(want.abs().max())))


@pytest.mark.parametrize(
    ("share", "fused"), [(0.2, True), (0.5, False), pytest.param(0.9, True, marks=pytest.mark.slow)]
)
def test_shrunk_equals_masked_at_a_share_of_the_macs(backbone: Tiny, share: float, fused: bool) -> None:
    dense = measure_cost(backbone.model)
    prunable = sum(layer.units * layer.macs_per_unit for layer in backbone.layers)
    budget = 1 - (1 - share) * prunable / dense.macs  # the same as `share`, except for stem, poolings and head
    options = PruningOptions(criterion="random", ratio="uniform", align=1, floor=0)
    model = with_attention(backbone.model, fused)
    plan = planned(model, backbone.spec, backbone.inputs, budget, options, batch=4)
    assert 0.995 * budget * dense.macs <= plan.cost.macs <= budget * dense.macs
    assert measure_cost(shrink(model, plan)) == plan.cost
    assert difference(backbone, plan, model) <= 1e-5


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "unfused"])
def test_whole_heads_and_branches_can_be_removed(backbone: Tiny, fused: bool) -> None:
    kept: dict[str, Tensor] = {}
    first: set[str] = set()
    for i, layer in enumerate(backbone.layers):
        if layer.kind not in first or i == len(backbone.layers) - 1:  # the first of each kind, and the last of all
            first.add(layer.kind)
            kept[layer.name] = torch.empty(0, dtype=torch.int64)
        elif layer.kind == "attention":  # only the last head stays, without its first dim
            kept[layer.name] = torch.arange(layer.units - layer.units_per_head + 1, layer.units)
    model = with_attention(backbone.model, fused)
    assert difference(backbone, plan_of(backbone, kept), model) <= 1e-5


def test_the_segments_one_after_another_are_the_model(backbone: Tiny) -> None:
    x = backbone.inputs
    for _, step in segments(backbone.model):
        x = step(x)
    assert torch.equal(x, backbone.model(backbone.inputs))
    blocks = [name for name, _ in segments(backbone.model) if ".blocks." in f".{name}"]
    assert [layer.block for layer in backbone.layers] == [name for name in blocks for _ in range(2)]


def test_saved_and_loaded_is_the_same_model(backbone: Tiny, tmp_path: Path) -> None:
    kept = {layer.name: torch.arange(layer.units // 2) for layer in backbone.layers if layer.kind == "ffn"}
    plan = plan_of(backbone, kept)
    small = shrink(backbone.model, plan)
    save_pruned(small, plan, tmp_path)
    assert torch.equal(load_pruned(tmp_path)(backbone.inputs), small(backbone.inputs))


@pytest.mark.parametrize("how", ["one-pass", "sequential"])
def test_all_of_them_can_be_compensated(how: str, backbone: Tiny) -> None:
    """If the output weights of all removed units are 0, nothing has to be compensated."""
    model: Any = copy.deepcopy(backbone.model)
    layer = backbone.layers[-1]
    half = torch.arange(layer.units // 2)
    model.get_submodule(layer.name).fc2.weight[:, layer.units // 2 :] = 0
    options = PruningOptions.model_validate({"criterion": "magnitude", "compensation": how})
    small = cut(pruning_task(model, backbone.inputs, 1.0, options, 4), Selection({layer.name: half}))
    torch.testing.assert_close(small(backbone.inputs), model(backbone.inputs), rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------- the published sizes


@pytest.mark.parametrize(
    ("name", "branches", "params", "macs"),
    [
        ("deit_tiny_patch16_224", 24, 5.7, 1.3),
        pytest.param("vit_small_patch16_224", 24, 22.1, 4.6, marks=pytest.mark.slow),
        pytest.param("deit_base_patch16_224", 24, 86.6, 17.6, marks=pytest.mark.slow),
        ("swin_tiny_patch4_window7_224", 24, 28.3, 4.5),
        pytest.param("swin_small_patch4_window7_224", 48, 49.6, 8.7, marks=pytest.mark.slow),
        pytest.param("swin_base_patch4_window7_224", 48, 87.8, 15.4, marks=pytest.mark.slow),
        ("pit_ti_224", 24, 4.85, 0.7),
    ],
)
def test_the_cost_of_a_backbone_is_as_published(name: str, branches: int, params: float, macs: float) -> None:
    """Parameters (M) and MACs (G) at 224 pixels from the models' papers (Swin-B: 88 M, 15.4 G)."""
    with torch.device("meta"):
        model = build(BackboneSpec(name=name, num_classes=1000))
        assert len(prunable_layers(model)) == branches
        cost = measure_cost(model)
    assert cost.params / 1e6 == pytest.approx(params, abs=0.05)
    assert cost.macs / 1e9 == pytest.approx(macs, abs=0.05)


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("name", "args", "said"),
    [
        ("vit_giant_patch14_dinov2", {"img_size": 28}, r"blocks\.0\.mlp: .*it is a GluMlp, accepted are timm's Att"),
        ("vit_dlittle_patch16_reg1_gap_256", {}, r"blocks\.0\.attn: .*it is a DiffAttention, accepted are timm's Att"),
        ("vit_base_patch16_xp_224", {}, r"blocks\.0: a ParallelScalingBlock has no attention or FFN .*accepted"),
        ("vit_small_patch16_18x2_224", {}, r"blocks\.0: a ParallelThingsBlock has no attention or FFN .*accepted"),
        ("beit3_base_patch16_224", {}, r"blocks\.0\.attn: .*it has norm, accepted is attention without norms or gates"),
        ("vit_tiny_patch16_224", {"qk_norm": True}, r"blocks\.0\.attn: .*it has q_norm, accepted is"),
        ("vit_tiny_patch16_224", {"scale_mlp_norm": True}, r"blocks\.0\.mlp: .*it has norm, accepted is a plain Mlp"),
    ],
)
def test_branches_that_cannot_be_cut_exactly_are_refused(name: str, args: dict[str, Any], said: str) -> None:
    model = build(BackboneSpec(name=name, args=TINY | args, num_classes=CLASSES))
    with pytest.raises(ModelError, match=said):
        prunable_layers(model)


@pytest.mark.parametrize(
    ("name", "args", "kind"),
    [
        ("eva02_tiny_patch14_224", {"depth": 1}, "Eva"),
        ("vit_base_patch16_rope_224", {"depth": 1}, "Eva"),
        ("beit_base_patch16_224", {"depth": 1}, "Beit"),
        ("cait_xxs24_224", {"depth": 1}, "Cait"),
        ("swinv2_tiny_window8_256", {"depths": (1, 1, 1, 1)}, "SwinTransformerV2"),
        ("vit_relpos_small_patch16_224", {"depth": 1}, "VisionTransformerRelPos"),
        ("naflexvit_base_patch16_gap", {"depth": 1}, "NaFlexVit"),
    ],
)
def test_other_families_are_refused(name: str, args: dict[str, Any], kind: str) -> None:
    with (
        torch.device("meta"),
        pytest.raises(ModelError, match=rf"'{name}': is timm's {kind}\b.*; accepted: timm's ViT, DeiT"),
    ):
        build(BackboneSpec(name=name, args=args, num_classes=CLASSES))


def test_an_attention_that_computes_something_else_is_refused() -> None:
    """A subclass has all linear layers of timm's attention, but may use them differently."""

    class Doubled(Attention):
        def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            return 2 * super().forward(x, *args, **kwargs)

    model: Any = build(BackboneSpec(name="vit_tiny_patch16_224", args=TINY, num_classes=CLASSES))
    model.blocks[1].attn.__class__ = Doubled
    with pytest.raises(ModelError, match=r"blocks\.1\.attn: cannot be pruned exactly; it is a Doubled"):
        prunable_layers(model)


def test_branches_with_post_norm_are_pruned_as_well() -> None:
    """timm's post-norm block: x + norm(branch(x))."""
    model = timm.create_model("vit_tiny_patch16_224", num_classes=CLASSES, block_fn=ResPostBlock, **TINY)
    backbone = tiny(BackboneSpec(name="vit_tiny_patch16_224", num_classes=CLASSES), model)
    kept = {layer.name: torch.arange(0, layer.units, 2) for layer in backbone.layers}
    kept[backbone.layers[0].name] = torch.empty(0, dtype=torch.int64)
    assert difference(backbone, plan_of(backbone, kept), model) <= 1e-5
    options = PruningOptions(criterion="magnitude", compensation="one-pass")
    task = pruning_task(model, backbone.inputs, 1.0, options, 4)
    once, plain = cut(task, Selection(kept)), shrink(model, plan_of(backbone, kept))
    layer = backbone.layers[0]
    assert not torch.equal(*(small.get_submodule(f"{layer.name}.proj").bias for small in (once, plain)))
    options = options.model_copy(update={"compensation": "sequential"})
    with pytest.raises(
        ConfigError, match=r"pruning\.compensation = 'sequential': blocks\.0: is a ResPostBlock.*: one-pass, none"
    ):
        pruning_task(model, backbone.inputs, 1.0, options, 4)


# ---------------------------------------------------------------- arguments that are tuples


def test_tuples_are_written_with_slashes() -> None:
    assert parse_args("depths=2/2, num_heads=2/4,img_size=36/60,ratios=0.5/1,embed_dim=24") == {
        "depths": (2, 2),
        "num_heads": (2, 4),
        "img_size": (36, 60),
        "ratios": (0.5, 1),
        "embed_dim": 24,
    }
    assert parse_args("depths=2/") == {"depths": (2,)}
    assert parse_args("norm_layer=a/b,x=/,y=True/2") == {"norm_layer": "a/b", "x": "/", "y": "True/2"}
    assert [type(value) for value in parse_args("depths=2/2")["depths"]] == [int, int]  # type: ignore[union-attr]
    with pytest.raises(ValueError, match=r"'2\)' must have the form key=value \(a tuple: depths=2/2\)"):
        parse_args("depths=(2,2)")


def test_tuples_go_through_options_and_plans() -> None:
    args = "img_size=32,embed_dim=24,depths=2/2,num_heads=2/4,window_size=2"
    name = "swin_tiny_patch4_window7_224"
    config = RunConfig.from_flat({"model.args": args, "model.name": name})
    assert RunConfig.from_flat(config.flat()) == config
    spec = spec_of(config.model, ("a", "b"))
    assert BackboneSpec.model_validate_json(spec.model_dump_json()) == spec
    backbone = tiny(spec)
    assert len(backbone.layers) == 8
    plan = plan_of(backbone, {})
    again = PruningPlan.from_json(plan.model_dump_json())
    assert again == plan
    assert len(prunable_layers(build(again.backbone))) == 8
