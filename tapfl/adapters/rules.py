"""The aggregation rules by name, and one round on the server.

Server and devices call the same functions of the same options, so that both know what a message holds without sending
its layout. A round on the server: each update is cut to the tensors that the rule uploads -> clipped -> combined over
the holders of each coordinate (mean, median, trimmed mean, noisy mean), by factor or by product as the rule says -> a
step of the server's optimiser.

Shapes: A (r, d_in) and B (d_out, r) of the global adapters; a device has the prefix r_i of r, and of the factor on its
width side the rows or columns of the units that its plan kept (`tapfl.adapters.layout.Placement`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, Protocol

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

    `fresh` are adapters as `initial` returns them, for rules that need new directions.
    """

    def __call__(
        self, previous: Params, updates: Sequence[Update], fresh: Params, combination: Combination = PLAIN
    ) -> Params: ...


EMBED: frozenset[Side] = frozenset({"embed"})
WIDTH: frozenset[Side] = frozenset({"width"})
BOTH = EMBED | WIDTH


@dataclass(frozen=True)
class Rule:
    """Which factors of a linear, by their side, a rule sends, trains and averages. Heads do not depend on the rule.

    Attributes:
        aggregate: the server's part.
        random: the factor that starts random: A, as in LoRA, or the one on the embedding's side. The other starts at 0.
        down: sides that the server sends.
        up: round -> sides that a device uploads; 1 is the first round.
        trained: round -> sides that a device trains.
    """

    aggregate: Aggregate
    random: Literal["A", "embed"] = "A"
    down: frozenset[Side] = BOTH
    up: Callable[[int], frozenset[Side]] = lambda round: BOTH
    trained: Callable[[int], frozenset[Side]] = lambda round: BOTH


def factor_means(
    previous: Params, updates: Sequence[Update], fresh: Params, combination: Combination = PLAIN
) -> Params:
    """FedIT (arXiv 2305.05644): every tensor combined by itself.

    Σ p_i B_i Σ p_i A_i is not Σ p_i B_i A_i: the error is Σ p_i (B_i - B̄)(A_i - Ā), and with pruned widths the embed
    side adds an error of its own, because Ā also averages devices that do not hold a row. Not exact, but cheap, and the
    usual baseline.
    """
    return combination.each(previous, updates)


def norm_weighted_means(
    previous: Params, updates: Sequence[Update], fresh: Params, combination: Combination = PLAIN
) -> Params:
    """HetLoRA's sparsity-weighted aggregation (Cho et al. 2024, arXiv 2401.06432): FedIT with weights ‖B_i A_i‖_F.

    A device whose product is 0 does not count in that linear; heads are weighted by samples. The other half of the
    paper, pruning of ranks, is not implemented: a device's rank is fixed.
    """
    result: Params = {}
    for name, theta in previous.items():
        a = name.removesuffix(LORA_B) + LORA_A if name.endswith(LORA_B) else name
        weighted = updates
        if a.endswith(LORA_A):
            weighted = [replace(update, weight=product_norm(update, a)) for update in updates if a in update.layout]
        result |= combination.each({name: theta}, weighted)
    return result


def product_norm(update: Update, a: str) -> float:
    """Returns ‖BA‖_F on the global scale from ‖BA‖² = tr(BᵀB AAᵀ), which needs two r × r matrices; `a` names A."""
    b = a.removesuffix(LORA_A) + LORA_B
    A, B = (to_global_scale(update.params[name], update.layout[name]) for name in (a, b))
    return float(((B.T @ B) * (A @ A.T)).sum().clamp(min=0).sqrt())


def one_sided_means(
    previous: Params, updates: Sequence[Update], fresh: Params, combination: Combination = PLAIN
) -> Params:
    """The mean of one factor while the other one is the same for all devices (FFA-LoRA, RoLoRA).

    Exact for the width side: B̄ A is the overlap mean of the B_i A_i, also where ranks differ (`whole_rank`). The price
    is that a direction which few devices hold is diluted by those that do not, as in the mean of the products.
    """
    return combination.each(previous, [whole_rank(update, previous) for update in updates])


def _turn(round: int) -> frozenset[Side]:
    return WIDTH if round % 2 else EMBED


