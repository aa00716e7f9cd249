"""Layer importance (TAP-ViTs): the KL divergence of the prediction when only one layer is pruned.

KL_l = mean over the metric set of KL(P_dense ‖ P_probe), where the probe is the dense model with only layer l cut to
its planned width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tapfl.compute import HERE, Compute, home
from tapfl.models.forward import require_finite
from tapfl.models.residual import branch_steps
from tapfl.models.units import PrunableLayer, replaced
from tapfl.progress import track

Variant = Mapping[str, nn.Module]  # branches that replace the dense model's, by layer name
Change = tuple[tuple[str, nn.Module], ...]  # the replaced branches at one step of the model


def layer_importance(
    model: nn.Module,
    layers: Sequence[PrunableLayer],
    kept: Mapping[str, Tensor],
    inputs: Tensor,
    batch: int,
    compute: Compute = HERE,
) -> dict[str, float]:
    """Returns KL_l in nats by layer name, for the probes that keep the units `kept`; see `divergences`."""
    kl = divergences(model, layers, probes(model, layers, kept), inputs, batch, compute, "layer importance")
    return {layer.name: value for layer, value in zip(layers, kl.mean(1).tolist(), strict=True)}


def probes(model: nn.Module, layers: Sequence[PrunableLayer], kept: Mapping[str, Tensor]) -> list[Variant]:
    """Returns the probe of every layer: a variant that replaces this layer, or nothing if it keeps all its units."""
    cut = [layer if len(kept[layer.name]) < layer.units else None for layer in layers]
    return [{n.name: n.shrink(model.get_submodule(n.name), kept[n.name])} if n else {} for n in cut]


@torch.no_grad()
def divergences(
    model: nn.Module,
    layers: Sequence[PrunableLayer],
    variants: Sequence[Variant],
    inputs: Tensor,
    batch: int,
    compute: Compute = HERE,
    name: str = "divergence",
) -> Tensor:
    """Returns KL(P_dense ‖ P_variant) in nats, float64 (variants, n); 0 for a variant that replaces nothing.

    Variants that agree up to some branch share the forward pass up to it. Every common prefix, including the dense
    model's, is computed once.

    Args:
        layers: the prunable layers of `model`.
        inputs: images in the backbone's input format (n, channels, height, width).
        batch: largest number of images per pass. Fewer are taken if a block's activations would not fit into a CPU's
            cache, which saves a sixth of the time.
        name: of the stage, as progress shows it.

    Raises:
        ModelError: if a prediction is not finite.
    """
    walk = _Walk(model, [{}, *variants])
    result = inputs.new_zeros(len(variants), len(inputs), dtype=torch.float64)
    floats = sum(layer.tokens * layer.embed_dim for layer in layers) / len(layers)  # per image, in an average block
    at_once = min(batch, max(1, round(compute.at_once.stream / floats)))
    parts = list(zip(inputs.split(at_once), result.split(at_once, dim=1), strict=True))
    for part, columns in track(parts, name):
        with compute.forward():
            logits = walk.logits(part)
        dense = logits[0].double().log_softmax(-1)
        for row, variant in enumerate(variants):
            if variant:
                own = logits[row + 1].double().log_softmax(-1)
                columns[row] = F.kl_div(own, dense, log_target=True, reduction="none").sum(-1)
    require_finite(result, name)
    return home(result.clamp_(min=0))


class _Walk:
    """The forward passes of all variants as a tree: a node is a residual stream, an edge a step of the model."""

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
        """Returns the logits (n, classes) by variant, for `members`, which agree on all steps before `start`.

        Args:
            x: the residual stream that enters step `start`; for step 0, the images.
            members: positions of variants; None stands for all of them.
        """
        logits: dict[int, Tensor] = {}
        members = range(len(self.changes)) if members is None else members
        for position in range(start, len(self.steps)):
            groups: dict[Change, list[int]] = {}
            for i in members:
                groups.setdefault(self.changes[i][position], []).append(i)
            (key, members), *others = groups.items()
            for other, leaving in others:
                logits |= self.logits(self._step(position, x, other), position + 1, leaving)
            x = self._step(position, x, key)
        return logits | dict.fromkeys(members, x)

    def _step(self, position: int, x: Tensor, change: Change) -> Tensor:
        with ExitStack() as stack:
            for name, branch in change:
                stack.enter_context(replaced(self.model, name, branch))
            return self.steps[position][1](x)
