"""The aggregation rules by name, and one round on the server.

Server and devices call the same functions with the same options, so both know what a message contains without sending
its layout. In a round, the server

1. reduces each update to the tensors that the rule uploads, and clips it,
2. combines the values of the holders of each coordinate (mean, median, trimmed mean, noisy mean), of factors or of
   products as the rule says,
3. takes a step of its optimiser.

Shapes: A (r, d_in) and B (d_out, r) of the global adapters. A device has the first r_i of the r directions, and in the
factor on the width side, the rows or columns of the units that its plan kept (`tapfl.adapters.layout.Placement`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, Protocol

import numpy as np
import torch
from torch import nn

from tapfl.adapters import flex
from tapfl.adapters.combination import (
    PLAIN,
    Combination,
    Combine,
    ServerOptimizer,
    clip_update,
    median_cut,
    noisy_mean,
    scatter_trimmed,
    trimmed_cut,
)
from tapfl.adapters.layout import (
    LORA_A,
    LORA_B,
    Layout,
    Shapes,
    Side,
    Update,
    device_layout,
    gather,
    gather_all,
    scatter_mean,
    to_global_scale,
    whole_rank,
)
from tapfl.config import AdapterOptions, PrivacyOptions
from tapfl.errors import ModelError
from tapfl.models.units import PrunableLayer
from tapfl.plugin import is_plugin, load_plugin
from tapfl.training import LARGEST, Params, largest


class Aggregate(Protocol):
    """(global adapters, updates in order of partition ids, fresh adapters, combination) -> global adapters.

    `fresh` is a set of adapters from `initial`, for rules that need new directions.
    """

    def __call__(
        self, previous: Params, updates: Sequence[Update], fresh: Params, combination: Combination = PLAIN
    ) -> Params: ...


EMBED: frozenset[Side] = frozenset({"embed"})
WIDTH: frozenset[Side] = frozenset({"width"})
BOTH = EMBED | WIDTH


@dataclass(frozen=True)
class Rule:
    """Which of a linear's two factors a rule sends, trains and averages, by side. Heads do not depend on the rule.

    Attributes:
        aggregate: the server's part.
        random: the factor that is initialised at random: A, as in LoRA, or the embed-side factor. The other is 0.
        down: sides that the server sends.
        up: maps a round to the sides that a device uploads; the first round is 1.
        trained: maps a round to the sides that a device trains.
    """

    aggregate: Aggregate
    random: Literal["A", "embed"] = "A"
    down: frozenset[Side] = BOTH
    up: Callable[[int], frozenset[Side]] = lambda round: BOTH
    trained: Callable[[int], frozenset[Side]] = lambda round: BOTH


def factor_means(
    previous: Params, updates: Sequence[Update], fresh: Params, combination: Combination = PLAIN
) -> Params:
    """FedIT (arXiv 2305.05644): every tensor is combined on its own.

    This is cheap and the usual baseline, but not exact: Σ p_i B_i Σ p_i A_i differs from Σ p_i B_i A_i by
    Σ p_i (B_i - B̄)(A_i - Ā). With pruned widths, the embed side adds another error, because Ā also averages over
    devices that do not have a given row of B.
    """
    return combination.each(previous, updates)


def norm_weighted_means(
    previous: Params, updates: Sequence[Update], fresh: Params, combination: Combination = PLAIN
) -> Params:
    """HetLoRA's sparsity-weighted aggregation (Cho et al. 2024, arXiv 2401.06432): FedIT with weights ‖B_i A_i‖_F.

    Both factors are padded with zeros to the global rank, as published, so a device without a rank direction counts as
    0 in it. A device whose product is 0 has weight 0 in that linear. Heads are weighted by samples. The paper's rank
    pruning is not implemented: a device's rank is fixed.
    """
    whole = [whole_rank(update, previous, "width", "embed") for update in updates]
    result: Params = {}
    for name, theta in previous.items():
        a = name.removesuffix(LORA_B) + LORA_A if name.endswith(LORA_B) else name
        weighted = updates
        if a.endswith(LORA_A):
            weighted = [replace(update, weight=product_norm(update, a)) for update in whole if a in update.layout]
        result |= combination.each({name: theta}, weighted)
    return result


def product_norm(update: Update, a: str) -> float:
    """Returns ‖BA‖_F on the global scale from ‖BA‖² = tr(BᵀB AAᵀ), which needs only r × r matrices; `a` names A."""
    b = a.removesuffix(LORA_A) + LORA_B
    A, B = (to_global_scale(update.params[name], update.layout[name]) for name in (a, b))
    return float(((B.T @ B) * (A @ A.T)).sum().clamp(min=0).sqrt())


def one_sided_means(
    previous: Params, updates: Sequence[Update], fresh: Params, combination: Combination = PLAIN
) -> Params:
    """FFA-LoRA and RoLoRA: the mean of one factor, while the other is the same on all devices.

    This is exact for the width side: B̄ A is the overlap mean of the B_i A_i, even if ranks differ (`whole_rank`). The
    price is that devices without a direction count as 0 in it, so a direction of few devices is diluted, as in the mean
    of the products.
    """
    return combination.each(previous, [whole_rank(update, previous, "width") for update in updates])


def _turn(round: int) -> frozenset[Side]:
    return WIDTH if round % 2 else EMBED


RULES: dict[str, Rule] = {
    "fedit": Rule(factor_means),
    "hetlora": Rule(norm_weighted_means),
    # FFA-LoRA (arXiv 2403.12313) freezes A. Here the embed-side factor is frozen: A of qkv and fc1, B of proj and fc2.
    # Every device has all of it, so a row (column) of the mean product is the mean of the other factor's row (column)
    # times the frozen factor. Only the width side is sent; the frozen side follows from the seed.
    "ffa": Rule(one_sided_means, random="embed", down=WIDTH, up=lambda round: WIDTH, trained=lambda round: WIDTH),
    # RoLoRA (arXiv 2409.02346): the two factors are trained in turns. The width side starts at 0 and is trained first:
    # its gradient passes through the random factor, while the gradient of the other factor would be 0 in round 1. The
    # mean is exact in odd rounds. In even rounds Ā (of qkv and fc1; B̄ of proj and fc2) also averages over devices that
    # do not have a row or a direction.
    "rolora": Rule(one_sided_means, random="embed", up=_turn, trained=_turn),
    # FedSA-LoRA (arXiv 2410.01463) shares A, which learns common knowledge, and keeps B on the device. Here the
    # embed-side factor is shared. Except for the rank, its shape is the same on every device, so it is combined without
    # the indices of kept units, which would reveal something about a device's task.
    "embed_side": Rule(factor_means, down=EMBED, up=lambda round: EMBED),
    "flex": Rule(flex.aggregate),
}


@dataclass(frozen=True)
class ServerState:
    """The server's state between rounds.

    Attributes:
        params: the global adapters.
        optimizer: moments of the server's optimiser, float32, by prefixed name; empty without an optimiser.
    """

    params: Params
    optimizer: Params = field(default_factory=dict)


def initial(
    options: AdapterOptions,
    shapes: Shapes,
    layers: Sequence[PrunableLayer],
    model: nn.Module,
    generator: torch.Generator,
) -> Params:
    """Returns the global adapters before round 1: one factor of each linear is uniform in ±1/√d_in, the other is 0.

    With a random A this is peft's initialisation. A random B has the same bound, with the d_in of the dense linear.
    Then the first steps of the product, -ηs²G AᵀA and -ηs² BBᵀ G, have the same size: E AᵀA = E BBᵀ = r/(3 d_in) I.
    The heads are copied from `model` and use no random numbers.
    """
    dense, rule = device_layout(shapes, layers, None, rank=1), rule_of(options)
    params: Params = {}
    for name, shape in shapes.items():
        linear, _, factor = name.rpartition(".")
        if factor not in (LORA_A, LORA_B):
            params[name] = model.get_parameter(name).detach().clone()
        elif factor == LORA_A if rule.random == "A" else dense[name].side == rule.random:
            d_in = shapes[f"{linear}.{LORA_A}"][1]
            params[name] = (torch.rand(shape, generator=generator) * 2 - 1) / d_in**0.5
        else:
            params[name] = torch.zeros(shape)
    return params


def untrained(layout: Layout, initial: Params, model: nn.Module) -> Params:
    """Returns a device's whole w before training: its part of `initial`, and the heads of its `model`."""
    heads = dict(model.named_parameters())
    return {
        name: heads[name].detach().clone() if placement.side == "whole" else gather(initial[name], placement)
        for name, placement in layout.items()
    }


