"""Composite importance: golden numbers, and equality with the definition written as loops."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from backbones import PADDED_SWIN, Tiny, golden, tiny
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from experiments.bench.timing import peak_tensor_bytes
from tapfl.compute import AtOnce
from tapfl.errors import ModelError
from tapfl.pruning.scores import (
    TERM_WEIGHTS,
    Terms,
    composite,
    exponents,
    five_kernels,
    neuron_importance,
    record_activations,
    refuse_not_finite,
    scratch_bytes,
    terms,
)


def loop_kernel(Z: np.ndarray) -> np.ndarray:
    K = np.zeros((len(Z), len(Z)))
    for i in range(len(Z)):
        for j in range(len(Z)):
            for sigma in (1, 2, 4, 8, 16):
                K[i, j] += np.exp(-((Z[i] - Z[j]) ** 2).sum() / (2 * sigma**2)) / 5
    return K


def loop_terms(X: np.ndarray, P: np.ndarray, heads: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns the terms as defined in `tapfl.pruning.scores`, channel by channel in float64."""
    B, _, C = X.shape
    H = np.eye(B) - 1 / B
    dims = C // max(heads, 1)
    rel, red, act = np.zeros(C), np.zeros(C), np.zeros(C)
    for c in range(C):
        K = H @ loop_kernel(X[:, :, c]) @ H
        rel[c] = np.trace(K @ H @ P @ P.T @ H)
        if heads:
            others = [g for g in range(heads) if g != c // dims]
            means = [X[:, :, g * dims : (g + 1) * dims].mean(-1) for g in others]
        else:
            means = [X.mean(-1)]
        red[c] = np.mean([np.trace(K @ H @ loop_kernel(m) @ H) for m in means]) if means else 0
        act[c] = np.abs(X[:, :, c]).sum()
    return rel, red, act


@pytest.mark.parametrize("kind", ["ffn", "attention"])
def test_terms_and_composite_are_golden(kind: str) -> None:
    case = golden("hsic")[kind]
    X, logits = torch.tensor(case["activations"]), torch.tensor(case["logits"])
    parts = terms(X, logits.softmax(-1), case.get("heads", 0))
    for name in ("rel", "red", "act"):
        torch.testing.assert_close(getattr(parts, name), torch.tensor(case[name]), rtol=1e-4, atol=1e-6)
    score = composite(parts, TERM_WEIGHTS[kind])
    torch.testing.assert_close(score, torch.tensor(case["score"]), rtol=1e-4, atol=1e-5)


@given(
    images=st.integers(2, 7),
    tokens=st.integers(1, 5),
    heads=st.integers(0, 3),
    dims=st.integers(1, 4),
    chunk=st.integers(1, 13),
    scale=st.sampled_from([0.01, 1.0, 20.0]),
    constant=st.booleans(),
    seed=st.integers(0, 10**6),
)
def test_vectorised_form_equals_the_loop(
    images: int, tokens: int, heads: int, dims: int, chunk: int, scale: float, constant: bool, seed: int
) -> None:
    generator = np.random.default_rng(seed)
    X = scale * generator.standard_normal((images, tokens, max(heads, 1) * dims)).astype(np.float32)
    if constant:
        X[:, :, 0] = 3.0
    P = generator.dirichlet(np.ones(4), images).astype(np.float32)
    parts = terms(torch.from_numpy(X), torch.from_numpy(P), heads, AtOnce(channels=chunk))
    expected = loop_terms(X.astype(np.float64), P.astype(np.float64), heads)
    for got, want in zip((parts.rel, parts.red, parts.act), expected, strict=True):
        np.testing.assert_allclose(got.numpy(), want, rtol=1e-3, atol=1e-4)
    for weights in TERM_WEIGHTS.values():
        score = composite(parts, weights)
        assert torch.isfinite(score).all()
        assert ((score >= -1e-6) & (score <= 1 + 1e-6)).all()


@pytest.mark.parametrize("images", [16, 17, 35])
@pytest.mark.parametrize("heads", [0, 2])
def test_strips_of_rows_together_are_the_loop(images: int, heads: int) -> None:
    generator = np.random.default_rng(images)
    X = generator.standard_normal((images, 3, 6))
    P = generator.dirichlet(np.ones(4), images)
    parts = terms(torch.from_numpy(X).float(), torch.from_numpy(P).float(), heads)
    for got, want in zip((parts.rel, parts.red, parts.act), loop_terms(X, P, heads), strict=True):
        np.testing.assert_allclose(got.numpy(), want, rtol=1e-3, atol=1e-4)


def test_a_common_offset_costs_the_kernels_no_digits() -> None:
    """A common offset does not change distances, but its square would exceed them in float32."""
    generator = torch.Generator().manual_seed(0)
    X, P = torch.randn(6, 4, 3, generator=generator), torch.randn(6, 4, generator=generator).softmax(-1)
    near = (X * 1024).round() / 1024  # so that X + 2048 is exact
    far = terms(near + 2048, P, 0)
    torch.testing.assert_close(far.rel, terms(near, P, 0).rel, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(far.red, terms(near, P, 0).red, rtol=1e-3, atol=1e-5)


def naive_composite(X: np.ndarray, P: np.ndarray, heads: int, weights: tuple[float, float, float]) -> np.ndarray:
    """Returns the composite of `loop_terms`, float64; a term whose values agree to 1e-5 counts as constant."""

    def scaled(values: np.ndarray) -> np.ndarray:
        spread = values.max() - values.min()
        return (values - values.min()) / spread if spread > 1e-5 * np.abs(values).max() else 0 * values

    rel, red, act = (scaled(values) for values in loop_terms(X, P, heads))
    return weights[0] * rel + weights[1] * (1 - red) + weights[2] * act


@pytest.mark.parametrize("weights", [(0.8, 0.1, 0.1), (0.1, 0.1, 0.8), (1.0, 0.0, 0.0), (0.0, 1.0, 0.0)])
@pytest.mark.parametrize("heads", [0, 2])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 100.0])
def test_units_rank_as_in_float64_at_any_scale(scale: float, heads: int, weights: tuple[float, float, float]) -> None:
    """Units of different sizes on 48 tokens; at scale 100 the kernels of most units are the identity."""
    generator = np.random.default_rng(5)
    sizes = 10 ** generator.uniform(-2.5, 0.5, 12)
    X = (scale * sizes * generator.standard_normal((8, 48, 12))).astype(np.float32)
    P = generator.dirichlet(np.ones(5), 8).astype(np.float32)
    expected = naive_composite(X.astype(np.float64), P.astype(np.float64), heads, weights)
    got = composite(terms(torch.from_numpy(X), torch.from_numpy(P), heads), weights).numpy()
    np.testing.assert_allclose(got, expected, atol=1e-3)
    rank, other = (np.round(values, 3).argsort(kind="stable").argsort() for values in (expected, got))
    assert np.corrcoef(rank, other)[0, 1] > 0.99


