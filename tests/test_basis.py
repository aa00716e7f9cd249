"""The canonical basis: the function does not change, and the order of a head's dimensions is the optimal one."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from backbones import CLASSES, PADDED_SWIN, VIT, VIT_ARGS, Tiny, random_kept, tiny
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from tapfl.config import PruningOptions
from tapfl.data.sources import load_images
from tapfl.data.transform import Transform
from tapfl.errors import ConfigError, ModelError
from tapfl.models.backbone import BackboneSpec
from tapfl.models.forward import example_input, transform_of
from tapfl.models.residual import observe, real_tokens
from tapfl.pruning.basis import BATCH, POOL_IMAGES, canonical_basis, carried_energy, ordering, turned_on_pool
from tapfl.pruning.criteria.norms import output_norms
from tapfl.pruning.criteria.registry import criterion_of
from tapfl.pruning.layer_importance import layer_importance
from tapfl.pruning.pipeline import plan_of, prune_model, pruning_task
from tapfl.pruning.surgery import shrink
from tapfl.seeds import numpy_generator

FAMILIES = ["vit", "deit", "swin"]


def unseen(backbone: Tiny) -> Tensor:
    return torch.randn(example_input(backbone.model, 5).shape, generator=torch.Generator().manual_seed(8))


def largest_difference(a: nn.Module, b: nn.Module, inputs: Tensor) -> float:
    """Returns the largest difference of the logits, relative to the largest logit."""
    expected = b(inputs)
    return float((a(inputs) - expected).detach().abs().max() / expected.detach().abs().max())


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_function_is_preserved(family: str, fused: bool, families: dict[str, Tiny]) -> None:
    backbone = families[family]
    model: Any = copy.deepcopy(backbone.model)
    for layer in backbone.layers:
        if layer.kind == "attention":
            model.get_submodule(layer.name).fused_attn = fused
    turned: Any = canonical_basis(model, backbone.layers, backbone.inputs.split(3))
    for inputs in (backbone.inputs, unseen(backbone)):
        assert largest_difference(turned, backbone.model, inputs) < 1e-5
    first = next(layer for layer in backbone.layers if layer.kind == "attention").name
    change = turned.get_submodule(first).qkv.weight - backbone.model.get_submodule(first).qkv.weight
    assert change.abs().max() > 0.1


@pytest.mark.parametrize("args", [{"qkv_bias": False}, {"proj_bias": False}, {"qkv_bias": False, "proj_bias": False}])
def test_the_function_is_preserved_without_biases(args: dict[str, Any]) -> None:
    backbone = tiny(BackboneSpec(name=VIT.name, args=VIT_ARGS | args, num_classes=CLASSES))
    turned = canonical_basis(backbone.model, backbone.layers, backbone.inputs.split(4))
    assert largest_difference(turned, backbone.model, unseen(backbone)) < 1e-5
    assert turned.state_dict().keys() == backbone.model.state_dict().keys()


def test_dead_and_dependent_dims_are_handled(vit: Tiny) -> None:
    model: Any = copy.deepcopy(vit.model)
    qkv, proj = model.blocks[0].attn.qkv, model.blocks[1].attn.proj
    qkv.weight[:8], qkv.bias[:8] = 0, 0  # dims of a query that are 0
    qkv.weight[64 + 3], qkv.bias[64 + 3] = qkv.weight[64 + 5], qkv.bias[64 + 5]  # two equal dims of a value
    model.blocks[1].attn.qkv.weight[16:32], model.blocks[1].attn.qkv.bias[16:32] = 0, 0  # a head without a query
    proj.weight[:, :16] = 0  # a head whose output is not used
    turned = canonical_basis(model, vit.layers, vit.inputs.split(4))
    assert largest_difference(turned, model, unseen(vit)) < 1e-5
    assert all(torch.isfinite(tensor).all() for tensor in turned.state_dict().values())


@pytest.mark.parametrize("seed", range(6))
def test_a_head_with_constant_output_is_rotated(seed: int, vit: Tiny) -> None:
    """The covariance of its output is only rounding, which sometimes has negative eigenvalues."""
    model: Any = copy.deepcopy(vit.model)
    qkv, generator = model.blocks[0].attn.qkv, torch.Generator().manual_seed(seed)
    qkv.weight[64:] = 0
    qkv.bias[64:] = torch.randn(32, generator=generator)
    inputs = torch.randn(16, *vit.inputs.shape[1:], generator=generator)
    turned = canonical_basis(model, vit.layers, inputs.split(8))
    assert largest_difference(turned, model, unseen(vit)) < 1e-5


@given(st.integers(1, 6), st.integers(0, 999))
def test_ordering_balances_both_sides(dims: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x, y = (torch.randn(2, dims + 4, dims, generator=generator).double() for _ in range(2))
    left, right = x.mT @ x, y.mT @ y
    B, B_other, sigma = ordering(left, right)
    torch.testing.assert_close(B @ B_other.mT, torch.eye(dims).double().expand(2, dims, dims), atol=1e-8, rtol=0)
    # σ are the singular values of left^½ right^½, here of the table of all products
    expected = torch.linalg.svdvals(x @ y.mT)[:, :dims]
    torch.testing.assert_close(sigma, expected, rtol=1e-6, atol=1e-7 * float(expected.max()))
    for moments, basis in ((left, B), (right, B_other)):
        torch.testing.assert_close(
            basis.mT @ moments @ basis, torch.diag_embed(sigma), rtol=1e-5, atol=1e-6 * float(sigma.max())
        )


def seen_by(model: nn.Module, name: str, inputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns (input of qkv, output of qkv, input of proj) of one attention, float64 (spans, tokens, ·)."""
    module: Any = model.get_submodule(name)
    seen: list[Tensor] = []
    handles = [
        module.qkv.register_forward_hook(lambda _m, x, y: seen.extend((x[0], y))),
        module.proj.register_forward_pre_hook(lambda _m, x: seen.append(x[0])),
    ]
    model(inputs)
    for handle in handles:
        handle.remove()
    x, qkv, o = (tensor.double() for tensor in seen)
    return x, qkv, o


