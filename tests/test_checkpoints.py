"""Checkpoint formats: every layout gives the same model, and files that are not weights are refused with one line."""

from __future__ import annotations

import json
import pickle
import re
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from backbones import DEIT, SWIN, VIT_ARGS
from timm.models import save_for_hf
from torch import Tensor, nn

from tapfl.config import ModelOptions
from tapfl.errors import ModelError
from tapfl.models.backbone import BackboneSpec, build, outline, spec_of
from tapfl.models.checkpoints import of_hub, read_checkpoint
from tapfl.models.prunable import prunable_layers
from tapfl.models.weights import load_weights
from tapfl.store import write_tensors

NAMES = tuple("abcde")
State = dict[str, Tensor]
VIT = BackboneSpec(name="vit_tiny_patch16_224", args=VIT_ARGS, num_classes=5)
DINO = BackboneSpec(
    name="vit_small_patch14_reg4_dinov2",
    args={"img_size": 28, "embed_dim": 32, "depth": 2, "num_heads": 2, "init_values": 0.5},
    num_classes=5,
)
DEIT3 = BackboneSpec(
    name="deit3_small_patch16_224",
    args={"img_size": 32, "embed_dim": 32, "depth": 2, "num_heads": 2, "init_values": 0.5},
    num_classes=5,
)


def as_dinov2(state: State) -> State:
    """Weights as in Meta's checkpoints of DINOv2 with registers: no head, a separate position of the class token."""
    state = {name: value for name, value in state.items() if not name.startswith("head")}
    state["register_tokens"] = state.pop("reg_token")
    state["mask_token"] = torch.zeros(1, 32)
    place = torch.full((1, 1, 32), 0.25)
    state["cls_token"] = state["cls_token"] - place
    state["pos_embed"] = torch.cat([place, state["pos_embed"]], 1)
    return state


def as_deit3(state: State) -> State:
    return {re.sub(r"ls(\d)\.gamma", r"gamma_\1", name): value for name, value in state.items()}


def averaged(state: State) -> dict[str, Any]:
    """A training checkpoint, of which the moving average is to be loaded."""
    other = {name: torch.zeros_like(value) for name, value in state.items()}
    return {"epoch": 3, "args": Namespace(lr=0.1), "optimizer": {"step": 1}, "model": other, "model_ema": state}


LAYOUTS: dict[str, tuple[BackboneSpec, Callable[[State], Any]]] = {
    "plain": (VIT, lambda state: state),
    "DeiT": (DEIT, lambda state: {"model": state}),
    "DeiT III": (DEIT3, lambda state: {"model": as_deit3(state)}),
    "DINOv2 with registers": (DINO, as_dinov2),
    "timm's training": (VIT, lambda state: {"epoch": 1, "arch": "vit", "state_dict": state}),
    "moving average": (VIT, averaged),
    "data-parallel": (VIT, lambda state: {"model": {f"module.{name}": value for name, value in state.items()}}),
    "compiled": (VIT, lambda state: {f"module._orig_mod.{name}": value for name, value in state.items()}),
    "half precision": (VIT, lambda state: {name: value.half() for name, value in state.items()}),
}


