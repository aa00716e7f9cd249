"""Round zero on the server: cost per device, probing layers once for all devices, noise on the mixtures."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import product
from typing import Annotated

import numpy as np
import torch
import typer
from scipy.stats import spearmanr
from torch import nn

from experiments.bench.timing import Counts, Row, Set, cpu_seconds, side_by_side
from experiments.command_line import options_of
from experiments.compare.scenario import DeviceView, Scenario, hits, shares
from strategies.round_zero import PublicPool, Shared, describe_pool, device_model, task_images
from tapfl.config import RunConfig
from tapfl.data.images import ImageSet
from tapfl.data.sources import load_images
from tapfl.models.backbone import BackboneSpec, build, spec_of
from tapfl.models.forward import image_features, input_transform, transform_of
from tapfl.pruning.compensation import cut
from tapfl.pruning.criteria.criterion import PruningTask, Selection
from tapfl.seeds import numpy_generator
from tapfl.summary.metric_set import RULES
from tapfl.summary.mixture import GaussianSummary, device_mixture

POOL, COMPONENTS, ALONE = 897, 3, 3  # images of the pool, components per device, devices planned without sharing
MEASURES = ("ρ attention", "ρ ffn", "kept alike", "accuracy own", "accuracy pool", "pool - own")
Seeds = Annotated[list[int], typer.Option(help="seeds of runs")]
Devices = Annotated[int, typer.Option(min=1, help="devices of the digits run")]


def devices(
    devices: Counts = [1, 10, 100],
    probe: Annotated[list[str], typer.Option(help="own or pool, as pruning.probe")] = ["own", "pool"],
    criterion: Annotated[list[str], typer.Option(help="as pruning.criterion")] = ["lowrank-heads", "tap"],
    set: Set = [],
) -> Iterator[Row]:
    """Round zero on the server for many devices with one public pool: CPU seconds per device, one thread.

    Descriptors and mixture of the pool are computed once, then a metric set, its scores and a plan for each device. The
    mixtures are synthetic, and the run's backbone has random weights. `unshared` is a plan with ``probe=own`` that
    shares nothing with others; `forward` is one forward pass of a metric set; `goal` is the time of all plans divided
    by the sum of 5 unshared plans and one forward pass per device.
    """
    torch.set_num_threads(1)
    torch.manual_seed(0)
    options = RunConfig.from_flat(options_of(None, set))
    images = load_images(options.data.source, input_transform(options.model), ids=options.data.ids)
    images = images.subset(np.arange(POOL))
    spec = spec_of(options.model, images.classes)
    model = build(spec).requires_grad_(False)
    for name, way in product(criterion, probe):
        own = RunConfig.from_flat(options.flat() | {"pruning.criterion": name})
        config = RunConfig.from_flat(own.flat() | {"pruning.probe": way})
        start = time.process_time()
        pool = describe_pool(config, images, model)
        described = time.process_time() - start
        alone = cpu_seconds(partial(_plan, own, pool, spec, model, ALONE, shared=False)) / ALONE
        floor = _forward_seconds(config, images, model)
        for count in devices:
            plans = cpu_seconds(partial(_plan, config, pool, spec, model, count, shared=True))
            yield {
                "criterion": name,
                "probe": way,
                "devices": str(count),
                "pool s": f"{described:.2f}",
                "plans s": f"{plans:.2f}",
                "s a device": f"{(described + plans) / count:.3f}",
                "plans, s a device": f"{plans / count:.3f}",
                "unshared": f"{alone:.3f}",
                "forward": f"{floor:.4f}",
                "device / forward": f"{(described + plans) / count / floor:.1f}",
                "plan / forward": f"{plans / count / floor:.1f}",
                "goal": f"{plans / (5 * alone + count * floor):.2f}",
            }


def synthetic_mixture(points: np.ndarray, device: int) -> GaussianSummary:
    """Returns a mixture similar to a device's: a few narrow components around points (n, d) of the pool."""
    generator = numpy_generator(0, "bench devices", device)
    means = points[generator.choice(len(points), COMPONENTS, replace=False)]
    variances = points.var(0) * generator.uniform(0.1, 0.4, means.shape)
    return GaussianSummary(generator.dirichlet(np.full(COMPONENTS, 5.0)), means, variances, 100)


def _plan(config: RunConfig, pool: PublicPool, spec: BackboneSpec, model: nn.Module, count: int, shared: bool) -> None:
    budgets = config.devices.budgets
    common = Shared(config, pool, model)
    for i in range(count):
        served = common if shared else Shared(config, pool, model)
        device_model(served, spec, synthetic_mixture(pool.points, i), i, budgets[i % len(budgets)])


@torch.no_grad()
def _forward_seconds(config: RunConfig, images: ImageSet, model: nn.Module) -> float:
    inputs = transform_of(model)(images.read(np.arange(config.metric.size)))
    return side_by_side({"": lambda: [model(part) for part in inputs.split(config.metric.batch)]}, 20)[""]


