"""Second moments of a branch's units and of the output it has lost, and the regression of the output on the units."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from tapfl.models.merging import group_sums
from tapfl.models.units import PrunableLayer
from tapfl.pruning.scores import record_activations
from tapfl.pruning.sensitivity import Sensitivities

RIDGE = 1e-3  # λ, relative to the mean variance of the kept activations
RESOLUTION = 1e-12  # relative to the mean square of the kept activations; less variance than that is rounding


class LostOutput:
    """Float64 moments of a branch's kept activations Z (rows, kept) and of the output r (rows, outputs) it has lost.

    Args:
        real: which tokens of an image count, bool (tokens,); None for all.
        weights: weights of the rows (rows,), batch by batch; None for equal weights.
        device: of Z and r.
    """

    def __init__(
        self,
        kept: int,
        outputs: int,
        real: Tensor | None = None,
        weights: Sequence[Tensor] | None = None,
        device: torch.device | None = None,
    ) -> None:
        self.kept, self.real = kept, real
        self.weights = None if weights is None else iter(weights)
        self.total = torch.zeros(kept + outputs, dtype=torch.float64, device=device)
        self.product, self.rows = self.total.new_zeros(kept, kept + outputs), self.total.new_zeros(())

    def add(self, Z: Tensor, r: Tensor, source: Tensor | None = None) -> Tensor:
        """Adds a batch. Returns the weights of its rows, float32 (rows,), with 0 for tokens that do not count.

        The weight of a merged token (`source` as in `Merged`) is the sum of the weights of the tokens in it.
        """
        both = torch.cat([part.flatten(0, -2).double() for part in (Z, r)], dim=1)
        rows = len(both) if source is None else source.numel()
        weights = both.new_ones(rows) if self.weights is None else next(self.weights)
        if source is not None:
            weights = group_sums(weights.view(*source.shape, 1), source, Z.shape[1]).flatten()
        counted = weights.float()
        if self.real is not None:
            real = self.real.repeat(len(both) // len(self.real))
            both, weights, counted = both[real], weights[real], counted * real
        weighted = weights.double()[:, None] * both
        self.rows += weights.double().sum()
        self.total += weighted.sum(0)
        self.product += both[:, : self.kept].T @ weighted
        return counted

    def covariance(self) -> Tensor:
        """Returns the covariance of the kept activations, float64 (kept, kept), regularised by RESOLUTION."""
        mean = self.total[: self.kept] / self.rows
        second = self.product[:, : self.kept] / self.rows
        rounding = RESOLUTION * second.diagonal().mean()
        return second - mean[:, None] * mean + torch.diag(rounding.expand(self.kept))

    def regression(self, ridge: float = RIDGE, intercept: bool = True) -> tuple[Tensor, Tensor]:
        """Returns D (outputs, kept) and e (outputs,) of the ridge regression r ≈ D z + e; e = 0 without intercept."""
        mean = self.total / self.rows if intercept else torch.zeros_like(self.total)
        second = self.product / self.rows
        C_ZZ, C_Zr = (second - mean[: self.kept, None] * mean).split([self.kept, len(mean) - self.kept], dim=1)
        size = second.diagonal().sum() / max(self.kept, 1)
        D = torch.zeros_like(C_Zr.T)
        if size > 0:
            penalty = ridge * C_ZZ.diagonal().mean() + RESOLUTION * size
            D = torch.linalg.solve(C_ZZ + torch.diag(penalty.expand(self.kept)), C_Zr).T
        return D, mean[self.kept :] - D @ mean[: self.kept]


@torch.no_grad()
def unit_moments(
    model: nn.Module, layers: Sequence[PrunableLayer], inputs: Tensor, batch: int, fisher: Sensitivities | None = None
) -> dict[str, LostOutput]:
    """Returns the moments of all units of every FFN, by layer name, without any lost output."""
    ffns = [layer for layer in layers if layer.kind == "ffn"]
    rows = {layer.name: fisher[layer.name].rows if fisher else None for layer in ffns}
    moments = {n.name: LostOutput(n.units, 0, weights=rows[n.name], device=inputs.device) for n in ffns}
    for number, images in enumerate(inputs.split(batch)):
        for name, X in record_activations(model, ffns, images, number)[1].items():
            moments[name].add(X, X[..., :0])
    return moments
