"""Compensation: exact if the removed units are linear in the kept ones, and ridge regression otherwise."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from backbones import CLASSES, VIT, VIT_ARGS, Tiny, plan_of, random_kept, scramble, tiny
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from tapfl.config import PruningOptions
from tapfl.errors import ModelError, PlanError
from tapfl.models.backbone import BackboneSpec
from tapfl.models.forward import example_input
from tapfl.models.residual import as_branch_output, branch_steps
from tapfl.models.units import PrunableLayer, replaced
from tapfl.pruning import compensation
from tapfl.pruning.compensation import cut
from tapfl.pruning.criteria.criterion import Selection
from tapfl.pruning.moments import LostOutput
from tapfl.pruning.pipeline import pruning_task
from tapfl.pruning.sensitivity import Sensitivities, Sensitivity
from tapfl.pruning.surgery import load_pruned, save_pruned, shrink

FAMILIES = ["vit", "deit", "swin"]
NOBODY = torch.empty(0, dtype=torch.int64)
Form = Callable[..., nn.Module]


def refitted(
    model: nn.Module,
    kept: dict[str, Tensor],
    inputs: Tensor,
    batch: int,
    fisher: Sensitivities | None = None,
    **how: object,
) -> nn.Module:
    task = pruning_task(model, inputs, 1.0, PruningOptions.model_validate({"criterion": "magnitude"} | how), batch)
    return cut(task, Selection(kept), fisher)


one_pass, sequential = (partial(refitted, compensation=how) for how in ("one-pass", "sequential"))
BOTH = pytest.mark.parametrize("form", [one_pass, sequential], ids=["one-pass", "sequential"])


def images(backbone: Tiny, count: int, seed: int = 5) -> Tensor:
    shape = example_input(backbone.model, count).shape
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def others(layer: PrunableLayer, kept: Tensor) -> Tensor:
    return torch.tensor(sorted({*range(layer.units)} - {*kept.tolist()}))


def with_redundant_units(backbone: Tiny, kept: dict[str, Tensor]) -> nn.Module:
    """Returns a copy in which every unit outside `kept` is a linear function of the kept ones."""
    model: Any = copy.deepcopy(backbone.model)
    generator = torch.Generator().manual_seed(2)
    for layer in backbone.layers:
        module, R = model.get_submodule(layer.name), kept[layer.name]
        S = others(layer, R)
        if layer.kind == "ffn":  # copies of kept units, and a constant one
            source = R[torch.randint(len(R), S.shape, generator=generator)]
            module.fc1.weight[S], module.fc1.bias[S] = module.fc1.weight[source], module.fc1.bias[source]
            module.fc1.weight[S[0]] = 0
        else:  # mixtures of the kept dims of the same head, with an own bias
            same_head = (S[:, None] // layer.units_per_head == R // layer.units_per_head).float()
            mix = same_head * torch.randn(len(S), len(R), generator=generator)
            for part in range(2):
                module.qkv.weight[S + part * layer.units], module.qkv.bias[S + part * layer.units] = 0, 0
            module.qkv.weight[S + 2 * layer.units] = mix @ module.qkv.weight[R + 2 * layer.units]
    return model


@BOTH
@pytest.mark.parametrize("family", FAMILIES)
def test_linear_functions_of_kept_units_are_restored_exactly(
    form: Form, family: str, families: dict[str, Tiny], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compensation, "RIDGE", 0.0)
    backbone = families[family]
    kept = random_kept(backbone.layers, 0.5)
    model = with_redundant_units(backbone, kept)
    dense = model(backbone.inputs)
    small = form(model, kept, backbone.inputs, batch=3)
    assert (small(backbone.inputs) - dense).abs().max() < 1e-4 * dense.abs().max()
    without = shrink(model, plan_of(backbone, kept))(backbone.inputs)
    assert (without - dense).abs().max() > 0.05 * dense.abs().max()
    assert {k: v.shape for k, v in small.state_dict().items()} == {
        k: v.shape for k, v in shrink(model, plan_of(backbone, kept)).state_dict().items()
    }


def ridge_by_lstsq(X_R: np.ndarray, r: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns (slope (kept, outputs), intercept) of ridge regression: least squares with rows sqrt(nλ) I."""
    centred, mean_r = X_R - X_R.mean(0), r.mean(0)
    rows = np.sqrt(1e-3 * centred.var(0).mean() * len(X_R)) * np.eye(X_R.shape[1])
    slope = np.linalg.lstsq(
        np.vstack([centred, rows]), np.vstack([r - mean_r, np.zeros((len(rows), r.shape[1]))]), rcond=None
    )[0]
    return slope, mean_r - X_R.mean(0) @ slope