def probe(
    seed: Seeds = [0],
    devices: Devices = 10,
    budget: Annotated[list[float], typer.Option(help="shares of the MACs")] = [0.3, 0.5, 0.7],
    tau: Annotated[list[float], typer.Option(help="temperatures, as pruning.tau")] = [5.82, 0.1],
    set: Set = [],
) -> Iterator[Row]:
    """Layers probed once on the pool against once per device: ranks, kept units and accuracy on the digits devices.

    Accuracy is that of the pruned models among a device's own classes, without training. Rows are means over devices
    and seeds; ± is the standard deviation of the difference in the last column. With the published τ = 5.82 widths are
    nearly even for any importance, so a small τ is measured too.
    """
    torch.set_num_threads(1)
    found: dict[tuple[float, float], list[list[float]]] = {(t, b): [] for t in tau for b in budget}
    for run in seed:
        config = RunConfig.from_flat(
            {"pruning.criterion": "tap", **options_of(None, set), "seed": run, "devices.count": devices}
        )
        scenario = Scenario.of(config)
        views = [DeviceView.of(scenario, device) for device in range(devices)]
        for t in tau:
            flat = [config.flat() | {"pruning.tau": t, "pruning.probe": way} for way in ("own", "pool")]
            ways = [Shared(RunConfig.from_flat(options), scenario.pool, scenario.model) for options in flat]
            for device, view in enumerate(views):
                chosen = task_images(scenario.pool, view.summary, config.metric, run, device)
                for b in budget:
                    found[t, b].append(_compare(view, [way.selection(chosen, b) for way in ways]))
    for (t, b), values in found.items():
        means, spread = np.nanmean(values, axis=0), np.std([value[-1] for value in values])
        row = {name: f"{mean:.3f}" for name, mean in zip(MEASURES, means, strict=True)}
        row["pool - own"] += f" ± {spread:.3f} ({len(values)})"
        yield {"τ": f"{t:g}", "budget": f"{b:g}"} | row


def _compare(view: DeviceView, answers: Sequence[tuple[PruningTask, Selection]]) -> list[float]:
    (task, own), (_, pool) = answers
    correlations = []
    for kind in ("attention", "ffn"):
        names = [layer.name for layer in task.layers if layer.kind == kind]
        values = ([selection.importance[name] for name in names] for selection in (own, pool))
        correlations.append(float(spearmanr(*values).statistic))
    same = sum(np.isin(own.kept[name], pool.kept[name]).sum() for name in own.kept)
    alike = float(same) / sum(len(kept) for kept in own.kept.values())
    accuracies = []
    for selection in (own, pool):
        options = task.options.model_copy(update={"compensation": "none"})
        model = cut(replace(task, options=options), selection)
        accuracies.append(shares(hits(model, view.inputs, view.labels, view.classes))[1])
    return [*correlations, alike, *accuracies, accuracies[1] - accuracies[0]]


def noise(
    noise: Annotated[list[float], typer.Option(min=0, help="as summary.noise")] = [0, 0.05, 0.1, 0.2, 0.5, 1, 2],
    clip: Annotated[float, typer.Option(min=0, help="as summary.clip, in all rows")] = 11.0,
    seed: Seeds = [0],
    devices: Devices = 10,
    set: Set = [],
) -> Iterator[Row]:
    """Noise on the mixture's moments: share of the metric set in the device's own classes, mean and worst."""
    torch.set_num_threads(1)
    described = []
    for run in seed:
        scenario = Scenario.of(RunConfig.from_flat({"devices.count": devices, **options_of(None, set), "seed": run}))
        for i in range(devices):
            images = scenario.private.subset(scenario.splits[i].train)
            features = image_features(scenario.model, scenario.transform.batches(images))
            described.append((scenario, i, scenario.pool.projection(features), np.unique(images.labels)))
    for amount in noise:
        components: list[int] = []
        shares: dict[str, list[float]] = {rule: [] for rule in RULES}
        for scenario, i, points, classes in described:
            config = RunConfig.from_flat(scenario.config.flat() | {"summary.clip": clip, "summary.noise": amount})
            mixture = device_mixture(points, config.summary, config.seed, i)
            components.append(len(mixture.weights))
            for rule, found in shares.items():
                metric = config.metric.model_copy(update={"rule": rule})
                chosen = task_images(scenario.pool, mixture, metric, config.seed, i)
                found.append(float(np.isin(scenario.pool.images.labels[chosen], classes).mean()))
        row = {"noise": f"{amount:g}", "components": f"{np.mean(components):.1f}"}
        yield row | {rule: f"{np.mean(found):.3f}, {min(found):.3f}" for rule, found in shares.items()}
