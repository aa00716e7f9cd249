"""Export: an exported file computes the same as the model and states its origin; otherwise it is not kept."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from backbones import DEIT, LARGER_SWIN, VIT, VIT_ARGS, Tiny, plan_of, random_kept, tiny
from test_merging import spec_of, task_of
from test_prune import tapfl
from torch import Tensor, nn

from tapfl.adapters.peft_format import merge_peft, save_peft
from tapfl.errors import ConfigError, PlanError, RunError
from tapfl.models.backbone import BackboneSpec, build
from tapfl.pruning import export as module
from tapfl.pruning.export import FORMATS, export, load_exported
from tapfl.pruning.pipeline import prune_model
from tapfl.pruning.plan import PruningPlan
from tapfl.pruning.surgery import save_pruned, shrink


def cut(backbone: Tiny) -> tuple[nn.Module, PruningPlan]:
    """Keeps half of the units; one head of the first attention, nothing of the first FFN and the last attention."""
    kept = random_kept(backbone.layers, 0.5)
    attentions = [layer for layer in backbone.layers if layer.kind == "attention"]
    kept[attentions[0].name] = torch.arange(attentions[0].units_per_head)
    kept[attentions[-1].name] = kept[backbone.layers[1].name] = torch.empty(0, dtype=torch.int64)
    plan = plan_of(backbone, kept)
    return shrink(backbone.model, plan), plan


SPECS = {
    "vit": VIT,
    "deit": DEIT,
    # a block with shifted windows and a second stage
    "swin": LARGER_SWIN.model_copy(update={"args": LARGER_SWIN.args | {"depths": (2, 1)}}),
}
PAIRS = {("deit", "torch-export"), ("swin", "torchscript"), ("swin", "onnx")}


@pytest.mark.parametrize(
    ("family", "format"),
    [
        pytest.param(family, format, marks=[] if (family, format) in PAIRS else pytest.mark.slow)
        for family in SPECS
        for format in FORMATS
    ],
)
def test_an_exported_model_computes_the_same_for_any_batch_and_describes_itself_but_not_the_machine(
    family: str, format: str, tmp_path: Path
) -> None:
    backbone, file = tiny(SPECS[family]), tmp_path / "model"
    model, plan = cut(backbone)
    written = export(model, plan, file, format)
    assert written.max_abs_difference <= 1e-4 and written.top1_equal and written.batches_checked == (1, 3)
    assert written.bytes == file.stat().st_size
    forward = load_exported(file, format)
    for x in (backbone.inputs, backbone.inputs[:1]):
        torch.testing.assert_close(forward(x), model(x), rtol=1e-4, atol=1e-5)
    about = about_of(file, format)
    assert about["backbone"] == backbone.spec.name and about["classes"] == "10" and about["plan"] == plan.checksum
    assert json.loads(about["arguments"]) == json.loads(json.dumps(backbone.spec.args))
    assert json.loads(about["input"]) == list(backbone.inputs.shape[1:])
    assert b"site-packages" not in file.read_bytes()


def about_of(file: Path, format: str) -> dict[str, str]:
    if format == "onnx":
        return {entry.key: entry.value for entry in onnx.load(file).metadata_props}
    kept = {"tapfl.json": ""}
    if format == "torch-export":
        with file.open("rb") as stream:
            torch.export.load(stream, extra_files=kept)
    else:
        torch.jit.load(str(file), _extra_files=kept)
    return json.loads(kept["tapfl.json"])


def test_pooled_tokens_and_a_fixed_batch(tmp_path: Path) -> None:
    spec = BackboneSpec(name=VIT.name, args=VIT_ARGS | {"class_token": False, "global_pool": "avg"}, num_classes=3)
    backbone = tiny(spec)
    model, plan = cut(backbone)
    written = export(model, plan, tmp_path / "fixed.onnx", batch=4, opset=18)
    assert written.batches_checked == (4,)
    found = onnx.load(tmp_path / "fixed.onnx")
    assert [axis.dim_value for axis in found.graph.input[0].type.tensor_type.shape.dim] == [4, 1, 8, 8]
    assert found.opset_import[0].version == 18
    torch.testing.assert_close(
        load_exported(tmp_path / "fixed.onnx")(backbone.inputs), model(backbone.inputs), rtol=1e-4, atol=1e-5
    )


SLOWLY = pytest.param("torch-export", marks=pytest.mark.slow)  # a step of the export to ONNX


@pytest.mark.parametrize("format", [SLOWLY if format == "torch-export" else format for format in FORMATS])
def test_every_format_supports_merging(tmp_path: Path, format: str) -> None:
    """Not with the other tests of merging, because the first export to ONNX of a process takes seconds longer."""
    spec = spec_of("class token", depth=2)
    pruned = prune_model(task_of(build(spec, seed=1).requires_grad_(False)), spec)
    assert all(pruned.plan.tokens)
    written = export(pruned.model, pruned.plan, tmp_path / "small", format)
    assert written.top1_equal and written.batches_checked == (1, 3)


@pytest.mark.parametrize("difference", [1e-3, float("nan")])
def test_an_export_that_differs_is_not_kept(
    difference: float, vit: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, read, packages = FORMATS["torchscript"]

    def off(file: Path) -> Any:
        forward = read(file)
        return lambda x: forward(x) + difference

    monkeypatch.setitem(FORMATS, "torchscript", (write, off, packages))
    with pytest.raises(RunError, match=r"model: the outputs of torchscript differ from the model's"):
        export(*cut(vit), tmp_path / "model", "torchscript")
    assert list(tmp_path.iterdir()) == []


def test_another_top_1_is_a_difference_however_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "example_input", lambda _, batch: torch.zeros(batch, 1))
    tied = torch.tensor([1.0, 1 - 1e-6])

    def constant(logits: Tensor) -> Any:
        return lambda x: logits.expand(len(x), -1)

    difference, same = module._check(constant(tied), constant(tied.flip(0)), (1, 3))
    assert difference < 2e-6 and not same
    assert module._check(constant(tied), constant(tied), (1, 3)) == (0.0, True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"format": "tflite"}, "format = 'tflite': accepted are onnx, torch-export, torchscript"),
        ({"batch": 0}, "batch = 0: must be at least 1"),
        ({"format": "torchscript", "opset": 18}, "opset = 18: is for format onnx"),
        ({"opset": 99}, "opset = 99: accepted are 1 to [0-9]+"),
        ({"opset": 0}, "opset = 0: accepted are 1 to [0-9]+"),
        pytest.param({"opset": 7}, "opset = 7: torch's exporter does not write it", marks=pytest.mark.slow),
    ],
)
def test_invalid_arguments_are_refused(arguments: dict[str, Any], message: str, vit: Tiny, tmp_path: Path) -> None:
    with pytest.raises((ConfigError, RunError), match=message):
        export(*cut(vit), tmp_path / "model", **arguments)
    assert list(tmp_path.iterdir()) == []


def test_an_existing_file_is_not_overwritten(vit: Tiny, tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    with pytest.raises(ConfigError, match=r"mine': exists already"):
        export(*cut(vit), tmp_path / "mine", "torchscript")
    with pytest.raises(ConfigError, match=r"cannot be written"):
        export(*cut(vit), tmp_path / "mine" / "model", "torchscript")
    assert (tmp_path / "mine").read_text() == "mine"


def test_without_its_packages_onnx_names_the_extra(vit: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "find_spec", lambda name: None if name == "onnxscript" else object())
    with pytest.raises(ConfigError, match=r"needs onnxscript, of the extra tapfl\[export\]"):
        export(*cut(vit), tmp_path / "model")
    export(*cut(vit), tmp_path / "model", "torchscript")


def test_from_the_command_line(vit: Tiny, tmp_path: Path) -> None:
    model, plan = cut(vit)
    save_pruned(model, plan, tmp_path / "03" / "pruned")
    said = json.loads(tapfl("export", str(tmp_path / "03"), "--out", str(tmp_path / "m.onnx"), "--json"))
    assert said["bytes"] == (tmp_path / "m.onnx").stat().st_size and said["plan"] == plan.checksum
    assert said["top1_equal"] is True and 0 <= said["max_abs_difference"] <= 1e-4
    assert said["latency_ms"] > 0 and said["latency_ms_torch"] > 0 and said["latency_batch"] == 1
    pruned = str(tmp_path / "03" / "pruned")
    shown = tapfl("export", pruned, "--out", str(tmp_path / "m.pt"), "--format", "torchscript", "--batch", "2")
    assert "torchscript" in shown and "m.pt" in shown
    with pytest.raises(ConfigError, match=r"--personal: there is no .*03/personal; accepted: devices/NN"):
        tapfl("export", str(tmp_path / "03"), "--out", str(tmp_path / "own.pt"), "--personal")
    name, head = "blocks.0.attn.proj", {f"head.{part}": 2 * theta for part, theta in model.head.state_dict().items()}
    width = model.get_submodule(name).in_features
    adapters = {f"{name}.lora_A": torch.ones(2, width), f"{name}.lora_B": torch.ones(32, 2)} | head
    save_peft(adapters, 2.0, tmp_path / "03" / "personal", base="pruned")
    as_script = ("--format", "torchscript", "--personal")
    tapfl("export", str(tmp_path / "03"), "--out", str(tmp_path / "own.pt"), *as_script)
    personal = merge_peft(model, tmp_path / "03" / "personal")
    found = load_exported(tmp_path / "own.pt", "torchscript")(vit.inputs)
    torch.testing.assert_close(found, personal(vit.inputs), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(found, model(vit.inputs), atol=0.1)
    with pytest.raises(ConfigError, match=r"--batch some: accepted: dynamic"):
        tapfl("export", pruned, "--out", str(tmp_path / "n.pt"), "--batch", "some")
    with pytest.raises(PlanError, match=r"plan\.json: cannot be read"):
        tapfl("export", str(tmp_path), "--out", str(tmp_path / "n.pt"))
