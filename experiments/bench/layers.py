"""Layer importance with cached prefixes against the plain way: two whole forward passes for every probe."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from experiments.bench.side_by_side import side_by_side
from tapfl.models.backbone import BackboneSpec, build
from tapfl.models.forward import example_input
from tapfl.models.prunable import prunable_layers
from tapfl.models.units import PrunableLayer, replaced
from tapfl.pruning.layer_importance import layer_importance

BATCH = 64


@torch.no_grad()
def plain_layer_importance(
    model: nn.Module, layers: Sequence[PrunableLayer], kept: Mapping[str, Tensor], inputs: Tensor
) -> dict[str, float]:
    """KL_l, each probe with a dense pass of its own."""
    divergence = {}
    for layer in layers:
        dense = model(inputs).double().log_softmax(-1)
        probe = layer.shrink(model.get_submodule(layer.name), kept[layer.name])
        with replaced(model, layer.name, probe):
            cut = model(inputs).double().log_softmax(-1)
        divergence[layer.name] = float(F.kl_div(cut, dense, log_target=True, reduction="batchmean"))
    return divergence


@torch.no_grad()
def bench_layers(name: str, image_size: int, repeats: int) -> Mapping[str, str]:
    """Returns a row for one backbone with random weights at half its widths, on one thread and one batch of noise."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = build(BackboneSpec(name=name, args={"img_size": image_size}, num_classes=1000))
    layers = prunable_layers(model)
    inputs = torch.randn(example_input(model, BATCH).shape)
    kept = {layer.name: torch.arange(0, layer.units, 2) for layer in layers}
    plain = plain_layer_importance(model, layers, kept, inputs)
    cached = layer_importance(model, layers, kept, inputs, BATCH)
    seconds = side_by_side(
        {
            "forward": lambda: model(inputs),
            "plain": lambda: plain_layer_importance(model, layers, kept, inputs),
            "cached": lambda: layer_importance(model, layers, kept, inputs, BATCH),
        },
        repeats,
    )
    return {
        "model": f"{name.removesuffix('_patch16_224')} {image_size} px",
        "plain s": f"{seconds['plain']:.2f}",
        "cached s": f"{seconds['cached']:.2f}",
        "plain / cached": f"{seconds['plain'] / seconds['cached']:.1f}",
        "forwards' worth": f"{seconds['cached'] / seconds['forward']:.1f} of {2 * len(layers)}",
        "relative difference": f"{max(abs(cached[n] / plain[n] - 1) for n in plain):.0e}",
    }
