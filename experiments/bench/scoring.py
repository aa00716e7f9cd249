"""Composite neuron importance of a whole backbone: the vectorised form against the per-channel loop, and the floor.

The loop is the formula as it is written, kept here as the reference: for each channel its kernels, centring matrices
and traces. Beside it stands a loop with all that is common to the channels taken out. Both are run on every n-th
channel of each layer, exactly, and their seconds multiplied by n; the scores compared are those of these channels. The
floor is what the formula asks of any implementation: one forward pass, copies of the activations in channel-major
order, one Gram matrix and one exponential a channel.

Memory: the most that the tensors of the terms take at once besides the activations, which `chunk` bounds; and by how
much the process grows over a whole batch, forward pass and recorded activations of all layers included.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from experiments.bench.memory import peak_process_bytes, peak_tensor_bytes
from experiments.bench.side_by_side import side_by_side
from tapfl.models.backbone import BackboneSpec, build
from tapfl.models.forward import example_input
from tapfl.models.prunable import prunable_layers
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


@dataclass(frozen=True)
class ScoringBench:
    """CPU seconds of one batch of 64, and the largest difference of a score and of the sets kept at one half.

    `forward` records the activations; the others start from them. Memory in bytes: of the terms besides the
    activations, what `scratch_bytes` says of that, and of the whole batch; that is None where it cannot be measured.
    """

    model: str
    image_size: int
    every: int
    chunk: int
    forward: float
    loop: float
    hoisted: float
    vectorised: float
    floor: float
    score_difference: float
    kept_in_common: float
    scratch: int
    scratch_bound: int
    whole: int | None

    def row(self) -> Mapping[str, str]:
        whole, floor = self.forward + self.vectorised, self.forward + self.floor
        return {
            "model": f"{self.model.removesuffix('_patch16_224')} {self.image_size} px",
            "forward s": f"{self.forward:.3f}",
            f"loop s (1/{self.every} × {self.every})": f"{self.loop:.2f}",
            "hoisted s": f"{self.hoisted:.2f}",
            "vectorised s": f"{self.vectorised:.3f}",
            "loop / vectorised": f"{self.loop / self.vectorised:.1f}",
            "with forward": f"{(self.forward + self.loop) / whole:.1f}",
            "whole / floor": f"{whole / floor:.2f}",
            "difference": f"{self.score_difference:.0e}",
            "kept alike": f"{self.kept_in_common:.4f}",
            "chunk": str(self.chunk),
            "terms MB": f"{self.scratch / 1e6:.1f} ≤ {self.scratch_bound / 1e6:.1f}",
            "whole MB": "?" if self.whole is None else f"{self.whole / 1e6:.0f}",
        }


def loop_kernel(Z: Tensor) -> Tensor:
    """K(Z) of (B, N), each bandwidth by itself."""
    squares = (Z[:, None] - Z[None]).square().sum(-1)
    return torch.stack([torch.exp(-squares / (2 * sigma**2)) for sigma in SIGMAS]).mean(0)


def trace_of_centred(K: Tensor, R: Tensor) -> Tensor:
    """tr(HKH · HRH), as it is written."""
    H = torch.eye(len(K)) - 1 / len(K)
    return torch.trace(H @ K @ H @ H @ R @ H)


def loop_terms(X: Tensor, P: Tensor, heads: int, every: int = 1) -> Terms:
    """The three terms of every n-th channel of a layer, a channel at a time, each as its formula is written."""
    channels = X.shape[-1]
    groups = max(heads, 1)
    width = channels // groups
    rel, red = [], []
    for c in range(0, channels, every):
        K = loop_kernel(X[:, :, c])
        rel.append(trace_of_centred(K, P @ P.T))
        others = [g for g in range(groups) if not heads or g != c // width]
        means = [X[:, :, g * width : (g + 1) * width].mean(-1) for g in others]
        traces = [trace_of_centred(K, loop_kernel(m)) for m in means]
        red.append(torch.stack(traces).mean() if traces else torch.zeros(()))
    return Terms(torch.stack(rel), torch.stack(red), X[:, :, ::every].abs().sum((0, 1)))


def hoisted_loop_terms(X: Tensor, P: Tensor, heads: int, every: int = 1) -> Terms:
    """The same with all that does not depend on the channel taken out of the loop: the best a loop can be."""
    channels = X.shape[-1]
    groups = max(heads, 1)
    width = channels // groups
    means = [X[:, :, g * width : (g + 1) * width].mean(-1) for g in range(groups)]
    target, references = centre(P @ P.T), [centre(loop_kernel(m)) for m in means]
    rel, red = [], []
    for c in range(0, channels, every):
        K = loop_kernel(X[:, :, c])
        rel.append((K * target).sum())
        others = [R for g, R in enumerate(references) if not heads or g != c // width]
        red.append(torch.stack([(K * R).sum() for R in others]).mean() if others else torch.zeros(()))
    return Terms(torch.stack(rel), torch.stack(red), X[:, :, ::every].abs().sum((0, 1)))


@torch.no_grad()
def bench_scoring(name: str, image_size: int, repeats: int, chunk: int, every: int) -> ScoringBench:
    """Returns the measurement for one backbone with random weights, on one thread and one batch of noise."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = build(BackboneSpec(name=name, args={"img_size": image_size}, num_classes=1000))
    layers = prunable_layers(model)
    batch = torch.randn(example_input(model, BATCH).shape)
    whole = peak_process_bytes(lambda: neuron_importance(model, layers, batch, BATCH, chunk=chunk))

    logits, activations = record_activations(model, layers, batch)
    P = logits.softmax(-1)

    def all_terms(of: Callable[[Tensor, Tensor, int], Terms]) -> dict[str, Terms]:
        return {
            layer.name: of(activations[layer.name], P, layer.heads if layer.kind == "attention" else 0)
            for layer in layers
        }

    def looped(X: Tensor, P: Tensor, heads: int) -> Terms:
        return loop_terms(X, P, heads, every)

    def hoisted(X: Tensor, P: Tensor, heads: int) -> Terms:
        return hoisted_loop_terms(X, P, heads, every)

    def vectorised(X: Tensor, P: Tensor, heads: int) -> Terms:
        return terms(X, P, heads, chunk)

    scratch = peak_tensor_bytes(lambda: all_terms(vectorised))
    loop, fused = all_terms(looped), all_terms(vectorised)
    differences, common = [], []
    for layer in layers:
        full, weights = fused[layer.name], TERM_WEIGHTS[layer.kind]
        same = Terms(full.rel[::every], full.red[::every], full.act[::every])
        reference, score = composite(loop[layer.name], weights), composite(same, weights)
        differences.append(float((reference - score).abs().max()))
        common.append(_kept(reference, score))
    variants: dict[str, Callable[[], object]] = {
        "forward": lambda: record_activations(model, layers, batch),
        "loop": lambda: all_terms(looped),
        "hoisted": lambda: all_terms(hoisted),
        "vectorised": lambda: all_terms(vectorised),
        "floor": lambda: _floor(activations, chunk),
    }
    seconds = side_by_side(variants, repeats)
    bounds = [scratch_bytes(BATCH, layer.tokens, layer.heads, chunk) for layer in layers]
    return ScoringBench(
        model=name,
        image_size=image_size,
        every=every,
        chunk=chunk,
        forward=seconds["forward"],
        loop=seconds["loop"] * every,
        hoisted=seconds["hoisted"] * every,
        vectorised=seconds["vectorised"],
        floor=seconds["floor"],
        score_difference=max(differences),
        kept_in_common=sum(common) / len(common),
        scratch=scratch,
        scratch_bound=max(bounds),
        whole=whole,
    )


def _kept(a: Tensor, b: Tensor) -> float:
    half = len(a) // 2
    first, second = (set(scores.argsort(descending=True)[:half].tolist()) for scores in (a, b))
    return len(first & second) / half


def _floor(activations: Mapping[str, Tensor], chunk: int) -> None:
    for X in activations.values():
        images, tokens, channels = X.shape
        for part in X.reshape(images * tokens, channels).split(chunk, dim=1):
            Z = part.contiguous().T.contiguous().view(-1, images, tokens)
            torch.bmm(Z, Z.transpose(1, 2)).exp_()
