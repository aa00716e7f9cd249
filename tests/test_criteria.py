"""Rival criteria: what each keeps that deserves its name, and what all of them promise."""

from __future__ import annotations

import copy
from dataclasses import replace
from importlib.metadata import EntryPoint
from itertools import chain, combinations

import numpy as np
import pytest
import torch
from backbones import Tiny
from torch import Tensor
from torch.nn import functional as F

from tapfl.config import PruningOptions
from tapfl.errors import BudgetError, ConfigError, ModelError
from tapfl.models.units import PrunableLayer, replaced
from tapfl.pruning.criteria import gradients, norms, registry, savit, updp, upop
from tapfl.pruning.criteria.criterion import PruningTask, Selection, across_layers, by_layer
from tapfl.pruning.pipeline import plan_of, pruning_task
from tapfl.pruning.surgery import shrink

FAMILIES = ["vit", "deit", "swin"]
LABELS = torch.tensor([3, 1, 4, 1])
QUANTISED = {"updp"}  # drops whole branches, so the budget is met from below only


def task_of(
    backbone: Tiny, budget: float = 0.6, batch: int = 2, ratio: str = "uniform", seed: int = 0, criterion: str = "tap"
) -> PruningTask:
    options = PruningOptions(criterion=criterion, align=1, ratio=ratio)
    return pruning_task(backbone.model, backbone.inputs, budget, options, batch, seed=seed)


def in_double(task: PruningTask) -> PruningTask:
    """The same problem in float64, in which finite differences are exact enough."""
    return replace(task, model=copy.deepcopy(task.model).double(), inputs=task.inputs.double())


def same(a: Selection, b: Selection) -> bool:
    return a.kept.keys() == b.kept.keys() and all(torch.equal(a.kept[name], b.kept[name]) for name in a.kept)


