"""Layer importance: resuming from the cached prefix changes nothing but the time."""

from __future__ import annotations

import pytest
import torch
from backbones import Tiny, masked, random_kept
from torch import Tensor

from tapfl.models.units import replaced
from tapfl.pruning.layer_importance import layer_importance


def plain_kl(model: torch.nn.Module, inputs: Tensor, backbone: Tiny, kept: dict[str, Tensor]) -> float:
    """Mean KL(dense ‖ probe) from two whole passes, the probe being the masked model; float64 from the logits on."""
    dense = model(inputs).double().log_softmax(-1)
    with masked(model, backbone.layers, kept):
        probe = model(inputs).double().log_softmax(-1)
    return float((dense.exp() * (dense - probe)).sum(1).mean())


@pytest.mark.parametrize("family", ["vit", "deit", "swin"])
def test_equals_two_whole_passes(family: str, families: dict[str, Tiny]) -> None:
    backbone = families[family]
    kept = random_kept(backbone.layers, 0.5)
    found = layer_importance(backbone.model, backbone.layers, kept, backbone.inputs, batch=3)  # 3 and a rest of 1
    assert list(found) == [layer.name for layer in backbone.layers]
    for layer in backbone.layers:
        expected = plain_kl(backbone.model, backbone.inputs, backbone, {layer.name: kept[layer.name]})
        assert found[layer.name] == pytest.approx(expected, rel=1e-4, abs=1e-7)
        assert expected > 1e-4  # far enough from 0 for the comparison to mean something


def test_a_layer_that_keeps_all_has_no_divergence(vit: Tiny) -> None:
    kept = {layer.name: torch.arange(layer.units) for layer in vit.layers}
    kept["blocks.1.mlp"] = torch.arange(7)
    found = layer_importance(vit.model, vit.layers, kept, vit.inputs, batch=4)
    assert found.pop("blocks.1.mlp") > 0
    assert set(found.values()) == {0.0}


def test_the_model_is_left_as_it_was(swin: Tiny) -> None:
    state = {name: tensor.clone() for name, tensor in swin.model.state_dict().items()}
    modules = [id(module) for module in swin.model.modules()]
    layer_importance(swin.model, swin.layers, random_kept(swin.layers, 0.3), swin.inputs, batch=4)
    assert [id(module) for module in swin.model.modules()] == modules
    assert all(torch.equal(tensor, state[name]) for name, tensor in swin.model.state_dict().items())
    assert not swin.model.training


def test_a_probe_that_fails_puts_the_branch_back(vit: Tiny) -> None:
    original = vit.model.blocks[0].attn
    place = replaced(vit.model, "blocks.0.attn", torch.nn.Flatten(99))
    with pytest.raises(TypeError), place:
        vit.model(vit.inputs)
    assert vit.model.blocks[0].attn is original
