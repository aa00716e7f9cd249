"""Backbones: which ones are accepted, which weights fit, and the cache of trained dense backbones."""

from __future__ import annotations

import json
import resource
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import timm
import torch
from backbones import CLASSES, DEIT, SWIN, VIT, VIT_ARGS, scramble

from tapfl.arguments import parse_args
from tapfl.config import ModelOptions
from tapfl.data.images import ArrayImages, ImageSet
from tapfl.errors import ModelError
from tapfl.models import dense
from tapfl.models.backbone import BackboneSpec, build, outline
from tapfl.models.dense import DenseCache, dense_backbone, dense_key
from tapfl.models.forward import example_input, head_names, image_features, transform_of
from tapfl.models.weights import load_hub_weights, load_weights, read_head_rows
from tapfl.progress import shown_on
from tapfl.store import read_tensors, write_tensors
from tapfl.training import accuracy, predict

NAMES = tuple("abcdefghij")
ARGS = "img_size=8,patch_size=4,in_chans=1,embed_dim=16,depth=1,num_heads=2"


def spec(**changes: object) -> BackboneSpec:
    return VIT.model_copy(update=changes)


# ---------------------------------------------------------------- building


def test_arguments_are_read_with_their_types() -> None:
    assert parse_args("img_size=8, class_token=False,global_pool=avg,drop_rate=0.5,") == {
        "img_size": 8,
        "class_token": False,
        "global_pool": "avg",
        "drop_rate": 0.5,
    }
    assert parse_args("class_token = True") == {"class_token": True}
    assert parse_args("") == {}
    with pytest.raises(ValueError, match=r"^'depth': 'depth' must have the form key=value"):
        parse_args("depth")


def test_an_unknown_model_is_refused_with_similar_names() -> None:
    with pytest.raises(ModelError, match=r"'vit_teeny_patch16': timm has no such model; similar: .*vit_tiny_patch16"):
        build(spec(name="vit_teeny_patch16"))


@pytest.mark.parametrize("args", [{"num_heads": 5}, {"num_heads": 0}, {"patch_size": 0}, {"embed_dim": -4}])
def test_arguments_that_timm_does_not_take_are_refused(args: dict) -> None:
    with pytest.raises(ModelError, match=r"model\.args = .*: timm cannot build vit_tiny_patch16_224 with them"):
        build(spec(args=VIT_ARGS | args))


