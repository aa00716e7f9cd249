"""A public pool with other classes than the devices', or without labels; and a classifier of the devices' classes."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from killing import copied_after
from PIL import Image
from safetensors.torch import load_file, save_file
from test_inprocess_run import SMALL, TINY, content, tapfl
from test_wire import HELLO

from experiments import feasible
from experiments.pruning import prune
from experiments.report.reading import read_run
from experiments.report.single import page_of
from strategies.records import TrafficLine, read_classes, read_metrics
from tapfl.config import ModelOptions, PruningOptions, RunConfig
from tapfl.data.images import ImageSet
from tapfl.data.letters import drawn_letters
from tapfl.data.sources import load_images
from tapfl.data.transform import Transform
from tapfl.errors import ConfigError, DataError, ModelError, PlanError, TapflError, WireError
from tapfl.models.backbone import BackboneSpec, build
from tapfl.models.cost import measure_cost
from tapfl.models.dense import DenseCache, dense_backbone, dense_spec
from tapfl.models.new_head import agreed_classes, fill_with_prototypes, put_head, with_new_head
from tapfl.pruning.pipeline import prune_model, pruning_task
from tapfl.pruning.recovery import labels_of
from tapfl.pruning.surgery import load_pruned, shrink
from tapfl.summary.metric_set import effective_size

RGB = Transform((8, 8), 3, (0.5,) * 3, (0.5,) * 3)
SPEC = BackboneSpec(
    name="vit_tiny_patch16_224",
    args={"img_size": 8, "patch_size": 2, "in_chans": 1, "embed_dim": 32, "depth": 2, "num_heads": 2},
    num_classes=7,
)


def options(**changes: object) -> ModelOptions:
    return RunConfig.from_flat({"model.args": TINY, **{f"model.{k}": v for k, v in changes.items()}}).model


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights with a head of 7 classes that neither the pool nor a device has."""
    file = tmp_path_factory.mktemp("weights") / "seven.safetensors"
    args = dict(part.split("=") for part in TINY.split(","))
    spec = SPEC.model_copy(update={"args": {**SPEC.args, "class_token": False, "global_pool": args["global_pool"]}})
    save_file(build(spec, seed=3).state_dict(), file)
    return file


