"""SAViT: squared gate gradients, interactions between the two types of gates, and the resulting split."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from backbones import Tiny
from test_criteria import FAMILIES, LABELS, in_double, task_of
from torch import Tensor
from torch.nn import functional as F

from tapfl.errors import BudgetError
from tapfl.pruning.criteria import gradients, savit


@pytest.mark.parametrize("family", FAMILIES)
def test_savit_interactions_are_finite_differences_of_gate_gradients(family: str, families: dict[str, Tiny]) -> None:
    """The scores are squared gradients of minibatches, in attentions for whole heads."""
    task = replace(in_double(task_of(families[family], batch=2)), labels=LABELS)
    scores, S = savit.importance_and_interactions(task)
    assert (S == S.T).all() and abs(S).min() > 0

    def gate_gradients(factors: dict[str, float], rows: slice) -> dict[str, Tensor]:
        """Returns gradients of two images' mean loss if all gates of a type have the value in `factors`."""
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


def test_savit_split_respects_the_limits_of_the_ffns() -> None:
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


def test_savit_names_a_budget_that_heads_and_ffns_cannot_meet(deit: Tiny) -> None:
    with pytest.raises(BudgetError, match=r"budget 0\.45 of the MACs cannot be met by whole heads and FFN units"):
        savit.savit(task_of(deit, budget=0.45))
