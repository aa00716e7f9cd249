"""What it costs to probe the layers on the public pool once (``pruning.probe = pool``) instead of for every device.

On the digits devices, with the trained dense backbone: how alike the layers are ranked, how many of the kept units are
the same, and the accuracy of the shrunk models among a device's own classes, untrained, at equal budgets.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr

from experiments.compare.scenario import DeviceView, Scenario, score
from strategies.round_zero import Shared, task_images
from tapfl.config import RunConfig
from tapfl.pruning.compensation import compensated
from tapfl.pruning.criteria.task import PruningTask, Selection

MEASURES = ("ρ attention", "ρ ffn", "kept alike", "accuracy own", "accuracy pool", "pool - own")


def bench_probe(
    seeds: Sequence[int],
    devices: int,
    budgets: Sequence[float],
    taus: Sequence[float],
    options: Mapping[str, Any] | None = None,
) -> list[Mapping[str, str]]:
    """Returns a row for each τ and budget: means over devices and seeds, and the spread of the last difference.

    A small τ matters: the published one makes widths nearly even, whatever the importance is.

    Args:
        options: further options of the runs, by their dotted names.
    """
    torch.set_num_threads(1)
    found: dict[tuple[float, float], list[list[float]]] = {(tau, budget): [] for tau in taus for budget in budgets}
    for seed in seeds:
        config = RunConfig.from_flat({**(options or {}), "seed": seed, "devices.count": devices})
        setting = Scenario.of(config)
        views = [DeviceView.of(setting, device) for device in range(devices)]
        for tau in taus:
            flat = [config.flat() | {"pruning.tau": tau, "pruning.probe": probe} for probe in ("own", "pool")]
            ways = [Shared(RunConfig.from_flat(each), setting.pool, setting.model) for each in flat]
            for device, view in enumerate(views):
                chosen = task_images(setting.pool, view.summary, config.metric, seed, device)
                for budget in budgets:
                    found[tau, budget].append(_compare(view, [way.selection(chosen, budget) for way in ways]))
    rows: list[Mapping[str, str]] = []
    for (tau, budget), values in found.items():
        means, spread = np.nanmean(values, axis=0), np.std([value[-1] for value in values])
        row = {name: f"{mean:.3f}" for name, mean in zip(MEASURES, means, strict=True)}
        row["pool - own"] += f" ± {spread:.3f} ({len(values)})"
        rows.append({"τ": f"{tau:g}", "budget": f"{budget:g}"} | row)
    return rows


def _compare(view: DeviceView, answers: Sequence[tuple[PruningTask, Selection]]) -> list[float]:
    (task, own), (_, pool) = answers
    correlations = []
    for kind in ("attention", "ffn"):
        names = [layer.name for layer in task.layers if layer.kind == kind]
        values = ([selection.importance[name] for name in names] for selection in (own, pool))
        correlations.append(float(spearmanr(*values).statistic))
    same = sum(len(set(own.kept[name].tolist()) & set(pool.kept[name].tolist())) for name in own.kept)
    alike = same / sum(len(kept) for kept in own.kept.values())
    accuracies = [
        score(
            compensated(task.model, selection.kept, task.layers, task.inputs, task.batch, "none"),
            view.inputs,
            view.labels,
            view.classes,
        )[1]
        for selection in (own, pool)
    ]
    return [*correlations, alike, *accuracies, accuracies[1] - accuracies[0]]
