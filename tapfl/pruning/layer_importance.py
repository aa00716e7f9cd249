"""Layer importance (TAP-ViTs): the KL divergence of the prediction when one layer alone is pruned as planned.

KL_l = mean over the metric set of KL(P_dense ‖ P_probe), where the probe is the dense model with layer l cut to its
planned width and everything else dense.

KL_l is a mean over samples. Where the masks of the probes do not depend on the device, one pass over the public pool
measures the divergence of every sample and layer, and the layer importance of a device is the mean over the samples of
its metric set (``pruning.probe = pool``, ours). That is an approximation: units are then ranked by the composite
importance of the pool as a whole, and not of the device's metric set. It pays where there are many devices and few
different shapes to probe.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tapfl.compute import OF_CPU, AtOnce, home
from tapfl.config import PruningOptions
from tapfl.memo import Memo
from tapfl.models.forward import Passing
from tapfl.models.residual import branch_steps
from tapfl.models.units import PrunableLayer, Shape, replaced
from tapfl.progress import track
from tapfl.pruning.scores import neuron_importance
from tapfl.pruning.unit_shape import keep_best

STREAM = OF_CPU.stream  # then a block's activations stay in a CPU's cache, which saves a sixth of the time
# of the divergences that are kept, float64 (layers, pool) for a set of shapes: 1 MB for DeiT and 5000 images
KEPT_BYTES = 256 * 2**20

Variant = Mapping[str, nn.Module]  # the branches that take the place of the dense model's, by layer name
Change = tuple[tuple[str, nn.Module], ...]  # those at one step of the model


def layer_importance(
    model: nn.Module,
    layers: Sequence[PrunableLayer],
    kept: Mapping[str, Tensor],
    inputs: Tensor,
    batch: int,
    stream: int = STREAM,
    passing: Passing = nullcontext,
) -> dict[str, float]:
    """Returns KL_l in nats by layer name: the mean of `sample_divergences` over the metric set `inputs`."""
    return mean_divergence(layers, sample_divergences(model, layers, kept, inputs, batch, stream, passing))


def mean_divergence(layers: Sequence[PrunableLayer], samples: Tensor) -> dict[str, float]:
    """Returns KL_l in nats by layer name, of the divergences (layers, samples) of a metric set's samples."""
    return {layer.name: mean for layer, mean in zip(layers, samples.mean(1).tolist(), strict=True)}


def sample_divergences(
    model: nn.Module,
    layers: Sequence[PrunableLayer],
    kept: Mapping[str, Tensor],
    inputs: Tensor,
    batch: int,
    stream: int = STREAM,
    passing: Passing = nullcontext,
) -> Tensor:
    """Returns KL(P_dense ‖ P_probe) in nats for every layer's probe and every sample, float64 (layers, n).

    Args:
        kept: the units that each layer would keep, by name; a layer that keeps all of them has KL 0.
        inputs: images in the backbone's input format (n, channels, height, width).
        batch: images at once, at most.
        stream, passing: as in `divergences`.
    """
    probes = [
        {layer.name: layer.shrink(model.get_submodule(layer.name), kept[layer.name])}
        if len(kept[layer.name]) < layer.units
        else {}
        for layer in layers
    ]
    return divergences(model, layers, probes, inputs, batch, stream, passing, "layer importance")


@torch.no_grad()
def divergences(
    model: nn.Module,
    layers: Sequence[PrunableLayer],
    variants: Sequence[Variant],
    inputs: Tensor,
    batch: int,
    stream: int = STREAM,
    passing: Passing = nullcontext,
    name: str = "divergence",
) -> Tensor:
    """Returns KL(P_dense ‖ P_variant) in nats, float64 (variants, n): 0 for a variant without another branch.

    Variants that agree up to a branch pass the model together up to there, so every common prefix, the dense model's
    included, is computed once.

    Args:
        layers: the prunable layers of `model`.
        inputs: images in the backbone's input format (n, channels, height, width).
        batch: images at once, at most.
        stream: floats of the residual stream that pass a block together.
        passing: context of the passes.
        name: of the stage as which it is shown.
    """
    walk = _Walk(model, [{}, *variants])
    found = inputs.new_zeros(len(variants), len(inputs), dtype=torch.float64)
    floats = sum(layer.tokens * layer.embed_dim for layer in layers) / len(layers)  # an image, in an average block
    at_once = min(batch, max(1, round(stream / floats)))
    parts = list(zip(inputs.split(at_once), found.split(at_once, dim=1), strict=True))
    for part, columns in track(parts, name):
        with passing():
            logits = walk.logits(part)
        dense = logits[0].double().log_softmax(-1)
        for row, variant in enumerate(variants):
            if variant:
                own = logits[row + 1].double().log_softmax(-1)
                columns[row] = F.kl_div(own, dense, log_target=True, reduction="none").sum(-1)
    return home(found.clamp_(min=0))


