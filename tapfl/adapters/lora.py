"""A frozen model as a function of its adapters, and the interpolation of two sets of adapters.

The parameters are not stored in the model: each call passes them, so one frozen model serves the shared adapters, the
personal ones and any interpolation between them, and a `Pair` of them in one pass.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx
from torch.nn import functional as F
from torch.utils._pytree import tree_map_only

from tapfl.adapters.layout import LORA_A, LORA_B, Layout, Shapes
from tapfl.adapters.stack import LINE, flat, lead, parts_of, shapes_of, two_dims
from tapfl.models.forward import Step, example_input, full, segments
from tapfl.models.units import put
from tapfl.training import Params, tensors_in

REST = "rest"  # beside the factors of a pair: what the second set has of the first one's A


class MergedLora(torch.autograd.Function):
    """(x, W₀, b, A, B, s) -> x (W₀ + s B A)ᵀ + b, for frozen W₀ and b.

    One product forward, and no gradient of the size of W₀ backward: ∂L/∂A = s (dy B)ᵀ x and ∂L/∂B = s dyᵀ (x Aᵀ). This
    equals plain LoRA with one large product where plain LoRA has three. The thin products are written as (Bᵀ dyᵀ) x and
    ((A xᵀ) dy)ᵀ, so that their long side comes last: on a CPU that is 2-4 times as fast.

    A stack of devices (`tapfl.adapters.stack`) has W₀ (K, out, in), b (K, 1, out), and x one device after the other.
    A pair has two sets of factors (2, …), or of a stack (2K, …), for each W₀; the second has W₀ + s (B A + R A_first),
    where R, (1, out, rank) or (K, out, rank), is the last argument and A_first, that of the first set, a constant.
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        A: Tensor,
        B: Tensor,
        s: float,
        rest: Tensor | None = None,
    ) -> Tensor:
        merged = _added(_for_all(weight, A), B, A, s)
        if rest is not None:
            merged[1::2].baddbmm_(rest, A[::2], alpha=s)
        ctx.save_for_backward(x, merged, A, B, rest)  # type: ignore[arg-type]  # None as well
        ctx.s = s  # type: ignore[attr-defined]
        return linear(x, merged, bias)

    @staticmethod
    def backward(ctx: FunctionCtx, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, merged, A, B, rest = ctx.saved_tensors  # type: ignore[attr-defined]
        s: float = ctx.s  # type: ignore[attr-defined]
        rows, flat_dy = (each.reshape(*lead(A), -1, each.shape[-1]) for each in (x, dy))
        dx = (flat_dy @ merged).view(x.shape) if ctx.needs_input_grad[0] else None  # type: ignore[attr-defined]
        dA = _added(A, B.mT @ flat_dy.mT, rows, s, 0) if ctx.needs_input_grad[3] else None  # type: ignore[attr-defined]
        dB = None
        if ctx.needs_input_grad[4]:  # type: ignore[attr-defined]
            dB = _added(B.mT, A @ rows.mT, flat_dy, s, 0).mT
        dR = None
        if rest is not None and ctx.needs_input_grad[6]:  # type: ignore[attr-defined]
            dR = _added(rest.mT, A[::2] @ rows[1::2].mT, flat_dy[1::2], s, 0).mT
        return dx, None, None, dA, dB, None, dR


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Returns x Wᵀ + b, or of a stack that of each device."""
    if weight.dim() == 2:
        return F.linear(x, weight, bias)
    rows = x.reshape(len(weight), -1, x.shape[-1])
    y = rows @ weight.mT if bias is None else torch.baddbmm(_for_all(bias, weight), rows, weight.mT)
    return y.view(*x.shape[:-1], -1)


def _for_all(theta: Tensor, sets: Tensor) -> Tensor:
    """Returns a frozen weight or bias once for each set of a stack or a pair."""
    if theta.dim() < 3 or len(theta) == len(sets):
        return theta.expand(*lead(sets), *theta.shape) if theta.dim() == 2 else theta
    return theta.repeat_interleave(len(sets) // len(theta), 0)


def _added(theta: Tensor, b: Tensor, a: Tensor, s: float, share: float = 1) -> Tensor:
    """Returns share · theta + s · b a, in one call; with a share of 0 theta gives its shape alone."""
    add = torch.addmm if theta.dim() == 2 else torch.baddbmm
    return add(theta, b, a, beta=share, alpha=s)


def plain_lora(
    x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, s: float, rest: Tensor | None = None
) -> Tensor:
    """Returns x W₀ᵀ + b + s (x Aᵀ) Bᵀ, float32, for W₀ and b in a lower precision, inside of autocast.

    In `MergedLora` the update would be added to W₀ and rounded with it, and in bfloat16 most of a small one is lost.
    Here it has digits of its own, and the sum is in float32.
    """
    y = torch.add(F.linear(x, weight, bias).float(), linear(linear(x, A, None), B, None), alpha=s)
    if rest is not None:
        second = x.reshape(len(A), -1, x.shape[-1])[1::2]
        y.view(len(A), -1, y.shape[-1])[1::2].add_(linear(linear(second, A[::2].detach(), None), rest, None), alpha=s)
    return y


class BoundLinear(nn.Module):
    """A frozen linear that takes its adapter, or its whole weight and bias, from the parameters of the call.

    Args:
        linear: has `weight` and `bias`, those of one device or of a stack.
    """

    def __init__(self, name: str, linear: nn.Module, bound: Params, scale: float, plain: bool = False) -> None:
        super().__init__()
        self.name, self.linear, self.bound, self.scale, self.plain = name, linear, bound, scale, plain

    def forward(self, x: Tensor) -> Tensor:
        weight = self.bound.get(f"{self.name}.weight")
        if weight is not None:
            return linear(x, weight, self.bound.get(f"{self.name}.bias"))
        A, B = self.bound[f"{self.name}.{LORA_A}"], self.bound[f"{self.name}.{LORA_B}"]
        form: Any = plain_lora if self.plain else MergedLora.apply
        return form(x, self.linear.weight, self.linear.bias, A, B, self.scale, self.bound.get(f"{self.name}.{REST}"))


class AdaptedModel:
    """A frozen pruned backbone as a function of its adapters: ``adapted(params, x)`` returns logits (n, classes).

    Args:
        model: the pruned backbone.
        layout: names the linears that have adapters and the heads that are trained whole.
        scale: s.
        reduced: of the products with frozen weights, instead of the model's own dtype: a lower one. Adapters, their
            gradients and the logits stay float32.

    Attributes:
        prefix, rest: the steps of a pass before the first that has adapters, and from it on.
    """

    prefix: Sequence[Step]
    rest: Sequence[Step]

    def __init__(self, model: nn.Module, layout: Layout, scale: float, reduced: torch.dtype | None = None) -> None:
        self.layout, self.scale, self.reduced = layout, scale, reduced
        self._bound: Params = {}
        self.model = copy.deepcopy(model).requires_grad_(False).eval()
        for name in modules_of(layout):
            module: nn.Linear = self.model.get_submodule(name)  # type: ignore[assignment]
            if reduced is not None:
                module.to(reduced)  # once, where autocast would do it in every pass
            put(self.model, name, BoundLinear(name, module, self._bound, scale, plain=reduced is not None))
        self._divide()

    def _divide(self) -> None:
        """Divides the steps of a pass."""
        steps = segments(self.model)
        adapted = [name for name, module in self.model.named_modules() if isinstance(module, BoundLinear)]
        holds = [any(name.startswith(f"{step}.") for name in adapted) for step, _ in steps]
        first = holds.index(True) if True in holds else len(steps) - 1  # the last step has the heads
        self.prefix, self.rest = steps[:first], steps[first:]

    def __call__(self, params: Params, x: Any) -> Tensor:
        return self._rest_of(self.before(x), params)

    @torch.no_grad()
    def before(self, x: Any) -> Any:
        """Returns what arrives at the first adapter: tensors (n, …), a function of the images alone."""
        if not self.prefix:
            return x
        with self._precision(x.device.type):
            return _through(self.prefix, x)

    @cached_property
    def beyond(self) -> AdaptedModel:
        """The same model for inputs that are what `before` returns."""
        made = copy.copy(self)
        made.prefix = ()
        return made

    @cached_property
    def bytes_before(self) -> int:
        """Of what `before` returns for one image."""
        return sum(each.nbytes for each in tensors_in(self.before(example_input(self.model))))

    def losses(self, params: Params | Pair, x: Any, loss: Callable[[Tensor], Tensor]) -> Tensor:
        """Returns ``loss(logits)``; of a pair both (2, …), in one pass that shares all before the first adapter."""
        if not isinstance(params, Pair):
            return loss(self(params, x))
        count = params.devices

        def beside(each: Tensor) -> Tensor:
            return each.unflatten(0, (count, 1, -1)).expand(-1, 2, *[-1] * each.dim()).flatten(0, 2)

        logits = self._rest_of(tree_map_only(Tensor, beside, self.before(x)), params.bound())
        return torch.stack([loss(each.flatten(0, 1)) for each in logits.unflatten(0, (count, 2, -1)).unbind(1)])

    def _rest_of(self, x: Any, params: Params) -> Tensor:
        self._bound.update(params)
        try:
            with self._precision(next(iter(params.values())).device.type):
                return full(_through(self.rest, x))
        finally:
            self._bound.clear()

    def _precision(self, device: str) -> AbstractContextManager[Any]:
        return nullcontext() if self.reduced is None else torch.autocast(device, self.reduced)


def _through(steps: Sequence[Step], x: Any) -> Any:
    for _, step in steps:
        x = step(x)
    return x


def modules_of(names: Iterable[str]) -> list[str]:
    """Returns the layers that parameters belong to, in their order: linears with adapters, and head modules."""
    return list(dict.fromkeys(name.rpartition(".")[0] for name in names))


def alphas_of(names: Collection[str], alpha: Tensor) -> dict[str, Tensor]:
    """Returns the α of each parameter: that of its layer, or the only one (see `interpolate`)."""
    modules = modules_of(names)
    of_layer = dict(zip(modules, alpha.unbind() if alpha.dim() else [alpha] * len(modules), strict=True))
    return {name: of_layer[name.rpartition(".")[0]] for name in names}


def spread(alpha: Tensor, w: Params, like: Params, multiple: int = 1) -> Tensor:
    """Returns α as a factor of ``flat(like, multiple)``, whose names are some of w's: one, or one for each element."""
    if alpha.dim() != 1:
        return alpha
    each = alphas_of(w, alpha)
    return flat({name: each[name].expand(theta.shape) for name, theta in like.items()}, multiple)


def interpolate(v: Params, w: Params, alpha: Tensor | float) -> Params:
    """Returns adapters whose *effective* weights are αv + (1-α)w (APFL, arXiv 2003.13461). Differentiable in all three.

    A pair of factors becomes one pair of twice the rank, [αB_v, (1-α)B_w] [A_v; A_w], whose product is
    αB_vA_v + (1-α)B_wA_w; interpolating the factors themselves would be off by α(1-α)(B_v - B_w)(A_v - A_w). All other
    parameters are interpolated directly.

    Args:
        v, w: the same names and shapes; the order of w's names is that of the layers.
        alpha: one number, or (L,) with one α for each of the L layers of `modules_of(w)`.
    """
    of_v, of_w = _weighed(v, w, alpha), _weighed(w, w, 1 - alpha)
    mixed: Params = {}
    for name, theta in w.items():
        if name.endswith(LORA_A):
            mixed[name] = torch.cat([v[name], theta], dim=-2)
        elif name.endswith(LORA_B):
            mixed[name] = torch.cat([of_v[name], of_w[name]], dim=-1)
        else:
            mixed[name] = of_v[name] + of_w[name]
    return mixed


@dataclass(frozen=True)
class Pair:
    """w, and the mixture αv + (1-α)w in which this w is a constant, for one pass through a model (see `interpolate`).

    Differentiable in w, v and α. Sets of K devices are stacks.
    """

    w: Params
    v: Params
    alpha: Tensor

    @property
    def devices(self) -> int:
        """K, or 1 without a stack."""
        return math.prod(lead(next(iter(self.w.values()))))

    def bound(self) -> Params:
        """Returns both as a stack, w and the mixture of one device after the other: in a few calls for all tensors.

        Factors of the mixture are A_v and αB_v; the rest of its product is R A_w with `REST` R = (1-α)B_w.
        """
        others = [name for name in self.w if not name.endswith(LORA_A)]
        thin = [name for name in self.w if name.endswith(LORA_A)]
        of_w, of_v = (flat({name: params[name] for name in others}, LINE) for params in (self.w, self.v))
        alpha = spread(self.alpha, self.w, {name: self.w[name] for name in others}, LINE).to(of_w)
        rests = self._parts(others, (1 - alpha) * of_w.detach())
        found = self._parts(others, of_w, alpha * of_v)
        if thin:
            of_a = (flat({name: params[name] for name in thin}, LINE) for params in (self.w, self.v))
            found |= self._parts(thin, *of_a)
        for name in others:
            if name.endswith(LORA_B):
                found[f"{name.removesuffix(LORA_B)}{REST}"] = rests[name]
            else:
                w, v = found[name].unflatten(0, (-1, 2)).unbind(1)
                found[name] = torch.stack([w, v + rests[name]], 1).flatten(0, 1)
        return found

    def _parts(self, names: Iterable[str], *vectors: Tensor) -> Params:
        """Returns the parts of vectors (P,) or (K, P) as a stack, the vectors of a device one after the other."""
        rows = torch.stack([vector.view(self.devices, -1) for vector in vectors], 1).flatten(0, 1)
        shapes: Shapes = {name: (len(rows), *two_dims(self.w[name].shape[-2:])) for name in names}
        return parts_of(rows, shapes, LINE)


def _weighed(params: Params, w: Params, share: Tensor | float) -> Params:
    """Returns the factors B and what has no factors, each times its share, in a few calls for all of them."""
    chosen = {name: theta for name, theta in params.items() if not name.endswith(LORA_A)}
    vector = flat(chosen)
    factor = spread(torch.as_tensor(share, dtype=torch.float64), w, chosen).to(vector)
    return parts_of(vector * factor, shapes_of(chosen))