@pytest.fixture(scope="module")
def letters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fifth of the letters, which a run otherwise draws for a second."""
    file, drawn = tmp_path_factory.mktemp("pool") / "letters.npz", load_images("letters")
    np.savez(file, images=drawn.read()[::5], labels=drawn.labels[::5], classes=np.array(drawn.classes))
    return file


@pytest.fixture(scope="module")
def unlabelled(letters: Path) -> Path:
    file = letters.with_name("unlabelled.npz")
    np.savez(file, images=np.load(letters)["images"])
    return file


# -- images without labels ---------------------------------------------------------------------------------------------


def folder_of(root: Path, *names: str) -> Path:
    for number, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (9, 9), (200, number, 50)).save(root / name)
    return root


def hugging_face(root: Path, column: str) -> str:
    from datasets import ClassLabel, Dataset, Features, Value
    from datasets import Image as ImageColumn

    pictures = [Image.new("RGB", (9, 9), (200, 10, 50))] * 3
    kind = ClassLabel(names=["a", "b"]) if column == "label" else Value("string")
    values = [-1] * 3 if column == "label" else ["x"] * 3
    features = Features({"image": ImageColumn(), column: kind})
    Dataset.from_dict({"image": pictures, column: values}, features=features).save_to_disk(str(root / "hf"))
    return f"hf:{root / 'hf'}"


def npz_of(root: Path) -> str:
    np.savez(root / "x.npz", images=np.full((3, 8, 8, 3), 200, np.uint8))
    return str(root / "x.npz")


SOURCES: dict[str, tuple[Callable[[Path], str], str]] = {
    "a flat folder": (
        lambda root: str(folder_of(root / "flat", "a.png", "b.png", "c.png")),
        "one folder of images per",
    ),
    "an npz": (npz_of, "has no array `labels`"),
    "a table of images": (lambda root: hugging_face(root, "caption"), "one of type ClassLabel"),
    "an unlabelled split": (lambda root: hugging_face(root, "label"), "3 of 3 images have no label"),
}


@pytest.mark.parametrize("case", SOURCES)
def test_a_pool_may_have_no_labels_and_devices_must(case: str, tmp_path: Path) -> None:
    make, refused = SOURCES[case]
    source = make(tmp_path)
    pool = load_images(source, RGB, tmp_path / "cache", unlabelled=True)
    assert len(pool) == 3 and pool.classes == () and pool.labels.tolist() == [-1] * 3 and pool.held == ()
    assert "3 images without labels" in pool.described()
    with pytest.raises(DataError, match=refused):
        load_images(source, RGB, tmp_path / "cache")


def test_a_folder_with_classes_is_one_and_other_files_are_left_out(tmp_path: Path) -> None:
    pool = load_images(str(folder_of(tmp_path / "x", "a/1.png", "2.png")), RGB, tmp_path / "cache", unlabelled=True)
    assert (
        pool.classes == ("a",) and len(pool) == 1 and dict(pool.left_out) == {"images outside the classes' folders": 1}
    )


def test_letters_are_the_same_whenever_they_are_drawn() -> None:
    one, (again, _, _) = load_images("letters"), drawn_letters()
    assert one.classes == tuple("ABCDEFGHIJKLMNOPQRSTUVWXYZ") and len(one) == 26 * 60
    np.testing.assert_array_equal(one.read(), again)
    assert len(np.unique(one.read().reshape(len(one), -1), axis=0)) > 0.95 * len(one)


def test_the_effective_size_of_equal_weights_is_their_number() -> None:
    assert effective_size(np.full(5, -700.0)) == pytest.approx(5)
    assert effective_size(np.log([3.0, 1.0, 1.0, 1.0])) == pytest.approx(36 / 12)
    assert effective_size(np.array([900.0, 0, 0])) == pytest.approx(1)


# -- refused, by name --------------------------------------------------------------------------------------------------

POOL = ImageSet.of(np.full((4, 8, 8, 1), 9, np.uint8), np.full(4, -1), ())


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"head": "train"}, r"model.head = 'train': model.weights = '' and the backbone is trained on the labels"),
        ({"head": "train", "weights": "x"}, r"model.head = 'train': the classifier is trained on the labels"),
        ({"head": "rows+train", "weights": "x"}, r"model.head = 'rows\+train': the classifier is trained"),
        ({"head": "rows", "weights": "x"}, r"model.head = 'rows': its classes are those of the pool, which has no lab"),
        ({"head": "new"}, r"model.head = 'new': model.weights = '' and the backbone is trained on the labels"),
    ],
)
def test_options_that_need_labels_of_the_pool_are_refused(changes: dict[str, str], said: str) -> None:
    with pytest.raises(ModelError, match=f"{said}.*accepted: a pool with labels, or model.head = 'new'"):
        dense_spec(options(**changes), POOL)


def test_public_labels_of_a_pool_without_labels() -> None:
    assert labels_of(POOL, PruningOptions()) is None
    with pytest.raises(
        ConfigError, match=r"pruning.labels = 'public': the public pool has no labels; accepted: pseudo"
    ):
        labels_of(POOL, PruningOptions(labels="public"))


@pytest.mark.parametrize(
    ("flat", "said"),
    [
        ({"model.head": "prototypes"}, "model.head=prototypes with adapters.head=.*means.*adapters.head=personal"),
        (
            {"model.head": "new", "adapters.head": "personal", "model.head-rows": "rows.json"},
            "model.head-rows=rows.json needs the names.*accepted: head-rows=''",
        ),
        (
            {"model.head": "new", "adapters.head": "personal", "personalize.method": "pooled"},
            "personalize.method=pooled needs one classifier",
        ),
        (
            {"model.head": "new", "model.weights": "x", "pruning.labels": "public"},
            "pruning.labels=public has labels of the pool's classes.*accepted: pruning.labels=pseudo",
        ),
    ],
)
def test_options_that_contradict_a_new_head(flat: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        RunConfig.from_flat(flat)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ([], "data.public = 'letters' and data.source differ in their classes.*model.head = 'new'"),
        (["model.head=new", "model.head-rows=rows.json"], "takes rows of the head of model.weights, which is empty"),
        (["model.head=new", "model.weights={weights}", "model.head-rows={rows}"], "has no row for class '3'"),
        (["model.head=new", "model.weights={weights}", "model.head-rows={beyond}"], "row 7 is not in the head, which"),
    ],
)
def test_a_run_that_would_fail_is_refused_before_it_begins(
    changes: list[str], said: str, weights: Path, cache: Path, tmp_path: Path
) -> None:
    (tmp_path / "rows.json").write_text(json.dumps({"0": 0, "1": 1, "2": 2}))
    (tmp_path / "beyond.json").write_text(json.dumps({str(digit): digit + 2 for digit in range(6)}))
    paths = {"weights": weights, "rows": tmp_path / "rows.json", "beyond": tmp_path / "beyond.json"}
    given = ["data.public=letters", *(change.format(**paths) for change in changes)]
    with pytest.raises(TapflError, match=said):
        tapfl("--out", str(tmp_path / "run"), cache=cache, options=given)
    assert not (tmp_path / "run").exists()


def test_preflight_knows_a_personal_head_as_the_devices_report_it(
    letters: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two devices with two classes each, one of them in common: a shared head has three rows, a personal head two."""
    rows: list[tuple[str, ...]] = []
    monkeypatch.setattr(feasible, "_check_backbone", lambda _config, _public, classes: rows.append(classes))
    options = {"data.public": str(letters), "data.classes-per-device": 2, "devices.count": 2, "model.head": "new"}
    for head in ("mean", "personal"):
        feasible.check(RunConfig.from_flat({**options, "cache": str(cache), "adapters.head": head}))
    assert rows == [("0", "1", "2"), ("0", "1")]