@pytest.mark.parametrize(
    ("name", "args", "message"),
    [
        pytest.param(
            *("vit_tiny_patch16_224", {"depth": 60000}, "more than 16384 parameter tensors"), marks=pytest.mark.slow
        ),
        ("vit_tiny_patch16_224", {"embed_dim": 60000, "num_heads": 4}, "more than 2147483648 parameters"),
        ("vit_tiny_patch16_224", {"img_size": 65536, "patch_size": 1}, "more than 2147483648 parameters"),
        ("swin_tiny_patch4_window7_224", {"img_size": 32768}, r"needs .* elements for its masks"),
    ],
)
def test_a_model_too_large_for_memory_is_refused_before_it_is_built(name: str, args: dict, message: str) -> None:
    """A server tells a device what to build, and a plan may come from an untrusted source."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ModelError, match=message):
        build(BackboneSpec(name=name, args=args, num_classes=3))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**18  # KiB: 256 MiB


def test_a_model_of_too_many_tensors_is_refused_before_it_is_built() -> None:
    with pytest.raises(ModelError, match="more than 200 parameter tensors"):
        outline(spec(args=VIT_ARGS | {"depth": 60000}), 200)


@pytest.mark.parametrize("name", ["resnet18", "mixer_s32_224"])
def test_a_model_that_is_not_a_vit_is_refused(name: str) -> None:
    with pytest.raises(ModelError, match=f"model.name = '{name}': is timm's .*; accepted: timm's ViT, DeiT"):
        build(BackboneSpec(name=name, num_classes=2))


@pytest.mark.parametrize(
    ("which", "heads", "size", "channels"),
    [(VIT, ("head",), (8, 8), 1), (DEIT, ("head", "head_dist"), (32, 32), 3), (SWIN, ("head.fc",), (32, 32), 3)],
)
def test_a_backbone_knows_its_input_heads_and_features(
    which: BackboneSpec, heads: tuple[str, ...], size: tuple[int, int], channels: int
) -> None:
    model = build(which)
    transform = transform_of(model)
    assert not model.training
    assert head_names(model) == heads
    assert (transform.size, transform.channels, len(transform.mean)) == (size, channels, channels)
    pooled = image_features(model, [torch.zeros(2, channels, *size)])
    assert pooled.shape == (2, model.num_features)


# ---------------------------------------------------------------- weights from a file


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("weights") / "vit.safetensors"
    write_tensors(file, scramble(build(VIT)).state_dict())
    return file


def test_weights_that_fit_are_taken_whole(weights: Path) -> None:
    model = build(VIT)
    load_weights(model, weights, NAMES, None)
    state = read_tensors(weights)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("args", "name"),
    [
        ({"embed_dim": 16}, "cls_token|pos_embed|patch_embed|norm|blocks"),
        ({"depth": 3}, r"blocks\.2"),
        ({"depth": 1}, r"blocks\.1"),
    ],
)
def test_weights_of_another_backbone_are_refused_by_name(args: dict, name: str, weights: Path) -> None:
    with pytest.raises(ModelError, match=rf"model\.weights = '.*vit\.safetensors': do not fit.*({name})"):
        load_weights(build(spec(args=VIT_ARGS | args)), weights, NAMES, None)


def test_weights_of_another_family_are_refused(weights: Path) -> None:
    with pytest.raises(ModelError, match=r"model\.weights = .*do not fit"):
        load_weights(build(SWIN), weights, NAMES, None)


def test_a_head_of_other_classes_stays_as_initialised(weights: Path) -> None:
    model = build(spec(num_classes=3))
    before = model.head.weight.clone()
    load_weights(model, weights, NAMES[:3], None)
    assert torch.equal(model.head.weight, before)
    assert torch.equal(model.blocks[0].mlp.fc1.weight, read_tensors(weights)["blocks.0.mlp.fc1.weight"])


def test_position_embeddings_are_resampled(weights: Path) -> None:
    model = build(spec(args=VIT_ARGS | {"img_size": 12}))
    load_weights(model, weights, NAMES, None)
    assert model.pos_embed.shape == (1, 37, 32)
    assert torch.equal(model.pos_embed[:, 0], read_tensors(weights)["pos_embed"][:, 0])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_weights_of_any_precision_become_float32(dtype: torch.dtype, weights: Path, tmp_path: Path) -> None:
    state = {name: tensor.to(dtype) for name, tensor in read_tensors(weights).items()}
    write_tensors(tmp_path / "other.safetensors", state)
    model = build(VIT)
    load_weights(model, tmp_path / "other.safetensors", NAMES, None)
    assert all(torch.equal(tensor, state[name].float()) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.bool, torch.complex64])
def test_weights_of_another_type_are_refused(dtype: torch.dtype, weights: Path, tmp_path: Path) -> None:
    """Quantised weights are meaningless without their scales; torch would read -3 as -3.0."""
    state = read_tensors(weights)
    state["blocks.1.mlp.fc1.weight"] = state["blocks.1.mlp.fc1.weight"].to(dtype)
    write_tensors(tmp_path / "other.safetensors", state)
    with pytest.raises(
        ModelError, match=r"other\.safetensors': blocks\.1\.mlp\.fc1\.weight is of type .*accepted: float"
    ):
        load_weights(build(VIT), tmp_path / "other.safetensors", NAMES, None)


@pytest.mark.parametrize("value", [float("nan"), float("-inf"), 1e39])
@pytest.mark.parametrize("key", ["blocks.1.mlp.fc1.weight", "head.bias"])
def test_weights_that_are_not_finite_are_refused(value: float, key: str, weights: Path, tmp_path: Path) -> None:
    state = read_tensors(weights)
    state[key] = state[key].double()
    state[key].view(-1)[3] = value
    write_tensors(tmp_path / "other.safetensors", state)
    with pytest.raises(ModelError, match=rf"other\.safetensors': {key} holds values that are not finite"):
        load_weights(build(VIT), tmp_path / "other.safetensors", NAMES, None)


@pytest.mark.parametrize(("key", "shape"), [("pos_embed", (1, 0, 32)), ("pos_embed", ()), ("cls_token", ())])
def test_weights_of_odd_shapes_are_refused(key: str, shape: tuple[int, ...], weights: Path, tmp_path: Path) -> None:
    write_tensors(tmp_path / "other.safetensors", read_tensors(weights) | {key: torch.zeros(shape)})
    with pytest.raises(ModelError, match=r"other\.safetensors': do not fit VisionTransformer"):
        load_weights(build(VIT), tmp_path / "other.safetensors", NAMES, None)


def rows_file(folder: Path, table: object) -> Path:
    file = folder / "rows.json"
    file.write_text(json.dumps(table))
    return file


def test_rows_of_the_head_are_picked_by_class_name(weights: Path, tmp_path: Path) -> None:
    model = build(spec(num_classes=3))
    rows = rows_file(tmp_path, {"dog": 7, "cat": 2, "ant": 0, "unused": 5})
    load_weights(model, weights, ("ant", "cat", "dog"), rows)
    state = read_tensors(weights)
    assert torch.equal(model.head.weight, state["head.weight"][[0, 2, 7]])
    assert torch.equal(model.head.bias, state["head.bias"][[0, 2, 7]])


def test_both_heads_of_a_distilled_deit_are_picked(tmp_path: Path) -> None:
    file = tmp_path / "deit.safetensors"
    write_tensors(file, scramble(build(DEIT)).state_dict())
    model = build(DEIT.model_copy(update={"num_classes": 2}))
    load_weights(model, file, ("x", "y"), rows_file(tmp_path, {"x": 9, "y": 4}))
    state = read_tensors(file)
    assert torch.equal(model.head.weight, state["head.weight"][[9, 4]])
    assert torch.equal(model.head_dist.bias, state["head_dist.bias"][[9, 4]])


def test_a_row_that_the_head_does_not_have_is_refused(weights: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"row 10 is not in head\.weight of vit\.safetensors"):
        load_weights(build(spec(num_classes=2)), weights, ("x", "y"), rows_file(tmp_path, {"x": 10, "y": 4}))


@pytest.mark.parametrize("row", [None, "3", 3.0, -1, True])
def test_a_class_without_a_row_is_refused(row: object, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"model\.head-rows = .*rows\.json.*: has no row for class 'y'"):
        read_head_rows(rows_file(tmp_path, {"x": 1, "y": row}), ("x", "y"))


def test_two_classes_with_the_same_row_are_refused(tmp_path: Path) -> None:
    """The second class could never be predicted."""
    with pytest.raises(ModelError, match=r"row 4 is given to 'x' and 'z'; accepted: a different row for each"):
        read_head_rows(rows_file(tmp_path, {"x": 4, "y": 1, "z": 4}), ("x", "y", "z"))


def test_a_duplicate_class_is_refused(tmp_path: Path) -> None:
    (tmp_path / "rows.json").write_text('{"x": 1, "y": 2, "x": 3}')
    with pytest.raises(ModelError, match=r"is not a readable JSON file \('x' occurs twice\)"):
        read_head_rows(tmp_path / "rows.json", ("x", "y"))


def test_a_mapping_with_a_byte_order_mark_is_read(tmp_path: Path) -> None:
    (tmp_path / "rows.json").write_text('{"x": 1}', encoding="utf-8-sig")
    assert read_head_rows(tmp_path / "rows.json", ("x",)) == [1]


def test_rows_of_a_head_without_rows_are_refused(weights: Path, tmp_path: Path) -> None:
    write_tensors(tmp_path / "other.safetensors", read_tensors(weights) | {"head.weight": torch.tensor(1.0)})
    with pytest.raises(ModelError, match=r"row 4 is not in head\.weight of other\.safetensors"):
        load_weights(build(spec(num_classes=1)), tmp_path / "other.safetensors", ("x",), rows_file(tmp_path, {"x": 4}))


def test_an_invalid_mapping_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="must map class names to rows"):
        read_head_rows(rows_file(tmp_path, [1, 2]), ("x",))
    (tmp_path / "rows.json").write_text("{")
    with pytest.raises(ModelError, match="is not a readable JSON file"):
        read_head_rows(tmp_path / "rows.json", ("x",))


def test_missing_or_damaged_weights_are_refused(weights: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ModelError, match=r"model\.weights = .*none.*: there is no such file; accepted: a \.safetensors"
    ):
        load_weights(build(VIT), tmp_path / "none", NAMES, None)
    half = tmp_path / "half.safetensors"
    half.write_bytes(weights.read_bytes()[:2000])
    with pytest.raises(ModelError, match=r"model\.weights = .*half\.safetensors.*is not a complete safetensors file"):
        load_weights(build(VIT), half, NAMES, None)


def a_hub(folder: Path) -> tuple[Any, dict[str, object]]:
    """Returns a backbone, and the entry of timm's hub that has its weights."""
    theirs = scramble(build(VIT))
    torch.save(theirs.state_dict(), folder / "hub.pt")
    names = {"first_conv": "patch_embed.proj", "classifier": "head"}
    return theirs, {"file": str(folder / "hub.pt"), "num_classes": CLASSES} | names


