"""The aggregation rules by name, and what server and devices ask of the one that the options name.

Server and devices call the same functions of the same options, so that both know what a message holds without saying
it. A round on the server: updates, each cut to what goes up -> clipped -> combined over the holders of a coordinate
(mean, median, trimmed mean, noisy mean), by factor or by product as the rule says -> a step of the server's optimiser.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import nn

from tapfl.adapters import embed_side, fedit, ffa, flex, hetlora, rolora
from tapfl.adapters.clip import clip_update
from tapfl.adapters.layout import LORA_A, LORA_B, Layout, Shapes, Side, Update, gather_all, global_sides, scatter_mean
from tapfl.adapters.private import noisy_mean
from tapfl.adapters.robust import median_cut, scatter_trimmed, trimmed_cut
from tapfl.adapters.rule import Combination, Combine, Rule
from tapfl.adapters.server import ServerOptimizer
from tapfl.config import AdapterOptions, PrivacyOptions
from tapfl.models.units import PrunableLayer
from tapfl.plugin import is_plugin, load_plugin
from tapfl.training import Params

RULES: dict[str, Rule] = {
    "fedit": fedit.RULE,
    "ffa": ffa.RULE,
    "rolora": rolora.RULE,
    "embed_side": embed_side.RULE,
    "flex": flex.RULE,
}


@dataclass(frozen=True)
class ServerState:
    """What the server carries from round to round.

    Attributes:
        params: the global adapters.
        optimizer: moments of the server's optimiser, float32, by prefixed names; empty without one.
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

    Where A is the random one this is peft's start. Where B is, it has the same bound, with the d_in of the dense
    linear, because the first steps -ηs²G AᵀA and -ηs² BBᵀ G of the product are then of the same size: E AᵀA = E BBᵀ =
    r/(3 d_in) I. The heads are those of `model`, which nothing else is asked of; no random number is drawn for them.
    """
    sides, rule = global_sides(layers), rule_of(options)
    params: Params = {}
    for name, shape in shapes.items():
        linear, _, factor = name.rpartition(".")
        if factor not in (LORA_A, LORA_B):
            params[name] = model.get_parameter(name).detach().clone()
        elif factor == LORA_A if rule.random == "A" else sides[name] == rule.random:
            d_in = shapes[f"{linear}.{LORA_A}"][1]
            params[name] = (torch.rand(shape, generator=generator) * 2 - 1) / d_in**0.5
        else:
            params[name] = torch.zeros(shape)
    return params


def down(options: AdapterOptions, layout: Layout) -> Layout:
    """Returns what the server sends of a device's layout, in its order."""
    return _cut(layout, rule_of(options).down | _heads(options))


def up(options: AdapterOptions, layout: Layout, round: int) -> Layout:
    """Returns what a device uploads of its layout in a round (1 is the first), in its order."""
    return _cut(layout, rule_of(options).up(round) | _heads(options))


def trained(options: AdapterOptions, layout: Layout, round: int) -> frozenset[str]:
    """Returns the names of the tensors that move on a device in a round, of the shared and the personal part alike."""
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
        updates: in order of partition ids; what the rule does not let up is ignored. None: the state stays.
        fresh: the adapters of `initial`, for rules that need new directions.
        generator: of this round, for the noise.
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
    return ServerState(params, optimizer.moments if optimizer else state.optimizer)


def class_rows(update: Update) -> Update:
    """Returns the update with the rows of the heads of those classes alone that the device holds."""
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
    """Returns the rule that the options name. Raises ConfigError if it is a user's own and not to be had."""
    if is_plugin(options.rule):
        found: Rule = load_plugin("adapters.rule", options.rule)
        return found
    return hetlora.RULE if options.hetlora else RULES[options.rule]


def _heads(options: AdapterOptions) -> frozenset[Side]:
    return frozenset() if options.head == "personal" else frozenset({"whole"})


def _cut(layout: Layout, sides: frozenset[Side]) -> Layout:
    return {name: placement for name, placement in layout.items() if placement.side in sides}