def tails(values: np.ndarray) -> np.ndarray:
    """Returns Σ_{r >= k} σ_r² for every k, the smallest squared error of rank k (Eckart-Young)."""
    return np.cumsum((values**2)[::-1])[::-1]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_first_dims_of_v_are_the_best_head_of_that_rank(family: str, families: dict[str, Tiny]) -> None:
    backbone = families[family]
    turned = canonical_basis(backbone.model, backbone.layers, backbone.inputs.split(4))
    for layer in (layer for layer in backbone.layers if layer.kind == "attention"):
        d = layer.units_per_head
        outputs = {}
        for key, model in (("dense", backbone.model), ("turned", turned)):
            o = seen_by(model, layer.name, backbone.inputs)[2].flatten(0, 1).numpy()
            outputs[key] = o, model.get_submodule(layer.name).proj.weight.double().numpy()
        for head in range(layer.heads):
            own = slice(head * d, head * d + d)
            o, W_o = outputs["dense"]
            written = (o[:, own] - o[:, own].mean(0)) @ W_o[:, own].T  # the head's output minus its mean
            best = tails(np.linalg.svd(written, compute_uv=False)[:d])
            o, W_o = outputs["turned"]
            assert abs(o[:, own].mean(0)).max() < 1e-4
            for k in range(0, d, 3):
                kept = o[:, own][:, :k] @ W_o[:, own][:, :k].T
                error = ((written - kept) ** 2).sum()
                assert error == pytest.approx(best[k], rel=1e-3, abs=1e-7 * best[0])


