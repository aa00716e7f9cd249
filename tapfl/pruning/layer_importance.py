"""Adaptive layer importance (TAP-ViTs): how far the prediction moves when one layer alone is pruned as planned.

KL_l = mean over the metric set of KL(P_dense ‖ P_probe), the probe being the dense model with layer l cut to its
planned width and everything else dense. The pass up to the probed block is the same for all its probes, so each batch
goes through the dense model once and every probe starts from the cached input of its block: about half the work of
whole passes, and no second dense pass.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tapfl.models.backbone import segments
from tapfl.models.units import PrunableLayer, replaced


@torch.no_grad()
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
    """
    probes = {
        layer.name: layer.shrink(model.get_submodule(layer.name), kept[layer.name])
        for layer in layers
        if len(kept[layer.name]) < layer.units
    }
    steps = segments(model)
    position = {name: index for index, (name, _) in enumerate(steps)}
    divergence = {layer.name: 0.0 for layer in layers}
    for part in inputs.split(batch):
        entering: list[Tensor] = []
        x = part
        for _, step in steps:
            entering.append(x)
            x = step(x)
        dense = x.log_softmax(-1)
        for layer in layers:
            if layer.name not in probes:
                continue
            start = position[layer.block]
            with replaced(model, layer.name, probes[layer.name]):
                x = entering[start]
                for _, step in steps[start:]:
                    x = step(x)
            kl = F.kl_div(x.log_softmax(-1), dense, log_target=True, reduction="sum")
            divergence[layer.name] += float(kl.double())
    return {name: max(total / len(inputs), 0.0) for name, total in divergence.items()}