@pytest.mark.parametrize(
    "names",
    ["", "[]", "[1]", '["b", "a"]', '["a", "a"]', '["a\\n"]', '[""]', '{"a": 1}', f'["{"a" * 201}"]', "[" * 9999],
)
def test_invalid_class_names_are_refused(names: str) -> None:
    with pytest.raises(WireError):
        replace(HELLO, class_names=names).named(asked=True)


def test_pruning_a_single_model_refuses_a_head_of_reported_classes(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"model.head = 'new': needs the classes that devices report; accepted: t"):
        prune(RunConfig.from_flat({"model.head": "new"}), 0.5, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_class_names_are_accepted_only_if_requested() -> None:
    assert HELLO.named(asked=True) == ("a", "b")
    assert replace(HELLO, class_names="[]").named(asked=False) == ()
    with pytest.raises(WireError, match="class names"):
        HELLO.named(asked=False)
    with pytest.raises(WireError, match="2 classes of 1 training samples"):
        replace(HELLO, train_samples=1).named(asked=True)


# -- the new head ------------------------------------------------------------------------------------------------------


def test_classes_are_those_of_all_devices_in_one_order() -> None:
    assert agreed_classes([("b", "c"), ("a", "c"), ("10", "9")]) == ("10", "9", "a", "b", "c")


@pytest.mark.parametrize("content", [None, "", "[]", "[1]", '{"a": 1}', '["a"'])
def test_damaged_stored_classes_are_refused(content: str | None, tmp_path: Path) -> None:
    file = tmp_path / "classes.json"
    if content is not None:
        file.write_text(content)
    with pytest.raises(PlanError, match=r"classes\.json: is not a list of class names"):
        read_classes(file)
    file.write_text('["b", "a"]')
    assert read_classes(file) == ["b", "a"]


def test_a_new_head_is_zero_or_has_the_named_rows(weights: Path, tmp_path: Path) -> None:
    cache, given = DenseCache(tmp_path / "cache"), options(head="new", weights=str(weights))
    old = dense_backbone(given, POOL, 0, cache)
    assert old[1].num_classes == 7  # of the weights, independent of the pool
    torch.testing.assert_close(old[2].head.weight, load_file(weights)["head.weight"])
    key, spec, zero = with_new_head(given, old, ("a", "b", "c"), cache)
    assert key != old[0] and spec.num_classes == 3 and not zero.head.weight.any() and not zero.head.bias.any()
    x = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(zero.forward_features(x), old[2].forward_features(x))
    (tmp_path / "rows.json").write_text(json.dumps({"a": 5, "b": 0, "c": 2, "z": 1}))
    named = given.model_copy(update={"head_rows": str(tmp_path / "rows.json")})
    other, _, rows = with_new_head(named, old, ("a", "b", "c"), cache)
    assert other not in (key, old[0])
    torch.testing.assert_close(rows(x), old[2](x)[:, [5, 0, 2]])


def test_prototypes_assign_an_image_to_the_nearest_class() -> None:
    model = build(SPEC.model_copy(update={"num_classes": 4}), seed=0).requires_grad_(False)
    generator = np.random.default_rng(0)
    labels = np.array([0, 1, 3] * 20)
    features = generator.normal(size=(4, 32))[labels] * 3 + generator.normal(size=(60, 32)) + 5
    filled = fill_with_prototypes(model, features.astype(np.float32), labels)
    logits = filled.head(torch.from_numpy(features).float())
    means = np.stack([features[labels == label].mean(0) for label in (0, 1, 3)])
    nearest = np.array([0, 1, 3])[((features[:, None] - means) ** 2).sum(-1).argmin(1)]
    np.testing.assert_array_equal(logits.argmax(1).numpy(), nearest)  # and never class 2, which has no image
    assert not torch.equal(model.head.weight, filled.head.weight)


def test_costs_are_those_of_the_model_with_the_new_head() -> None:
    old = build(SPEC, seed=1).requires_grad_(False)
    new = put_head(old, build(SPEC.model_copy(update={"num_classes": 40}), seed=2).requires_grad_(False))
    inputs = torch.randn(64, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    task = pruning_task(old, inputs, 0.5, PruningOptions(criterion="tap", align=1), new_head=new)
    made = prune_model(task, SPEC.model_copy(update={"num_classes": 40}))
    assert made.plan.dense == measure_cost(new) and made.plan.cost == measure_cost(made.model)
    assert 0.49 < made.plan.cost.macs / made.plan.dense.macs <= 0.5
    assert made.exact and made.model(inputs[:1]).shape == (1, 40)
    torch.testing.assert_close(made.model(inputs), shrink(new, made.plan)(inputs))


# -- whole runs --------------------------------------------------------------------------------------------------------


def test_a_run_with_an_unlabelled_foreign_pool(weights: Path, unlabelled: Path, cache: Path, tmp_path: Path) -> None:
    """The head is for the devices' classes and is trained by the federation; a report shows the effective sizes."""
    given = [
        f"data.public={unlabelled}",
        f"model.weights={weights}",
        "model.head=new",
        "metric.size=64",
        "train.steps=5",
    ]
    done = tapfl("--out", str(tmp_path / "run"), cache=cache, options=given)
    assert done.exit_code == 0, done.output
    classes = json.loads((tmp_path / "run" / "classes.json").read_text())
    state = load_file(tmp_path / "run" / "server" / "round-0002.safetensors")
    assert state["params:head.weight"].shape == (len(classes), 32) and state["params:head.weight"].abs().max() > 0
    run = read_run(tmp_path / "run")
    held = {name for i in range(4) for name, n in zip(run.images[i].names, run.images[i].train, strict=True) if n}
    assert sorted(held) == classes and all(plan.backbone.num_classes == len(classes) for plan in run.plans.values())
    lines = read_metrics(tmp_path / "run").lines
    asked = [line for line in lines if isinstance(line, TrafficLine) and line.phase == "hello"]
    for record in run.devices:
        assert float(record.profile.budget) * 0.995 <= record.macs_share <= float(record.profile.budget)
        # it introduces itself twice: with the first backbone, and with the new head
        (again,) = [each for each in asked if each.device == record.device]
        assert record.bytes_down["hello"] == 2 * again.down["hello"]
        assert record.bytes_up["hello"] > 2 * again.up["hello"] > 0  # and of two more answers
    figures = {figure.name for figure in page_of(run).figures}
    assert "effective" in figures and not figures & {"coverage", "metric-classes"}
    assert all(1 <= chosen.effective_size <= 64 == chosen.size for chosen in run.metric_sets.values())


def test_a_personal_head_of_prototypes_keeps_the_names_on_the_devices(
    letters: Path, cache: Path, tmp_path: Path
) -> None:
    given = [f"data.public={letters}", "model.head=prototypes", "adapters.head=personal", "data.classes-per-device=2"]
    given += ["devices.count=2", "train.steps=5"]
    with copied_after(
        {"killed": ("strategies.server_app", "save_checkpoint", 2)}, tmp_path / "run", tmp_path / "copies"
    ):
        done = tapfl("--out", str(tmp_path / "run"), cache=cache, options=given)
    assert done.exit_code == 0, done.output
    assert json.loads((tmp_path / "run" / "classes.json").read_text()) == ["0", "1"]  # positions, not names
    run = read_run(tmp_path / "run")
    assert {name for images in run.images.values() for name in images.names} - {"0", "1"}
    heads = [
        load_pruned(tmp_path / "run" / "devices" / f"{i:02d}" / "pruned").get_parameter("head.weight") for i in (0, 1)
    ]
    assert heads[0].shape == (2, 32) and heads[0].any() and not torch.equal(*heads)
    assert not load_file(tmp_path / "run" / "server" / "round-0001.safetensors")["params:head.weight"].any()
    assert tapfl("--resume", str(tmp_path / "copies" / "killed"), cache=cache, options=given).exit_code == 0
    assert content(tmp_path / "copies" / "killed") == content(tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["flower", "ray"])
def test_a_new_head_is_the_same_on_every_engine(
    engine: str, weights: Path, unlabelled: Path, cache: Path, tmp_path: Path
) -> None:
    given = [f"data.public={unlabelled}", f"model.weights={weights}", "model.head=new", f"cache={cache}"]
    assert tapfl("--out", str(tmp_path / "here"), cache=cache, options=given).exit_code == 0
    sets = [part for option in [*SMALL, *given] for part in ("--set", option)]
    command = [sys.executable, "-m", "experiments.cli", "run", "--engine", engine, "--workers", "1", "--no-report"]
    subprocess.run([*command, "--out", str(tmp_path / "there"), *sets], check=True, timeout=600)
    assert content(tmp_path / "there") == content(tmp_path / "here")
