"""Backward elimination of units that compensate each other: the optimal brain surgeon, unit by unit.

The units of a branch are read by a linear W (outputs, units); C is the covariance of their activations, M says what an
error of the output is worth. If unit j goes and the others take over what they can of it, the error grows by

    e_j = (Wᵀ M W)_jj / (H⁻¹)_jj,   H = C + λI

and W ← W − W_:j H⁻¹_j: / H⁻¹_jj,  H⁻¹ ← H⁻¹ − H⁻¹_:j H⁻¹_j: / H⁻¹_jj. The unit of the smallest e_j goes, again and
again, so that of several units that say the same one stays (Hassibi and Stork, NeurIPS 1992; for structures Kurtic et
al., "ZipLM", NeurIPS 2023). That what is foreseen is the compensation of `tapfl.pruning.compensation`, and that M is
the Fisher information of the output (`tapfl.pruning.sensitivity`), is ours.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tapfl.pruning.lost_output import RIDGE

ROUNDS = 256  # in which a branch loses its units: one at a time up to that width, a few at a time beyond


def elimination_order(W: Tensor, C: Tensor, M: Tensor, ridge: float = RIDGE) -> tuple[Tensor, Tensor]:
    """Returns the units in the order in which they go, int64 (units,), and the error after each, float64 (units,).

    Args:
        W: float64 (outputs, units).
        C: float64 (units, units), positive semi-definite.
        M: float64 (outputs, outputs), positive semi-definite; with all errors alike, the identity.
        ridge: λ as a share of the mean variance of the units, >= 0.
    """
    units = len(C)
    H = C + (ridge * C.diagonal().mean() + torch.finfo(C.dtype).tiny) * torch.eye(units, dtype=C.dtype)
    inverse = torch.linalg.inv(H)
    worth, directions = torch.linalg.eigh(M)
    W = worth.clamp(min=0).sqrt()[:, None] * (directions.T @ W)
    left, order, errors = torch.arange(units), [], []
    error = 0.0
    while len(left):
        e = W.square().sum(0) / inverse.diagonal()
        count = min(max(1, units // ROUNDS), len(left))
        gone = e.argsort(stable=True)[:count]
        stay = torch.ones(len(left), dtype=torch.bool).index_fill(0, gone, False)
        for j in gone.tolist():
            error += float(e[j])
            order.append(int(left[j]))
            errors.append(error)
        block = torch.linalg.solve(inverse[gone][:, gone], inverse[gone][:, stay])
        W = W[:, stay] - W[:, gone] @ block
        inverse = inverse[stay][:, stay] - inverse[stay][:, gone] @ block
        left = left[stay]
    return torch.tensor(order), torch.tensor(errors, dtype=torch.float64)