def down(options: AdapterOptions, layout: Layout) -> Layout:
    """Returns the part of a device's layout that the server sends, in its order."""
    return _cut(layout, rule_of(options).down | _heads(options))


def up(options: AdapterOptions, layout: Layout, round: int) -> Layout:
    """Returns the part of a device's layout that it uploads in a round (the first is 1), in its order."""
    return _cut(layout, rule_of(options).up(round) | _heads(options))


def trained(options: AdapterOptions, layout: Layout, round: int) -> frozenset[str]:
    """Returns the names of the tensors that a device trains in a round, in its shared and in its private model."""
    return frozenset(_cut(layout, rule_of(options).trained(round) | {"whole"}))


def aggregate(
    options: AdapterOptions,
    privacy: PrivacyOptions,
    state: ServerState,
    updates: Sequence[Update],
    fresh: Params,
    round: int,
    generator: np.random.Generator,
) -> ServerState:
    """Returns the state after a round.

    Args:
        updates: in order of partition ids. Tensors that the rule does not upload are ignored. Without updates, the
            state is returned unchanged.
        fresh: adapters from `initial`, for rules that need new directions.
        generator: of this round, for the noise of differential privacy.

    Raises:
        ModelError: if the new adapters exceed LARGEST² or are NaN. It names the option that is the likely cause.
    """
    if not updates:
        return state
    bounds = [bound for bound in (options.clip, privacy.dp_clip) if bound]
    updates = [_sent(options, update, round) for update in updates]
    if bounds:
        updates = [_clipped(update, state.params, min(bounds)) for update in updates]
    if options.head == "class-rows":
        updates = [class_rows(update) for update in updates]
    if privacy.dp_clip:
        updates = [replace(update, weight=1.0) for update in updates]
    optimizer = None if options.server == "none" else ServerOptimizer(options, state.optimizer)
    combination = Combination(_combine(options, privacy, generator), optimizer.step if optimizer else None)
    params = rule_of(options).aggregate(state.params, updates, fresh, combination)
    # one device can drive the mean to LARGEST, and products of factors beyond it; robust means prevent that
    if not (reached := largest(params.values())) <= LARGEST**2:
        raise ModelError(
            f"{_likely_cause(options, privacy)}: the shared adapters reach {reached:.3g} after round {round}, and at "
            f"most {LARGEST**2:g} is usable; accepted: a lower one"
        )
    return ServerState(params, optimizer.moments if optimizer else state.optimizer)


