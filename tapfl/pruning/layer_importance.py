"""Adaptive layer importance (TAP-ViTs): how far the prediction moves when one layer alone is pruned as planned.

KL_l = mean over the metric set of KL(P_dense ‖ P_probe), the probe being the dense model with layer l cut to its
planned width and everything else dense. What probes have in common is computed once: each image goes through the dense
model once, and every probe starts from the cached stream that enters its branch, as a physically smaller branch.

KL_l is a mean over samples of what each contributes alone, so the divergences of a public pool, measured once with
masks that all devices share, give every device its own layer importance: the mean over its metric set's columns. That
is an approximation (ours, ``pruning.probe = pool``): the masks are then those of the pool, not the device's own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tapfl.models.residual import branch_steps
from tapfl.models.units import PrunableLayer, replaced
from tapfl.progress import track

# Floats of the residual stream that pass a block together (16 images of DeiT-T at 224 px): its activations then stay in
# the processor's cache, which saves a sixth of the time
STREAM_AT_ONCE = 600_000


def layer_importance(
    model: nn.Module,
    layers: Sequence[PrunableLayer],
    kept: Mapping[str, Tensor],
    inputs: Tensor,
    batch: int,
) -> dict[str, float]:
    """Returns KL_l in nats by layer name.

    Args:
        kept: the units that each layer would keep, by name; a layer that keeps all of them has KL 0.
        inputs: the metric set (n, channels, height, width).
        batch: images at once, at most.
    """
    return mean_divergence(layers, sample_divergences(model, layers, kept, inputs, batch))


def mean_divergence(layers: Sequence[PrunableLayer], divergences: Tensor) -> dict[str, float]:
    """Returns KL_l in nats by layer name, of the divergences (layers, samples) of a metric set's samples."""
    return {layer.name: float(mean) for layer, mean in zip(layers, divergences.mean(1), strict=True)}


@torch.no_grad()
def sample_divergences(
    model: nn.Module,
    layers: Sequence[PrunableLayer],
    kept: Mapping[str, Tensor],
    inputs: Tensor,
    batch: int,
) -> Tensor:
    """Returns KL(P_dense ‖ P_probe) in nats for every layer's probe and every sample, float64 (layers, n).

    Args: as `layer_importance`.
    """
    probes = {
        layer.name: layer.shrink(model.get_submodule(layer.name), kept[layer.name])
        for layer in layers
        if len(kept[layer.name]) < layer.units
    }
    steps = branch_steps(model)
    position = {name: index for index, (name, _) in enumerate(steps)}
    start = {layer.name: position.get(layer.name, position.get(layer.block, 0)) for layer in layers}
    found = torch.zeros(len(layers), len(inputs), dtype=torch.float64)
    at_once = min(batch, images_at_once(layers))
    parts = list(zip(inputs.split(at_once), found.split(at_once, dim=1), strict=True))
    for part, columns in track(parts, "layer importance"):
        entering: list[Tensor] = []
        x = part
        for _, step in steps:
            entering.append(x)
            x = step(x)
        dense = x.double().log_softmax(-1)
        for row, layer in enumerate(layers):
            if layer.name not in probes:
                continue
            with replaced(model, layer.name, probes[layer.name]):
                x = entering[start[layer.name]]
                for _, step in steps[start[layer.name] :]:
                    x = step(x)
            columns[row] = F.kl_div(x.double().log_softmax(-1), dense, log_target=True, reduction="none").sum(-1)
    return found.clamp_(min=0)


def images_at_once(layers: Sequence[PrunableLayer]) -> int:
    """Returns how many images pass a block together, so that the stream of an average block is STREAM_AT_ONCE."""
    floats = sum(layer.tokens * layer.embed_dim for layer in layers) / len(layers)
    return max(1, round(STREAM_AT_ONCE / floats))
