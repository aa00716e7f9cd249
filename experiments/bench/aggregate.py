"""What a round's aggregation costs the server: every rule, robust and optimised combinations, seconds and memory.

Devices have the default budgets and ranks in turn, plans of random units that meet the budget, and random adapters: how
long it takes depends on shapes and indices, not on values. `flex` picks the smaller of two forms of a linear's mean
product, Σ r_i thin factors or the dense matrix; both are also forced on all linears, with the elements that they hold
beside a linear's result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from experiments.bench.memory import peak_process_bytes
from experiments.bench.side_by_side import side_by_side
from tapfl.adapters import flex, rules
from tapfl.adapters.layout import LORA_A, LORA_B, Update, device_layout, gather_all, global_shapes
from tapfl.config import AdapterOptions, DeviceOptions, PrivacyOptions, PruningOptions
from tapfl.models.backbone import BackboneSpec, build
from tapfl.models.forward import example_input
from tapfl.models.prunable import prunable_layers
from tapfl.pruning.criteria.random_units import random_units
from tapfl.pruning.plan import LayerPlan, PruningPlan
from tapfl.pruning.planning import pruning_task
from tapfl.seeds import torch_generator
from tapfl.training import Params

VARIANTS: dict[str, AdapterOptions] = {
    "fedit": AdapterOptions(rule="fedit"),
    "hetlora": AdapterOptions(rule="hetlora"),
    "fedit, clip": AdapterOptions(rule="fedit", clip=1.0),
    "fedit, adam": AdapterOptions(rule="fedit", server="adam"),
    "fedit, median": AdapterOptions(rule="fedit", combine="median"),
    "fedit, trimmed mean": AdapterOptions(rule="fedit", combine="trimmed-mean"),
    "ffa": AdapterOptions(rule="ffa"),
    "rolora": AdapterOptions(rule="rolora"),
    "embed_side": AdapterOptions(rule="embed_side"),
    "flex": AdapterOptions(rule="flex"),
    "flex, adam": AdapterOptions(rule="flex", server="adam"),
}
ROBUST_PRODUCTS: dict[str, AdapterOptions] = {
    "flex, median": AdapterOptions(rule="flex", combine="median"),
    "flex, trimmed mean": AdapterOptions(rule="flex", combine="trimmed-mean"),
}


@dataclass(frozen=True)
class Round:
    """A round as the server meets it: global adapters, and what the devices sent."""

    params: Params
    updates: Sequence[Update]

    def aggregate(self, options: AdapterOptions) -> Params:
        generator = torch_generator(0, "bench aggregate")
        state = rules.ServerState(self.params)
        return rules.aggregate(options, PrivacyOptions(), state, self.updates, self.params, 1, generator).params

    def svds(self, svd: Callable[[Tensor, Tensor], object]) -> None:
        """Carries `svd` out on the stacked factors of every linear."""
        for B, A in self._stacked():
            svd(B, A)

    def largest(self, elements: Callable[[Tensor, Tensor], int]) -> int:
        """Returns the most `elements` of any linear's stacked factors."""
        return max(elements(B, A) for B, A in self._stacked())

    def _stacked(self) -> Iterator[tuple[Tensor, Tensor]]:
        for a in self.params:
            if a.endswith(LORA_A):
                b = a.removesuffix(LORA_A) + LORA_B
                yield flex.stacked_mean(self.params[b], self.params[a], self.updates, b, a)


def bench_aggregate(
    spec: BackboneSpec, devices: int, repeats: int, robust_products: bool = True
) -> list[Mapping[str, str]]:
    """Returns a row for every rule and combination; CPU seconds on one thread, by how much the process grew."""
    torch.set_num_threads(1)
    met = random_round(spec, devices)
    variants: dict[str, Callable[[], object]] = {
        name: partial(met.aggregate, options)
        for name, options in (VARIANTS | (ROBUST_PRODUCTS if robust_products else {})).items()
    }
    forms: dict[str, Callable[[Tensor, Tensor], object]] = {
        "flex SVDs, all thin": flex.thin_svd,
        "flex SVDs, all dense": lambda B, A: torch.linalg.svd(B @ A, full_matrices=False),
    }
    variants |= {name: partial(met.svds, svd) for name, svd in forms.items()}
    sizes = {
        "flex SVDs, all thin": met.largest(lambda B, A: B.numel() + A.numel()),
        "flex SVDs, all dense": met.largest(lambda B, A: len(B) * A.shape[1]),
    }
    seconds = side_by_side(variants, repeats)
    rows: list[Mapping[str, str]] = []
    for name, work in variants.items():
        grown = peak_process_bytes(work)
        rows.append(
            {
                "devices": str(devices),
                "aggregation": name,
                "s": f"{seconds[name]:.2f}",
                "peak MB": "?" if grown is None else f"{grown / 1e6:.0f}",
                "largest form": f"{sizes[name] / 1e3:.0f} k" if name in sizes else "",
            }
        )
    return rows


def random_round(spec: BackboneSpec, devices: int) -> Round:
    """Returns random adapters of the largest default rank, and updates near them of devices that differ."""
    model = build(spec).requires_grad_(False)
    layers, has = prunable_layers(model), DeviceOptions()
    shapes = global_shapes(model, layers, max(has.ranks))
    options = PruningOptions(criterion="random", ratio="uniform", align=1)
    tasks = [pruning_task(model, example_input(model, 1), budget, options, batch=1) for budget in has.budgets]
    generator = torch_generator(0, "bench aggregate")

    def noise(shape: Sequence[int]) -> Tensor:
        return 0.1 * torch.randn(tuple(shape), generator=generator)

    params: Params = {name: noise(shape) for name, shape in shapes.items()}
    updates = []
    for i in range(devices):
        task, rank = tasks[i % len(tasks)], has.ranks[i % len(has.ranks)]
        kept = random_units(replace(task, generator=torch_generator(0, "bench aggregate", i))).kept
        parts = tuple(
            LayerPlan(name=layer.name, kind=layer.kind, units=layer.units, kept=tuple(kept[layer.name].tolist()))
            for layer in layers
        )
        plan = PruningPlan(backbone=spec, layers=parts, dense=task.dense, cost=task.dense)
        layout = device_layout(shapes, layers, plan, rank)
        own = {name: theta + noise(theta.shape) for name, theta in gather_all(params, layout).items()}
        updates.append(Update(own, layout, 100.0 + i))
    return Round(params, updates)