def trained(spec: BackboneSpec) -> nn.Module:
    """A model in which every weight has an effect."""
    generator = torch.Generator().manual_seed(3)
    model = build(spec, seed=1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


def test_the_head_of_swin_s_own_layout_is_found(tmp_path: Path) -> None:
    """Its downsampling is at the end of a stage, and its head is not in a module of its own."""
    file = tmp_path / "swin.pth"
    wanted = trained(SWIN.model_copy(update={"num_classes": 5}))
    state = {
        name.replace("layers.1.downsample", "layers.0.downsample").replace("head.fc.", "head."): value
        for name, value in wanted.state_dict().items()
    }
    torch.save(state, file)
    model: Any = build(SWIN.model_copy(update={"num_classes": 5}))
    assert load_weights(model, file, NAMES, None, needs_head=True) == []
    assert torch.equal(model.head.fc.weight, wanted.get_parameter("head.fc.weight"))
    model = build(SWIN.model_copy(update={"num_classes": 3}))
    (note,) = load_weights(model, file, NAMES[:3], None)
    assert "head.fc.weight is 5×48; a new one of 3×48 is trained" in note
    rows = tmp_path / "rows.json"
    rows.write_text(json.dumps({"a": 4, "b": 0, "c": 2}))
    load_weights(model, file, NAMES[:3], rows, needs_head=True)
    assert torch.equal(model.head.fc.weight, wanted.get_parameter("head.fc.weight")[[4, 0, 2]])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("ending", [".pth", ".bin", ".pt"])
def test_each_layout_gives_the_model_that_was_saved(layout: str, ending: str, tmp_path: Path) -> None:
    spec, written = LAYOUTS[layout]
    wanted, model = trained(spec), build(spec)
    torch.save(written(wanted.state_dict()), tmp_path / f"weights{ending}")
    assert load_weights(model, tmp_path / f"weights{ending}", NAMES, None) == []
    for (name, own), theirs in zip(model.state_dict().items(), wanted.state_dict().values(), strict=True):
        if not (layout.startswith("DINO") and name.startswith("head")):
            torch.testing.assert_close(own, theirs, rtol=0, atol=1e-3 if layout == "half precision" else 1e-6)
    assert prunable_layers(model)


def test_safetensors_of_a_parallel_model_lose_their_prefix(tmp_path: Path) -> None:
    state = trained(VIT).state_dict()
    write_tensors(tmp_path / "w.safetensors", {f"module.{name}": value for name, value in state.items()})
    assert read_checkpoint(tmp_path / "w.safetensors").keys() == state.keys()


def test_a_head_of_another_size_is_reported_and_left_out(tmp_path: Path) -> None:
    torch.save(trained(VIT).state_dict(), tmp_path / "w.pth")
    model = build(VIT.model_copy(update={"num_classes": 3}))
    (note,) = load_weights(model, tmp_path / "w.pth", NAMES[:3], None)
    assert note.endswith("w.pth': head.weight is 5×32; a new one of 3×32 is trained")
    with pytest.raises(ModelError, match=r"w\.pth': has no head\.weight for 3 classes; model\.head-rows names"):
        load_weights(model, tmp_path / "w.pth", NAMES[:3], None, needs_head=True)


class Malicious:
    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.file,)


@pytest.mark.parametrize("old", [False, True], ids=["zip", "before torch 1.6"])
def test_a_pickle_that_would_run_code_is_refused_and_does_not_run(old: bool, tmp_path: Path) -> None:
    file, made = tmp_path / "bad.pth", tmp_path / "made"
    torch.save({"model": Malicious(made)}, file, _use_new_zipfile_serialization=not old)
    with pytest.raises(ModelError, match=r"bad\.pth': holds objects other than tensors \(.*\); accepted") as r:
        load_weights(build(VIT), file, NAMES, None)
    assert not made.exists() and "\n" not in str(r.value)
    assert old or "Path" in str(r.value)


def test_a_whole_pickled_model_is_refused(tmp_path: Path) -> None:
    torch.save(nn.Linear(2, 2), tmp_path / "model.pth")
    with pytest.raises(
        ModelError, match=r"other than tensors \(torch\.nn\.modules\.linear\.Linear\); accepted: tensors"
    ):
        load_weights(build(VIT), tmp_path / "model.pth", NAMES, None)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.pth", b"", "is not a complete file of torch.save"),
        ("a.pth", b"no zip and no pickle", "is not a complete file of torch.save|holds objects"),
        ("a.bin", pickle.dumps({"a": 1}), "holds a int under 'a'|is not a complete file|holds objects"),
        ("a.safetensors", b"half", "is not a complete safetensors file .*; accepted: a .safetensors file, a file of"),
        ("a.onnx", b"x", "has an unknown suffix; accepted: a .safetensors file, a file of torch.save"),
        ("none.pth", None, "there is no such file; accepted: a .safetensors file, a file of torch.save"),
    ],
)
def test_an_invalid_file_is_refused(name: str, content: bytes | None, message: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ModelError, match=f"{re.escape(name)}': .*({message})") as refused:
        load_weights(build(VIT), tmp_path / name, NAMES, None)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "is not a complete file of torch.save"),
        ({"encoder": {"a": torch.ones(1)}}, "holds a dict under 'encoder'; accepted: tensors by name"),
        ({"model": {"a": 3}}, "holds a int under 'a'"),
        ({3: torch.ones(1)}, "holds a Tensor under 3|is not a complete"),
        ({}, "do not fit the backbone: '.*' is missing; accepted: timm's names"),
    ],
)
def test_a_checkpoint_without_weights_is_refused(content: Any, message: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(ModelError, match=message):
        load_weights(build(VIT), tmp_path / "w.pth", NAMES, None)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("eva02_tiny_patch14_224", "is timm's Eva, whose rotary position embeddings rotate pairs of a head's dims"),
        ("beit_base_patch16_224", "is timm's Beit, whose blocks have relative position biases"),
        ("vit_giant_patch14_dinov2", "blocks.0.mlp: cannot be pruned exactly; it is a GluMlp"),
        ("vit_medium_patch16_rope_reg1_gap_256", "is timm's Eva"),
    ],
)
def test_a_model_that_cannot_be_pruned_exactly_is_refused_with_the_reason(name: str, reason: str) -> None:
    small = BackboneSpec(name=name, args={"depth": 1}, num_classes=5)
    with pytest.raises(ModelError, match=re.escape(reason)):
        prunable_layers(outline(small))


