"""Reference models, which a device also trains to compare them with its own: `personalize.references`.

    alone          the device's pruned model, trained only on its own images
    dense+alone    the dense backbone, trained only on the device's images
    pooled         the pruned model, trained on the images of all devices, which only a simulation has

Their adapters start like the device's own (without effect, or from the warm start) and never leave the device. No
images are held out from their training, and they take as many steps as the device's own model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from clients import caches
from clients.storage import DeviceStorage
from tapfl.compute import Compute
from tapfl.config import RunConfig
from tapfl.errors import ConfigError
from tapfl.models.dense import DenseCache
from tapfl.personalize.method import Method
from tapfl.personalize.methods import Local, Pooled
from tapfl.pruning.plan import PruningPlan
from tapfl.store import cache_folder
from tapfl.training import Params, rate_factor

Training = Callable[[Method[Any], Params, caches.AdaptedDevice], Params]
"""(method, adapters, model) -> the adapters after a round of this method, which shares nothing."""
Scoring = Callable[[Params, caches.AdaptedDevice], float]
"""(adapters, model) -> accuracy."""


@dataclass(frozen=True)
class References:
    """The reference models of one device, by name."""

    config: RunConfig
    storage: DeviceStorage
    rank: int
    compute: Compute

    @property
    def rates(self) -> dict[str, float]:
        return self.config.personalize.reference_rates

    def begin(self, key: str, plan: PruningPlan, simulated: bool) -> None:
        """Checks that the device can train them, and stores what they need, when it gets its pruned model.

        Args:
            key: of the dense backbone.
            plan: of the pruned model.
            simulated: whether the images of all devices are available.

        Raises:
            ConfigError: if the device cannot train one of them.
        """
        refused = "personalize.references: {} needs {}, which this device does not have; accepted: the others"
        if "pooled" in self.rates and not simulated:
            raise ConfigError(refused.format("pooled", "the images of all devices"))
        if "dense+alone" in self.rates:
            if not DenseCache(self._cache).holds(key):
                raise ConfigError(refused.format("dense+alone", "the dense backbone"))
            self.storage.save_backbone(key, plan.backbone.model_dump_json())

    def warm(self, start: Params) -> dict[str, Params]:
        """Returns the adapters of each reference before the first round, if the device got warm-started adapters.

        The dense backbone is not in the result, because the warm start was distilled from it.
        """
        return {name: start for name in self.rates if name != "dense+alone"}

    def trained(
        self, before: Mapping[str, Params], own: caches.AdaptedDevice, round: int, train: Training
    ) -> dict[str, Params]:
        """Returns the adapters of each reference after a round.

        Args:
            before: the adapters before the round; empty in the first.
            own: the device's pruned model.
            train: trains one reference.
        """
        after: dict[str, Params] = {}
        for name, base_rate in self.rates.items():
            rate, model = rate_factor(self.config.train, round) * base_rate, self._model(name, own)
            method = Pooled(rate) if name == "pooled" else Local(rate)
            after[name] = train(method, before.get(name) or self._start(model), model)
        return after

    def accuracies(self, now: Mapping[str, Params], own: caches.AdaptedDevice, score: Scoring) -> np.ndarray:
        """Returns the accuracy of each reference, float64 (references,)."""
        models = {name: self._model(name, own) for name in self.rates}
        return np.array([score(now.get(name) or self._start(model), model) for name, model in models.items()])

    def _start(self, model: caches.AdaptedDevice) -> Params:
        return self.compute.put(model.start)

    def _model(self, name: str, own: caches.AdaptedDevice) -> caches.AdaptedDevice:
        if name != "dense+alone":
            return own
        return caches.unpruned(self._cache, *self.storage.backbone, self.rank, self.config, self.compute)

    @property
    def _cache(self) -> Path:
        return cache_folder(self.config.cache)