def test_the_hub_s_weights_are_those_of_timm(tmp_path: Path) -> None:
    theirs, hub = a_hub(tmp_path)
    with patch.object(timm, "create_model", partial(timm.create_model, pretrained_cfg_overlay=hub)):
        torch.testing.assert_close(build(VIT, pretrained=True).state_dict(), theirs.state_dict(), rtol=0, atol=0)
        own = build(spec(num_classes=2))
        with patch.object(timm, "get_pretrained_cfg", lambda name: SimpleNamespace(**hub)):
            load_hub_weights(own, spec(num_classes=2), ("x", "y"), rows_file(tmp_path, {"x": 7, "y": 4}))
            with pytest.raises(ModelError, match=r"row 10 is not in head\.weight of the hub's vit_tiny"):
                load_hub_weights(own, spec(num_classes=2), ("x", "y"), rows_file(tmp_path, {"x": 10, "y": 4}))
    rows = theirs.state_dict() | {f"head.{part}": getattr(theirs.head, part)[[7, 4]] for part in ("weight", "bias")}
    torch.testing.assert_close(dict(own.state_dict()), rows, rtol=0, atol=0)


def test_a_new_head_on_the_hub_s_weights_follows_from_the_seed(tmp_path: Path) -> None:
    theirs, hub = a_hub(tmp_path)
    text = ",".join(f"{name}={value}" for name, value in VIT_ARGS.items())
    own, made = partial(dense_backbone, options(args=text, weights="hub", epochs=1), bright_and_dark()), []
    with patch.object(timm, "create_model", partial(timm.create_model, pretrained_cfg_overlay=hub)):
        for seed, state_of_torch in ((0, 1), (0, 2), (1, 1)):
            torch.manual_seed(state_of_torch)
            _, _, model = own(seed, DenseCache(tmp_path / f"{seed}-{state_of_torch}"))
            assert torch.equal(model.blocks[0].attn.qkv.weight, theirs.blocks[0].attn.qkv.weight)
            made.append(model.head.weight)
        model = build(spec(num_classes=2), seed=5)
        head = model.head.weight.detach().clone()
        load_hub_weights(model, spec(num_classes=2), ("x", "y"), None, seed=5)
    assert torch.equal(made[0], made[1]) and not torch.equal(made[0], made[2])
    assert torch.equal(model.head.weight, head)  # as it was built


