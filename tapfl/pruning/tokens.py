"""How many tokens a smaller model merges, and where: the schedule that joins the widths in one budget (ours).

    none     no token is merged
    merge    `pruning.token-share` of the tokens stay, on average over the blocks' FFNs; widths take what is left to cut
    auto     each of SHARES is tried with the widths that it leaves room for, on the metric set alone: cut and
             compensated with one half of its images, and judged on the other half by the KL divergence from the dense
             model's prediction. The least wins

Every block merges equally many tokens. Where the head reads class tokens alone, the last block drops all others, which
changes nothing.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise

import torch
from torch import nn
from torch.nn import functional as F

from tapfl.config import PruningOptions
from tapfl.errors import BudgetError, ConfigError, ModelError
from tapfl.models.cost import measure_cost, measure_timings
from tapfl.models.merging import Schedule, Tokens, merged_layers, merging
from tapfl.models.units import PrunableLayer
from tapfl.progress import track
from tapfl.pruning.budget import Budget
from tapfl.pruning.compensation import cut
from tapfl.pruning.cost_table import CostTable, cost_table
from tapfl.pruning.criteria.criterion import PruningTask, Scores, Selection
from tapfl.pruning.criteria.registry import criterion_of

SHARES = (1.0, 0.85, 0.7, 0.55)


def schedule_of(stream: Tokens, share: float) -> Schedule:
    """Returns the merges of each block: evenly many, so that at least `share` of the tokens stay on average.

    Even merges of all tokens leave half of them on average, so a smaller share is the same schedule.
    """
    T, L = stream.free + stream.protected, stream.blocks
    schedule: Schedule = (0,) * L
    for total in range(1, stream.free):
        merges = tuple(b - a for a, b in pairwise([round(total * i / L) for i in range(L + 1)]))
        left, lefts = stream.free, []
        for each in merges:
            lefts.append(left := left - each)
        halved = all(each <= (after + each) // 2 for each, after in zip(merges, lefts, strict=True))
        if not halved or sum(lefts) + L * stream.protected < share * L * T:
            break
        schedule = merges
    return (*schedule[:-1], stream.free - sum(schedule[:-1])) if stream.class_only else schedule


def stream_of(model: nn.Module, options: PruningOptions) -> Tokens:
    """Returns the tokens of `model`. Raises ConfigError if it cannot merge them."""
    try:
        return Tokens.of(model)
    except ModelError as error:
        raise ConfigError(f"pruning.tokens = {options.tokens!r}: {error}; accepted here: none") from None


def costs_under(
    model: nn.Module, layers: Sequence[PrunableLayer], costs: CostTable, schedule: Schedule, align: int = 1
) -> tuple[Sequence[PrunableLayer], CostTable]:
    """Returns the layers of `model` and what their shapes cost under a schedule; shares stay those of the dense model.

    Args:
        costs: without a schedule.
        align: of `measure_timings`, where latency is among the limits.
    """
    if not any(schedule):
        return layers, costs
    merged = merging(copy.deepcopy(model), schedule)
    layers = merged_layers(layers, schedule, Tokens.of(merged))
    timings = measure_timings(merged, layers, align) if costs.measured else None
    found = cost_table(layers, measure_cost(merged), Budget(costs.limits), timings)
    return layers, replace(found, dense=costs.dense)


def select(task: PruningTask, scores: Scores | None = None) -> Selection:
    """Returns the choice of the criterion that the task's options name, and the tokens that merge beside it.

    Args:
        scores: of the criterion, if they are known.

    Raises:
        BudgetError: if no widths meet the budget under the schedule, or under any.
        ConfigError: if the backbone cannot merge tokens.
    """
    spend, options = criterion_of(task.options.criterion).chooser(task, scores), task.options
    if options.tokens == "none":
        return spend(task)
    stream = stream_of(task.model, options)

    def under(share: float) -> Selection:
        schedule, given = schedule_of(stream, share), task.new_head or task.model
        layers, costs = costs_under(given, task.layers, task.costs, schedule, options.align)
        chosen = spend(replace(task, layers=tuple(layers), costs=costs))
        return replace(chosen, tokens=schedule if any(schedule) else ())

    if options.tokens == "merge":
        return under(options.token_share)
    judge, found = divergence(task), list[tuple[float, Selection]]()
    refused: BudgetError | None = None
    for share in track(SHARES, "tokens"):
        try:
            selection = under(share)
        except BudgetError as error:
            refused = refused or error
            continue
        found.append((judge(selection), selection))
        if importance := selection.importance:
            task = _with_importance(task, importance)
        if all(len(selection.kept[layer.name]) == layer.units for layer in task.layers):
            break  # the tokens alone meet the budget, and fewer would only lose more
    if not found:
        assert refused is not None
        raise refused
    return min(found, key=lambda each: each[0])[1]


def _with_importance(task: PruningTask, importance: dict[str, float]) -> PruningTask:
    """Returns the task with a known importance of its layers, whose probes cost more than a cut."""
    return replace(task, probe=lambda _: importance)


@torch.no_grad()
def divergence(task: PruningTask) -> Callable[[Selection], float]:
    """Returns how far a selection is from the dense model: KL(P_dense ‖ P_cut) in nats, on the metric set.

    The smaller model is cut and compensated with every other of its images, and judged on the rest of them.
    """
    half, held = replace(task, inputs=task.inputs[::2]), task.inputs[1::2].split(task.batch)
    dense = [task.model(x).double().log_softmax(-1) for x in held]

    @torch.no_grad()
    def judge(selection: Selection) -> float:
        small = cut(half, selection)
        found = [small(x).double().log_softmax(-1) for x in held]
        return float(F.kl_div(torch.cat(found), torch.cat(dense), log_target=True, reduction="batchmean"))

    return judge
