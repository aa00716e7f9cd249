"""Mixtures αv + (1-α)w of adapters, in *effective* weights (APFL, arXiv 2003.13461), with one α or one a layer."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from tapfl.adapters.layout import LORA_A, LORA_B
from tapfl.training import Params


def modules_of(names: Iterable[str]) -> list[str]:
    """Returns the layers that parameters belong to, in their order: linears with adapters, and head modules."""
    return list(dict.fromkeys(name.rpartition(".")[0] for name in names))


def shares(names: Iterable[str], alpha: Tensor | float) -> Params:
    """Returns α by layer: the same for all where it is one number, or alpha[l] for the l-th of `modules_of`."""
    modules, alphas = modules_of(names), torch.as_tensor(alpha, dtype=torch.float64)
    return dict(zip(modules, alphas.unbind(), strict=True)) if alphas.dim() else dict.fromkeys(modules, alphas)


def mix(v: Params, w: Params, alpha: Tensor | float) -> Params:
    """Returns the mixture αv + (1-α)w.

    A pair of factors becomes one of twice the rank, [αB_v, (1-α)B_w] [A_v; A_w], whose product is
    αB_vA_v + (1-α)B_wA_w; mixing the factors themselves would be off by α(1-α)(B_v - B_w)(A_v - A_w). Everything else
    is mixed as parameters. Differentiable in all three.

    Args:
        v, w: the same names and shapes; the order of w's is that of the layers.
        alpha: one number, or (L,).
    """
    share = shares(w, alpha)
    mixed: Params = {}
    for name, theta in w.items():
        a = share[name.rpartition(".")[0]]
        if name.endswith(LORA_A):
            mixed[name] = torch.cat([v[name], theta], dim=0)
        elif name.endswith(LORA_B):
            mixed[name] = torch.cat([a * v[name], (1 - a) * theta], dim=1)
        else:
            mixed[name] = a * v[name] + (1 - a) * theta
    return mixed


class Pair(dict[str, Tensor]):
    """Two models as one set of parameters: each tensor is (2, ...), w's at 0 and v's at 1, and there is an α.

    Evaluated, it stands for w and for αv + (1-α)w, where w is held fixed; a model that takes it whole runs both on the
    two halves of one batch (`tapfl.adapters.lora.AdaptedModel`).
    """

    def __init__(self, stacked: Params, alpha: Tensor) -> None:
        super().__init__(stacked)
        self.alpha = alpha