RULES: dict[str, Rule] = {
    "fedit": Rule(factor_means),
    "hetlora": Rule(norm_weighted_means),
    # FFA-LoRA (arXiv 2403.12313) freezes A. Here the factor on the embedding's side is frozen, A of qkv and fc1 and B
    # of proj and fc2: every device holds the whole of it, so a row (column) of the mean product is the mean of the
    # other factor's row (column) times it. Only the width side travels; the seed gives the frozen side.
    "ffa": Rule(one_sided_means, random="embed", down=WIDTH, up=lambda round: WIDTH, trained=lambda round: WIDTH),
    # RoLoRA (arXiv 2409.02346): the two factors take turns. The width side starts at 0 and comes first: its gradient
    # passes through the random factor, while the other factor's passes through zeros and round 1 would be lost. Exact
    # in odd rounds; in even ones Ā (of qkv and fc1; B̄ of proj and fc2) averages devices that lack a row or a direction.
    "rolora": Rule(one_sided_means, random="embed", up=_turn, trained=_turn),
    # FedSA-LoRA (arXiv 2410.01463) shares A, which learns what is common, and keeps B on the device. Here the factor on
    # the embedding's side is shared: its shape is the same for every device but for the rank, so no index of a kept
    # unit, which would reveal something about the task, is needed to combine it.
    "embed_side": Rule(factor_means, down=EMBED, up=lambda round: EMBED),
    "flex": Rule(flex.aggregate),
}


@dataclass(frozen=True)
class ServerState:
    """The server's state between rounds.

    Attributes:
        params: the global adapters.
        optimizer: moments of the server's optimiser, float32, by prefixed names; empty without an optimiser.
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
    """Returns the global adapters before round one: one factor of each linear uniform in ±1/√d_in, the other 0.

    With a random A this is peft's initialisation. A random B has the same bound, with the d_in of the dense linear,
    because the first steps -ηs²G AᵀA and -ηs² BBᵀ G of the product are then of the same size: E AᵀA = E BBᵀ =
    r/(3 d_in) I. The heads are copied from `model` and use no random numbers.
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
    """Returns all of a device's w before anything is trained: its part of `initial`, and the heads of its `model`."""
    heads = dict(model.named_parameters())
    return {
        name: heads[name].detach().clone() if placement.side == "whole" else gather(initial[name], placement)
        for name, placement in layout.items()
    }


def down(options: AdapterOptions, layout: Layout) -> Layout:
    """Returns the part of a device's layout that the server sends, in its order."""
    return _cut(layout, rule_of(options).down | _heads(options))


def up(options: AdapterOptions, layout: Layout, round: int) -> Layout:
    """Returns the part of a device's layout that it uploads in a round (1 is the first), in its order."""
    return _cut(layout, rule_of(options).up(round) | _heads(options))


def trained(options: AdapterOptions, layout: Layout, round: int) -> frozenset[str]:
    """Returns the names of the tensors that a device trains in a round, in shared and personal parameters alike."""
    return frozenset(_cut(layout, rule_of(options).trained(round) | {"whole"}))


def aggregate(
    options: AdapterOptions,
    privacy: PrivacyOptions,
    state: ServerState,
    updates: Sequence[Update],
    fresh: Params,
    round: int,
    generator: torch.Generator,
) -> ServerState:
    """Returns the state after a round.

    Args:
        updates: in order of partition ids; tensors that the rule does not upload are ignored. With no updates the
            state is returned unchanged.
        fresh: adapters of `initial`, for rules that need new directions.
        generator: of this round, for the noise of differential privacy.

    Raises:
        ModelError: if the new adapters exceed LARGEST² or are NaN, naming the option that can do that.
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
    # one device can bring the mean to LARGEST, and products of factors beyond: that is what robust rules are for
    if not (reached := largest(params.values())) <= LARGEST**2:
        raise ModelError(
            f"{_mover(options, privacy)}: the shared adapters reach {reached:.3g} after round {round}, and at most "
            f"{LARGEST**2:g} is usable; accepted: a lower one"
        )
    return ServerState(params, optimizer.moments if optimizer else state.optimizer)


def _mover(options: AdapterOptions, privacy: PrivacyOptions) -> str:
    """Returns what moved the shared adapters furthest, as an option."""
    if options.server != "none" and options.server_learning_rate:
        return f"adapters.server-learning-rate = {options.server_learning_rate:g}"
    return f"privacy.dp-noise = {privacy.dp_noise:g}" if privacy.dp_noise else "train.learning-rate"


def class_rows(update: Update) -> Update:
    """Returns the update with its heads reduced to the rows of the classes that the device holds."""
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


def _combine(options: AdapterOptions, privacy: PrivacyOptions, generator: torch.Generator) -> Combine:
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
