"""Composite neuron importance of a whole backbone: the vectorised form against the per-channel loop, and the floor.

The loop is the published way, kept here as the reference: for each layer and channel its own distances and five
exponentials. The floor is what no implementation of the same formula can leave out: one forward pass, one Gram matrix
and one exponential a channel, and the copies of activations into channel-major order.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from experiments.bench.side_by_side import side_by_side
from tapfl.models.backbone import BackboneSpec, build, example_input
from tapfl.models.units import PrunableLayer, prunable_layers
from tapfl.pruning.scores import TERM_WEIGHTS, Terms, centre, composite, record_activations, terms

SIGMAS = (1, 2, 4, 8, 16)
BATCH = 64


@dataclass(frozen=True)
class ScoringBench:
    """CPU seconds of one batch, and the largest difference of a score and of the sets kept at one half."""

    model: str
    image_size: int
    loop: float
    vectorised: float
    floor: float
    score_difference: float
    kept_in_common: float

    def row(self) -> Mapping[str, str]:
        return {
            "model": f"{self.model} {self.image_size} px",
            "loop s": f"{self.loop:.2f}",
            "vectorised s": f"{self.vectorised:.3f}",
            "loop / vectorised": f"{self.loop / self.vectorised:.1f}",
            "vectorised / floor": f"{self.vectorised / self.floor:.2f}",
            "score difference": f"{self.score_difference:.1e}",
            "kept in common": f"{self.kept_in_common:.4f}",
        }


def loop_kernel(Z: Tensor) -> Tensor:
    """K(Z) of (B, N), each bandwidth by itself."""
    squares = torch.cdist(Z, Z, compute_mode="donot_use_mm_for_euclid_dist").square()
    return torch.stack([torch.exp(-squares / (2 * sigma**2)) for sigma in SIGMAS]).mean(0)


def loop_terms(X: Tensor, P: Tensor, heads: int) -> Terms:
    """The three terms of a layer, a channel at a time."""
    B, _, C = X.shape
    target = centre(P @ P.T)
    groups = max(heads, 1)
    width = C // groups
    references = [centre(loop_kernel(X[:, :, g * width : (g + 1) * width].mean(-1))) for g in range(groups)]
    rel, red = torch.zeros(C), torch.zeros(C)
    for c in range(C):
        K = centre(loop_kernel(X[:, :, c]))
        rel[c] = torch.trace(K @ target)
        others = [g for g in range(groups) if not heads or g != c // width]
        red[c] = torch.stack([torch.trace(K @ references[g]) for g in others]).mean() if others else 0.0
    return Terms(rel, red, X.abs().sum((0, 1)))


@torch.no_grad()
def bench_scoring(name: str, image_size: int, repeats: int) -> ScoringBench:
    """Returns the measurement for one backbone with random weights, on one thread and one batch of noise."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = build(BackboneSpec(name=name, args={"img_size": image_size}, num_classes=1000))
    layers = prunable_layers(model)
    batch = torch.randn(example_input(model, BATCH).shape)

    def scores(of: Callable[[Tensor, Tensor, int], Terms]) -> dict[str, Tensor]:
        logits, activations = record_activations(model, layers, batch)
        P = logits.softmax(-1)
        return {
            layer.name: composite(
                of(activations.pop(layer.name), P, layer.heads if layer.kind == "attention" else 0),
                TERM_WEIGHTS[layer.kind],
            )
            for layer in layers
        }

    loop, fused = scores(loop_terms), scores(terms)
    difference = max(float((loop[name] - fused[name]).abs().max()) for name in loop)
    common = [_kept(loop[name], fused[name]) for name in loop]
    seconds = side_by_side(
        {
            "loop": lambda: scores(loop_terms),
            "vectorised": lambda: scores(terms),
            "floor": lambda: _floor(model, layers, batch),
        },
        repeats,
    )
    return ScoringBench(
        model=name,
        image_size=image_size,
        loop=seconds["loop"],
        vectorised=seconds["vectorised"],
        floor=seconds["floor"],
        score_difference=difference,
        kept_in_common=sum(common) / len(common),
    )


def _kept(a: Tensor, b: Tensor) -> float:
    half = len(a) // 2
    first, second = (set(scores.argsort(descending=True)[:half].tolist()) for scores in (a, b))
    return len(first & second) / half


def _floor(model: nn.Module, layers: Sequence[PrunableLayer], batch: Tensor) -> None:
    _, activations = record_activations(model, layers, batch)
    for layer in layers:
        for part in activations.pop(layer.name).permute(2, 0, 1).split(64):
            part = part.contiguous()
            torch.bmm(part, part.transpose(1, 2)).exp_()
