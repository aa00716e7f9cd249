"""Layer importance: sharing work between probes and skipping unread tokens changes only the time."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from backbones import CLASSES, DEIT, VIT, VIT_ARGS, Tiny, masked, overflowing, random_kept, tiny, tiny_of_family
from torch import Tensor

from experiments.bench.scores import Sized
from tapfl.compute import AtOnce
from tapfl.errors import ModelError
from tapfl.models.backbone import BackboneSpec
from tapfl.models.forward import tokens_read
from tapfl.models.residual import branch_steps, first_queries
from tapfl.models.units import replaced
from tapfl.pruning.layer_importance import divergences, layer_importance, probes

POOLED = {**VIT_ARGS, "class_token": False, "global_pool": "avg"}
MORE = {
    "plain deit": BackboneSpec(name="deit_tiny_patch16_224", args=DEIT.args, num_classes=CLASSES),
    "pooled": BackboneSpec(name=VIT.name, args=POOLED, num_classes=CLASSES),
    "pooled with a class token": BackboneSpec(
        name=VIT.name, args={**VIT_ARGS, "global_pool": "avg"}, num_classes=CLASSES
    ),
    "layer scale": BackboneSpec(name=VIT.name, args={**VIT_ARGS, "init_values": 0.5}, num_classes=CLASSES),
    "no qkv bias": BackboneSpec(name=VIT.name, args={**VIT_ARGS, "qkv_bias": False}, num_classes=CLASSES),
}
ALL = ["vit", "deit", "swin", *MORE]


@cache
def backbone_of(family: str) -> Tiny:
    return tiny(MORE[family]) if family in MORE else tiny_of_family(family)


def plain_kl(model: torch.nn.Module, inputs: Tensor, backbone: Tiny, kept: dict[str, Tensor]) -> float:
    """Returns the mean KL(dense ‖ probe) from two whole passes with the masked model; float64 from the logits on."""
    dense = model(inputs).double().log_softmax(-1)
    with masked(model, backbone.layers, kept):
        probe = model(inputs).double().log_softmax(-1)
    return float((dense.exp() * (dense - probe)).sum(1).mean())


@pytest.mark.parametrize("family", ALL)
def test_equals_two_whole_passes(family: str) -> None:
    backbone = backbone_of(family)
    kept = random_kept(backbone.layers, 0.5)
    found = layer_importance(backbone.model, backbone.layers, kept, backbone.inputs, batch=3)  # 3, and then 1
    assert list(found) == [layer.name for layer in backbone.layers]
    for layer in backbone.layers:
        expected = plain_kl(backbone.model, backbone.inputs, backbone, {layer.name: kept[layer.name]})
        assert found[layer.name] == pytest.approx(expected, rel=1e-4, abs=1e-7)
        assert expected > 1e-4  # far enough from 0 for a meaningful comparison


def test_a_layer_that_keeps_all_units_has_no_divergence(vit: Tiny) -> None:
    kept = {layer.name: torch.arange(layer.units) for layer in vit.layers}
    kept["blocks.1.mlp"] = torch.arange(7)
    found = layer_importance(vit.model, vit.layers, kept, vit.inputs, batch=4)
    assert found.pop("blocks.1.mlp") > 0
    assert set(found.values()) == {0.0}


def test_the_model_is_not_changed(swin: Tiny) -> None:
    state = {name: tensor.clone() for name, tensor in swin.model.state_dict().items()}
    modules = [id(module) for module in swin.model.modules()]
    layer_importance(swin.model, swin.layers, random_kept(swin.layers, 0.3), swin.inputs, batch=4)
    assert [id(module) for module in swin.model.modules()] == modules
    assert all(torch.equal(tensor, state[name]) for name, tensor in swin.model.state_dict().items())
    assert not swin.model.training


def test_a_prediction_that_is_not_finite_is_refused(vit: Tiny) -> None:
    kept = random_kept(vit.layers, 0.5)
    with pytest.raises(ModelError, match=r"layer importance: .* is not finite; its weights are too large"):
        layer_importance(overflowing(vit.model), vit.layers, kept, vit.inputs, batch=4)


def test_a_failing_probe_restores_the_branch(vit: Tiny) -> None:
    original = vit.model.blocks[0].attn
    place = replaced(vit.model, "blocks.0.attn", torch.nn.Flatten(99))
    with pytest.raises(TypeError), place:
        vit.model(vit.inputs)
    assert vit.model.blocks[0].attn is original


@pytest.mark.parametrize("family", ALL)
def test_the_steps_of_the_branches_make_the_model(family: str) -> None:
    backbone = backbone_of(family)
    steps = branch_steps(backbone.model)
    assert {layer.name for layer in backbone.layers} <= {name for name, _ in steps}
    x, last = backbone.inputs, backbone.layers[-1].name
    for name, step in steps:
        x = step(x)
        if name == last:
            read = tokens_read(backbone.model)
            assert x.shape[1] == (read if read is not None else backbone.layers[-1].tokens) or family == "swin"
    torch.testing.assert_close(x, backbone.model(backbone.inputs), rtol=1e-4, atol=1e-5)


def test_the_head_reads_the_class_token_and_that_of_distillation() -> None:
    found = {family: tokens_read(backbone_of(family).model) for family in ALL}
    assert found["vit"] == found["plain deit"] == 1 and found["deit"] == 2
    assert found["pooled"] is found["pooled with a class token"] is found["swin"] is None


@pytest.mark.parametrize("family", ["deit", "no qkv bias"])
@pytest.mark.parametrize("share", [1.0, 0.5])
def test_few_queries_attend_as_all_queries_do(family: str, share: float) -> None:
    backbone = backbone_of(family)
    layer = next(layer for layer in backbone.layers if layer.kind == "attention")
    kept = random_kept([layer], share)[layer.name]
    attention = layer.shrink(backbone.model.get_submodule(layer.name), kept)
    x = torch.randn(3, layer.tokens, layer.embed_dim, generator=torch.Generator().manual_seed(5))
    torch.testing.assert_close(first_queries(attention, x, 2), attention(x)[:, :2], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["vit", "deit", "pooled", "swin"])
def test_a_branch_without_units_is_probed_as_its_bias(family: str) -> None:
    backbone = backbone_of(family)
    none = {layer.name: torch.arange(0) for layer in backbone.layers}
    found = layer_importance(backbone.model, backbone.layers, none, backbone.inputs, batch=4)
    for layer in backbone.layers:
        expected = plain_kl(backbone.model, backbone.inputs, backbone, {layer.name: none[layer.name]})
        assert found[layer.name] == pytest.approx(expected, rel=1e-4, abs=1e-7)


@pytest.mark.parametrize("family", ["vit", "swin"])
def test_a_sample_diverges_as_it_does_alone(family: str) -> None:
    backbone = backbone_of(family)
    kept = random_kept(backbone.layers, 0.5)
    variants = probes(backbone.model, backbone.layers, kept)
    together = divergences(backbone.model, backbone.layers, variants, backbone.inputs, batch=4)
    assert together.shape == (len(backbone.layers), 4) and together.dtype == torch.float64
    for image in range(4):
        part = backbone.inputs[image : image + 1]
        alone = divergences(backbone.model, backbone.layers, variants, part, batch=4)
        torch.testing.assert_close(together[:, image], alone[:, 0], rtol=1e-4, atol=1e-7)


def test_the_size_of_a_joint_pass_is_bounded(vit: Tiny) -> None:
    kept = random_kept(vit.layers, 0.5)
    expected = layer_importance(vit.model, vit.layers, kept, vit.inputs, batch=4)
    sizes: list[int] = []
    compute = Sized(at_once=AtOnce(stream=3 * vit.layers[0].tokens * vit.layers[0].embed_dim))
    handle = vit.model.patch_embed.register_forward_pre_hook(lambda _m, inputs: sizes.append(len(inputs[0])))
    try:
        found = layer_importance(vit.model, vit.layers, kept, vit.inputs, batch=4, compute=compute)
    finally:
        handle.remove()
    assert sizes == [3, 1]
    assert found == pytest.approx(expected, rel=1e-4)
