"""Moments of a branch's units and of the output that it has lost: what the regression of compensation is made of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from tapfl.models.units import PrunableLayer
from tapfl.pruning.scores import record_activations
from tapfl.pruning.sensitivity import Sensitivity

RIDGE = 1e-3  # λ, of the mean variance of the kept activations
RESOLUTION = 1e-12  # of the mean square of the kept activations: less variance than that is rounding

Felt = Mapping[str, Sensitivity] | None
Known = Mapping[str, "LostOutput"] | None


class LostOutput:
    """Float64 moments of a branch's kept activations Z (rows, kept) and of the output r (rows, outputs) it has lost.

    Args:
        real: bool (tokens,), which tokens of an image count, or None: all.
        weights: of the rows (rows,), batch by batch, or None: all alike.
    """

    def __init__(
        self, kept: int, outputs: int, real: Tensor | None = None, weights: Sequence[Tensor] | None = None
    ) -> None:
        self.kept, self.rows, self.real = kept, 0.0, real
        self.weights = None if weights is None else iter(weights)
        self.total = torch.zeros(kept + outputs, dtype=torch.float64)
        self.product = torch.zeros(kept, kept + outputs, dtype=torch.float64)

    def add(self, Z: Tensor, r: Tensor) -> None:
        both = torch.cat([part.flatten(0, -2).double() for part in (Z, r)], dim=1)
        weights = torch.ones(len(both)) if self.weights is None else next(self.weights)
        if self.real is not None:
            real = self.real.repeat(len(both) // len(self.real))
            both, weights = both[real], weights[real]
        weighted = weights.double()[:, None] * both
        self.rows += float(weights.double().sum())
        self.total += weighted.sum(0)
        self.product += both[:, : self.kept].T @ weighted

    def of_cut(self, kept: Tensor, W: Tensor) -> LostOutput:
        """Returns the moments of the units at `kept` and of r = W_S x_S, which the others S write.

        `self` is of all units and of no output; W (outputs, units) is the linear that reads them.
        """
        gone = torch.ones(self.kept, dtype=torch.bool).index_fill(0, kept, False)
        W_S = W.double()[:, gone]
        found = LostOutput(len(kept), len(W))
        found.rows = self.rows
        found.total = torch.cat([self.total[kept], W_S @ self.total[gone]])
        product = self.product[kept]
        found.product = torch.cat([product[:, kept], product[:, gone] @ W_S.T], dim=1)
        return found

    def covariance(self) -> Tensor:
        """Returns the covariance of the kept activations, float64 (kept, kept)."""
        mean = self.total[: self.kept] / self.rows
        return self.product[:, : self.kept] / self.rows - mean[:, None] * mean

    def regression(self, ridge: float = RIDGE, intercept: bool = True) -> tuple[Tensor, Tensor]:
        """Returns D (outputs, kept) and e (outputs) of the ridge regression r ≈ D z + e; e = 0 without intercept."""
        mean = self.total / self.rows if intercept else torch.zeros_like(self.total)
        second = self.product / self.rows
        C_ZZ, C_Zr = (second - mean[: self.kept, None] * mean).split([self.kept, len(mean) - self.kept], dim=1)
        size = second.diagonal().sum() / max(self.kept, 1)
        D = torch.zeros_like(C_Zr.T)
        if size > 0:
            penalty = ridge * C_ZZ.diagonal().mean() + RESOLUTION * size
            D = torch.linalg.solve(C_ZZ + penalty * torch.eye(self.kept, dtype=C_ZZ.dtype), C_Zr).T
        return D, mean[self.kept :] - D @ mean[: self.kept]


@torch.no_grad()
def unit_moments(
    model: nn.Module, layers: Sequence[PrunableLayer], inputs: Tensor, batch: int, felt: Felt = None
) -> dict[str, LostOutput]:
    """Returns the moments of all units of every FFN, by layer name: what one-pass compensation of any cut follows from.

    The output that an FFN loses is linear in its units; what an attention loses depends on how its logits change, so
    that has to be looked at for every cut.
    """
    ffns = [layer for layer in layers if layer.kind == "ffn"]
    found = {layer.name: LostOutput(layer.units, 0, weights=rows_of(felt, layer)) for layer in ffns}
    for number, images in enumerate(inputs.split(batch)):
        for name, X in record_activations(model, ffns, images, number)[1].items():
            found[name].add(X, X[..., :0])
    return found


def rows_of(felt: Felt, layer: PrunableLayer) -> tuple[Tensor, ...] | None:
    """Returns the weights of a branch's rows, batch by batch; None: all alike."""
    return None if felt is None else felt[layer.name].rows