@pytest.mark.parametrize("family", FAMILIES)
def test_the_first_dims_of_q_and_k_are_the_best_logits_of_that_rank(family: str, families: dict[str, Tiny]) -> None:
    """Compares with the truncated SVD of S_x^½ W_qᵀ W_k C_x^½; x has a 1 for the biases, C_x is within spans."""
    backbone = families[family]
    turned = canonical_basis(backbone.model, backbone.layers, backbone.inputs.split(4))
    for layer in (layer for layer in backbone.layers if layer.kind == "attention"):
        d = layer.units_per_head
        x, _, _ = seen_by(backbone.model, layer.name, backbone.inputs)
        x = torch.cat([x, torch.ones_like(x[..., :1])], dim=-1)
        queries, keys = x.flatten(0, 1).numpy(), (x - x.mean(1, keepdim=True)).flatten(0, 1).numpy()
        left, right = (np.linalg.qr(side, mode="r") for side in (queries, keys))  # leftᵀ left = Σ x xᵀ
        whitened = {}
        for key, model in (("dense", backbone.model), ("turned", turned)):
            qkv: Any = model.get_submodule(layer.name).qkv
            W = np.concatenate([qkv.weight.numpy(), qkv.bias.numpy()[:, None]], axis=1).astype(np.float64)
            whitened[key] = [
                (left @ W[head * d :][:d].T, right @ W[layer.units + head * d :][:d].T) for head in range(layer.heads)
            ]
        q, k, _ = seen_by(backbone.model, layer.name, backbone.inputs)[1].unflatten(-1, (3, layer.heads, d)).unbind(2)
        q_turned, k_turned, _ = (
            seen_by(turned, layer.name, backbone.inputs)[1].unflatten(-1, (3, layer.heads, d)).unbind(2)
        )
        logits = torch.einsum("bnhd,bmhd->bhnm", q, k)
        difference = torch.einsum("bnhd,bmhd->bhnm", q_turned, k_turned) - logits
        assert difference.abs().max() < 1e-5 * logits.abs().max()  # key biases too, although the softmax ignores them
        for (Q, K), (Q_turned, K_turned) in zip(whitened["dense"], whitened["turned"], strict=True):
            best = tails(np.linalg.svd(Q @ K.T, compute_uv=False)[:d])
            for rank in range(0, d, 3):
                error = ((Q @ K.T - Q_turned[:, :rank] @ K_turned[:, :rank].T) ** 2).sum()
                assert error == pytest.approx(best[rank], rel=1e-3, abs=1e-7 * best[0])


def test_padding_of_windows_does_not_count() -> None:
    """The moments of queries and outputs are those of the other tokens; keys at the padding get attention, too."""
    swin = tiny(PADDED_SWIN)
    turned = canonical_basis(swin.model, swin.layers, swin.inputs.split(3))
    for layer in (layer for layer in swin.layers if layer.kind == "attention"):
        real = real_tokens(swin.model, layer)
        assert real is not None and not real.all()
        _, qkv, o = seen_by(turned, layer.name, swin.inputs)
        q, k, _ = qkv.unflatten(-1, (3, layer.heads, -1)).unbind(2)
        q, o = (x.reshape(-1, layer.tokens, layer.units)[:, real].flatten(0, 1) for x in (q.flatten(2), o))
        assert o.mean(0).abs().max() < 1e-4
        k = (k - k.mean(1, keepdim=True)).flatten(0, 1).transpose(0, 1)
        q = q.unflatten(-1, (layer.heads, -1)).transpose(0, 1)
        sigma, other = (x.mT @ x / x.shape[1] for x in (q, k))
        torch.testing.assert_close(sigma, other, rtol=1e-3, atol=1e-3 * float(sigma.max()))


@pytest.mark.parametrize("family", FAMILIES)
def test_dims_are_ordered_by_their_energy(family: str, families: dict[str, Tiny]) -> None:
    backbone = families[family]
    turned = canonical_basis(backbone.model, backbone.layers, backbone.inputs.split(4))
    carried = carried_energy(turned)
    assert carried is not None
    assert list(carried) == [layer.name for layer in backbone.layers if layer.kind == "attention"]
    for layer in backbone.layers:
        if layer.kind == "attention":
            shares = carried[layer.name].view(layer.heads, -1)
            assert (shares[:, 1:] <= shares[:, :-1]).all() and (shares >= 0).all()
            torch.testing.assert_close(shares.sum(1), torch.ones(layer.heads, dtype=torch.float64))
            # balanced: E q² = E k² = σ, with the keys about their span's mean
            _, qkv, _ = seen_by(turned, layer.name, backbone.inputs)
            q, k, _ = qkv.unflatten(-1, (3, layer.units)).unbind(2)
            q_size, k_size = q.square().mean((0, 1)), (k - k.mean(1, keepdim=True)).square().mean((0, 1))
            torch.testing.assert_close(q_size, k_size, rtol=1e-2, atol=1e-4 * float(q_size.max()))