@pytest.mark.parametrize("scale", [1.0, 100.0, 1e4])
def test_an_image_has_zero_distance_from_itself(scale: float) -> None:
    Z = scale * torch.randn(5, 20, 197, generator=torch.Generator().manual_seed(0))
    for strip in exponents(Z, [slice(0, 16), slice(16, 20)]):
        assert not strip.diagonal(dim1=1, dim2=2).any()
        assert (five_kernels(strip).diagonal(dim1=1, dim2=2) == 0).all()  # K - 1


def test_values_that_are_constant_up_to_rounding_have_no_effect() -> None:
    """Logits, activations, or both are the same for all images, up to float32 rounding."""
    generator = torch.Generator().manual_seed(1)
    X, P = torch.randn(8, 6, 10, generator=generator), torch.randn(8, 4, generator=generator).softmax(-1)

    def noisy(values: torch.Tensor) -> torch.Tensor:  # the first image, repeated
        return values[:1] * (1 + 1e-6 * torch.randn(values.shape, generator=generator))

    whole = terms(X, P, heads=2)
    logits = terms(X, noisy(P), heads=2)
    assert not logits.rel.any() and torch.equal(logits.red, whole.red) and torch.equal(logits.act, whole.act)
    assert torch.equal(composite(logits, (1, 0, 0)), torch.zeros(10))
    activations = terms(noisy(X), P, heads=2)
    assert not activations.rel.any() and not activations.red.any()
    assert torch.equal(composite(activations, (0.8, 0.2, 0)), torch.full((10,), 0.2))
    one = X.clone()
    one[:, :, 3] = noisy(X)[:, :, 3]  # a single unit has no relevance, whatever the others have
    assert terms(one, P, heads=0).rel[3] == 0 and terms(one, P, heads=0).rel[:3].all()