class _Walk:
    """The passes of all variants as a tree: a node is a residual stream, an edge a step of the model."""

    def __init__(self, model: nn.Module, variants: Sequence[Variant]) -> None:
        self.model, self.steps = model, branch_steps(model)
        position = {name: i for i, (name, _) in enumerate(self.steps)}
        self.changes: list[list[Change]] = []  # by variant and step
        for variant in variants:
            changes: list[Change] = [()] * len(self.steps)
            for name, branch in variant.items():
                step = position.get(name, position.get(name.rpartition(".")[0], 0))
                changes[step] += ((name, branch),)
            self.changes.append(changes)

    def logits(self, x: Tensor, start: int = 0, members: Sequence[int] | None = None) -> dict[int, Tensor]:
        """Returns the logits (n, classes), by variant, of the variants `members` that agree up to step `start`.

        Args:
            x: the residual stream that enters the step; for step 0, the images.
        """
        found: dict[int, Tensor] = {}
        members = range(len(self.changes)) if members is None else members
        for position in range(start, len(self.steps)):
            groups: dict[Change, list[int]] = {}
            for i in members:
                groups.setdefault(self.changes[i][position], []).append(i)
            (key, members), *others = groups.items()
            for other, leaving in others:
                found |= self.logits(self._step(position, x, other), position + 1, leaving)
            x = self._step(position, x, key)
        return found | dict.fromkeys(members, x)

    def _step(self, position: int, x: Tensor, change: Change) -> Tensor:
        with ExitStack() as stack:
            for name, branch in change:
                stack.enter_context(replaced(self.model, name, branch))
            return self.steps[position][1](x)


@dataclass(eq=False)
class PoolProbe:
    """The divergences of all samples of a pool, by the shapes that layers are probed at.

    Of a pool that is too large for that, units are ranked on a part, and divergences measured where they are asked for.

    Attributes:
        model: the dense backbone.
        layers: its prunable layers.
        batches: returns the whole pool in the backbone's input format, in order, in pieces; called for each pass. Of a
            large pool: the part.
        options: weights of the composite score.
        batch: images a scoring batch.
        at_once, passing: as in `tapfl.pruning.criteria.criterion.PruningTask`.
    """

    model: nn.Module
    layers: Sequence[PrunableLayer]
    batches: Callable[[], Iterable[Tensor]]
    options: PruningOptions
    batch: int
    at_once: AtOnce = OF_CPU
    passing: Passing = nullcontext
    at: Callable[[np.ndarray], Iterable[Tensor]] | None = None  # of a large pool: the images at these positions
    _known: Memo = field(default_factory=lambda: Memo(KEPT_BYTES, lambda found: found.nbytes), init=False)

    @cached_property
    def scores(self) -> dict[str, Tensor]:
        """The composite importance (units,) of every layer, summed over the whole batches of each piece."""
        weights = {"ffn": self.options.ffn_terms, "attention": self.options.attention_terms}
        total = {layer.name: torch.zeros(layer.units) for layer in self.layers}
        for part in self._parts(self.batches()):
            if len(part) >= self.batch:
                settings = (self.batch, weights, self.at_once, self.passing)
                for name, values in neuron_importance(self.model, self.layers, part, *settings).items():
                    total[name] += home(values)
        return total

    def divergences(self, shapes: Mapping[str, Shape]) -> Tensor:
        """Returns KL(P_dense ‖ P_probe) in nats, float64 (layers, pool), each layer cut to its shape alone."""
        key = tuple(shapes[layer.name] for layer in self.layers)
        return self._known.once(key, lambda: self._measured(shapes, self.batches()))

    def _measured(self, shapes: Mapping[str, Shape], images: Iterable[Tensor]) -> Tensor:
        kept = {layer.name: keep_best(layer, self.scores[layer.name], shapes[layer.name]) for layer in self.layers}
        settings = (self.batch, self.at_once.stream, self.passing)
        found = [sample_divergences(self.model, self.layers, kept, part, *settings) for part in self._parts(images)]
        return torch.cat(found, dim=1)

    def importance(self, shapes: Mapping[str, Shape], chosen: np.ndarray) -> dict[str, float]:
        """Returns KL_l in nats by layer name, over the samples at the positions `chosen` of the pool."""
        if self.at is not None:
            return mean_divergence(self.layers, self._measured(shapes, self.at(chosen)))
        return mean_divergence(self.layers, self.divergences(shapes)[:, torch.from_numpy(chosen)])

    def _parts(self, images: Iterable[Tensor]) -> Iterator[Tensor]:
        device = next(self.model.parameters()).device
        for part in track(images, "pool"):
            yield part.to(device)