# ---------------------------------------------------------------- repositories of timm's hub


def a_copy(folder: Path, weights: str = "model.safetensors", **config: Any) -> ModelOptions:
    """Writes a local copy of a repository by timm's `save_for_hf`."""
    preprocessing = {"input_size": [1, 8, 8], "fixed_input_size": True, "mean": [0.4], "std": [0.2], "crop_pct": 0.875}
    about = {"pretrained_cfg": preprocessing}
    save_for_hf(trained(VIT), folder, model_config=about, safe_serialization=weights.endswith(".safetensors"))
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(content | config))
    return ModelOptions(name=f"local-dir:{folder}", args="", weights="hub", mean=(), crop_pct=0.0)


@pytest.mark.parametrize("weights", ["model.safetensors", "pytorch_model.bin"])
def test_a_copy_of_a_repository_gives_its_model(weights: str, tmp_path: Path) -> None:
    found = of_hub(a_copy(tmp_path / "copy", weights))
    assert (found.name, found.weights) == (VIT.name, str(tmp_path / "copy" / weights))
    assert (found.mean, found.std, found.crop_pct, found.interpolation) == ((0.4,), (0.2,), 0.875, "bicubic")
    model = build(spec_of(found, NAMES))
    load_weights(model, Path(found.weights), NAMES, None)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), trained(VIT).parameters(), strict=True))
    assert of_hub(found) is found


def test_options_override_what_a_repository_says(tmp_path: Path) -> None:
    given = a_copy(tmp_path / "copy").model_copy(update={"args": "img_size=16", "mean": (0.1,), "weights": ""})
    found = of_hub(given)
    assert spec_of(found, NAMES).args["img_size"] == 16 and found.mean == (0.1,) and not found.weights


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "vit", "architecture": None}, r"config\.json: .*name"),
        ({"model_args": {"norm_layer": {"a": 1}}}, r"its config\.json gives norm_layer the value"),
        ({"pretrained_cfg": {"crop_pct": 7}}, r"its config\.json: crop-pct = 7: "),
    ],
)
def test_an_unusable_config_is_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=message):
        of_hub(a_copy(tmp_path / "copy", **change))


def test_a_missing_repository_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ModelOptions(name=f"local-dir:{tmp_path}", args="", weights="hub")
    with pytest.raises(ModelError, match=r"has no config\.json that timm wrote \(FileNotFoundError"):
        of_hub(options)
    copy = a_copy(tmp_path / "copy")
    (tmp_path / "copy" / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"local-dir:.* has none of model\.safetensors, pytorch_model\.bin that can"):
        of_hub(copy)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # it reads the environment when imported
    with pytest.raises(ModelError, match=r"'hf-hub:timm/no_such': has no config\.json that timm wrote \(.*; accepted"):
        of_hub(options.model_copy(update={"name": "hf-hub:timm/no_such"}))


def test_a_repository_in_a_message_is_not_looked_up() -> None:
    with pytest.raises(
        ModelError, match=r"'hf-hub:someone/model': only the command `tapfl` resolves repositories; accepted here"
    ):
        build(BackboneSpec(name="hf-hub:someone/model", num_classes=2))


def test_a_repository_s_files_are_fetched_by_its_revision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy, asked = a_copy(tmp_path / "copy"), []

    def fetch(repository: str, file: str, revision: str | None) -> str:
        asked.append((repository, file, revision))
        return str(tmp_path / "copy" / file)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", fetch)
    found = of_hub(copy.model_copy(update={"name": "hf-hub:someone/model@v2"}))
    assert found.weights == str(tmp_path / "copy" / "model.safetensors")
    assert asked == [("someone/model", "config.json", "v2"), ("someone/model", "model.safetensors", "v2")]