def loss_with(task: PruningTask, factors: dict[str, Tensor], labels: Tensor) -> Tensor:
    """Each image's cross-entropy when the units' activations are multiplied by `factors`; hooks written here anew."""
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


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", sorted(registry.BUILT_IN))
def test_a_criterion_keeps_its_promises(
    name: str, family: str, families: dict[str, Tiny], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A valid plan within the budget, the same for the same seed, and a dense model that is as it was."""
    backbone = families[family]
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
    assert sum(plan.widths.values()) < sum(layer.units for layer in plan.layers)

    assert [id(module) for module in backbone.model.modules()] == modules
    assert all(torch.equal(value, state[key]) for key, value in backbone.model.state_dict().items())
    assert all(p.grad is None and not p.requires_grad for p in backbone.model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in backbone.model.modules())
    assert not backbone.model.training


@pytest.mark.parametrize("family", FAMILIES)
def test_magnitude_is_the_coupled_norm(family: str, families: dict[str, Tiny]) -> None:
    backbone = families[family]
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
def test_wanda_is_activation_norm_times_column_norm(family: str, families: dict[str, Tiny]) -> None:
    backbone = families[family]
    task = task_of(backbone)
    seen: dict[str, np.ndarray] = {}
    handles = [
        backbone.model.get_submodule(f"{layer.name}.{layer.output}").register_forward_pre_hook(
            lambda _m, x, name=layer.name: seen.__setitem__(name, x[0].double().flatten(0, -2).numpy())
        )
        for layer in backbone.layers
    ]
    backbone.model(backbone.inputs)  # all images at once, where the criterion goes by batches of two
    for handle in handles:
        handle.remove()
    for layer in backbone.layers:
        columns = backbone.model.get_parameter(f"{layer.name}.{layer.output}.weight").double().numpy()
        expected = np.sqrt((seen[layer.name] ** 2).sum(0)) * np.sqrt((columns**2).sum(0))
        np.testing.assert_allclose(norms.output_norms(task)[layer.name].numpy(), expected, rtol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_gate_gradients_are_finite_differences_of_each_image(family: str, families: dict[str, Tiny]) -> None:
    task = replace(in_double(task_of(families[family])), labels=LABELS)
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
    whole = gradients.taylor_scores(replace(task, batch=4))[name]  # an image's gradient knows no batch
    torch.testing.assert_close(whole, each.abs().mean(0), rtol=1e-4, atol=1e-7)


def test_without_labels_the_dense_predictions_are_the_targets(vit: Tiny) -> None:
    task = task_of(vit)
    assert torch.equal(gradients.targets(task), vit.model(vit.inputs).argmax(1))
    assert torch.equal(gradients.targets(replace(task, labels=LABELS)), LABELS)


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
def test_isomorphic_ranks_only_within_a_type(family: str, families: dict[str, Tiny]) -> None:
    task = task_of(families[family], budget=0.5)
    scores = gradients.taylor_scores(task)
    plain = gradients.within_types(task, scores)
    louder = {layer.name: scores[layer.name] * (1e6 if layer.kind == "ffn" else 1) for layer in task.layers}
    assert same(plain, gradients.within_types(task, louder))
    first = task.layers[0].name  # within a type, scale counts: a loud layer takes what there is for its type
    loud = gradients.within_types(task, scores | {first: scores[first] * 1e6})
    assert len(loud.kept[first]) > 0.85 * task.layers[0].units > len(plain.kept[first])
    others = [layer.name for layer in task.layers if layer.kind == "ffn"]
    assert sum(len(loud.kept[n]) for n in others) == pytest.approx(sum(len(plain.kept[n]) for n in others), rel=0.05)
    shares = {}
    for kind in ("attention", "ffn"):
        members = [layer for layer in task.layers if layer.kind == kind]
        spent = sum(len(plain.kept[layer.name]) * layer.macs_per_unit for layer in members)
        shares[kind] = spent / sum(layer.units * layer.macs_per_unit for layer in members)
    assert shares["attention"] == pytest.approx(shares["ffn"], abs=0.08)  # slices of an attention are coarse


def test_isomorphic_asks_what_a_unit_is_worth_and_not_what_it_costs(swin: Tiny) -> None:
    task = task_of(swin, budget=0.5)
    scores = {layer.name: torch.linspace(0, 1, layer.units) for layer in task.layers}

    def spread(selection: Selection) -> float:
        """By how much the kept shares of FFNs differ, of which a unit costs twice as much in the first stage."""
        shares = [len(selection.kept[layer.name]) / layer.units for layer in task.layers if layer.kind == "ffn"]
        return max(shares) - min(shares)

    assert len({layer.macs_per_unit for layer in task.layers if layer.kind == "ffn"}) > 1
    assert spread(gradients.within_types(task, scores)) < 0.15 < spread(across_layers(task, scores))


@pytest.mark.parametrize("family", FAMILIES)
def test_upop_masks_are_shared_by_heads_and_sit_before_the_activation(family: str, families: dict[str, Tiny]) -> None:
    """A mask of 0 does what surgery does to the unit, in every head, and its gradient is a finite difference."""
    task = replace(in_double(task_of(families[family], batch=4)), labels=LABELS)
    masks = upop.open_masks(task.layers, task.inputs)
    with upop.masked(task.model, task.layers, masks):
        loss = F.cross_entropy(task.model(task.inputs), LABELS)
    found = dict(zip(masks, torch.autograd.grad(loss, list(masks.values())), strict=True))
    ε = 1e-5
    for layer in task.layers[:2]:
        assert found[layer.name].shape == (layer.units_per_head,)
        module = task.model.get_submodule(layer.name)
        first = module.fc1 if layer.kind == "ffn" else module.qkv
        for k in (0, layer.units_per_head - 1):
            around = []
            for value in (1 + ε, 1 - ε):
                factor = torch.ones(layer.units_per_head).double()
                factor[k] = value
                factor = factor.repeat(first.out_features // layer.units_per_head)  # by q, k and v and by head
                handle = first.register_forward_hook(lambda _m, _x, y, f=factor: y * f)
                around.append(F.cross_entropy(task.model(task.inputs), LABELS))
                handle.remove()
            assert float(found[layer.name][k]) == pytest.approx(
                float(around[0] - around[1]) / (2 * ε), rel=1e-4, abs=1e-9
            )

        with torch.no_grad():
            masks[layer.name][1] = 0
        heads = torch.arange(layer.heads) * layer.units_per_head
        stay = torch.tensor(sorted(set(range(layer.units)) - set((heads + 1).tolist())))
        with upop.masked(task.model, [layer], masks):
            zeroed = task.model(task.inputs)
        with replaced(task.model, layer.name, layer.shrink(module, stay).double()):
            torch.testing.assert_close(task.model(task.inputs), zeroed.detach())


def test_upop_makes_nothing_of_gradients_that_agree_to_rounding(vit: Tiny) -> None:
    generator = torch.Generator().manual_seed(0)
    gradients = {n.name: 0.1 + 1e-9 * torch.randn(n.units_per_head, generator=generator).double() for n in vit.layers}
    assert all(not z.any() for z in upop.standardise(vit.layers, gradients).values())
    tiny = {n.name: 1e-30 * torch.randn(n.units_per_head, generator=generator).double() for n in vit.layers}
    assert all(z.any() for z in upop.standardise(vit.layers, tiny).values())


def test_scores_that_are_no_numbers_are_refused_by_layer(vit: Tiny) -> None:
    task = task_of(vit)
    scores = {layer.name: torch.rand(layer.units) for layer in vit.layers}
    scores["blocks.1.mlp"][3] = torch.nan
    for spend in (by_layer, across_layers):
        with pytest.raises(ModelError, match=r"blocks\.1\.mlp: scores of units are not numbers"):
            spend(task, scores)


def test_upop_standardises_within_types_and_ranks_all_types_in_one(vit: Tiny) -> None:
    gradients = {layer.name: torch.randn(layer.units_per_head, dtype=torch.float64) for layer in vit.layers}
    z = upop.standardise(vit.layers, gradients)
    for kind in ("attention", "ffn"):
        members = [layer.name for layer in vit.layers if layer.kind == kind]
        values = np.concatenate([gradients[name].numpy() for name in members])
        expected = (values - values.mean()) / values.std(ddof=1)
        np.testing.assert_allclose(np.concatenate([z[name].numpy() for name in members]), expected, rtol=1e-12)

    task = task_of(vit, budget=0.7)
    kept = upop.unified(task, upop.worth(task.layers, z)).kept
    worst_kept = {layer.name: float(z[layer.name][_dims(layer, kept)].max()) for layer in vit.layers}
    ranked = sorted((-float(v), layer.macs_per_unit * layer.heads) for layer in vit.layers for v in z[layer.name])
    left, threshold = 0.3 * task.dense.macs, 0.0  # by falling z, until the costs sum up to what has to go
    for value, macs in ranked:
        threshold, left = -value, left - macs
        if left < 0:
            break
    for layer in vit.layers:  # one threshold for both types, but for the units that make the budget exact
        count = int((z[layer.name] < threshold).sum())
        assert abs(len(_dims(layer, kept)) - count) <= 2, (layer.name, worst_kept)


def _dims(layer: PrunableLayer, kept: dict[str, Tensor]) -> Tensor:
    """The dims that stay, which must be the same in every head."""
    by_head = kept[layer.name].view(layer.heads, -1) - torch.arange(layer.heads)[:, None] * layer.units_per_head
    assert (by_head == by_head[0]).all()
    return by_head[0]


@pytest.mark.parametrize("name", ["upop", "upop-oneshot"])
@pytest.mark.parametrize("family", FAMILIES)
def test_upop_keeps_the_same_dims_in_every_head(
    name: str, family: str, families: dict[str, Tiny], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(upop, "STEPS", 4)
    kept = registry.criterion_of(name)(task_of(families[family])).kept
    for layer in families[family].layers:
        _dims(layer, kept)


def test_upop_schedule_runs_from_nothing_to_all() -> None:
    assert upop.schedule(0, 100, 0.4) == 0
    assert upop.schedule(100, 100, 0.4) == pytest.approx(0.4, rel=1e-15)
    assert upop.schedule(50, 100, 0.4) == pytest.approx(0.4 * 0.5**0.5)
    steps = [upop.schedule(t, 20, 1.0) for t in range(21)]
    assert steps == sorted(steps)


def test_upop_masks_fade_to_nothing_at_a_cost_of_what_has_to_go(vit: Tiny) -> None:
    task = task_of(vit, budget=0.7)
    p = upop.share_to_go(task)
    z = {layer.name: torch.randn(layer.units_per_head, dtype=torch.float64) for layer in vit.layers}
    whole = sum(layer.units * layer.macs_per_unit for layer in vit.layers)
    assert p * whole == pytest.approx(0.3 * task.dense.macs)
    for now in (0.0, p / 2, p):
        masks = upop.faded(task, z, now, p)
        gone = sum(int((masks[n.name] < 1).sum()) * n.heads * n.macs_per_unit for n in vit.layers)
        most = max(layer.heads * layer.macs_per_unit for layer in vit.layers)
        assert now * whole - most <= gone <= now * whole * (1 + 1e-9)
        for name, mask in masks.items():
            below = mask < 1
            assert (mask[below] == 1 - now / p).all()
            assert not below.any() or z[name][below].min() > z[name][~below].max()  # the largest z go first
    assert all(set(mask.tolist()) <= {0.0, 1.0} for mask in upop.faded(task, z, p, p).values())


def test_upop_adds_up_gradients_from_the_first_step(vit: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """With weights and masks that stay, every step has the same gradient: the one-shot variant's."""
    monkeypatch.setattr(upop, "STEPS", 5)
    monkeypatch.setattr(upop, "LEARNING_RATE", 0.0)
    seen: list[dict[str, Tensor]] = []
    standardise = upop.standardise

    def record(layers: list[PrunableLayer], gradients: dict[str, Tensor]) -> dict[str, Tensor]:
        seen.append({name: gradient.clone() for name, gradient in gradients.items()})
        return standardise(layers, gradients)

    monkeypatch.setattr(upop, "standardise", record)
    monkeypatch.setattr(upop, "faded", lambda task, z, now, final: {n: torch.ones_like(v) for n, v in z.items()})
    task = task_of(vit, batch=4)  # one batch is the whole metric set
    found = upop.upop(task)
    assert len(seen) == 5
    for step, accumulated in enumerate(seen, start=1):
        for name, gradient in accumulated.items():
            torch.testing.assert_close(gradient, step * seen[0][name], rtol=1e-3, atol=1e-6)
    assert same(found, upop.upop_oneshot(task))


def test_upop_trains_through_masks_that_fade(vit: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """Written anew: weights step by their own gradients alone, masks add theirs up, and fade after each selection."""
    monkeypatch.setattr(upop, "STEPS", 4)
    monkeypatch.setattr(upop, "SELECTIONS", 4)
    task = task_of(vit, batch=4)  # one batch is the whole metric set, in some order
    found = upop.upop(task)
    model, labels = copy.deepcopy(task.model).requires_grad_(True), task.model(task.inputs).argmax(1)
    masks, final = upop.open_masks(task.layers, task.inputs), upop.share_to_go(task)
    optimizer = torch.optim.AdamW(model.parameters(), lr=upop.LEARNING_RATE, weight_decay=upop.WEIGHT_DECAY)
    total = {name: torch.zeros_like(mask) for name, mask in masks.items()}
    for step in range(1, 5):
        with torch.enable_grad(), upop.masked(model, task.layers, masks):
            loss = F.cross_entropy(model(task.inputs), labels)
        weights = list(model.parameters())
        gradients = torch.autograd.grad(loss, [*weights, *masks.values()])
        for weight, gradient in zip(weights, gradients, strict=False):
            weight.grad = gradient
        optimizer.step()
        for name, gradient in zip(masks, gradients[len(weights) :], strict=True):
            total[name] += gradient
        now = upop.faded(task, upop.standardise(task.layers, total), upop.schedule(step, 4, final), final)
        masks = {name: values.float().requires_grad_() for name, values in now.items()}
    assert found.model is not None
    for name, weight in model.state_dict().items():
        if not name.endswith("qkv.bias"):  # that of keys has a gradient of 0 but for rounding, which AdamW makes a step
            torch.testing.assert_close(found.model.state_dict()[name], weight, rtol=1e-3, atol=1e-5)


def test_upop_trains_a_copy(vit: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upop, "STEPS", 7)
    found = upop.upop(task_of(vit))
    assert found.steps == 7 and found.model is not None
    moved = [not torch.equal(a, b) for a, b in zip(found.model.parameters(), vit.model.parameters(), strict=True)]
    assert all(moved)
    other = upop.upop(task_of(vit, seed=1)).model
    assert other is not None and not torch.equal(other.blocks[0].mlp.fc1.weight, found.model.blocks[0].mlp.fc1.weight)


@pytest.mark.parametrize(
    ("family", "budget"), [("vit", 0.85), ("vit", 0.6), ("vit", 0.35), ("vit", 0.15), ("deit", 0.85), ("deit", 0.6)]
)
def test_updp_finds_the_best_drop_set(family: str, budget: float, families: dict[str, Tiny]) -> None:
    """Two blocks have 16 drop sets; of those that only just meet the budget, the one of least divergence is found."""
    backbone = families[family]
    task = task_of(backbone, budget)
    names = [layer.name for layer in task.layers]
    dense = backbone.model(backbone.inputs).detach().double().log_softmax(-1)
    divergences = {}
    for drop in map(set, chain.from_iterable(combinations(names, n) for n in range(5))):
        kept = {name: torch.arange(0) for name in drop}
        whole = {layer.name: torch.arange(layer.units) for layer in task.layers}
        plan = plan_of(task, Selection(whole | kept), backbone.spec)
        if plan.cost.macs <= budget * task.dense.macs:
            logits = shrink(backbone.model, plan)(backbone.inputs).detach().double().log_softmax(-1)
            divergences[frozenset(drop)] = float((dense.exp() * (dense - logits)).sum(1).mean())
    minimal = {drop: kl for drop, kl in divergences.items() if not any(other < drop for other in divergences)}
    best = min(minimal, key=lambda drop: minimal[drop])
    found, alone = updp.search(task, updp.BEAM)
    assert found[0] == best
    together = updp.divergence(task, list(divergences))
    assert together == pytest.approx(list(divergences.values()), rel=1e-4, abs=1e-6)
    for name, kl in alone.items():
        assert kl == pytest.approx(updp.divergence(task, [frozenset({name})])[0], rel=1e-5)
    selection = updp.updp(task)
    assert {name for name, kept in selection.kept.items() if not len(kept)} == best
    assert all(len(selection.kept[layer.name]) in (0, layer.units) for layer in task.layers)


def test_updp_restores_what_may_stay_and_says_what_can_be_had(vit: Tiny) -> None:
    task = task_of(vit, 0.6)
    everything = frozenset(layer.name for layer in vit.layers)
    smaller = updp._minimal(task, everything)
    assert smaller < everything and updp._fits(task, smaller)
    assert not any(updp._fits(task, smaller - {name}) for name in smaller)
    assert updp.search(task_of(vit, 1.0), 4) == ([frozenset()], {})
    with pytest.raises(BudgetError, match="without any branch"):
        updp.updp(task_of(vit, 0.001))


@pytest.mark.parametrize("family", FAMILIES)
def test_savit_interactions_are_finite_differences_of_gate_gradients(family: str, families: dict[str, Tiny]) -> None:
    """And its scores are squared gradients of minibatches, of whole heads in attentions."""
    task = replace(in_double(task_of(families[family], batch=2)), labels=LABELS)
    scores, S = savit.importance_and_interactions(task)
    assert (S == S.T).all() and abs(S).min() > 0

    def gate_gradients(factors: dict[str, float], rows: slice) -> dict[str, Tensor]:
        """Gradients of two images' mean loss where all gates of a type have the value that `factors` names."""
        gates_ = {
            n.name: torch.full((n.units,), factors[n.kind], dtype=torch.float64).requires_grad_() for n in task.layers
        }
        with gradients.gated(task.model, task.layers, gates_):
            loss = F.cross_entropy(task.model(task.inputs[rows]), LABELS[rows])
        return dict(zip(gates_, torch.autograd.grad(loss, list(gates_.values())), strict=True))

    ε, halves = 1e-5, (slice(0, 2), slice(2, 4))
    units = {kind: sum(layer.units for layer in task.layers if layer.kind == kind) for kind in savit.TYPES}
    one = dict.fromkeys(savit.TYPES, 1.0)
    for i, moved in enumerate(savit.TYPES):
        total = dict.fromkeys(savit.TYPES, 0.0)
        for rows in halves:
            up, down = gate_gradients(one | {moved: 1 + ε}, rows), gate_gradients(one | {moved: 1 - ε}, rows)
            for layer in task.layers:
                total[layer.kind] += float((up[layer.name] - down[layer.name]).sum()) / (2 * ε) / len(halves)
        for j, kind in enumerate(savit.TYPES):
            assert S[i, j] == pytest.approx(total[kind] / (units[moved] * units[kind]), rel=1e-4)

    at_one = [gate_gradients(one, rows) for rows in halves]
    for layer in task.layers:
        each = torch.stack([part[layer.name] for part in at_one])
        if layer.kind == "attention":
            each = each.view(2, layer.heads, -1).sum(2)
        torch.testing.assert_close(scores[layer.name], each.square().mean(0))


@pytest.mark.parametrize("S", [[[3.0, 1.0], [1.0, 2.0]], [[1.0, -0.5], [-0.5, 4.0]], [[-2.0, 0.1], [0.1, -1.0]]])
def test_savit_split_is_that_of_a_brute_force_grid(S: list[list[float]]) -> None:
    heads, head_macs, ffn_macs, to_go = 240, 1.0, 480.0, 300.0
    order = savit.splits(np.array(S), np.full(heads, head_macs), heads, ffn_macs, to_go)
    a = np.linspace(0, 1, 200_001)
    b = (to_go - a * heads * head_macs) / ffn_macs
    objective = np.where((b >= 0) & (b <= 1), S[0][0] * a * a + 2 * S[0][1] * a * b + S[1][1] * b * b, np.inf)
    assert order[0] / heads == pytest.approx(a[objective.argmin()], abs=0.51 / heads)
    assert sorted(order) == list(range(241))


def test_savit_split_leaves_out_what_the_ffns_cannot_give_or_take() -> None:
    assert sorted(savit.splits(np.eye(2), np.full(10, 10.0), 10, 100.0, 120.0)) == list(range(2, 11))
    assert sorted(savit.splits(np.eye(2), np.full(10, 10.0), 10, 100.0, 40.0)) == list(range(5))
    assert savit.splits(np.eye(2), np.full(10, 10.0), 10, 100.0, 250.0) == []


def test_savit_removes_whole_heads_by_one_threshold(swin: Tiny) -> None:
    task = task_of(swin, budget=0.4)
    kept = savit.savit(task).kept
    scores, _ = savit.importance_and_interactions(task)
    stay, gone = [], []
    for layer in swin.layers:
        if layer.kind == "attention":
            sizes = torch.bincount(kept[layer.name] // layer.units_per_head, minlength=layer.heads)
            assert set(sizes.tolist()) <= {0, layer.units_per_head} and sizes.any()  # the floor keeps one
            best = float(scores[layer.name].max())
            gone += scores[layer.name][sizes == 0].tolist()
            stay += [score for score in scores[layer.name][sizes > 0].tolist() if score < best]
    assert gone and (not stay or max(gone) < min(stay))


def test_savit_says_what_heads_and_ffns_cannot_meet(deit: Tiny) -> None:
    with pytest.raises(BudgetError, match=r"budget 0\.45 of the MACs cannot be met by whole heads and FFN units"):
        savit.savit(task_of(deit, budget=0.45))


def test_updp_lets_the_finalists_of_a_thinned_search_meet_on_the_whole_metric_set(
    vit: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = task_of(vit, 0.35)
    monkeypatch.setattr(updp, "IMAGES", 2)
    part = updp._thinned(task, 2)
    assert torch.equal(part.inputs, vit.inputs[[0, 2]])
    finalists = updp.search(part, updp.BEAM)[0][: updp.BEAM]
    best = min(finalists, key=lambda drop: updp.divergence(task, [drop])[0])
    assert {name for name, kept in updp.updp(task).kept.items() if not len(kept)} == best


def test_updp_measures_only_the_best_of_a_level_on_all_images(vit: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    task = task_of(vit, 0.35)
    monkeypatch.setattr(updp, "SCREEN_IMAGES", 2)
    monkeypatch.setattr(updp, "SCREENED", 2)
    few = updp._thinned(task, 2)
    pairs = [frozenset(pair) for pair in combinations([layer.name for layer in vit.layers], 2)]
    rough = dict(zip(pairs, updp.divergence(few, pairs), strict=True))
    assert updp._screened(task, pairs) == sorted(pairs, key=rough.__getitem__)[:2]
    assert updp._screened(few, pairs) == pairs and updp._screened(task, pairs[:2]) == pairs[:2]
    singles = [frozenset({layer.name}) for layer in vit.layers]
    assert updp._screened(task, singles) == singles, "their divergence is the importance of a layer"


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
    with pytest.raises(ConfigError, match="mine"):
        registry.criterion_of("yours")


def test_tap_weighs_its_terms_by_the_options(vit: Tiny) -> None:
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