def _likely_cause(options: AdapterOptions, privacy: PrivacyOptions) -> str:
    """Returns the option that most likely made the shared adapters diverge."""
    if options.server != "none" and options.server_learning_rate:
        return f"adapters.server-learning-rate = {options.server_learning_rate:g}"
    return f"privacy.dp-noise = {privacy.dp_noise:g}" if privacy.dp_noise else "train.learning-rate"


def class_rows(update: Update) -> Update:
    """Returns the update with its heads reduced to the rows of the device's own classes."""
    if update.classes is None:
        return update
    params, layout = dict(update.params), dict(update.layout)
    for name, placement in update.layout.items():
        if placement.side == "whole":
            rows = update.classes[placement.index[0]]
            params[name] = params[name][rows]
            layout[name] = replace(placement, index=(placement.index[0][rows], *placement.index[1:]))
    return replace(update, params=params, layout=layout)


def _sent(options: AdapterOptions, update: Update, round: int) -> Update:
    layout = up(options, update.layout, round)
    return replace(update, params={name: update.params[name] for name in layout}, layout=layout)


def _clipped(update: Update, current: Params, bound: float) -> Update:
    received = gather_all(current, update.layout)
    return replace(update, params=clip_update(update.params, received, update.layout, bound))


def _combine(options: AdapterOptions, privacy: PrivacyOptions, generator: np.random.Generator) -> Combine:
    if privacy.dp_noise:
        return noisy_mean(privacy.dp_noise * privacy.dp_clip, generator)
    if options.combine == "mean":
        return scatter_mean
    return scatter_trimmed(median_cut if options.combine == "median" else trimmed_cut(options.trim))


def rule_of(options: AdapterOptions) -> Rule:
    """Returns the rule that the options name. Raises ConfigError if it is a plugin that cannot be imported."""
    if is_plugin(options.rule):
        found: Rule = load_plugin("adapters.rule", options.rule)
        return found
    return RULES[options.rule]


def _heads(options: AdapterOptions) -> frozenset[Side]:
    return frozenset() if options.head == "personal" else frozenset({"whole"})


def _cut(layout: Layout, sides: frozenset[Side]) -> Layout:
    return {name: placement for name, placement in layout.items() if placement.side in sides}
