"""Tiny backbones of every supported family; weights are far from timm's near-zero initialisation, so errors show."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tapfl.config import PruningOptions
from tapfl.models.backbone import BackboneSpec, build
from tapfl.models.cost import measure_cost
from tapfl.models.forward import example_input
from tapfl.models.prunable import prunable_layers
from tapfl.models.units import PrunableLayer
from tapfl.pruning.pipeline import prune_model, pruning_task
from tapfl.pruning.plan import LayerPlan, PruningPlan

CLASSES = 10
VIT_ARGS: dict[str, Any] = {"img_size": 8, "patch_size": 2, "in_chans": 1, "embed_dim": 32, "depth": 2, "num_heads": 2}
VIT = BackboneSpec(name="vit_tiny_patch16_224", args=VIT_ARGS, num_classes=CLASSES)
DEIT = BackboneSpec(
    name="deit_tiny_distilled_patch16_224",
    args={"img_size": 32, "embed_dim": 32, "depth": 2, "num_heads": 2},
    num_classes=CLASSES,
)
SWIN = BackboneSpec(
    name="swin_tiny_patch4_window7_224",
    args={"img_size": 32, "embed_dim": 24, "depths": (2, 2), "num_heads": (2, 4), "window_size": 2},
    num_classes=CLASSES,
)
# with its own windows of 7, which fit into 56 pixels
LARGER_SWIN = SWIN.model_copy(update={"args": SWIN.args | {"img_size": 56, "window_size": 7}})
# 11 patches a side, later 6, which windows of 4 exceed
PADDED_SWIN = SWIN.model_copy(update={"args": SWIN.args | {"img_size": 44, "window_size": 4}})


@dataclass(frozen=True)
class Tiny:
    """A backbone that tests share and must not change, its prunable layers, and four images for it."""

    spec: BackboneSpec
    model: Any
    layers: list[PrunableLayer]
    inputs: Tensor


def golden(name: str) -> dict[str, Any]:
    """Returns reference numbers that were computed independently of this package, in float64."""
    return json.loads((Path(__file__).parent / "golden" / f"{name}.json").read_text())


def scramble(model: nn.Module, seed: int = 0) -> nn.Module:
    """Adds noise to every parameter, including biases and position tables, and freezes it."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            spread = 0.2 if parameter.ndim < 2 else 1.5 / parameter.shape[-1] ** 0.5
            parameter.add_(spread * torch.randn(parameter.shape, generator=generator))
    return model.eval().requires_grad_(False)


def overflowing(model: nn.Module) -> nn.Module:
    """A copy with finite weights of the head whose logits are not finite."""
    model = copy.deepcopy(model)
    model.get_parameter("head.weight").fill_(3e38)
    return model


def tiny(spec: BackboneSpec, model: nn.Module | None = None) -> Tiny:
    if model is None:
        torch.manual_seed(0)
        model = build(spec)
    scramble(model)
    inputs = torch.randn(example_input(model, 4).shape, generator=torch.Generator().manual_seed(1))
    return Tiny(spec, model, prunable_layers(model), inputs)


def tiny_of_family(family: str) -> Tiny:
    return tiny({"vit": VIT, "deit": DEIT, "swin": LARGER_SWIN}[family])


@contextmanager
def masked(model: nn.Module, layers: list[PrunableLayer], kept: Mapping[str, Tensor]) -> Iterator[None]:
    """The dense model with all units except `kept` set to 0: hidden neurons, or dims of q, k and v."""
    handles = []
    for layer in layers:
        if layer.name in kept:
            factor = torch.zeros(layer.units)
            factor[kept[layer.name]] = 1
            threefold = factor.repeat(3)
            module = model.get_submodule(layer.name)
            if layer.kind == "ffn":
                handles.append(module.fc2.register_forward_pre_hook(lambda _m, x, f=factor: (x[0] * f,)))
            else:
                handles.append(module.qkv.register_forward_hook(lambda _m, _x, y, f=threefold: y * f))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def random_kept(layers: list[PrunableLayer], share: float, seed: int = 0) -> dict[str, Tensor]:
    """Returns, for each layer, a random choice of about `share` of its units, equally many in each head."""
    generator = torch.Generator().manual_seed(seed)
    kept = {}
    for layer in layers:
        count = max(1, round(share * layer.units_per_head))
        heads = [
            torch.randperm(layer.units_per_head, generator=generator)[:count] + head * layer.units_per_head
            for head in range(layer.heads)
        ]
        kept[layer.name] = torch.cat(heads).sort().values
    return kept


def plan_of(backbone: Tiny, kept: Mapping[str, Tensor]) -> PruningPlan:
    """Returns a plan that keeps `kept` (all units of layers it does not name); its cost is that of the dense model."""
    cost = measure_cost(backbone.model)
    layers = tuple(
        LayerPlan(
            name=layer.name,
            kind=layer.kind,
            units=layer.units,
            kept=tuple(kept.get(layer.name, torch.arange(layer.units)).tolist()),
        )
        for layer in backbone.layers
    )
    return PruningPlan(backbone=backbone.spec, layers=layers, dense=cost, cost=cost)


def planned(
    model: nn.Module, spec: BackboneSpec, inputs: Tensor, budget: float | str, options: PruningOptions, batch: int
) -> PruningPlan:
    """Returns the plan of the criterion that the options name."""
    return prune_model(pruning_task(model, inputs, budget, options, batch), spec).plan


def kept_units(plan: PruningPlan) -> dict[str, torch.Tensor]:
    """Returns the kept units (int64) of every layer of a plan, by name."""
    return {layer.name: layer.index() for layer in plan.layers}
