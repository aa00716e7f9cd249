"""Merged LoRA equals LoRA, a model is a function of its adapters, and interpolation acts on effective weights."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from backbones import Tiny, plan_of, random_kept, tiny
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from tapfl.adapters.layout import Layout, device_layout, gather_all, global_shapes
from tapfl.adapters.lora import AdaptedModel, MergedLora, Pair, interpolate, modules_of
from tapfl.adapters.rules import initial
from tapfl.config import AdapterOptions
from tapfl.models.backbone import BackboneSpec
from tapfl.pruning.surgery import shrink
from tapfl.training import Params

FAMILIES = ["vit", "deit", "swin"]
A, B = "fc.lora_A", "fc.lora_B"


def leaves(seed: int, *shapes: tuple[int, ...], dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=dtype).requires_grad_() for shape in shapes]


def device(backbone: Tiny, share: float, rank: int) -> tuple[AdaptedModel, Layout, Params]:
    """A pruned model, the layout of its adapters, and its initial adapters."""
    plan = plan_of(backbone, random_kept(backbone.layers, share))
    shapes = global_shapes(backbone.model, backbone.layers, rank)
    layout = device_layout(shapes, backbone.layers, plan, rank)
    params = initial(AdapterOptions(), shapes, backbone.layers, backbone.model, torch.Generator().manual_seed(0))
    return AdaptedModel(shrink(backbone.model, plan), layout, 2.0), layout, gather_all(params, layout)


def with_noise(params: Params, seed: int) -> Params:
    generator = torch.Generator().manual_seed(seed)
    return {name: theta + 0.3 * torch.randn(theta.shape, generator=generator) for name, theta in params.items()}


# -- the merged form --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("batch", [(5,), (2, 3)], ids=["2-d", "3-d"])
def test_merged_form_is_plain_lora_forward_and_backward(batch: tuple[int, ...], bias: bool) -> None:
    x, a, b = leaves(0, (*batch, 4), (2, 4), (3, 2), dtype=torch.float32)
    weight, offset = (t.detach() for t in leaves(1, (3, 4), (3,), dtype=torch.float32))
    dy = leaves(2, (*batch, 3), dtype=torch.float32)[0].detach()
    constant = offset if bias else None
    plain = F.linear(x, weight, constant) + 1.5 * F.linear(F.linear(x, a), b)
    got = MergedLora.apply(x, weight, constant, a, b, 1.5)
    torch.testing.assert_close(got, plain, rtol=1e-6, atol=1e-6)
    for gradient, want in zip(
        torch.autograd.grad(got, (x, a, b), dy), torch.autograd.grad(plain, (x, a, b), dy), strict=True
    ):
        torch.testing.assert_close(gradient, want, rtol=1e-6, atol=1e-6)


def test_gradients_are_those_of_finite_differences() -> None:
    x, a, b = leaves(0, (2, 3, 4), (2, 4), (3, 2))
    weight, offset = (t.detach() for t in leaves(1, (3, 4), (3,)))
    assert torch.autograd.gradcheck(lambda x, a, b: MergedLora.apply(x, weight, offset, a, b, 0.7), (x, a, b))


def test_the_base_is_always_frozen() -> None:
    x, a, b = leaves(0, (2, 4), (2, 4), (3, 2))
    weight = leaves(1, (3, 4))[0]  # requires a gradient, but the base is frozen
    output = MergedLora.apply(x.detach(), weight, None, a.detach(), b, 1.0)
    assert torch.autograd.grad(output.sum(), weight, allow_unused=True, retain_graph=True) == (None,)
    (gradient,) = torch.autograd.grad(output.sum(), b)
    torch.testing.assert_close(gradient, torch.ones(3, 2, dtype=torch.float64) @ (x.detach() @ a.detach().T))


# -- a model as a function of its adapters ----------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_initial_adapters_change_nothing(family: str, families: dict[str, Tiny]) -> None:
    backbone = families[family]
    adapted, _, params = device(backbone, 0.5, 3)
    want = shrink(backbone.model, plan_of(backbone, random_kept(backbone.layers, 0.5)))(backbone.inputs)
    assert torch.equal(adapted(params, backbone.inputs), want)


def test_parameters_of_a_call_do_not_leak_into_the_next(vit: Tiny) -> None:
    adapted, _, params = device(vit, 0.5, 2)
    other = with_noise(params, 1)
    first, second = adapted(params, vit.inputs), adapted(other, vit.inputs)
    assert (first - second).abs().max() > 0.1
    assert torch.equal(adapted(params, vit.inputs), first)
    without = {name: theta for name, theta in other.items() if name != "blocks.1.mlp.fc1.lora_B"}
    with pytest.raises(KeyError, match=r"blocks\.1\.mlp\.fc1\.lora_B"):
        adapted(without, vit.inputs)
    assert torch.equal(adapted(other, vit.inputs), second)  # and a failed call leaves nothing behind


def test_the_given_model_is_not_changed(vit: Tiny) -> None:
    small = shrink(vit.model, plan_of(vit, random_kept(vit.layers, 0.5)))
    shapes = global_shapes(vit.model, vit.layers, 2)
    layout = device_layout(shapes, vit.layers, plan_of(vit, random_kept(vit.layers, 0.5)), 2)
    before = {name: theta.clone() for name, theta in small.state_dict().items()}
    want = small(vit.inputs)
    params = with_noise(gather_all({name: torch.zeros(shape) for name, shape in shapes.items()}, layout), 0)
    AdaptedModel(small, layout, 2.0)(params, vit.inputs)
    assert torch.equal(small(vit.inputs), want)
    assert all(torch.equal(theta, before[name]) for name, theta in small.state_dict().items())


def test_every_adapter_is_trained_and_nothing_else(vit: Tiny) -> None:
    adapted, _, params = device(vit, 0.5, 2)
    trained = {name: theta.requires_grad_() for name, theta in with_noise(params, 0).items()}
    adapted(trained, vit.inputs).square().sum().backward()
    assert all(theta.grad is not None and theta.grad.abs().max() > 0 for theta in trained.values())
    assert not any(parameter.requires_grad for parameter in adapted.model.parameters())


def test_layers_in_the_order_of_the_layout(vit: Tiny) -> None:
    _, layout, _ = device(vit, 0.5, 1)
    linears = [f"blocks.{i}.{part}" for i in range(2) for part in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")]
    assert modules_of(layout) == [*linears, "head"]


# -- interpolation -----------------------------------------------------------------------------------------------------


def pair(seed: int) -> tuple[Params, Params]:
    """Two adapters of ranks 2 and 3 for one linear layer, and a head."""
    va, vb, wa, wb, vh, wh = (t.detach() for t in leaves(seed, (2, 4), (3, 2), (3, 4), (3, 3), (5,), (5,)))
    return {A: va, B: vb, "head.bias": vh}, {A: wa, B: wb, "head.bias": wh}


@given(alpha=st.floats(0, 1), seed=st.integers(0, 999))
def test_interpolation_is_of_effective_weights(alpha: float, seed: int) -> None:
    v, w = pair(seed)
    between = interpolate(v, w, alpha)
    assert between[A].shape == (5, 4) and between[B].shape == (3, 5)
    torch.testing.assert_close(
        between[B] @ between[A], alpha * v[B] @ v[A] + (1 - alpha) * w[B] @ w[A], rtol=1e-12, atol=1e-12
    )
    torch.testing.assert_close(between["head.bias"], alpha * v["head.bias"] + (1 - alpha) * w["head.bias"])


@given(alpha=st.floats(0, 1), seed=st.integers(0, 999), scale=st.floats(0.1, 4))
def test_interpolating_the_factors_themselves_is_off_by_a_known_term(alpha: float, seed: int, scale: float) -> None:
    va, vb, wa, wb = (t.detach() for t in leaves(seed, (2, 4), (3, 2), (2, 4), (3, 2)))
    between = interpolate({A: va, B: vb}, {A: wa, B: wb}, alpha)
    raw = (alpha * vb + (1 - alpha) * wb) @ (alpha * va + (1 - alpha) * wa)
    torch.testing.assert_close(
        scale * (between[B] @ between[A] - raw),
        scale * alpha * (1 - alpha) * (vb - wb) @ (va - wa),
        rtol=1e-10,
        atol=1e-10,
    )


def test_ends_of_the_interpolation_are_the_two_models(vit: Tiny) -> None:
    adapted, _, params = device(vit, 0.5, 2)
    v, w = with_noise(params, 1), with_noise(params, 2)
    for alpha, alone in ((1.0, v), (0.0, w)):
        torch.testing.assert_close(
            adapted(interpolate(v, w, alpha), vit.inputs), adapted(alone, vit.inputs), rtol=1e-5, atol=1e-5
        )
    half = adapted(interpolate(v, w, 0.5), vit.inputs)
    logits = (adapted(v, vit.inputs) + adapted(w, vit.inputs)) / 2
    assert (half - logits).abs().max() > 0.05  # an interpolation of models, not of their logits


def test_interpolation_keeps_the_type_of_the_parameters() -> None:
    v, w = ({name: theta.float() for name, theta in params.items()} for params in pair(0))
    between = interpolate(v, w, torch.tensor(0.3, dtype=torch.float64))
    assert {theta.dtype for theta in between.values()} == {torch.float32}


@pytest.mark.parametrize("at", [0.0, 0.3, 1.0])
def test_gradient_of_alpha_is_that_of_finite_differences(vit: Tiny, at: float) -> None:
    plan = plan_of(vit, random_kept(vit.layers, 0.5))
    shapes = global_shapes(vit.model, vit.layers, 2)
    layout = device_layout(shapes, vit.layers, plan, 2)
    small = shrink(vit.model, plan).double()
    adapted, x = AdaptedModel(small, layout, 2.0), vit.inputs.double()
    zero = {name: torch.zeros(placement.shape, dtype=torch.float64) for name, placement in layout.items()}
    v, w = with_noise(zero, 1), with_noise(zero, 2)
    labels = torch.tensor([0, 1, 2, 3])

    def loss(alpha: Tensor) -> Tensor:
        return F.cross_entropy(adapted(interpolate(v, w, alpha), x), labels)

    alpha = torch.tensor(at, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(loss(alpha), alpha)
    step = 1e-6
    with torch.no_grad():
        difference = (loss(alpha + step) - loss(alpha - step)) / (2 * step)
    assert abs(float(gradient)) > 1e-2
    torch.testing.assert_close(gradient, difference, rtol=1e-6, atol=1e-8)


# -- a pair in one pass -----------------------------------------------------------------------------------------------

PIT = BackboneSpec(
    name="pit_ti_224", args={"img_size": 32, "base_dims": (8, 8), "depth": (1, 1), "heads": (2, 4)}, num_classes=10
)


def later(params: Params, backbone: Tiny) -> Params:
    """The adapters in the second half of the layers, and the head."""
    first = {layer.name for layer in backbone.layers[: len(backbone.layers) // 2]}
    return {name: theta for name, theta in params.items() if name.rsplit(".", 2)[0] not in first}


def only(backbone: Tiny, layout: Layout, reduced: torch.dtype | None = None) -> AdaptedModel:
    """The model of `device` with adapters as in `layout`."""
    return AdaptedModel(
        shrink(backbone.model, plan_of(backbone, random_kept(backbone.layers, 0.5))), layout, 2.0, reduced
    )


@pytest.mark.parametrize("per", ["device", "layer"])
@pytest.mark.parametrize("family", [*FAMILIES, "pit", "last blocks", "bfloat16"])
def test_a_pair_in_one_pass_is_w_and_the_mixture_in_two(family: str, per: str, families: dict[str, Tiny]) -> None:
    backbone = tiny(PIT) if family == "pit" else families.get(family, families["vit"])
    _, layout, params = device(backbone, 0.5, 2)
    params = later(params, backbone) if family == "last blocks" else params
    reduced = torch.bfloat16 if family == "bfloat16" else None
    adapted = only(backbone, {name: layout[name] for name in params}, reduced)
    v, w = ({n: t.requires_grad_() for n, t in with_noise(params, seed).items()} for seed in (1, 2))
    alpha = torch.tensor(0.3, dtype=torch.float64)
    alpha = (
        alpha if per == "device" else torch.linspace(0, 1, len(modules_of(w)), dtype=torch.float64)
    ).requires_grad_()
    loss = partial(F.cross_entropy, target=torch.tensor([0, 1, 2, 3]))
    fixed = {name: theta.detach() for name, theta in w.items()}
    apart = torch.stack(
        [loss(adapted(w, backbone.inputs)), loss(adapted(interpolate(v, fixed, alpha), backbone.inputs))]
    )
    got, leaves = adapted.losses(Pair(w, v, alpha), backbone.inputs, loss), [*w.values(), *v.values(), alpha]
    torch.testing.assert_close(got, apart, rtol=(tolerance := 2e-2 if reduced else 1e-5), atol=1e-6)
    gradients = zip(*(torch.autograd.grad(each.sum(), leaves) for each in (got, apart)), strict=True)
    for mine, theirs in gradients:
        assert (mine - theirs).norm() <= 10 * tolerance * theirs.norm() + 1e-6


def test_the_part_before_the_first_adapter_is_computed_once(vit: Tiny) -> None:
    _, layout, params = device(vit, 0.5, 2)
    params, seen = later(params, vit), []
    model = only(vit, {name: layout[name] for name in params})
    for block in model.model.blocks:  # type: ignore[union-attr]
        block.register_forward_hook(lambda module, args, output: seen.append((len(output), output.requires_grad)))
    w = {name: theta.requires_grad_() for name, theta in params.items()}
    model.losses(Pair(w, w, torch.tensor(0.5)), vit.inputs, torch.sum)
    assert seen == [(4, False), (8, True)]
