"""Chooses how many tokens a pruned model merges in each block, so that tokens and widths share one budget (ours).

    none     no token is merged
    merge    `pruning.token-share` of the tokens stay, on average over the blocks' FFNs; widths are cut for the rest of
             the budget
    auto     tries every share of SHARES, each with the widths that then fit the budget. The model is cut and
             compensated on one half of the metric set. On the other half, the KL divergence from the dense model's
             prediction is measured. The share with the smallest divergence is taken

All blocks merge about equally many tokens. If the head reads only class tokens, the last block drops all others,
which does not change the output.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from tapfl.config import PruningOptions
from tapfl.errors import BudgetError, ConfigError, ModelError
from tapfl.models.cost import measure_cost, measure_timings
from tapfl.models.forward import require_finite
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
    """Returns the number of merges in each block, as many as possible with at least `share` of the tokens left.

    The share is the average over the blocks, and all blocks merge about equally many tokens. Merging all tokens this
    way leaves half of them on average, so all smaller shares give the same schedule.
    """
    T, L = stream.free + stream.protected, stream.blocks
    schedule: Schedule = (0,) * L
    for total in range(1, stream.free):
        merges = tuple(b - a for a, b in pairwise([round(total * i / L) for i in range(L + 1)]))
        remaining = stream.free - np.cumsum(merges)  # free tokens after each block
        possible = all(m <= (m + left) // 2 for m, left in zip(merges, remaining, strict=True))  # at most half merge
        if not possible or remaining.sum() + L * stream.protected < share * L * T:
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
    """Returns the layers of `model` and the costs of their shapes when tokens are merged by `schedule`.

    Limits that are shares still refer to the dense model without merging.

    Args:
        costs: the costs without merging.
        align: of `measure_timings`, if latency is limited.
    """
    if not any(schedule):
        return layers, costs
    merged = merging(copy.deepcopy(model), schedule)
    layers = merged_layers(layers, schedule, Tokens.of(merged))
    timings = measure_timings(merged, layers, align) if costs.measured else None
    table = cost_table(layers, measure_cost(merged), Budget(costs.limits), timings)
    return layers, replace(table, dense=costs.dense)


def select(task: PruningTask, scores: Scores | None = None) -> Selection:
    """Returns the selection of the criterion that the task's options name, with the schedule of merged tokens.

    Args:
        scores: scores of the criterion, if they are already known.

    Raises:
        BudgetError: if no widths meet the budget under the schedule, or with `auto`, under any of them.
        ConfigError: if the backbone cannot merge tokens.
    """
    spend, options = criterion_of(task.options.criterion).chooser(task, scores), task.options
    if options.tokens == "none":
        return spend(task)
    stream = stream_of(task.model, options)

    def under(share: float) -> Selection:
        schedule, deployed = schedule_of(stream, share), task.new_head or task.model
        layers, costs = costs_under(deployed, task.layers, task.costs, schedule, options.align)
        chosen = spend(replace(task, layers=tuple(layers), costs=costs))
        return replace(chosen, tokens=schedule if any(schedule) else ())

    if options.tokens == "merge":
        return under(options.token_share)
    judge, judged = divergence(task), list[tuple[float, Selection]]()
    first_error: BudgetError | None = None
    for share in track(SHARES, "tokens"):
        try:
            selection = under(share)
        except BudgetError as error:
            first_error = first_error or error
            continue
        judged.append((judge(selection), selection))
        if importance := selection.importance:
            task = _with_importance(task, importance)
        if all(len(selection.kept[layer.name]) == layer.units for layer in task.layers):
            break  # merging alone meets the budget; fewer tokens would only lose more
    if not judged:
        assert first_error is not None
        raise first_error
    return min(judged, key=lambda entry: entry[0])[1]


def _with_importance(task: PruningTask, importance: dict[str, float]) -> PruningTask:
    """Returns the task with a known layer importance: measuring it again would take longer than cutting the model."""
    return replace(task, probe=lambda _: importance)


@torch.no_grad()
def divergence(task: PruningTask) -> Callable[[Selection], float]:
    """Returns a function that measures the divergence KL(P_dense ‖ P_cut) of a selection, in nats, on the metric set.

    The model is cut and compensated on the even-numbered images of the metric set and measured on the odd-numbered.

    Raises:
        ModelError: if there are fewer than two images, or a prediction is not finite.
    """
    if len(task.inputs) < 2:
        raise ModelError("pruning.tokens = 'auto': takes a metric set of at least two images, one to judge by")
    half, held = replace(task, inputs=task.inputs[::2]), task.inputs[1::2].split(task.batch)
    dense = [task.model(x).double().log_softmax(-1) for x in held]

    @torch.no_grad()
    def judge(selection: Selection) -> float:
        small = cut(half, selection)
        own = [small(x).double().log_softmax(-1) for x in held]
        kl = F.kl_div(torch.cat(own), torch.cat(dense), log_target=True, reduction="batchmean")
        require_finite(kl, "tokens")
        return float(kl)

    return judge
