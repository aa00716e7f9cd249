"""Layer importance for many devices at once, from the samples of the public pool that they share (ours).

KL is a mean over samples. Where the masks of the probes do not depend on the device, one pass over the pool says what
every sample contributes to every layer, and a device's layer importance is the mean over its metric set. The masks are
therefore ranked by the composite importance of the pool as a whole: an approximation, since on its own metric set a
device would rank a little differently. It pays where devices are many and the shapes they are probed at few.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property

import numpy as np
import torch
from torch import Tensor, nn

from tapfl.config import PruningOptions
from tapfl.memo import Memo
from tapfl.models.units import PrunableLayer, Shape
from tapfl.progress import track
from tapfl.pruning.layer_importance import mean_divergence, sample_divergences
from tapfl.pruning.scores import neuron_importance
from tapfl.pruning.unit_shape import keep_best

LAYER_SHAPES = (
    32  # sets of shapes whose divergences are kept: float64 (layers, pool) each, 1 MB for DeiT and 5000 images
)


class PoolProbe:
    """The divergences of all samples of a pool, by the shapes that layers are probed at.

    Args:
        model: the dense backbone.
        layers: its prunable layers.
        batches: gives the whole pool in the backbone's input format, in order, in pieces; called for each pass.
        options: weights of the composite score, channels at once.
        batch: images a scoring batch.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[PrunableLayer],
        batches: Callable[[], Iterable[Tensor]],
        options: PruningOptions,
        batch: int,
    ) -> None:
        self.model, self.layers, self.batches, self.options, self.batch = model, layers, batches, options, batch
        self._known = Memo(LAYER_SHAPES)

    @cached_property
    def scores(self) -> dict[str, Tensor]:
        """The composite importance (units,) of every layer, summed over the whole batches of each piece."""
        weights = {"ffn": self.options.ffn_terms, "attention": self.options.attention_terms}
        total = {layer.name: torch.zeros(layer.units) for layer in self.layers}
        for part in track(self.batches(), "pool"):
            if len(part) >= self.batch:
                found = neuron_importance(self.model, self.layers, part, self.batch, weights)
                for name, values in found.items():
                    total[name] += values
        return total

    def divergences(self, shapes: Mapping[str, Shape]) -> Tensor:
        """Returns KL(P_dense ‖ P_probe) in nats, float64 (layers, pool), each layer cut to its shape alone."""
        return self._known.once(tuple(shapes[layer.name] for layer in self.layers), lambda: self._measure(shapes))

    def importance(self, shapes: Mapping[str, Shape], chosen: np.ndarray) -> dict[str, float]:
        """Returns KL_l in nats by layer name, over the samples at the positions `chosen` of the pool."""
        return mean_divergence(self.layers, self.divergences(shapes)[:, torch.from_numpy(chosen)])

    def _measure(self, shapes: Mapping[str, Shape]) -> Tensor:
        kept = {layer.name: keep_best(layer, self.scores[layer.name], shapes[layer.name]) for layer in self.layers}
        parts = [
            sample_divergences(self.model, self.layers, kept, part, self.batch)
            for part in track(self.batches(), "pool")
        ]
        return torch.cat(parts, dim=1)
