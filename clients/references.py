"""Models that a device also trains, for comparison with its own: `personalize.references`.

`alone` is the device's pruned model, trained on its own images alone; `dense+alone` is the dense backbone, trained so;
`pooled` is the pruned model, trained on the images of all devices, which only a simulation has. Adapters start without
effect, or from the warm start as the device's own do, and never leave the device. Nothing is held out of them, and they
take as many steps as the device's own model.
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
"""(method, adapters, model) -> the adapters after a round of this method, which shares nothing"""
Scoring = Callable[[Params, caches.AdaptedDevice], float]
"""(adapters, model) -> accuracy"""


@dataclass(frozen=True)
class References:
    """The references of one device, by name."""

    config: RunConfig
    storage: DeviceStorage
    rank: int
    compute: Compute

    @property
    def rates(self) -> dict[str, float]:
        return self.config.personalize.reference_rates

    def begin(self, key: str, plan: PruningPlan, simulated: bool) -> None:
        """Keeps what they need, when the device gets its pruned model.

        Args:
            key: of the dense backbone.

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
        """Returns the adapters of each before the first round, if the device's model came with a warm start.

        The dense model, whose answers that was distilled from, keeps adapters without effect.
        """
        return {name: start for name in self.rates if name != "dense+alone"}

    def trained(
        self, before: Mapping[str, Params], own: caches.AdaptedDevice, round: int, train: Training
    ) -> dict[str, Params]:
        """Returns the adapters of each after a round.

        Args:
            before: those before it, none at first.
            own: the device's pruned model.
        """
        found: dict[str, Params] = {}
        for name, own_rate in self.rates.items():
            rate, model = rate_factor(self.config.train, round) * own_rate, self._model(name, own)
            method = Pooled(rate) if name == "pooled" else Local(rate)
            found[name] = train(method, before.get(name) or self._start(model), model)
        return found

    def accuracies(self, now: Mapping[str, Params], own: caches.AdaptedDevice, score: Scoring) -> np.ndarray:
        """Returns the accuracy of each, float64."""
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
