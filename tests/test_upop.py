"""UPop: masks, their standardised gradients, and a search that trains while masks fade."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from backbones import Tiny
from test_criteria import FAMILIES, LABELS, in_double, same, task_of
from torch import Tensor
from torch.nn import functional as F

from tapfl.models.units import PrunableLayer, replaced
from tapfl.pruning.criteria import registry, upop


@pytest.mark.parametrize("family", FAMILIES)
def test_upop_masks_are_shared_by_heads_and_sit_before_the_activation(family: str, families: dict[str, Tiny]) -> None:
    """A mask of 0 equals removing the unit in every head, and its gradient equals a finite difference."""
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


def test_upop_ignores_differences_of_gradients_within_rounding(vit: Tiny) -> None:
    generator = torch.Generator().manual_seed(0)
    gradients = {n.name: 0.1 + 1e-9 * torch.randn(n.units_per_head, generator=generator).double() for n in vit.layers}
    assert all(not z.any() for z in upop.standardise(vit.layers, gradients).values())
    tiny = {n.name: 1e-30 * torch.randn(n.units_per_head, generator=generator).double() for n in vit.layers}
    assert all(z.any() for z in upop.standardise(vit.layers, tiny).values())


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
    left, threshold = 0.3 * task.dense.macs, 0.0  # by decreasing z, until the costs sum to the cost to remove
    for value, macs in ranked:
        threshold, left = -value, left - macs
        if left < 0:
            break
    for layer in vit.layers:  # one threshold for both types, except for the units that make the budget exact
        count = int((z[layer.name] < threshold).sum())
        assert abs(len(_dims(layer, kept)) - count) <= 2, (layer.name, worst_kept)


def _dims(layer: PrunableLayer, kept: dict[str, Tensor]) -> Tensor:
    """Returns the kept dims, which must be the same in every head."""
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


def test_upop_masks_fade_to_zero_for_the_cost_to_remove(vit: Tiny) -> None:
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
            assert not below.any() or z[name][below].min() > z[name][~below].max()  # the largest z are removed first
    assert all(set(mask.tolist()) <= {0.0, 1.0} for mask in upop.faded(task, z, p, p).values())


def test_upop_adds_up_gradients_from_the_first_step(vit: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """With constant weights and masks every step has the same gradient, that of the one-shot variant."""
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


def test_upop_trains_while_masks_fade(vit: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """A separate implementation: weights step by their own gradients; masks sum theirs and fade after selections."""
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
        if not name.endswith("qkv.bias"):  # the gradient of keys is only rounding, of which AdamW makes a step
            torch.testing.assert_close(found.model.state_dict()[name], weight, rtol=1e-3, atol=1e-5)


def test_upop_trains_a_copy(vit: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upop, "STEPS", 7)
    found = upop.upop(task_of(vit))
    assert found.steps == 7 and found.model is not None
    moved = [not torch.equal(a, b) for a, b in zip(found.model.parameters(), vit.model.parameters(), strict=True)]
    assert all(moved)
    other = upop.upop(task_of(vit, seed=1)).model
    assert other is not None and not torch.equal(other.blocks[0].mlp.fc1.weight, found.model.blocks[0].mlp.fc1.weight)
