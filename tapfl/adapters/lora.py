"""A frozen model as a function of its adapters.

The parameters are not in the model; they are given with each call, so that one frozen model serves the shared adapters,
the personal ones and any mixture of them.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tapfl.adapters.layout import LORA_A, LORA_B, Layout
from tapfl.adapters.merged import MergedLora, PairedLora
from tapfl.adapters.mixture import Pair, modules_of, shares
from tapfl.models.units import put
from tapfl.training import Params


class _BoundLinear(nn.Module):
    """A frozen linear that takes its adapter, or its whole weight and bias, from the parameters of the call."""

    def __init__(self, name: str, linear: nn.Linear, bound: Params, alpha: dict[str, Tensor], scale: float) -> None:
        super().__init__()
        self.name, self.linear, self.bound, self.alpha, self.scale = name, linear, bound, alpha, scale

    def forward(self, x: Tensor) -> Tensor:
        if self.alpha:
            halves = self._paired(x.reshape(2, -1, x.shape[-1]), self.alpha[self.name])
            return halves.view(*x.shape[:-1], -1)
        weight = self.bound.get(f"{self.name}.weight")
        if weight is not None:
            return F.linear(x, weight, self.bound.get(f"{self.name}.bias"))
        A, B = self.bound[f"{self.name}.{LORA_A}"], self.bound[f"{self.name}.{LORA_B}"]
        return MergedLora.apply(x, self.linear.weight, self.linear.bias, A, B, self.scale)

    def _paired(self, x: Tensor, alpha: Tensor) -> Tensor:
        """The same on the two halves of a batch, (2, n, d_in) -> (2, n, d_out)."""

        def mixed(theta: Tensor) -> Tensor:
            w, v = theta.unbind()
            return torch.stack([w, alpha * v + (1 - alpha) * w.detach()])

        weight, bias = self.bound.get(f"{self.name}.weight"), self.bound.get(f"{self.name}.bias")
        if weight is not None:
            y = x @ mixed(weight).mT
            return y if bias is None else y + mixed(bias)[:, None]
        A, B = self.bound[f"{self.name}.{LORA_A}"], self.bound[f"{self.name}.{LORA_B}"]
        return PairedLora.apply(x, self.linear.weight, self.linear.bias, A, B, alpha, self.scale)


class AdaptedModel:
    """A frozen pruned backbone as a function of its adapters: ``adapted(params, x)`` gives logits.

    With a `Pair` for parameters it gives those of both its models, (2, n, classes), in one pass over 2n images.

    Args:
        model: the pruned backbone.
        layout: names the linears that have adapters and the heads that are trained whole.
        scale: s.
    """

    def __init__(self, model: nn.Module, layout: Layout, scale: float) -> None:
        self._bound: Params = {}
        self._alpha: dict[str, Tensor] = {}
        self._model = copy.deepcopy(model).requires_grad_(False).eval()
        for name in modules_of(layout):
            linear: nn.Linear = self._model.get_submodule(name)  # type: ignore[assignment]
            put(self._model, name, _BoundLinear(name, linear, self._bound, self._alpha, scale))

    def __call__(self, params: Params, x: Tensor) -> Tensor:
        self._bound.update(params)
        try:
            if isinstance(params, Pair):
                self._alpha.update(shares(params, params.alpha))
                return self._model(torch.cat([x, x])).unflatten(0, (2, -1))
            logits: Tensor = self._model(x)
            return logits
        finally:
            self._bound.clear()
            self._alpha.clear()
