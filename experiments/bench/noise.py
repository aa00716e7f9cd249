"""What noise on the mixture's moments costs: how much of the metric set still shows classes that the device has."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch

from experiments.compare.scenario import Scenario
from strategies.round_zero import task_images
from tapfl.config import RunConfig
from tapfl.models.forward import image_features
from tapfl.summary.metric_set import RULES
from tapfl.summary.private import device_mixture


def bench_noise(
    noises: Sequence[float], clip: float, seeds: Sequence[int], devices: int, options: Mapping[str, Any]
) -> list[dict[str, str]]:
    """Returns a row a noise: components a device, and for every rule the share of own classes, mean and worst device.

    Each device and seed draws its own noise; the clip is the same in all rows.
    """
    torch.set_num_threads(1)
    held = [
        (setting, i, setting.pool.projection(image_features(setting.model, setting.transform.batches(images.images))))
        for setting in map(partial(_setting, devices, options), seeds)
        for i in range(devices)
        for images in [setting.private.subset(setting.splits[i].train)]
    ]
    rows = []
    for noise in noises:
        components: list[int] = []
        shares: dict[str, list[float]] = {rule: [] for rule in RULES}
        for setting, i, points in held:
            config = RunConfig.from_flat(setting.config.flat() | {"summary.clip": clip, "summary.noise": noise})
            mixture = device_mixture(points, config.summary, config.seed, i)
            components.append(len(mixture.weights))
            own = np.unique(setting.private.labels[setting.splits[i].train])
            for rule, found in shares.items():
                metric = config.metric.model_copy(update={"rule": rule})
                chosen = task_images(setting.pool, mixture, metric, config.seed, i)
                found.append(float(np.isin(setting.pool.images.labels[chosen], own).mean()))
        row = {"noise": f"{noise:g}", "components": f"{np.mean(components):.1f}"}
        rows.append(row | {rule: f"{np.mean(found):.3f}, {min(found):.3f}" for rule, found in shares.items()})
    return rows


def _setting(devices: int, options: Mapping[str, Any], seed: int) -> Scenario:
    return Scenario.of(RunConfig.from_flat({"devices.count": devices, **options, "seed": seed}))
