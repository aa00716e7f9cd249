"""A frozen model as a function of its adapters, and the interpolation of two sets of adapters.

The adapters are not stored in the model; each call passes them. One frozen model therefore serves the shared adapters,
the personal ones, any interpolation between them, and a `Pair` of them in one pass.
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

REST = "rest"  # name of R, the coefficient of A_first in the second set of a pair (`MergedLora`)


class MergedLora(torch.autograd.Function):
    """(x, W₀, b, A, B, s) -> x (W₀ + s B A)ᵀ + b, for frozen W₀ and b.

    The forward pass is one matrix product, and the backward pass has no gradient of the size of W₀: ∂L/∂A = s (dy B)ᵀ x
    and ∂L/∂B = s dyᵀ (x Aᵀ). The result equals plain LoRA, with one large product where plain LoRA has three. The thin
    products are written as (Bᵀ dyᵀ) x and ((A xᵀ) dy)ᵀ, so that their long side comes last, which is 2-4 times as fast
    on a CPU.

    In a stack of devices (`tapfl.adapters.stack`), W₀ is (K, out, in), b is (K, 1, out), and x concatenates the images
    of all devices. In a pair, each W₀ has two sets of factors: (2, …), or in a stack (2K, …). The weights of the second
    set are W₀ + s (B A + R A_first). R, (1, out, rank) or (K, out, rank), is the last argument; A_first is the A of the
    first set, taken as a constant.
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
        ctx.save_for_backward(x, merged, A, B, rest)  # type: ignore[arg-type]  # accepts None, too
        ctx.s = s  # type: ignore[attr-defined]
        return linear(x, merged, bias)

    @staticmethod
    def backward(ctx: FunctionCtx, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, merged, A, B, rest = ctx.saved_tensors  # type: ignore[attr-defined]
        s: float = ctx.s  # type: ignore[attr-defined]
        rows, flat_dy = (tensor.reshape(*lead(A), -1, tensor.shape[-1]) for tensor in (x, dy))
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
    """Returns x Wᵀ + b; for a stack, device by device."""
    if weight.dim() == 2:
        return F.linear(x, weight, bias)
    rows = x.reshape(len(weight), -1, x.shape[-1])
    y = rows @ weight.mT if bias is None else torch.baddbmm(_for_all(bias, weight), rows, weight.mT)
    return y.view(*x.shape[:-1], -1)


def _for_all(theta: Tensor, sets: Tensor) -> Tensor:
    """Returns a frozen weight or bias repeated for each set of a stack or a pair."""
    if theta.dim() < 3 or len(theta) == len(sets):
        return theta.expand(*lead(sets), *theta.shape) if theta.dim() == 2 else theta
    return theta.repeat_interleave(len(sets) // len(theta), 0)


def _added(theta: Tensor, b: Tensor, a: Tensor, s: float, share: float = 1) -> Tensor:
    """Returns share · theta + s · b a, in one call; with a share of 0, only the shape of theta is used."""
    add = torch.addmm if theta.dim() == 2 else torch.baddbmm
    return add(theta, b, a, beta=share, alpha=s)


def plain_lora(
    x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, s: float, rest: Tensor | None = None
) -> Tensor:
    """Returns x W₀ᵀ + b + s (x Aᵀ) Bᵀ as float32, for W₀ and b in a lower precision, under autocast.

    `MergedLora` would add the update to W₀ and round the sum, and in bfloat16 most of a small update would be lost.
    Here the update is computed separately and added in float32.
    """
    y = torch.add(F.linear(x, weight, bias).float(), linear(linear(x, A, None), B, None), alpha=s)
    if rest is not None:
        second = x.reshape(len(A), -1, x.shape[-1])[1::2]
        y.view(len(A), -1, y.shape[-1])[1::2].add_(linear(linear(second, A[::2].detach(), None), rest, None), alpha=s)
    return y


class BoundLinear(nn.Module):
    """A frozen linear that takes its adapter, or its whole weight and bias, from the parameters of the current call.

    Args:
        name: module path of the linear in the model.
        linear: has `weight` and `bias`, of one device or of a stack.
        bound: the parameters of the current call, shared by all linears of the model.
        scale: s.
        plain: use `plain_lora` instead of `MergedLora`.
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
        reduced: a lower precision for the products with frozen weights; None: the model's own dtype. Adapters, their
            gradients and the logits stay float32.

    Attributes:
        prefix: the steps of a pass before the first step with adapters.
        rest: the remaining steps.
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
                module.to(reduced)  # once; autocast would convert the weights in every pass
            put(self.model, name, BoundLinear(name, module, self._bound, scale, plain=reduced is not None))
        self._divide()

    def _divide(self) -> None:
        """Divides the steps of a pass into `prefix` and `rest`."""
        steps = segments(self.model)
        adapted = [name for name, module in self.model.named_modules() if isinstance(module, BoundLinear)]
        holds = [any(name.startswith(f"{step}.") for name in adapted) for step, _ in steps]
        first = holds.index(True) if True in holds else len(steps) - 1  # the last step has the heads
        self.prefix, self.rest = steps[:first], steps[first:]

    def __call__(self, params: Params, x: Any) -> Tensor:
        return self._rest_of(self.before(x), params)

    @torch.no_grad()
    def before(self, x: Any) -> Any:
        """Returns the input of the first step with adapters, tensors (n, …), which depends only on the images."""
        if not self.prefix:
            return x
        with self._precision(x.device.type):
            return _through(self.prefix, x)

    @cached_property
    def beyond(self) -> AdaptedModel:
        """The same model for inputs that `before` has returned."""
        shortened = copy.copy(self)
        shortened.prefix = ()
        return shortened

    @cached_property
    def bytes_before(self) -> int:
        """Size of what `before` returns for one image."""
        return sum(tensor.nbytes for tensor in tensors_in(self.before(example_input(self.model))))

    def losses(self, params: Params | Pair, x: Any, loss: Callable[[Tensor], Tensor]) -> Tensor:
        """Returns ``loss(logits)``. For a pair, both losses (2, …), in one pass that shares the steps of `prefix`."""
        if not isinstance(params, Pair):
            return loss(self(params, x))
        count = params.devices

        def twice(tensor: Tensor) -> Tensor:
            return tensor.unflatten(0, (count, 1, -1)).expand(-1, 2, *[-1] * tensor.dim()).flatten(0, 2)

        logits = self._rest_of(tree_map_only(Tensor, twice, self.before(x)), params.bound())
        return torch.stack([loss(part.flatten(0, 1)) for part in logits.unflatten(0, (count, 2, -1)).unbind(1)])

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
    """Returns the modules that parameters belong to, in their order: linears with adapters, and heads."""
    return list(dict.fromkeys(name.rpartition(".")[0] for name in names))


def alphas_of(names: Collection[str], alpha: Tensor) -> dict[str, Tensor]:
    """Returns the α of each parameter: its layer's, or the only one (see `interpolate`)."""
    modules = modules_of(names)
    of_layer = dict(zip(modules, alpha.unbind() if alpha.dim() else [alpha] * len(modules), strict=True))
    return {name: of_layer[name.rpartition(".")[0]] for name in names}


def spread(alpha: Tensor, w: Params, like: Params, multiple: int = 1) -> Tensor:
    """Returns α as a factor of ``flat(like, multiple)``: one number, or one for each element.

    Args:
        w: all parameters; their order is that of the layers in α.
        like: some of them.
    """
    if alpha.dim() != 1:
        return alpha
    by_name = alphas_of(w, alpha)
    return flat({name: by_name[name].expand(theta.shape) for name, theta in like.items()}, multiple)


def interpolate(v: Params, w: Params, alpha: Tensor | float) -> Params:
    """Returns adapters whose *effective* weights are αv + (1-α)w (APFL, arXiv 2003.13461).

    It is differentiable in v, w and α. The factors of v and w become factors of twice the rank,
    [αB_v, (1-α)B_w] [A_v; A_w], with the product αB_vA_v + (1-α)B_wA_w. Interpolating the factors themselves would be
    off by α(1-α)(B_v - B_w)(A_v - A_w). All other parameters are interpolated directly.

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
    """w and the mixture αv + (1-α)w, for one pass through a model (see `interpolate`).

    In the mixture, w is taken as a constant. The pair is differentiable in w, v and α. Sets of K devices are stacks.
    """

    w: Params
    v: Params
    alpha: Tensor

    @property
    def devices(self) -> int:
        """The number of devices K; 1 without a stack."""
        return math.prod(lead(next(iter(self.w.values()))))

    def bound(self) -> Params:
        """Returns both as one stack: w and the mixture of the first device, then of the next.

        The factors of the mixture are A_v and αB_v. The rest of its product is R A_w with R = (1-α)B_w (`REST`). All
        tensors are computed together, in a few calls.
        """
        others = [name for name in self.w if not name.endswith(LORA_A)]
        thin = [name for name in self.w if name.endswith(LORA_A)]
        of_w, of_v = (flat({name: params[name] for name in others}, LINE) for params in (self.w, self.v))
        alpha = spread(self.alpha, self.w, {name: self.w[name] for name in others}, LINE).to(of_w)
        rests = self._parts(others, (1 - alpha) * of_w.detach())
        stack = self._parts(others, of_w, alpha * of_v)
        if thin:
            of_a = (flat({name: params[name] for name in thin}, LINE) for params in (self.w, self.v))
            stack |= self._parts(thin, *of_a)
        for name in others:
            if name.endswith(LORA_B):
                stack[f"{name.removesuffix(LORA_B)}{REST}"] = rests[name]
            else:
                w, v = stack[name].unflatten(0, (-1, 2)).unbind(1)
                stack[name] = torch.stack([w, v + rests[name]], 1).flatten(0, 1)
        return stack

    def _parts(self, names: Iterable[str], *vectors: Tensor) -> Params:
        """Returns the tensors of `vectors`, each (P,) or (K, P), as a stack in which a device's sets are adjacent."""
        rows = torch.stack([vector.view(self.devices, -1) for vector in vectors], 1).flatten(0, 1)
        shapes: Shapes = {name: (len(rows), *two_dims(self.w[name].shape[-2:])) for name in names}
        return parts_of(rows, shapes, LINE)


def _weighed(params: Params, w: Params, share: Tensor | float) -> Params:
    """Returns all parameters but the factors A, multiplied by `share` (one number, or one per layer of `w`)."""
    chosen = {name: theta for name, theta in params.items() if not name.endswith(LORA_A)}
    vector = flat(chosen)
    factor = spread(torch.as_tensor(share, dtype=torch.float64), w, chosen).to(vector)
    return parts_of(vector * factor, shapes_of(chosen))
