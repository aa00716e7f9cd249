"""A saved personal model is an ordinary peft adapter that stock peft loads onto the pruned backbone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from backbones import Tiny, plan_of, random_kept

from tapfl.adapters.layout import Layout, device_layout, gather_all, global_shapes
from tapfl.adapters.lora import AdaptedModel, interpolate
from tapfl.adapters.peft_format import CONFIG_FILE, WEIGHTS_FILE, merge_peft, save_peft
from tapfl.errors import PlanError
from tapfl.personalize.label_prior import with_prior
from tapfl.pruning.plan import PruningPlan
from tapfl.pruning.surgery import load_pruned, save_pruned, shrink
from tapfl.store import read_tensors
from tapfl.training import Params

RANK, SCALE = 2, 1.7
NOBODY = torch.empty(0, dtype=torch.int64)


def device(backbone: Tiny) -> tuple[PruningPlan, Layout]:
    """A device with half of the units, without its first FFN."""
    gone = next(layer.name for layer in backbone.layers if layer.kind == "ffn")
    plan = plan_of(backbone, random_kept(backbone.layers, 0.5) | {gone: NOBODY})
    return plan, device_layout(global_shapes(backbone.model, backbone.layers, RANK), backbone.layers, plan, RANK)


def personal(backbone: Tiny, layout: Layout, seed: int = 0) -> Params:
    """An interpolation of two adapters, with twice their rank, and its head."""
    generator = torch.Generator().manual_seed(seed)
    shapes = global_shapes(backbone.model, backbone.layers, RANK)
    v, w = (
        gather_all({name: 0.3 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}, layout)
        for _ in range(2)
    )
    return interpolate(v, w, 0.3)


@pytest.mark.parametrize("family", ["vit", "deit", "swin"])
def test_stock_peft_loads_the_personal_model(family: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    from peft import PeftModel

    backbone: Tiny = request.getfixturevalue(family)
    plan, layout = device(backbone)
    small = shrink(backbone.model, plan)
    save_pruned(small, plan, tmp_path / "pruned")
    params, prior = personal(backbone, layout), torch.linspace(-3, 0, 10)
    save_peft(with_prior(params, prior), SCALE, tmp_path / "personal", base=str(tmp_path / "pruned"))
    # peft replaces modules of its model, so it gets its own copy
    loaded = PeftModel.from_pretrained(load_pruned(tmp_path / "pruned"), str(tmp_path / "personal")).eval()
    with torch.no_grad():
        got = loaded(backbone.inputs)
        want = AdaptedModel(small, layout, SCALE)(params, backbone.inputs) + prior
        bare = small(backbone.inputs)
        merged = merge_peft(small, tmp_path / "personal")(backbone.inputs)
        assert torch.equal(small(backbone.inputs), bare), "only a copy is changed"
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(merged, want, rtol=1e-5, atol=1e-5)
    assert (want - bare).abs().max() > 0.1


@pytest.mark.parametrize("damage", ["missing", "r = 0", "no JSON", "another head", "a plan without this layer"])
def test_adapters_that_do_not_fit_are_not_merged(damage: str, vit: Tiny, tmp_path: Path) -> None:
    plan, layout = device(vit)
    params = personal(vit, layout) | ({"head.bias": torch.zeros(3)} if damage == "another head" else {})
    save_peft(params, SCALE, tmp_path, base="pruned")
    config = tmp_path / CONFIG_FILE
    if damage == "missing":
        config.unlink()
    elif damage in ("r = 0", "no JSON"):
        config.write_text(config.read_text().replace('"r": 4', '"r": 0') if damage == "r = 0" else "{")
    gone = dict.fromkeys((layer.name for layer in vit.layers), NOBODY)
    small = shrink(vit.model, plan_of(vit, gone) if damage.startswith("a plan") else plan)
    with pytest.raises(PlanError, match="is not an adapter of this pruned model"):
        merge_peft(small, tmp_path)


def test_the_configuration_has_what_peft_needs(vit: Tiny, tmp_path: Path) -> None:
    _, layout = device(vit)
    save_peft(personal(vit, layout), SCALE, tmp_path, base="pruned")
    config = json.loads((tmp_path / CONFIG_FILE).read_text())
    assert config["peft_type"] == "LORA" and config["inference_mode"] is True
    assert config["r"] == 2 * RANK  # the interpolation of two adapters has twice the rank
    assert config["lora_alpha"] / config["r"] == pytest.approx(SCALE)
    assert config["base_model_name_or_path"] == "pruned"
    assert config["modules_to_save"] == ["head"]
    assert len(config["target_modules"]) == 6  # four linear layers per block, without the two of the removed FFN
    tensors = read_tensors(tmp_path / WEIGHTS_FILE)
    assert tensors["base_model.model.blocks.1.attn.qkv.lora_A.weight"].shape == (2 * RANK, 32)
    assert tensors["base_model.model.head.bias"].shape == (10,)
    assert len(tensors) == 2 * 6 + 2


def test_same_content_gives_the_same_bytes(vit: Tiny, tmp_path: Path) -> None:
    _, layout = device(vit)
    params = personal(vit, layout)
    for folder, content in (("one", params), ("two", dict(reversed(params.items())))):
        save_peft(content, SCALE, tmp_path / folder, base="pruned")
        save_peft(content, SCALE, tmp_path / folder, base="pruned")  # overwrites the existing file
    files = [{f.name: f.read_bytes() for f in (tmp_path / folder).iterdir()} for folder in ("one", "two")]
    assert files[0] == files[1]
    assert {CONFIG_FILE, WEIGHTS_FILE} == set(files[0])
    # peft keeps these names in a set, whose order differs between processes
    names = json.loads(files[0][CONFIG_FILE])["target_modules"]
    assert names == sorted(names)
