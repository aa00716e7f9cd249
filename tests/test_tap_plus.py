"""TAP+ and its parts: sensitivity, backward elimination, weighted compensation."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from backbones import PADDED_SWIN, Tiny, overflowing, tiny
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from tapfl.config import PruningOptions
from tapfl.errors import ModelError
from tapfl.models.residual import real_tokens
from tapfl.pruning import sensitivity
from tapfl.pruning.basis import carried_energy
from tapfl.pruning.criteria import criterion
from tapfl.pruning.criteria.registry import resolved
from tapfl.pruning.criteria.tap import elimination_order
from tapfl.pruning.moments import LostOutput
from tapfl.pruning.pipeline import prune_model, pruning_task
from tapfl.pruning.sensitivity import TRUST, sensitivities
from tapfl.seeds import torch_generator

FAMILIES = ["vit", "deit", "swin"]


def covariance(generator: torch.Generator, units: int) -> Tensor:
    X = torch.randn(4 * units, units, generator=generator, dtype=torch.float64) @ torch.randn(
        units, units, generator=generator, dtype=torch.float64
    )
    return X.T @ X / len(X)


def error_left(W: Tensor, C: Tensor, M: Tensor, gone: list[int]) -> float:
    """Returns tr(M W_S C_S|R W_Sᵀ): the part of the other units' output that the kept units cannot explain."""
    stay = [j for j in range(len(C)) if j not in gone]
    C_SS, C_SR, C_RR = C[gone][:, gone], C[gone][:, stay], C[stay][:, stay]
    left = C_SS - C_SR @ torch.linalg.solve(C_RR, C_SR.T) if stay else C_SS
    return float(torch.trace(M @ W[:, gone] @ left @ W[:, gone].T))


