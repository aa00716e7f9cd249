"""Neuron scores and layer importance of whole backbones, against their formulas and a lower bound of the work.

Scores: the *loop* implements the formula literally, with kernels, centring matrices and traces for each channel. The
*hoisted* loop computes what all channels share only once. Both compute exact scores for every n-th channel of each
layer, and their seconds are multiplied by n; scores are compared for these channels. The *floor* is the work that any
implementation has to do: one forward pass, copies of the activations in channel-major order, and one Gram matrix and
one exponential per channel. Memory: the peak of the tensors of the terms, without the activations, which `chunk`
bounds; and the growth of the process over a whole batch, with the forward pass and the recorded activations of all
layers.

Layers: each probe with two whole forward passes, against `layer_importance`, which caches the common prefix.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated

import torch
import typer
from torch import Tensor, nn
from torch.nn import functional as F

from experiments.bench.local_training import IMAGENET, model_of, specs
from experiments.bench.timing import (
    Models,
    Repeats,
    Row,
    Sizes,
    peak_process_bytes,
    peak_tensor_bytes,
    side_by_side,
)
from tapfl.compute import OF_CPU, AtOnce, Compute
from tapfl.models.forward import example_input
from tapfl.models.prunable import prunable_layers
from tapfl.models.units import PrunableLayer, replaced
from tapfl.pruning.layer_importance import layer_importance
from tapfl.pruning.scores import (
    TERM_WEIGHTS,
    Terms,
    centre,
    composite,
    neuron_importance,
    record_activations,
    scratch_bytes,
    terms,
)

SIGMAS = (1, 2, 4, 8, 16)
BATCH = 64
TermsOf = Callable[[Tensor, Tensor, int], Terms]


def scoring(
    model: Models = ["deit_tiny_patch16_224"],
    size: Sizes = [64],
    repeats: Repeats = 3,
    chunk: Annotated[int, typer.Option(min=1, help="channels scored at once")] = 128,
    every: Annotated[
        int, typer.Option(min=1, help="n: loops only for every n-th channel, and their times are scaled by n")
    ] = 16,
) -> Iterator[Row]:
    """Composite neuron importance against the per-channel loop and a lower bound of the work; one thread, batch 64."""
    torch.set_num_threads(1)
    for name, spec in specs(model, size, IMAGENET):
        yield {"model": name} | _scoring(model_of(spec), repeats, chunk, every)


@dataclass(frozen=True)
class Sized(Compute):
    """The CPU, with other chunk sizes than its default."""

    at_once: AtOnce = OF_CPU


@torch.no_grad()
def _scoring(model: nn.Module, repeats: int, chunk: int, every: int) -> Row:
    layers = prunable_layers(model)
    batch, together = torch.randn(example_input(model, BATCH).shape), AtOnce(channels=chunk)
    grown = peak_process_bytes(lambda: neuron_importance(model, layers, batch, BATCH, compute=Sized(at_once=together)))
    logits, activations = record_activations(model, layers, batch)
    P = logits.softmax(-1)

    def of_all(one: TermsOf) -> dict[str, Terms]:
        heads = {layer.name: layer.heads if layer.kind == "attention" else 0 for layer in layers}
        return {layer: one(activations[layer], P, count) for layer, count in heads.items()}

    ways: dict[str, TermsOf] = {
        "loop": lambda X, P, heads: loop_terms(X, P, heads, every),
        "hoisted": lambda X, P, heads: loop_terms(X, P, heads, every, hoisted=True),
        "vectorised": lambda X, P, heads: terms(X, P, heads, together),
    }
    scratch = peak_tensor_bytes(lambda: of_all(ways["vectorised"]))
    bound = max(scratch_bytes(BATCH, layer.tokens, layer.heads, together) for layer in layers)
    difference, in_common = _agreement(layers, of_all(ways["loop"]), of_all(ways["vectorised"]), every)
    variants: dict[str, Callable[[], object]] = {"forward": lambda: record_activations(model, layers, batch)}
    variants |= {way: partial(of_all, one) for way, one in ways.items()}
    s = side_by_side(variants | {"floor": lambda: _floor(activations, chunk)}, repeats)
    loop, hoisted, whole = s["loop"] * every, s["hoisted"] * every, s["forward"] + s["vectorised"]
    return {
        "forward s": f"{s['forward']:.3f}",
        f"loop s (1/{every} × {every})": f"{loop:.2f}",
        "hoisted s": f"{hoisted:.2f}",
        "vectorised s": f"{s['vectorised']:.3f}",
        "loop / vectorised": f"{loop / s['vectorised']:.1f}",
        "with forward": f"{(s['forward'] + loop) / whole:.1f}",
        "whole / floor": f"{whole / (s['forward'] + s['floor']):.2f}",
        "difference": f"{difference:.0e}",
        "kept alike": f"{in_common:.4f}",
        "chunk": str(chunk),
        "terms MB": f"{scratch / 1e6:.1f} ≤ {bound / 1e6:.1f}",
        "whole MB": "?" if grown is None else f"{grown / 1e6:.0f}",
    }


def loop_kernel(Z: Tensor) -> Tensor:
    """Returns K(Z) of Z (B, N); each bandwidth is computed separately."""
    squares = (Z[:, None] - Z[None]).square().sum(-1)
    return torch.stack([torch.exp(-squares / (2 * sigma**2)) for sigma in SIGMAS]).mean(0)


def trace_of_centred(K: Tensor, R: Tensor) -> Tensor:
    """Returns tr(HKH · HRH), computed literally."""
    H = torch.eye(len(K)) - 1 / len(K)
    return torch.trace(H @ K @ H @ H @ R @ H)


def loop_terms(X: Tensor, P: Tensor, heads: int, every: int = 1, hoisted: bool = False) -> Terms:
    """Returns the three terms of every n-th channel of a layer, one channel at a time, each formula literally.

    Args:
        hoisted: compute what does not depend on the channel outside of the loop, the fastest possible loop.
    """
    channels = X.shape[-1]
    groups = max(heads, 1)
    width = channels // groups

    def mean_of(group: int) -> Tensor:
        return X[:, :, group * width : (group + 1) * width].mean(-1)

    target, references = centre(P @ P.T), [centre(loop_kernel(mean_of(g))) for g in range(groups)] if hoisted else []
    rel, red = [], []
    for c in range(0, channels, every):
        K = loop_kernel(X[:, :, c])
        others = [g for g in range(groups) if not heads or g != c // width]
        if hoisted:
            rel.append((K * target).sum())
            traces = [(K * references[g]).sum() for g in others]
        else:
            rel.append(trace_of_centred(K, P @ P.T))
            traces = [trace_of_centred(K, loop_kernel(mean_of(g))) for g in others]
        red.append(torch.stack(traces).mean() if traces else torch.zeros(()))
    return Terms(torch.stack(rel), torch.stack(red), X[:, :, ::every].abs().sum((0, 1)))


def _floor(activations: Mapping[str, Tensor], chunk: int) -> None:
    for X in activations.values():
        images, tokens, channels = X.shape
        for part in X.reshape(images * tokens, channels).split(chunk, dim=1):
            Z = part.contiguous().T.contiguous().view(-1, images, tokens)
            torch.bmm(Z, Z.transpose(1, 2)).exp_()


def _agreement(
    layers: Sequence[PrunableLayer], loop: Mapping[str, Terms], fused: Mapping[str, Terms], every: int
) -> tuple[float, float]:
    """Returns the largest difference of a score, and the share of the better half that both variants keep."""
    differences, common = [], []
    for layer in layers:
        full = fused[layer.name]
        same = Terms(full.rel[::every], full.red[::every], full.act[::every])
        pair = [composite(found, TERM_WEIGHTS[layer.kind]) for found in (loop[layer.name], same)]
        half = len(pair[0]) // 2
        first, second = (set(scores.argsort(descending=True)[:half].tolist()) for scores in pair)
        differences.append(float((pair[0] - pair[1]).abs().max()))
        common.append(len(first & second) / half)
    return max(differences), sum(common) / len(common)


def layers(
    model: Models = ["deit_tiny_patch16_224"],
    size: Sizes = [64],
    repeats: Repeats = 3,
    every: Annotated[
        int, typer.Option(min=1, help="n: whole passes only for every n-th layer, and their times are scaled by n")
    ] = 5,
) -> Iterator[Row]:
    """Layer importance with the common work of all probes done once, against two whole forward passes per probe."""
    torch.set_num_threads(1)
    for name, spec in specs(model, size, IMAGENET):
        yield {"model": name} | _layers(model_of(spec), repeats, every)


@torch.no_grad()
def _layers(model: nn.Module, repeats: int, every: int) -> Row:
    layers = prunable_layers(model)
    some = layers[::every]
    inputs = torch.randn(example_input(model, BATCH).shape)
    kept = {layer.name: torch.arange(0, layer.units, 2) for layer in layers}
    plain: dict[str, float] = {}
    cached: dict[str, float] = {}
    seconds = side_by_side(
        {
            "forward": lambda: model(inputs),
            "plain": lambda: plain.update(plain_layer_importance(model, some, kept, inputs)),
            "cached": lambda: cached.update(layer_importance(model, layers, kept, inputs, BATCH)),
        },
        repeats,
    )
    whole = seconds["plain"] * len(layers) / len(some)
    return {
        f"plain s (1/{every} × {every})": f"{whole:.2f}",
        "cached s": f"{seconds['cached']:.2f}",
        "plain / cached": f"{whole / seconds['cached']:.1f}",
        "forwards' worth": f"{seconds['cached'] / seconds['forward']:.1f} of {2 * len(layers)}",
        "relative difference": f"{max(abs(cached[n] / plain[n] - 1) for n in plain):.0e}",
    }


@torch.no_grad()
def plain_layer_importance(
    model: nn.Module, layers: Sequence[PrunableLayer], kept: Mapping[str, Tensor], inputs: Tensor
) -> dict[str, float]:
    """Returns KL_l of each layer; each probe does its own dense pass."""
    divergence = {}
    for layer in layers:
        dense = model(inputs).double().log_softmax(-1)
        probe = layer.shrink(model.get_submodule(layer.name), kept[layer.name])
        with replaced(model, layer.name, probe):
            cut = model(inputs).double().log_softmax(-1)
        divergence[layer.name] = float(F.kl_div(cut, dense, log_target=True, reduction="batchmean"))
    return divergence
