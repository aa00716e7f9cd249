"""LoRA in merged form: y = (W₀ + s B A) x + b, in one product forward and without the dense gradient backward.

∂L/∂A = s (dy B)ᵀ x and ∂L/∂B = s dyᵀ (x Aᵀ): equal to plain LoRA, with one large product where that has three.
The parameters are not in the model; they are given with each call, so that one frozen model serves the shared adapters,
the personal ones and any mixture of them.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx
from torch.nn import functional as F

from tapfl.adapters.layout import LORA_A, LORA_B, Layout, Params
from tapfl.models.units import put


class MergedLora(torch.autograd.Function):
    """(x, W₀, b, A, B, s) -> x (W₀ + s B A)ᵀ + b, for frozen W₀ and b."""

    @staticmethod
    def forward(
        ctx: FunctionCtx, x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, s: float
    ) -> Tensor:
        merged = torch.addmm(weight, B, A, alpha=s)
        ctx.save_for_backward(x, merged, A, B)
        ctx.s = s  # type: ignore[attr-defined]
        return F.linear(x, merged, bias)

    @staticmethod
    def backward(ctx: FunctionCtx, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, merged, A, B = ctx.saved_tensors  # type: ignore[attr-defined]
        s: float = ctx.s  # type: ignore[attr-defined]
        rows, flat_dy = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
        dx = dy @ merged if ctx.needs_input_grad[0] else None  # type: ignore[attr-defined]
        dA = (flat_dy @ B).T @ rows * s if ctx.needs_input_grad[3] else None  # type: ignore[attr-defined]
        dB = flat_dy.T @ (rows @ A.T) * s if ctx.needs_input_grad[4] else None  # type: ignore[attr-defined]
        return dx, None, None, dA, dB, None


class _BoundLinear(nn.Module):
    """A frozen linear that takes its adapter, or its whole weight and bias, from the parameters of the call."""

    def __init__(self, name: str, linear: nn.Linear, bound: Params, scale: float) -> None:
        super().__init__()
        self.name, self.linear, self.bound, self.scale = name, linear, bound, scale

    def forward(self, x: Tensor) -> Tensor:
        weight = self.bound.get(f"{self.name}.weight")
        if weight is not None:
            return F.linear(x, weight, self.bound.get(f"{self.name}.bias"))
        A, B = self.bound[f"{self.name}.{LORA_A}"], self.bound[f"{self.name}.{LORA_B}"]
        return MergedLora.apply(x, self.linear.weight, self.linear.bias, A, B, self.scale)


class AdaptedModel:
    """A frozen pruned backbone as a function of its adapters: ``adapted(params, x)`` gives logits.

    Args:
        model: the pruned backbone.
        layout: names the linears that have adapters and the heads that are trained whole.
        scale: s.
    """

    def __init__(self, model: nn.Module, layout: Layout, scale: float) -> None:
        self._bound: Params = {}
        self._model = copy.deepcopy(model).requires_grad_(False).eval()
        for name in adapted_modules(layout):
            linear: nn.Linear = self._model.get_submodule(name)  # type: ignore[assignment]
            put(self._model, name, _BoundLinear(name, linear, self._bound, scale))

    def __call__(self, params: Params, x: Tensor) -> Tensor:
        self._bound.update(params)
        try:
            logits: Tensor = self._model(x)
            return logits
        finally:
            self._bound.clear()


def adapted_modules(layout: Layout) -> list[str]:
    """Returns the module names that a layout speaks of, in its order."""
    return list(dict.fromkeys(name.rpartition(".")[0] for name in layout))


def mix(v: Params, w: Params, alpha: Tensor | float) -> Params:
    """Returns the mixture αv + (1-α)w in *effective* weights (APFL, arXiv 2003.13461).

    A pair of factors becomes one of twice the rank, [αB_v, (1-α)B_w] [A_v; A_w], whose product is
    αB_vA_v + (1-α)B_wA_w; mixing the factors themselves would be off by α(1-α)(B_v - B_w)(A_v - A_w). Everything else
    is mixed as parameters. Differentiable in all three.
    """
    mixed: Params = {}
    for name, theta in v.items():
        if name.endswith(LORA_A):
            mixed[name] = torch.cat([theta, w[name]], dim=0)
        elif name.endswith(LORA_B):
            mixed[name] = torch.cat([alpha * theta, (1 - alpha) * w[name]], dim=1)
        else:
            mixed[name] = alpha * theta + (1 - alpha) * w[name]
    return mixed
