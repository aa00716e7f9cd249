"""Rival criteria: each does what its name promises, and all keep the common guarantees."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import EntryPoint
from typing import Any

import numpy as np
import pytest
import torch
from backbones import Tiny
from torch import Tensor
from torch.nn import functional as F
from typer.testing import CliRunner

from experiments import cli
from tapfl.config import PruningOptions
from tapfl.errors import ConfigError, ModelError
from tapfl.pruning.criteria import gradients, norms, registry, upop
from tapfl.pruning.criteria.criterion import PruningTask, Scores, Selection, across_layers, by_layer
from tapfl.pruning.pipeline import plan_of, pruning_task

FAMILIES = ["vit", "deit", "swin"]


LABELS = torch.tensor([3, 1, 4, 1])


QUANTISED = {"updp"}  # drops whole branches, so that the cost may be far below the budget


def task_of(
    backbone: Tiny, budget: float = 0.6, batch: int = 2, ratio: str = "uniform", seed: int = 0, criterion: str = "tap"
) -> PruningTask:
    options = PruningOptions(criterion=criterion, align=1, ratio=ratio)
    return pruning_task(backbone.model, backbone.inputs, budget, options, batch, seed=seed)


def in_double(task: PruningTask) -> PruningTask:
    """The same task in float64, in which finite differences are exact enough."""
    return replace(task, model=copy.deepcopy(task.model).double(), inputs=task.inputs.double())


def same(a: Selection, b: Selection) -> bool:
    return a.kept.keys() == b.kept.keys() and all(torch.equal(a.kept[name], b.kept[name]) for name in a.kept)


def loss_with(task: PruningTask, factors: dict[str, Tensor], labels: Tensor) -> Tensor:
    """Returns each image's cross-entropy if the units' activations are multiplied by `factors`, with separate hooks."""
    handles = [
        task.model.get_submodule(f"{layer.name}.{layer.output}").register_forward_pre_hook(
            lambda _m, x, f=factors[layer.name]: (x[0] * f,)
        )
        for layer in task.layers
        if layer.name in factors
    ]
    with torch.no_grad():
        logits = task.model(task.inputs)
    for handle in handles:
        handle.remove()
    return F.cross_entropy(logits, labels, reduction="none")


@pytest.mark.parametrize("family", ["vit", pytest.param("deit", marks=pytest.mark.slow), "swin"])
@pytest.mark.parametrize("name", sorted(registry.BUILT_IN))
def test_a_criterion_keeps_its_promises(
    name: str, family: str, small_families: dict[str, Tiny], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The plan is valid, within the budget and the same for the same seed; the dense model is not changed."""
    backbone = small_families[family]
    state = {key: value.clone() for key, value in backbone.model.state_dict().items()}
    modules = [id(module) for module in backbone.model.modules()]
    monkeypatch.setattr(upop, "STEPS", 10)
    criterion = registry.criterion_of(name)
    first = criterion(task_of(backbone, criterion=name))
    again = criterion(task_of(backbone, criterion=name))
    assert same(first, again)
    if first.model is not None:
        assert again.model is not None
        trained = again.model.state_dict()
        assert all(torch.equal(value, trained[key]) for key, value in first.model.state_dict().items())
        assert not any(p.requires_grad for p in first.model.parameters()) and not first.model.training
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in first.model.modules())

    plan = plan_of(task_of(backbone), first, backbone.spec)
    assert plan.cost.macs <= 0.6 * plan.dense.macs
    assert name in QUANTISED or plan.cost.macs >= 0.6 * plan.dense.macs * 0.995
    assert sum(len(layer.kept) for layer in plan.layers) < sum(layer.units for layer in plan.layers)

    assert [id(module) for module in backbone.model.modules()] == modules
    assert all(torch.equal(value, state[key]) for key, value in backbone.model.state_dict().items())
    assert all(p.grad is None and not p.requires_grad for p in backbone.model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in backbone.model.modules())
    assert not backbone.model.training