def test_a_term_that_is_constant_up_to_rounding_scales_to_zero() -> None:
    same = 5 + 1e-6 * torch.arange(6.0)
    parts = Terms(same, same, torch.arange(6.0))
    torch.testing.assert_close(composite(parts, (0.5, 0.25, 1.0)), 0.25 + torch.arange(6.0) / 5)
    small = Terms(1e-9 * torch.arange(6.0), torch.zeros(6), torch.zeros(6))
    torch.testing.assert_close(composite(small, (1.0, 0.0, 0.0)), torch.arange(6.0) / 5)  # small is not constant


def test_a_layer_that_is_constant_everywhere_scores_without_nan() -> None:
    parts = terms(torch.full((4, 3, 6), 2.0), torch.full((4, 5), 0.2), heads=2)
    assert torch.equal(composite(parts, (0.8, 0.1, 0.1)), torch.full((6,), 0.1))  # only 1 - red is left


def test_importance_is_the_sum_over_whole_batches(vit: Tiny) -> None:
    inputs = torch.cat([vit.inputs, vit.inputs.flip(0) * 2, vit.inputs[:3]])
    whole = neuron_importance(vit.model, vit.layers, inputs, batch=4)
    first, second = (neuron_importance(vit.model, vit.layers, inputs[i : i + 4], 4) for i in (0, 4))
    for layer in vit.layers:
        assert whole[layer.name].shape == (layer.units,)
        torch.testing.assert_close(whole[layer.name], first[layer.name] + second[layer.name])


def test_the_composite_of_a_layer_uses_its_activations_and_heads(vit: Tiny) -> None:
    """The layer's activations, recorded separately, give the scores of `neuron_importance`."""
    layer = next(layer for layer in vit.layers if layer.name == "blocks.1.attn")
    seen = []
    handle = vit.model.blocks[1].attn.proj.register_forward_pre_hook(lambda _m, inputs: seen.append(inputs[0]))
    P = vit.model(vit.inputs).softmax(-1)
    handle.remove()
    expected = composite(terms(seen[0], P, heads=2), (0.8, 0.1, 0.1))
    torch.testing.assert_close(neuron_importance(vit.model, vit.layers, vit.inputs, 4)[layer.name], expected)


def test_the_units_of_an_ffn_are_compared_with_the_mean_over_all_of_them(vit: Tiny) -> None:
    layer = next(layer for layer in vit.layers if layer.name == "blocks.1.mlp")
    logits, seen = record_activations(vit.model, vit.layers, vit.inputs)
    parts = terms(seen[layer.name], logits.softmax(-1), heads=0)
    assert parts.red.std() > 0
    redundant = dict.fromkeys(("ffn", "attention"), (0.0, 1.0, 0.0))
    found = neuron_importance(vit.model, vit.layers, vit.inputs, 4, redundant)[layer.name]
    torch.testing.assert_close(found, composite(parts, (0, 1, 0)))


def test_a_row_of_swin_is_one_image_with_all_its_windows(swin: Tiny) -> None:
    _, together = record_activations(swin.model, swin.layers, swin.inputs)
    for layer in swin.layers:
        assert together[layer.name].shape == (4, layer.tokens, layer.units)
    for image in range(4):
        _, alone = record_activations(swin.model, swin.layers, swin.inputs[image : image + 1])
        for layer in swin.layers:
            torch.testing.assert_close(together[layer.name][image], alone[layer.name][0], rtol=1e-4, atol=1e-4)