@pytest.mark.parametrize("family", FAMILIES)
def test_one_pass_is_ridge_regression_of_pruned_units(family: str, families: dict[str, Tiny]) -> None:
    backbone = families[family]
    kept = random_kept(backbone.layers, 0.5)
    small = one_pass(backbone.model, kept, backbone.inputs, batch=3)
    layer = backbone.layers[-1]
    assert layer.kind == "ffn"
    linear: Any = backbone.model.get_submodule(f"{layer.name}.{layer.output}")
    seen: list[Tensor] = []
    handle = linear.register_forward_pre_hook(lambda _m, x: seen.append(x[0].flatten(0, -2)))
    for part in backbone.inputs.split(3):
        backbone.model(part)
    handle.remove()
    X, W2 = torch.cat(seen).double().numpy(), linear.weight.double().numpy()
    R, S = kept[layer.name].numpy(), others(layer, kept[layer.name]).numpy()
    A_T, nu = ridge_by_lstsq(X[:, R], X[:, S])
    found: Any = small.get_submodule(f"{layer.name}.{layer.output}")
    np.testing.assert_allclose(found.weight.detach().numpy(), W2[:, R] + W2[:, S] @ A_T.T, atol=2e-5)
    np.testing.assert_allclose(found.bias.detach().numpy(), linear.bias.numpy() + W2[:, S] @ nu, atol=2e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_one_pass_fits_what_the_shrunk_attention_lacks(family: str, families: dict[str, Tiny]) -> None:
    """A shrunk attention has other logits, so it lacks more than the contribution of the removed dims."""
    backbone = families[family]
    layer = backbone.layers[0]
    assert layer.kind == "attention"
    kept = {layer.name: random_kept([layer], 0.5)[layer.name]}
    small = one_pass(backbone.model, kept, backbone.inputs, batch=3)
    branch: Any = backbone.model.get_submodule(layer.name)
    shrunk: Any = layer.shrink(branch, kept[layer.name]).requires_grad_(False)
    Z: list[Tensor] = []
    r: list[Tensor] = []
    shrunk.proj.register_forward_pre_hook(lambda _m, x: Z.append(x[0].flatten(0, -2)))
    handle = branch.register_forward_hook(
        lambda _m, args, kwargs, y: r.append((y - shrunk(*args, **kwargs)).flatten(0, -2)), with_kwargs=True
    )
    with torch.no_grad():
        backbone.model(backbone.inputs)
    handle.remove()
    slope, intercept = ridge_by_lstsq(torch.cat(Z).double().numpy(), torch.cat(r).double().numpy())
    found: Any = small.get_submodule(layer.name)
    np.testing.assert_allclose(found.proj.weight.detach().numpy(), shrunk.proj.weight.numpy() + slope.T, atol=2e-5)
    np.testing.assert_allclose(found.proj.bias.detach().numpy(), shrunk.proj.bias.numpy() + intercept, atol=2e-5)


@pytest.mark.parametrize("share", [0.4, compensation.CORRECTION])
def test_the_sequential_form_by_hand(share: float, vit: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """blocks.1.mlp after a shrunk blocks.0.attn: its own error, and a share of the drift of the residual stream."""
    kept = {
        name: ids for name, ids in random_kept(vit.layers, 0.5).items() if name in ("blocks.0.attn", "blocks.1.mlp")
    }
    monkeypatch.setattr(compensation, "CORRECTION", share)
    small: Any = sequential(vit.model, kept, vit.inputs, batch=3)
    dense: Any = vit.model

    def parts(model: Any) -> tuple[Tensor, Tensor]:  # the residual stream before blocks.1.mlp, and after its norm
        x = model.blocks[0](model.norm_pre(model._pos_embed(model.patch_embed(vit.inputs))))
        x = x + model.blocks[1].attn(model.blocks[1].norm1(x))
        return x, model.blocks[1].norm2(x)

    (x, normed), (y, own) = parts(dense), parts(small)
    f, R = dense.blocks[1].mlp, kept["blocks.1.mlp"]
    units = f.act(f.fc1(own))[..., R]
    kept_output = units @ f.fc2.weight[:, R].T + f.fc2.bias
    lost = f(own) - kept_output + share * ((x + f(normed)) - (y + f(own)))
    slope, nu = ridge_by_lstsq(*(t.flatten(0, 1).double().numpy() for t in (units.detach(), lost.detach())))
    fc2 = small.blocks[1].mlp.fc2
    np.testing.assert_allclose(fc2.weight.detach().numpy(), f.fc2.weight[:, R].numpy() + slope.T, atol=1e-4)
    np.testing.assert_allclose(fc2.bias.detach().numpy(), f.fc2.bias.numpy() + nu, atol=1e-4)


@given(
    st.integers(1, 40), st.integers(0, 8), st.integers(1, 5), st.floats(0, 10), st.floats(-30, 30), st.integers(0, 999)
)
def test_the_fit_never_increases_the_error(
    rows: int, kept: int, outputs: int, ridge: float, offset: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    Z = offset + torch.randn(rows, kept, generator=generator).double() * torch.rand(kept, generator=generator) ** 4
    r = offset + torch.randn(rows, outputs, generator=generator).double() + Z[:, :1].sum(1, keepdim=True)
    for intercept in (True, False):
        lost = LostOutput(kept, outputs)
        lost.add(Z[:5], r[:5])
        if rows > 5:
            lost.add(Z[5:], r[5:])
        D, e = lost.regression(ridge, intercept)
        error = (r - Z @ D.T - e).square().sum(0)
        assert (error <= r.square().sum(0) * (1 + 1e-9) + 1e-12).all()


@pytest.mark.parametrize("units", [0.0, 3.0])
def test_constant_units_are_not_used_in_the_fit(units: float) -> None:
    lost = LostOutput(3, 2)
    lost.add(torch.full((50, 3), units), torch.randn(50, 2, generator=torch.Generator().manual_seed(0)) + 1)
    D, e = lost.regression()
    assert D.abs().max() < 1e-3
    assert e + 3 * D.sum(1) == pytest.approx((lost.total[3:] / 50).tolist(), abs=1e-2)


@pytest.mark.parametrize("family", FAMILIES)
def test_compensation_reduces_the_error_of_a_single_ffn(family: str, families: dict[str, Tiny]) -> None:
    backbone = families[family]
    layer = next(layer for layer in backbone.layers if layer.kind == "ffn")
    kept = {layer.name: random_kept(backbone.layers, 0.4)[layer.name]}

    @torch.no_grad()
    def error(model: nn.Module) -> float:
        outputs = []
        for m in (backbone.model, model):
            m.get_submodule(layer.name).register_forward_hook(lambda _m, _x, y: outputs.append(y))
            m(backbone.inputs)
            m.get_submodule(layer.name)._forward_hooks.clear()
        return float((outputs[0] - outputs[1]).square().sum())

    small = one_pass(backbone.model, kept, backbone.inputs, batch=4)
    assert error(small) < error(shrink(backbone.model, plan_of(backbone, kept)))


@pytest.mark.parametrize("seed", [0, 1])
def test_layer_by_layer_is_at_least_as_good_as_one_pass(seed: int) -> None:
    torch.manual_seed(seed)  # timm's initial weights
    vit = tiny(VIT)
    kept = random_kept(vit.layers, 0.6, seed)
    fitted, held_out = images(vit, 48, seed), images(vit, 32, seed + 10)

    @torch.no_grad()
    def error(model: nn.Module) -> float:
        return float((model(held_out) - vit.model(held_out)).square().mean())

    plain = error(shrink(vit.model, plan_of(vit, kept)))
    once = error(one_pass(vit.model, kept, fitted, batch=24))
    by_layer = error(sequential(vit.model, kept, fitted, batch=24))
    assert by_layer < once < plain


@BOTH
@pytest.mark.parametrize("family", FAMILIES)
def test_a_removed_branch_leaves_its_mean(form: Form, family: str, families: dict[str, Tiny]) -> None:
    backbone = families[family]
    first, last = backbone.layers[0], backbone.layers[-1]
    for layer in (first, last):
        seen: list[Tensor] = []
        branch = backbone.model.get_submodule(layer.name)
        handle = branch.register_forward_hook(lambda _m, _x, y, seen=seen: seen.append(y.flatten(0, -2)))
        small: Any = form(backbone.model, {layer.name: NOBODY}, backbone.inputs, batch=4)
        handle.remove()
        bias = small.get_submodule(f"{layer.name}.{layer.output}").bias
        assert torch.allclose(bias, seen[-1].mean(0), atol=1e-5)
    both = form(backbone.model, {first.name: NOBODY, last.name: NOBODY}, backbone.inputs, batch=4)
    assert torch.isfinite(both(backbone.inputs)).all()


@BOTH
def test_tokens_that_only_fill_up_a_window_do_not_count(form: Form) -> None:
    backbone = tiny(VIT, a_backbone("windows that overhang"))
    for layer in (backbone.layers[0], backbone.layers[2]):  # whole and shifted windows
        block: Any = backbone.model.get_submodule(layer.block)
        stream: list[Tensor] = []  # before and after the attention
        handles = [
            norm.register_forward_pre_hook(lambda _m, x, stream=stream: stream.append(x[0].flatten(0, -2)))
            for norm in (block.norm1, block.norm2)
        ]
        backbone.model(backbone.inputs)
        for handle in handles:
            handle.remove()
        small: Any = form(backbone.model, {layer.name: NOBODY}, backbone.inputs, batch=4)
        bias = small.get_submodule(layer.name).proj.bias
        assert torch.allclose(bias, (stream[1] - stream[0]).mean(0), atol=1e-5)


@BOTH
def test_an_output_without_bias_gets_none(form: Form) -> None:
    backbone = tiny(BackboneSpec(name=VIT.name, args=VIT_ARGS | {"proj_bias": False}, num_classes=CLASSES))
    kept = random_kept(backbone.layers, 0.5)
    small: Any = form(backbone.model, kept, backbone.inputs, batch=4)
    assert small.blocks[0].attn.proj.bias is None and small.blocks[1].mlp.fc2.bias is None
    gone: Any = form(backbone.model, {"blocks.0.attn": NOBODY}, backbone.inputs, batch=4)
    assert gone.blocks[0].attn.proj.bias.abs().max() > 0.01  # a removed branch has a bias in any case


def test_without_intercept_the_moments_are_about_zero() -> None:
    generator = np.random.default_rng(0)
    Z, r = generator.normal(1, 1, (60, 4)), generator.normal(2, 1, (60, 3))
    lost = LostOutput(4, 3)
    lost.add(torch.tensor(Z), torch.tensor(r))
    D, e = lost.regression(0.1, intercept=False)
    assert not e.any()
    penalty = np.sqrt(60 * 0.1 * (Z**2).mean()) * np.eye(4)
    expected = np.linalg.lstsq(np.vstack([Z, penalty]), np.vstack([r, np.zeros((4, 3))]), rcond=None)[0]
    np.testing.assert_allclose(D.numpy(), expected.T, atol=1e-9)


@BOTH
@pytest.mark.parametrize("family", FAMILIES)
def test_the_dense_model_is_not_changed(form: Form, family: str, families: dict[str, Tiny]) -> None:
    backbone = families[family]
    model = backbone.model
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modules = [id(module) for module in model.modules()]
    small = form(model, random_kept(backbone.layers, 0.5), backbone.inputs, batch=4)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert [id(module) for module in model.modules()] == modules
    assert not any(m._forward_hooks or m._forward_pre_hooks for net in (model, small) for m in net.modules())
    assert not {p.data_ptr() for p in model.parameters()} & {p.data_ptr() for p in small.parameters()}
    assert not small.training


@BOTH
def test_layers_that_stay_whole_do_not_change(form: Form, deit: Tiny) -> None:
    whole = {layer.name: torch.arange(layer.units) for layer in deit.layers[1:]}
    small = form(deit.model, whole, deit.inputs, batch=4)
    assert torch.equal(small(deit.inputs), deit.model(deit.inputs))


@BOTH
def test_the_result_is_saved_as_any_pruned_model(form: Form, vit: Tiny, tmp_path: Path) -> None:
    kept = random_kept(vit.layers, 0.5) | {"blocks.1.attn": NOBODY}
    small = form(vit.model, kept, vit.inputs, batch=4)
    save_pruned(small, plan_of(vit, kept), tmp_path)
    assert torch.equal(load_pruned(tmp_path)(vit.inputs), small(vit.inputs))


@BOTH
def test_images_with_zero_weight_have_no_effect(form: Form, vit: Tiny) -> None:
    kept, inputs = random_kept(vit.layers, 0.5), images(vit, 6)
    fisher = {}
    for layer in vit.layers:
        rows = (torch.ones(2 * layer.tokens), torch.zeros(2 * layer.tokens), torch.ones(2 * layer.tokens))
        fisher[layer.name] = Sensitivity(rows, torch.eye(layer.embed_dim, dtype=torch.float64))
    found = form(vit.model, kept, inputs, batch=2, fisher=fisher)
    without = form(vit.model, kept, inputs[[0, 1, 4, 5]], batch=2)
    for name, theta in found.state_dict().items():
        torch.testing.assert_close(theta, without.state_dict()[name], rtol=1e-4, atol=1e-4)


@BOTH
def test_impossible_input_is_refused(form: Form, vit: Tiny) -> None:
    kept = random_kept(vit.layers, 0.5)
    with pytest.raises(ModelError, match=r"blocks\.0\.attn: activations are not finite in batch 2"):
        form(vit.model, kept, vit.inputs.index_fill(0, torch.tensor(2), torch.inf), batch=1)
    with pytest.raises(PlanError, match=r"blocks\.0\.mlp: kept units must be sorted"):
        form(vit.model, {"blocks.0.mlp": torch.tensor([3, 1])}, vit.inputs, batch=4)


def test_without_compensation_the_model_is_shrunk(vit: Tiny) -> None:
    kept = random_kept(vit.layers, 0.5)
    small = refitted(vit.model, kept, vit.inputs, 4, compensation="none")
    assert torch.equal(small(vit.inputs), shrink(vit.model, plan_of(vit, kept))(vit.inputs))


def a_backbone(name: str) -> nn.Module:
    torch.manual_seed(0)  # timm's initial weights
    if name == "layer scale":
        return scramble(timm.create_model(VIT.name, num_classes=CLASSES, init_values=0.1, **VIT_ARGS))
    # 44 pixels are 11 patches a side: windows of 7 overhang; every other block shifts them
    return scramble(
        timm.create_model(
            "swin_tiny_patch4_window7_224",
            img_size={"windows": 56, "windows that overhang": 44}[name],
            embed_dim=24,
            depths=(2, 2),
            num_heads=(2, 4),
            num_classes=3,
        )
    )


@pytest.mark.parametrize("name", ["layer scale", "windows", "windows that overhang"])
def test_a_branch_s_output_in_the_stream_is_what_the_block_adds(name: str) -> None:
    model: Any = a_backbone(name)
    backbone = tiny(VIT, model)
    x, streams = backbone.inputs, {}
    for name, step in branch_steps(model, all_tokens=True):
        x, streams[name] = step(x), x
    for layer in backbone.layers:
        x = streams[layer.name]
        x = x if layer.kind == "attention" else x.reshape(len(x), -1, x.shape[-1])  # not a grid
        piece = torch.randn(x.shape, generator=torch.Generator().manual_seed(3))

        class Answer(nn.Module):
            def __init__(self, output: Tensor) -> None:
                super().__init__()
                self.output = output

            def forward(self, _x: Tensor, *_: object, **__: object) -> Tensor:
                return self.output

        block = model.get_submodule(layer.block)
        after: list[Tensor] = []
        handle = (block.norm2 if layer.kind == "attention" else block).register_forward_hook(
            lambda _m, x, y, after=after, kind=layer.kind: after.append(x[0] if kind == "attention" else y)
        )
        with replaced(model, layer.name, Answer(as_branch_output(model, layer, piece))):
            model(backbone.inputs)
        handle.remove()
        assert torch.allclose(after[0].flatten(), (x + piece).flatten(), atol=1e-4)


@BOTH
@pytest.mark.parametrize("name", ["layer scale", "windows", "windows that overhang"])
def test_every_kind_of_block_is_compensated(form: Form, name: str) -> None:
    backbone = tiny(VIT, a_backbone(name))
    kept = random_kept(backbone.layers, 0.6)
    fitted = images(backbone, 8)
    dense = backbone.model(fitted)
    plain = copy.deepcopy(backbone.model)
    for layer in backbone.layers:
        parent, _, leaf = layer.name.rpartition(".")
        setattr(plain.get_submodule(parent), leaf, layer.shrink(plain.get_submodule(layer.name), kept[layer.name]))
    small = form(backbone.model, kept, fitted, batch=4)
    assert (small(fitted) - dense).square().sum() < 0.7 * (plain(fitted) - dense).square().sum()