def test_the_dense_model_is_not_changed(swin: Tiny) -> None:
    state = {name: tensor.clone() for name, tensor in swin.model.state_dict().items()}
    turned = canonical_basis(swin.model, swin.layers, swin.inputs.split(4))
    assert all(torch.equal(tensor, state[name]) for name, tensor in swin.model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for net in (swin.model, turned) for m in net.modules())
    assert turned.state_dict().keys() == state.keys()
    assert carried_energy(swin.model) is None
    assert carried_energy(copy.deepcopy(turned)) is not None


def test_the_batch_size_does_not_matter(vit: Tiny) -> None:
    one, many = (canonical_basis(vit.model, vit.layers, vit.inputs.split(batch)) for batch in (4, 1))
    for (name, a), b in zip(one.state_dict().items(), many.state_dict().values(), strict=True):
        assert torch.allclose(a.abs(), b.abs(), atol=1e-3), name  # a dim may have the other sign


def test_the_basis_of_a_pool_holds_one_batch_of_it_at_a_time(vit: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    digits, transform, sizes = load_images("digits"), transform_of(vit.model), []
    call = Transform.__call__
    monkeypatch.setattr(Transform, "__call__", lambda self, x: sizes.append(len(x)) or call(self, x))
    turned = turned_on_pool(vit.model, digits, transform, seed=3)
    assert sizes == [BATCH] * (POOL_IMAGES // BATCH)
    drawn = numpy_generator(3, "basis").permutation(len(digits))[:POOL_IMAGES]
    whole = canonical_basis(vit.model, vit.layers, transform(digits.read(drawn)).split(BATCH))
    assert all(map(torch.equal, turned.state_dict().values(), whole.state_dict().values()))


def test_impossible_input_is_refused(vit: Tiny) -> None:
    with pytest.raises(ModelError, match="at least one image"):
        canonical_basis(vit.model, vit.layers, [])
    with pytest.raises(ModelError, match=r"blocks\.0\.attn: activations are not finite in batch 2"):
        canonical_basis(vit.model, vit.layers, vit.inputs.index_fill(0, torch.tensor(2), torch.inf).split(1))


@pytest.mark.parametrize("ratio", ["uniform", "adaptive"])
@pytest.mark.parametrize("family", FAMILIES)
def test_lowrank_heads_keep_the_first_dims(family: str, ratio: Any, families: dict[str, Tiny]) -> None:
    backbone = families[family]
    options = PruningOptions(criterion="lowrank-heads", align=1, ratio=ratio)
    task = pruning_task(backbone.model, backbone.inputs, 0.6, options, batch=4)
    selection = criterion_of("lowrank-heads")(task)
    assert selection.model is None and carried_energy(backbone.model) is None
    assert largest_difference(task.model, backbone.model, backbone.inputs) < 1e-5
    norms = output_norms(task)
    for layer in backbone.layers:
        kept = selection.kept[layer.name]
        if layer.kind == "attention":
            dims = kept.view(layer.heads, -1) - torch.arange(layer.heads)[:, None] * layer.units_per_head
            assert torch.equal(dims, torch.arange(dims.shape[1]).expand_as(dims))
        else:
            dropped = sorted({*range(layer.units)} - {*kept.tolist()})
            assert norms[layer.name][kept].min() >= norms[layer.name][dropped].max() * (1 - 1e-4)
    plan = plan_of(task, selection, backbone.spec)
    assert 0.597 * task.dense.macs <= plan.cost.macs <= 0.6 * task.dense.macs


def test_a_model_in_the_basis_is_not_rotated_again(vit: Tiny) -> None:
    turned = canonical_basis(vit.model, vit.layers, unseen(vit).split(5))
    task = pruning_task(turned, vit.inputs, 0.6, PruningOptions(criterion="lowrank-heads", align=1), batch=4)
    assert task.model is turned
    selection = criterion_of("lowrank-heads")(task)
    kept = selection.kept["blocks.0.attn"].view(2, -1)
    assert torch.equal(kept[0], torch.arange(kept.shape[1])) and torch.equal(kept[1], kept[0] + 16)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_first_dims_are_better_than_arbitrary_ones(family: str, families: dict[str, Tiny]) -> None:
    backbone = families[family]
    turned = canonical_basis(backbone.model, backbone.layers, backbone.inputs.split(4))
    layer = next(layer for layer in backbone.layers if layer.kind == "attention")
    heads = torch.arange(layer.heads)[:, None] * layer.units_per_head
    first = {layer.name: (heads + torch.arange(layer.units_per_head // 2)).flatten()}

    @torch.no_grad()
    def error(model: nn.Module, kept: dict[str, Tensor]) -> float:
        dense = observe(model, layer, model, backbone.inputs)
        args, kwargs = dense.arguments
        small = layer.shrink(model.get_submodule(layer.name), kept[layer.name])
        return float((small(*args, **kwargs) - dense.output).square().sum())

    arbitrary = [error(backbone.model, random_kept([layer], 0.5, seed)) for seed in range(3)]
    assert error(turned, first) < 0.5 * min(arbitrary)


def test_a_shrunk_low_rank_model_has_the_stated_cost(vit: Tiny) -> None:
    task = pruning_task(vit.model, vit.inputs, 0.6, PruningOptions(criterion="lowrank-heads", align=1), batch=4)
    selection = criterion_of("lowrank-heads")(task)
    plan = plan_of(task, selection, vit.spec)
    assert sum(p.numel() for p in shrink(task.model, plan).parameters()) == plan.cost.params


def test_layers_are_probed_in_the_basis_in_which_they_are_pruned(vit: Tiny) -> None:
    chosen = {}
    ratios: tuple[Any, ...] = ("uniform", "adaptive")
    for ratio in ratios:
        options = PruningOptions(criterion="lowrank-heads", align=1, ratio=ratio)
        task = pruning_task(vit.model, vit.inputs, 0.6, options, batch=4)
        chosen[ratio] = criterion_of("lowrank-heads")(task)
    expected = layer_importance(task.model, vit.layers, chosen["uniform"].kept, vit.inputs, batch=4)
    assert chosen["adaptive"].importance == pytest.approx(expected, rel=1e-4)


def test_lowrank_heads_in_another_basis_are_refused(vit: Tiny) -> None:
    options = PruningOptions(criterion="lowrank-heads", align=1, basis="none")
    with pytest.raises(ConfigError, match=r"pruning.basis = 'none': criterion lowrank-heads"):
        pruning_task(vit.model, vit.inputs, 0.6, options, batch=4)
    task = pruning_task(vit.model, vit.inputs, 0.6, PruningOptions(criterion="lowrank-heads", align=1), batch=4)
    with pytest.raises(ConfigError, match=r"pruning.basis = 'none': criterion lowrank-heads"):
        criterion_of("lowrank-heads")(replace(task, model=vit.model))


def test_any_criterion_can_be_used_in_the_basis(vit: Tiny) -> None:
    options = PruningOptions(criterion="tap", align=1, basis="canonical")
    task = pruning_task(vit.model, vit.inputs, 0.6, options, batch=4)
    assert carried_energy(task.model) is not None
    pruned = prune_model(task, vit.spec)
    assert not pruned.exact and pruned.plan.provenance["basis"] == "canonical"
    assert largest_difference(pruned.model, shrink(task.model, pruned.plan), vit.inputs) == 0