@pytest.mark.parametrize("family", FAMILIES)
def test_magnitude_is_the_coupled_norm(family: str, small_families: dict[str, Tiny]) -> None:
    backbone = small_families[family]
    weights = {key: value.double().numpy() for key, value in backbone.model.state_dict().items()}
    for layer in backbone.layers:
        found = norms.coupled_norm(layer, backbone.model.get_submodule(layer.name)).numpy()
        for unit in (0, 1, layer.units // 2, layer.units - 1):
            if layer.kind == "ffn":
                w1, b1 = weights[f"{layer.name}.fc1.weight"], weights[f"{layer.name}.fc1.bias"]
                parts = [w1[unit], b1[unit], weights[f"{layer.name}.fc2.weight"][:, unit]]
            else:
                qkv, n = weights[f"{layer.name}.qkv.weight"], layer.units
                parts = [qkv[unit], qkv[n + unit], qkv[2 * n + unit], weights[f"{layer.name}.proj.weight"][:, unit]]
            assert found[unit] == pytest.approx(sum((part**2).sum() for part in parts), rel=1e-12)


@pytest.mark.parametrize("family", FAMILIES)
def test_wanda_is_activation_norm_times_column_norm(family: str, small_families: dict[str, Tiny]) -> None:
    backbone = small_families[family]
    task = task_of(backbone)
    seen: dict[str, np.ndarray] = {}
    handles = [
        backbone.model.get_submodule(f"{layer.name}.{layer.output}").register_forward_pre_hook(
            lambda _m, x, name=layer.name: seen.__setitem__(name, x[0].double().flatten(0, -2).numpy())
        )
        for layer in backbone.layers
    ]
    backbone.model(backbone.inputs)  # all images at once; the criterion uses batches of two
    for handle in handles:
        handle.remove()
    for layer in backbone.layers:
        columns = backbone.model.get_parameter(f"{layer.name}.{layer.output}.weight").double().numpy()
        expected = np.sqrt((seen[layer.name] ** 2).sum(0)) * np.sqrt((columns**2).sum(0))
        np.testing.assert_allclose(norms.output_norms(task)[layer.name].numpy(), expected, rtol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_gate_gradients_are_finite_differences_of_each_image(family: str, small_families: dict[str, Tiny]) -> None:
    task = replace(in_double(task_of(small_families[family])), labels=LABELS)
    batches = list(gradients.image_gradients(task))
    ε = 1e-5
    for layer in task.layers:
        found = torch.cat([batch[layer.name] for batch in batches])
        assert found.shape == (4, layer.units)
        for unit in (0, layer.units - 1):
            up, down = torch.ones(layer.units).double(), torch.ones(layer.units).double()
            up[unit] += ε
            down[unit] -= ε
            slope = (loss_with(task, {layer.name: up}, LABELS) - loss_with(task, {layer.name: down}, LABELS)) / (2 * ε)
            torch.testing.assert_close(found[:, unit], slope, rtol=1e-5, atol=1e-8)


def test_taylor_and_fisher_are_means_over_images(vit: Tiny) -> None:
    task = replace(task_of(vit), labels=LABELS)
    name = "blocks.0.mlp"
    each = torch.cat([batch[name] for batch in gradients.image_gradients(task)]).double()
    torch.testing.assert_close(gradients.taylor_scores(task)[name], each.abs().mean(0))
    torch.testing.assert_close(gradients.fisher_scores(task)[name], (each**2).mean(0))
    whole = gradients.taylor_scores(replace(task, batch=4))[name]  # an image's gradient is independent of its batch
    torch.testing.assert_close(whole, each.abs().mean(0), rtol=1e-4, atol=1e-7)


def test_without_labels_the_dense_predictions_are_the_targets(vit: Tiny) -> None:
    task = task_of(vit)
    assert torch.equal(gradients.targets(task), vit.model(vit.inputs).argmax(1))
    assert torch.equal(gradients.targets(replace(task, labels=LABELS)), LABELS)


@pytest.mark.parametrize("score", [gradients.taylor_scores, gradients.fisher_scores, upop.first_gradients])
@pytest.mark.parametrize("family", FAMILIES)
def test_images_without_labels_pass_once_and_have_the_same_scores(
    family: str, score: Callable[[PruningTask], Scores], small_families: dict[str, Tiny]
) -> None:
    task, passes = task_of(small_families[family], batch=2), list[int]()
    handle = task.model.register_forward_hook(lambda _module, images, _output: passes.append(len(images[0])))
    try:
        without = score(task)
    finally:
        handle.remove()
    assert passes == [2, 2]
    known = score(replace(task, labels=gradients.targets(task)))
    assert all(torch.equal(without[name], known[name]) for name in known)


def test_global_ranking_follows_the_scale_of_a_layer_and_ranking_within_layers_does_not(vit: Tiny) -> None:
    task = task_of(vit)
    scores = gradients.taylor_scores(task)
    louder = scores | {"blocks.1.mlp": scores["blocks.1.mlp"] * 1e6}
    assert same(by_layer(task, scores), by_layer(task, louder))
    assert len(across_layers(task, louder).kept["blocks.1.mlp"]) == 128
    assert len(across_layers(task, scores).kept["blocks.1.mlp"]) < 128
    assert same(gradients.taylor_global(task), across_layers(task, scores))
    assert same(gradients.fisher(task), by_layer(task, gradients.fisher_scores(task)))


@pytest.mark.parametrize("family", ["vit", "swin"])
def test_isomorphic_ranks_only_within_a_type(family: str, small_families: dict[str, Tiny]) -> None:
    task = task_of(small_families[family], budget=0.5)
    scores = gradients.taylor_scores(task)
    plain = gradients.within_types(task, scores)
    louder = {layer.name: scores[layer.name] * (1e6 if layer.kind == "ffn" else 1) for layer in task.layers}
    assert same(plain, gradients.within_types(task, louder))
    first = task.layers[0].name  # within a type the scale counts: large scores take most units of the type
    loud = gradients.within_types(task, scores | {first: scores[first] * 1e6})
    assert len(loud.kept[first]) > 0.85 * task.layers[0].units > len(plain.kept[first])
    others = [layer.name for layer in task.layers if layer.kind == "ffn"]
    assert sum(len(loud.kept[n]) for n in others) == pytest.approx(sum(len(plain.kept[n]) for n in others), rel=0.05)
    shares = {}
    for kind in ("attention", "ffn"):
        members = [layer for layer in task.layers if layer.kind == kind]
        spent = sum(len(plain.kept[layer.name]) * layer.macs_per_unit for layer in members)
        shares[kind] = spent / sum(layer.units * layer.macs_per_unit for layer in members)
    assert shares["attention"] == pytest.approx(shares["ffn"], abs=0.08)  # the slices of an attention are coarse


def test_isomorphic_ranks_by_importance_and_not_by_cost(small_swin: Tiny) -> None:
    task = task_of(small_swin, budget=0.5)
    scores = {layer.name: torch.linspace(0, 1, layer.units) for layer in task.layers}

    def spread(selection: Selection) -> float:
        """Returns how much the kept shares of FFNs differ; a unit of the first stage costs twice as much."""
        shares = [len(selection.kept[layer.name]) / layer.units for layer in task.layers if layer.kind == "ffn"]
        return max(shares) - min(shares)

    assert len({layer.macs_per_unit for layer in task.layers if layer.kind == "ffn"}) > 1
    assert spread(gradients.within_types(task, scores)) < 0.15 < spread(across_layers(task, scores))


def test_scores_that_are_not_finite_are_refused_by_layer(vit: Tiny) -> None:
    task = task_of(vit)
    scores = {layer.name: torch.rand(layer.units) for layer in vit.layers}
    scores["blocks.1.mlp"][3] = torch.nan
    for spend in (by_layer, across_layers):
        with pytest.raises(ModelError, match=r"blocks\.1\.mlp: scores of units are not numbers"):
            spend(task, scores)


def test_an_unknown_name_is_refused_and_the_known_ones_are_named() -> None:
    with pytest.raises(ConfigError, match=r"pruning\.criterion = 'tapp'.*magnitude.*tap, .*wanda"):
        registry.criterion_of("tapp")


def test_a_package_may_offer_a_criterion(monkeypatch: pytest.MonkeyPatch) -> None:
    offered = EntryPoint("mine", "tapfl.pruning.criteria.norms:random_units", registry.ENTRY_POINTS)

    def entry_points(group: str, name: str | None = None) -> list[EntryPoint]:
        return [offered] if group == registry.ENTRY_POINTS and name in (None, "mine") else []

    monkeypatch.setattr(registry, "entry_points", entry_points)
    assert registry.criterion_of("mine") is offered.load()
    assert "mine" in registry.criterion_names()
    listed = CliRunner().invoke(cli.app, ["criteria"]).stdout.splitlines()
    assert f"mine           {norms.random_units.about}" in listed and len(listed) == len(registry.BUILT_IN) + 1
    rows = CliRunner().invoke(cli.app, ["criteria", "--json"]).stdout.splitlines()
    assert {"criterion": "mine", "about": norms.random_units.about} in map(json.loads, rows)
    with pytest.raises(ConfigError, match="mine"):
        registry.criterion_of("yours")


def test_tap_weights_its_terms_by_the_options(vit: Tiny) -> None:
    criterion = registry.criterion_of("tap")
    plain, task = criterion(task_of(vit)), task_of(vit)
    options = PruningOptions(align=1, ratio="uniform", ffn_terms=(1, 0, 0), attention_terms=(0, 0, 1))
    other = criterion(replace(task, options=options))
    assert any(not torch.equal(plain.kept[n.name], other.kept[n.name]) for n in vit.layers if n.kind == "ffn")
    assert any(not torch.equal(plain.kept[n.name], other.kept[n.name]) for n in vit.layers if n.kind == "attention")


@pytest.mark.parametrize(
    ("size", "said"),
    [
        ((0, 1, 8, 8), "metric set is empty"),
        ((3, 1, 8, 8), "metric set of 3 images is smaller than one batch of 4"),
        ((4, 3, 8, 8), r"images 3×8×8 does not fit the backbone, which takes 1×8×8"),
        ((4, 1, 8, 9), r"images 1×8×9 does not fit the backbone, which takes 1×8×8"),
        ((4, 64), r"images 64 does not fit the backbone"),
        ((4,), r"images without sizes does not fit"),
    ],
)
def test_a_metric_set_that_does_not_fit_is_refused(size: tuple[int, ...], said: str, vit: Tiny) -> None:
    with pytest.raises(ModelError, match=said):
        pruning_task(vit.model, torch.zeros(size), 0.5, batch=4)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"batch": 0}, "batch = 0: must be at least 1"),
        (
            {"inputs": torch.zeros(4, 1, 8, 8, dtype=torch.uint8)},
            r"metric set of torch\.uint8; accepted: ",
        ),
        (
            {"labels": torch.zeros(3, dtype=torch.int64)},
            r"torch\.int64 \(3,\); accepted: torch\.int64 \(4,\)",
        ),
        ({"labels": torch.zeros(4)}, r"labels of torch\.float32 \(4,\); accepted: torch\.int64"),
        ({"labels": torch.tensor([0, 1, 10, 3])}, "labels of 0 to 10; accepted: 0 to 9"),
        ({"labels": torch.tensor([0, 1, -1, 3])}, "labels of -1 to 3; accepted: 0 to 9"),
    ],
)
def test_labels_and_batches_that_do_not_fit_are_refused(changed: dict[str, Any], said: str, vit: Tiny) -> None:
    with pytest.raises(ModelError, match=said):
        pruning_task(vit.model, **{"inputs": torch.zeros(4, 1, 8, 8), "budget": 0.5, "batch": 4} | changed)
