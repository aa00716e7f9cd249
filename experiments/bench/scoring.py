"""Composite neuron importance of a whole backbone: the vectorised form against the per-channel loop, and the floor.

The loop is the formula as it is written, kept here as the reference: for each channel its kernels, centring matrices
and traces. Beside it stands a loop with all that is common to the channels taken out. The floor is what no
implementation of the same formula can leave out: one forward pass, one Gram matrix and one exponential a channel, and
the copies of activations into channel-major order.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from experiments.bench.side_by_side import side_by_side
from tapfl.models.backbone import BackboneSpec, build, example_input
from tapfl.models.units import prunable_layers
from tapfl.pruning.scores import TERM_WEIGHTS, Terms, centre, composite, record_activations, terms

SIGMAS = (1, 2, 4, 8, 16)
BATCH = 64


@dataclass(frozen=True)
class ScoringBench:
    """CPU seconds of one batch of 64, and the largest difference of a score and of the sets kept at one half.

    `forward` records the activations; the others start from them.
    """

    model: str
    image_size: int
    forward: float
    loop: float
    hoisted: float
    vectorised: float
    floor: float
    score_difference: float
    kept_in_common: float

    def row(self) -> Mapping[str, str]:
        whole, floor = self.forward + self.vectorised, self.forward + self.floor
        return {
            "model": f"{self.model.removesuffix('_patch16_224')} {self.image_size} px",
            "forward s": f"{self.forward:.3f}",
            "loop s": f"{self.loop:.2f}",
            "hoisted s": f"{self.hoisted:.2f}",
            "vectorised s": f"{self.vectorised:.3f}",
            "loop / vectorised": f"{self.loop / self.vectorised:.1f}",
            "with forward": f"{(self.forward + self.loop) / whole:.1f}",
            "whole / floor": f"{whole / floor:.2f}",
            "difference": f"{self.score_difference:.0e}",
            "kept alike": f"{self.kept_in_common:.4f}",
        }


def loop_kernel(Z: Tensor) -> Tensor:
    """K(Z) of (B, N), each bandwidth by itself."""
    squares = (Z[:, None] - Z[None]).square().sum(-1)
    return torch.stack([torch.exp(-squares / (2 * sigma**2)) for sigma in SIGMAS]).mean(0)


def trace_of_centred(K: Tensor, R: Tensor) -> Tensor:
    """tr(HKH · HRH), as it is written."""
    H = torch.eye(len(K)) - 1 / len(K)
    return torch.trace(H @ K @ H @ H @ R @ H)


def loop_terms(X: Tensor, P: Tensor, heads: int) -> Terms:
    """The three terms of a layer, a channel at a time, each as its formula is written."""
    channels = X.shape[-1]
    groups = max(heads, 1)
    width = channels // groups
    rel, red = torch.zeros(channels), torch.zeros(channels)
    for c in range(channels):
        K = loop_kernel(X[:, :, c])
        rel[c] = trace_of_centred(K, P @ P.T)
        others = [g for g in range(groups) if not heads or g != c // width]
        means = [X[:, :, g * width : (g + 1) * width].mean(-1) for g in others]
        red[c] = torch.stack([trace_of_centred(K, loop_kernel(m)) for m in means]).mean() if means else 0.0
    return Terms(rel, red, X.abs().sum((0, 1)))


def hoisted_loop_terms(X: Tensor, P: Tensor, heads: int) -> Terms:
    """The same with all that does not depend on the channel taken out of the loop: the best a loop can be."""
    channels = X.shape[-1]
    groups = max(heads, 1)
    width = channels // groups
    means = [X[:, :, g * width : (g + 1) * width].mean(-1) for g in range(groups)]
    target, references = centre(P @ P.T), [centre(loop_kernel(m)) for m in means]
    rel, red = torch.zeros(channels), torch.zeros(channels)
    for c in range(channels):
        K = loop_kernel(X[:, :, c])
        rel[c] = (K * target).sum()
        others = [R for g, R in enumerate(references) if not heads or g != c // width]
        red[c] = torch.stack([(K * R).sum() for R in others]).mean() if others else 0.0
    return Terms(rel, red, X.abs().sum((0, 1)))


@torch.no_grad()
def bench_scoring(name: str, image_size: int, repeats: int) -> ScoringBench:
    """Returns the measurement for one backbone with random weights, on one thread and one batch of noise."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = build(BackboneSpec(name=name, args={"img_size": image_size}, num_classes=1000))
    layers = prunable_layers(model)
    batch = torch.randn(example_input(model, BATCH).shape)

    logits, activations = record_activations(model, layers, batch)
    P = logits.softmax(-1)

    def scores(of: Callable[[Tensor, Tensor, int], Terms]) -> dict[str, Tensor]:
        return {
            layer.name: composite(
                of(activations[layer.name], P, layer.heads if layer.kind == "attention" else 0),
                TERM_WEIGHTS[layer.kind],
            )
            for layer in layers
        }

    loop, fused = scores(loop_terms), scores(terms)
    common = [_kept(loop[name], fused[name]) for name in loop]
    variants: dict[str, Callable[[], object]] = {
        "forward": lambda: record_activations(model, layers, batch),
        "loop": lambda: scores(loop_terms),
        "hoisted": lambda: scores(hoisted_loop_terms),
        "vectorised": lambda: scores(terms),
        "floor": lambda: _floor(activations),
    }
    return ScoringBench(
        model=name,
        image_size=image_size,
        **side_by_side(variants, repeats),
        score_difference=max(float((loop[name] - fused[name]).abs().max()) for name in loop),
        kept_in_common=sum(common) / len(common),
    )


def _kept(a: Tensor, b: Tensor) -> float:
    half = len(a) // 2
    first, second = (set(scores.argsort(descending=True)[:half].tolist()) for scores in (a, b))
    return len(first & second) / half


def _floor(activations: Mapping[str, Tensor]) -> None:
    for X in activations.values():
        for part in X.permute(2, 0, 1).split(64):
            Z = part.contiguous()
            torch.bmm(Z, Z.transpose(1, 2)).exp_()