def test_padding_of_windows_does_not_count() -> None:
    swin = tiny(PADDED_SWIN)
    _, seen = record_activations(swin.model, swin.layers, swin.inputs)
    for layer in (layer for layer in swin.layers if layer.kind == "attention"):
        model = copy.deepcopy(swin.model)
        model.get_submodule(layer.name).proj = nn.Identity()  # the attention's output is then the units
        attended: list[Tensor] = []
        block: Any = model.get_submodule(layer.block)
        block.norm1.register_forward_hook(lambda _m, _x, y, block=block, to=attended: to.append(block._attn(y)))
        model(swin.inputs)
        units = attended[0].flatten(1, 2)
        assert seen[layer.name].shape == units.shape and units.shape[1] < layer.tokens
        torch.testing.assert_close(seen[layer.name].square().sum(1), units.square().sum(1))


def test_activations_that_are_not_finite_are_refused_by_layer(vit: Tiny) -> None:
    broken = copy.deepcopy(vit.model)
    broken.blocks[1].mlp.fc1.weight[3, 2] = float("nan")
    with pytest.raises(ModelError, match=r"blocks\.1\.mlp: activations are not finite in batch 0"):
        neuron_importance(broken, vit.layers, vit.inputs, 4)
    inputs = torch.cat([vit.inputs, vit.inputs])
    inputs[6, 0, 3, 3] = float("inf")
    with pytest.raises(ModelError, match=r"blocks\.0\.attn: activations are not finite in batch 3"):
        neuron_importance(vit.model, vit.layers, inputs, 2)


def test_the_terms_have_the_given_weights(vit: Tiny) -> None:
    """Activeness alone ranks units by the sum of absolute activations."""
    found = neuron_importance(vit.model, vit.layers, vit.inputs, 4, dict.fromkeys(("ffn", "attention"), (0, 0, 1)))
    _, activations = record_activations(vit.model, vit.layers, vit.inputs)
    for layer in vit.layers:
        active = activations[layer.name].abs().sum((0, 1))
        torch.testing.assert_close(found[layer.name], (active - active.min()) / (active.max() - active.min()))


def test_no_hook_stays_behind(vit: Tiny) -> None:
    record_activations(vit.model, vit.layers, vit.inputs)
    assert not any(module._forward_pre_hooks for module in vit.model.modules())


@pytest.mark.parametrize("heads", [0, 3])
@pytest.mark.parametrize("at_once", [AtOnce(1), AtOnce(5), AtOnce(64), AtOnce(1024, strip=64)])
def test_chunk_sizes_change_only_the_memory(heads: int, at_once: AtOnce) -> None:
    generator = torch.Generator().manual_seed(heads)
    X = torch.randn(20, 7, 48, generator=generator)
    P, before = torch.randn(20, 4, generator=generator).softmax(-1), X.clone()
    whole = terms(X, P, heads)
    assert peak_tensor_bytes(lambda: terms(X, P, heads, at_once)) <= scratch_bytes(20, 7, heads, at_once)
    parts = terms(X, P, heads, at_once)
    for name in ("rel", "red", "act"):
        torch.testing.assert_close(getattr(parts, name), getattr(whole, name), rtol=1e-5, atol=1e-6)
    assert torch.equal(X, before)


def test_a_smaller_chunk_takes_less_memory() -> None:
    X, P = torch.randn(64, 50, 256), torch.randn(64, 10).softmax(-1)
    small, large = (peak_tensor_bytes(lambda chunk=chunk: terms(X, P, 0, AtOnce(chunk))) for chunk in (16, 256))
    assert small < large / 8


def test_large_activations_are_finite_though_their_sum_is_not() -> None:
    refuse_not_finite({"layer": torch.full((10,), 3e38)}, 0)
    with pytest.raises(ModelError, match="layer: activations are not finite in batch 2"):
        refuse_not_finite({"layer": torch.tensor([3e38, 3e38, float("-inf")])}, 2)