@given(
    units=st.integers(1, 12), outputs=st.integers(1, 6), ridge=st.sampled_from([0.0, 0.3]), seed=st.integers(0, 1000)
)
def test_the_errors_equal_those_of_the_best_compensation(units: int, outputs: int, ridge: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    C = covariance(generator, units)
    M = covariance(generator, outputs)
    W = torch.randn(outputs, units, generator=generator, dtype=torch.float64)
    order, errors = elimination_order(W, C, M, ridge)
    C = C + ridge * C.diagonal().mean() * torch.eye(units, dtype=C.dtype)
    assert sorted(order.tolist()) == list(range(units))
    for n in range(1, units + 1):
        assert float(errors[n - 1]) == pytest.approx(error_left(W, C, M, order[:n].tolist()), rel=1e-6)
    first = [error_left(W, C, M, [j]) for j in range(units)]
    assert first[int(order[0])] == pytest.approx(min(first), rel=1e-9)


def test_of_two_redundant_units_one_is_removed_first_and_the_other_last() -> None:
    C = torch.diag(torch.tensor([1.0, 1.0, 0.1, 0.2], dtype=torch.float64))
    C[0, 1] = C[1, 0] = 1 - 1e-9
    W = torch.ones(1, 4, dtype=torch.float64)
    order, errors = elimination_order(W, C, torch.eye(1, dtype=torch.float64), ridge=1e-6)
    assert set(order[[0, -1]].tolist()) == {0, 1}  # ranked by its own norm, unit 0 would be removed among the last
    assert float(errors[0]) < 1e-4


def test_constant_units_are_removed_at_no_cost() -> None:
    """E[x²] − E[x]² of a constant is rounding with either sign; the errors are at least 0."""
    moments = LostOutput(6, 0)
    for _ in range(50):
        moments.add(torch.full((40, 6), 0.1) * torch.arange(1, 7), torch.zeros(40, 0))
    W = torch.randn(3, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    order, errors = elimination_order(W, moments.covariance(), torch.eye(3, dtype=torch.float64))
    assert sorted(order.tolist()) == list(range(6))
    assert (errors.diff() >= 0).all() and errors[0] >= 0 and errors[-1] < 1e-6


@pytest.mark.parametrize("scale", [1e-25, 1.0])
def test_a_confident_model_has_finite_row_weights(scale: float, vit: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """Squares of gradients of 1e-25 underflow in float32."""
    gradient = torch.randn(4, 5, 32, generator=torch.Generator().manual_seed(1))
    found = []
    for size in (1.0, scale):
        monkeypatch.setattr(sensitivity, "_output_gradients", lambda *_args, size=size: {"x": size * gradient})
        layer = replace(vit.layers[0], name="x")
        found.append(sensitivities(vit.model, [layer], vit.inputs, 4, torch.Generator())["x"].rows[0])
    torch.testing.assert_close(found[1], found[0])
    assert found[1].dtype == torch.float32 and found[1].std() > 0.01


@pytest.mark.parametrize("family", FAMILIES)
def test_sensitivity_is_the_gradient_of_the_sampled_loss(family: str, families: dict[str, Tiny]) -> None:
    backbone = families[family]
    layers = backbone.layers
    found = sensitivities(backbone.model, layers, backbone.inputs, 4, torch.Generator().manual_seed(3))
    labels = torch.multinomial(
        backbone.model(backbone.inputs).softmax(-1), 1, generator=torch.Generator().manual_seed(3)
    )[:, 0]
    for layer in (layers[0], layers[-1]):
        model = copy.deepcopy(backbone.model)
        linear = model.get_submodule(f"{layer.name}.{layer.output}")
        assert isinstance(linear, nn.Linear) and linear.bias is not None
        linear.bias.requires_grad_(True)
        outputs: list[Tensor] = []
        linear.register_forward_hook(lambda _module, _inputs, output, outputs=outputs: outputs.append(output))
        loss = F.cross_entropy(model(backbone.inputs), labels, reduction="sum")
        g = torch.autograd.grad(loss, outputs[-1])[0].flatten(0, -2).double()
        (rows,), M = found[layer.name].rows, found[layer.name].metric
        torch.testing.assert_close(M, g.T @ g / len(g), rtol=1e-3, atol=1e-6 * float(M.diagonal().max()))
        norms = g.square().sum(1)
        torch.testing.assert_close(rows.double(), TRUST * norms / norms.mean() + 1 - TRUST, rtol=1e-3, atol=1e-6)
    assert not any(module._forward_hooks for module in backbone.model.modules())


def test_a_prediction_that_is_not_finite_is_refused(vit: Tiny) -> None:
    with pytest.raises(ModelError, match=r"sensitivity: .* is not finite; its weights are too large"):
        sensitivities(overflowing(vit.model), vit.layers, vit.inputs, 4, torch.Generator())


def test_the_weights_of_rows_that_are_not_padding_have_mean_one() -> None:
    swin = tiny(PADDED_SWIN)
    layer = swin.layers[0]
    real = real_tokens(swin.model, layer)
    (rows,) = sensitivities(swin.model, [layer], swin.inputs, 4, torch.Generator().manual_seed(3))[layer.name].rows
    assert real is not None and rows.view(4, -1)[:, real].mean() == pytest.approx(1)


def test_rows_with_larger_weights_are_compensated_better() -> None:
    generator = torch.Generator().manual_seed(0)
    Z, r = torch.randn(200, 3, generator=generator), torch.randn(200, 2, generator=generator)
    weights = torch.cat([torch.full((100,), 9.0), torch.full((100,), 1.0)])

    def errors(weights: Tensor | None) -> Tensor:
        lost = LostOutput(3, 2, weights=None if weights is None else [weights])
        lost.add(Z, r)
        D, e = lost.regression(ridge=0.0)
        return (r.double() - Z.double() @ D.T - e).square().sum(1)

    plain, weighted = errors(None), errors(weights)
    assert weighted[:100].sum() < plain[:100].sum() and weighted[100:].sum() > plain[100:].sum()
    torch.testing.assert_close(errors(torch.full((200,), 2.5)), plain)  # weights are relative


@pytest.mark.parametrize("family", FAMILIES)
def test_tap_plus_prunes_every_family_and_repeats(family: str, families: dict[str, Tiny]) -> None:
    backbone = families[family]
    options = PruningOptions(criterion="tap+", align=1)
    made = [prune_model(pruning_task(backbone.model, backbone.inputs, 0.6, options, 2), backbone.spec) for _ in "ab"]
    assert made[0].plan == made[1].plan and not made[0].exact
    assert 0.597 <= made[0].plan.cost.macs / made[0].plan.dense.macs <= 0.6
    state = made[1].model.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in made[0].model.state_dict().items())
    said = made[0].plan.provenance
    assert (said["basis"], said["compensation"], said["ratio"]) == ("canonical", "sequential", "uniform")


def test_scores_and_compensation_share_their_sensitivities(vit: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[nn.Module] = []
    monkeypatch.setattr(
        criterion, "sensitivities", lambda model, *args: (made.append(model), sensitivities(model, *args))[1]
    )
    task = pruning_task(vit.model, vit.inputs, 0.6, PruningOptions(criterion="tap+", align=1), 4)
    prune_model(task, vit.spec)
    assert made == [task.model]
    again = sensitivities(task.model, task.layers, task.inputs, task.batch, torch_generator(0, "criterion"))
    assert all(torch.equal(again[name].metric, found.metric) for name, found in task.fisher.items())


def test_each_part_of_tap_plus_can_be_switched_off(vit: Tiny) -> None:
    own = resolved(PruningOptions(criterion="tap+"))
    assert (own.ratio, own.basis, own.compensation, own.compensation_rows) == (
        "uniform", "canonical", "sequential", "sensitivity",
    )  # fmt: skip
    assert resolved(PruningOptions(criterion="tap")).compensation == "none"
    options = PruningOptions(criterion="tap+", align=1, basis="none", compensation="none")
    task = pruning_task(vit.model, vit.inputs, 0.6, options, 4)
    assert carried_energy(task.model) is None
    assert prune_model(task, vit.spec).exact
