"""Round zero on the server for 1, 10, 100 or 1000 devices that share one public pool: what a device costs.

The work is that of `strategies.round_zero`: the pool's descriptors and mixture once, then a metric set, its scores and
a plan for each device. The devices' mixtures are synthetic, all different: components at points of the pool. The
backbone is the small digits ViT with random weights, because the work does not depend on what the weights are.

Beside it stands the floor, one forward pass of a device's metric set, and the same work without anything shared. With
``probe = pool`` the layers are probed on the pool once, with the masks of the pool, instead of for every device.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import nn

from strategies.round_zero import PublicPool, Shared, describe_pool, device_model
from tapfl.config import RunConfig
from tapfl.data.sources import load_images
from tapfl.models.backbone import BackboneSpec, build, spec_of
from tapfl.models.forward import transform_of
from tapfl.seeds import numpy_generator
from tapfl.summary.mixture import GaussianSummary

POOL, COMPONENTS, ALONE = 897, 3, 3  # images of the pool, components a device, devices that are planned without sharing


def synthetic_mixture(points: np.ndarray, device: int) -> GaussianSummary:
    """Returns a mixture like a device's: a few tight components around points (n, d) of the pool."""
    generator = numpy_generator(0, "bench devices", device)
    means = points[generator.choice(len(points), COMPONENTS, replace=False)]
    variances = points.var(0) * generator.uniform(0.1, 0.4, means.shape)
    return GaussianSummary(generator.dirichlet(np.full(COMPONENTS, 5.0)), means, variances, 100)


def bench_devices(counts: Sequence[int], probes: Sequence[str]) -> list[Mapping[str, str]]:
    """Returns a row for every number of devices and every way to probe; CPU seconds on one thread."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    images = load_images("digits").subset(np.arange(POOL))
    spec = spec_of(RunConfig().model, images.classes)
    model = build(spec).requires_grad_(False)
    rows: list[Mapping[str, str]] = []
    for probe in probes:
        config = RunConfig.from_flat({"pruning.probe": probe})
        start = time.process_time()
        pool = describe_pool(config, images, model)
        described = time.process_time() - start
        alone = _seconds(config, pool, spec, model, ALONE, shared=False) / ALONE if probe == "own" else None
        floor = _forward_seconds(config, pool, model)
        for count in counts:
            plans = _seconds(config, pool, spec, model, count, shared=True)
            rows.append(
                {
                    "probe": probe,
                    "devices": str(count),
                    "pool s": f"{described:.2f}",
                    "plans s": f"{plans:.2f}",
                    "s a device": f"{(described + plans) / count:.3f}",
                    "plans, s a device": f"{plans / count:.3f}",
                    "unshared": f"{alone:.3f}" if alone else "",
                    "forward": f"{floor:.4f}",
                    "device / forward": f"{(described + plans) / count / floor:.1f}",
                    "plan / forward": f"{plans / count / floor:.1f}",
                }
            )
    return rows


def _seconds(
    config: RunConfig, pool: PublicPool, spec: BackboneSpec, model: nn.Module, count: int, shared: bool
) -> float:
    budgets = config.devices.budgets
    start = time.process_time()
    common = Shared(config, pool, model)
    for i in range(count):
        served = common if shared else Shared(config, pool, model)
        device_model(served, spec, synthetic_mixture(pool.points, i), i, budgets[i % len(budgets)])
    return time.process_time() - start


@torch.no_grad()
def _forward_seconds(config: RunConfig, pool: PublicPool, model: nn.Module, repeats: int = 20) -> float:
    """Returns the median CPU seconds of one forward pass of a metric set."""
    inputs = transform_of(model)(pool.images.images[: config.metric.size])
    seconds = []
    for _ in range(repeats):
        start = time.process_time()
        for part in inputs.split(config.metric.batch):
            model(part)
        seconds.append(time.process_time() - start)
    return float(np.median(seconds))