# ---------------------------------------------------------------- the dense backbone, made once


def bright_and_dark(n: int = 40, seed: int = 0) -> ImageSet:
    """Two classes that a linear model can separate: bright above, or bright below."""
    generator = np.random.default_rng(seed)
    labels = np.arange(n) % 2
    images = generator.integers(0, 60, (n, 8, 8, 1)).astype(np.uint8)
    images[labels == 0, :4] += 150
    images[labels == 1, 4:] += 150
    return ImageSet.of(images, labels.astype(np.int64), ("above", "below"))


def options(**values: object) -> ModelOptions:
    return ModelOptions.model_validate({"args": ARGS, "epochs": 8} | values)


def test_a_dense_backbone_learns_and_is_frozen(tmp_path: Path) -> None:
    told: list[tuple[object, ...]] = []
    pool = bright_and_dark(400)
    with shown_on(lambda name: nullcontext(lambda *done: told.append((name, *done)))):
        key, made, model = dense_backbone(options(), pool, 0, DenseCache(tmp_path))
    assert made.num_classes == 2
    assert accuracy(predict(model, transform_of(model)(pool.read())), torch.from_numpy(pool.labels)) > 0.9
    steps = 8 * -(-len(pool) // 64)
    assert [step[:3] for step in told] == [("dense backbone", done, steps) for done in range(steps + 1)]
    loss = float(str(told[-1][3]).removeprefix("epoch 8 of 8, loss "))
    assert 0 < loss < 1
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert DenseCache(tmp_path).holds(key)


@pytest.mark.parametrize("with_weights", [False, True])
def test_a_diverged_backbone_is_refused_and_not_cached(with_weights: bool, weights: Path, tmp_path: Path) -> None:
    text = ",".join(f"{name}={value}" for name, value in VIT_ARGS.items())
    changes = {"args": text, "weights": str(weights)} if with_weights else {}
    said = r"model\.learning-rate = 1e\+30: dense backbone diverged at step \d+ of 8 \(its loss is (nan|inf)\)"
    with pytest.raises(ModelError, match=said):
        dense_backbone(options(learning_rate=1e30, **changes), bright_and_dark(), 0, DenseCache(tmp_path))
    assert not list(tmp_path.rglob("*.safetensors")) and not list(tmp_path.rglob("*.tmp*"))


def test_features_that_are_not_finite_are_refused_by_image(tmp_path: Path) -> None:
    _, _, model = dense_backbone(options(epochs=1), bright_and_dark(), 0, DenseCache(tmp_path))
    inputs = torch.randn(6, *example_input(model).shape[1:])
    assert np.isfinite(image_features(model, inputs.split(2))).all()
    inputs[4] = torch.inf
    with pytest.raises(ModelError, match=r"features of image 4 are not finite \(1 of 6 images\)"):
        image_features(model, inputs.split(2))


def test_the_second_call_trains_nothing_and_gives_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache, pool = DenseCache(tmp_path), bright_and_dark()
    first = dense_backbone(options(), pool, 0, cache)
    fresh = dense_backbone(options(), pool, 0, DenseCache(tmp_path / "elsewhere"))
    monkeypatch.setattr(dense, "train_dense", lambda *_, **__: pytest.fail("trained again"))
    second = dense_backbone(options(), pool, 0, cache)
    assert first[:2] == second[:2] == fresh[:2]
    for other in (second, fresh):
        for name, tensor in first[2].state_dict().items():
            assert torch.equal(tensor, other[2].state_dict()[name])


def test_the_key_changes_with_everything_that_the_weights_depend_on(weights: Path, tmp_path: Path) -> None:
    pool = bright_and_dark()
    made = BackboneSpec(name=VIT.name, args=parse_args(ARGS), num_classes=2)
    relabelled = replace(pool, labels=1 - pool.labels)
    renamed = replace(pool, classes=("left", "right"))  # head rows are found by name
    reshaped = replace(pool, images=ArrayImages(pool.read().reshape(-1, 4, 16, 1)))
    copy = tmp_path / "copy.safetensors"
    copy.write_bytes(weights.read_bytes())
    keys = [
        dense_key(options(), made, pool, 0),
        dense_key(options(), made, pool, 1),
        dense_key(options(), made, bright_and_dark(seed=1), 0),
        dense_key(options(), made, relabelled, 0),
        dense_key(options(), made, renamed, 0),
        dense_key(options(), made, reshaped, 0),
        dense_key(options(epochs=9), made, pool, 0),
        dense_key(options(), made.model_copy(update={"num_classes": 3}), pool, 0),
        dense_key(options(weights=str(copy)), made, pool, 0),
    ]
    content = bytearray(copy.read_bytes())
    content[-1] ^= 1
    copy.write_bytes(bytes(content))
    keys.append(dense_key(options(weights=str(copy)), made, pool, 0))
    assert len(set(keys)) == len(keys)
    assert dense_key(options(), made, bright_and_dark(), 0) == keys[0]


def test_with_weights_only_the_head_is_trained(weights: Path, tmp_path: Path) -> None:
    text = ",".join(f"{name}={value}" for name, value in VIT_ARGS.items())
    wanted = options(args=text, weights=str(weights), epochs=3)
    model = dense_backbone(wanted, bright_and_dark(), 0, DenseCache(tmp_path))[2]
    state, found = read_tensors(weights), model.state_dict()
    assert found["head.weight"].shape == (2, 32) != state["head.weight"].shape == (CLASSES, 32)
    assert all(torch.equal(found[name], state[name]) for name in found if not name.startswith("head."))
    assert found["head.bias"].abs().max() > 0


def test_rows_without_training_are_those_of_the_file(weights: Path, tmp_path: Path) -> None:
    text = ",".join(f"{name}={value}" for name, value in VIT_ARGS.items())
    rows = rows_file(tmp_path, {"above": 3, "below": 8})
    wanted = options(args=text, weights=str(weights), head="rows", head_rows=str(rows))
    model = dense_backbone(wanted, bright_and_dark(), 0, DenseCache(tmp_path))[2]
    assert torch.equal(model.head.weight, read_tensors(weights)["head.weight"][[3, 8]])


def test_rows_of_a_head_that_the_weights_do_not_have_are_refused(tmp_path: Path) -> None:
    """`head = rows` trains no head, so that only its accuracy would reveal a head that stayed as initialised."""
    file = tmp_path / "other.safetensors"
    write_tensors(file, build(spec(num_classes=7)).state_dict())
    load_weights(build(spec()), file, NAMES, None)
    with pytest.raises(ModelError, match=r"no head.weight for 10 classes; model.head-rows"):
        load_weights(build(spec()), file, NAMES, None, needs_head=True)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"args": {"checkpoint_path": "/etc/passwd"}}, "checkpoint_path: is not an argument of the architecture"),
        ({"args": {"pretrained_cfg": "x"}}, "pretrained_cfg: is not an argument"),
        ({"args": {"depth": 10**9}}, "depth = 1000000000: is beyond 65536"),
        ({"args": {"depths": [2, 1e300]}}, "depths = 1e\\+300: is beyond 65536"),
        ({"args": {"depth": 10**400}}, "depth = 1000"),
        ({"num_classes": 10**9}, "less than or equal to 65536"),
        ({"num_classes": -1}, "greater than or equal to 0"),
        ({"weights": "x"}, "Extra inputs are not permitted"),
    ],
)
def test_a_received_backbone_may_name_shapes_but_no_files(change: dict[str, object], said: str) -> None:
    """A device builds what the server describes."""
    with pytest.raises(ModelError, match=said) as caught:
        BackboneSpec.from_json(json.dumps(VIT.model_dump() | change))
    assert "\n" not in str(caught.value)
    assert BackboneSpec.from_json(VIT.model_dump_json()) == VIT


def test_a_head_whose_rows_may_have_two_orders_needs_class_names(tmp_path: Path) -> None:
    """torchvision sorts folders as text (10 before 2), timm by number."""
    file = tmp_path / "vit.safetensors"
    write_tensors(file, build(spec(num_classes=3)).state_dict())
    model = build(spec(num_classes=3))
    with pytest.raises(ModelError, match=r"model\.head-rows = '': .*differ from class '10' on; accepted: a J"):
        load_weights(model, file, ("1", "10", "2"), None, needs_head=True)
    load_weights(model, file, ("1", "10", "2"), None)  # a new head is trained
    for classes in (("1", "2", "10"), ("a1", "a2", "b"), ("02", "10", "11")):
        load_weights(model, file, classes, None, needs_head=True)
    load_weights(model, file, ("1", "10", "2"), rows_file(tmp_path, {"1": 0, "2": 1, "10": 2}), needs_head=True)
