"""The pruned models of several devices as one model. A step of all devices takes as many calls as a step of one device.

Heads, dims per head and neurons are padded to the widest device with zero weights. A branch that was removed from a
device's model has zero weights and its constant as bias. Each slice computes what the device's own model computes,
except for rounding. The gradient of the padding is exactly 0, so it stays 0 under every optimiser. The images of all
devices are concatenated, so that modules that are not pruned can be used unchanged.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

import torch
from timm.layers import Attention, Mlp
from timm.models import VisionTransformer
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from tapfl.adapters.layout import LORA_A, LORA_B, Shapes
from tapfl.adapters.lora import AdaptedModel, BoundLinear, linear, modules_of
from tapfl.adapters.stack import Place, Stacking
from tapfl.errors import ModelError
from tapfl.models.units import ConstantBranch, put

BRANCHES = {"attn": ("qkv", "proj"), "mlp": ("fc1", "fc2")}


class StackedModel(AdaptedModel):
    """K adapted models as one: ``stacked(params, x)`` with a stack of adapters returns logits (K · n, classes).

    Attributes:
        stacking: the positions of each device's adapters in a stack.

    Raises:
        ModelError: if a model is not a ViT or DeiT, or if the models differ in tensors that are not pruned or in the
            block at which their inputs enter (`AdaptedModel.beyond`).
    """

    def __init__(self, members: Sequence[AdaptedModel]) -> None:
        models: list[Any] = [member.model for member in members]
        for model in models:
            _require_plain(model)
        if any(member.reduced for member in members):
            raise ModelError("train.together: compute.precision = fast trains one by one; accepted: exact")
        begins = {  # number of blocks that the inputs have passed; None if they are images
            None if member.prefix else len(model.blocks) + 1 - len(member.rest)
            for member, model in zip(members, models, strict=True)
        }
        if len(begins) > 1:
            raise ModelError("train.together: their inputs arrive at different blocks; accepted: 1")
        (begin,) = begins
        self.layout, self.scale, self.reduced, self._bound = {}, members[0].scale, None, {}
        self.model: Any = copy.deepcopy(models[0])
        places: list[dict[str, Place]] = [{} for _ in models]
        wide: Shapes = {}
        for i in range(begin or 0, len(self.model.blocks)):
            for branch in BRANCHES:
                name = f"blocks.{i}.{branch}"
                put(self.model, name, _stacked(name, [model.get_submodule(name) for model in models], places, wide))
        for name in modules_of(name for member in members for name in member.layout):
            module = self.model.get_submodule(name)
            frozen = module.linear if isinstance(module, BoundLinear) else module
            put(self.model, name, BoundLinear(name, frozen, self._bound, self.scale))
        _require_same(models)
        self._divide()
        self.prefix = self.prefix if begin is None else ()
        own: list[Shapes] = [{name: place.shape for name, place in member.layout.items()} for member in members]
        self.stacking = Stacking.of(own, places, wide)


def _stacked(name: str, branches: Sequence[Any], places: Sequence[dict[str, Place]], wide: Shapes) -> nn.Module:
    """Returns the stacked branch of all devices.

    Args:
        name: of the branch.
        branches: of each device.
        places: filled with the positions of each device's units in its width-side factors.
        wide: filled with the sizes of the width-side factors in the stack.
    """
    present = [branch for branch in branches if not isinstance(branch, ConstantBranch)]
    inner, output = BRANCHES[name.rpartition(".")[2]]
    if not present:
        bias = torch.stack([branch.get_submodule(output).bias for branch in branches])
        return _Constant(bias)
    stacked = copy.copy(present[0])
    stacked._modules = dict(stacked._modules)
    attention = isinstance(stacked, Attention)
    shapes = [_shape(branch) for branch in branches]
    heads, dims = (max(sizes) for sizes in zip(*shapes, strict=True))
    kept = [(torch.arange(h)[:, None] * dims + torch.arange(d)).flatten() for h, d in shapes]
    rows = [torch.cat([part * heads * dims + units for part in range(3 if attention else 1)]) for units in kept]
    for axis, leaf, factor, units in ((0, inner, LORA_B, rows), (1, output, LORA_A, kept)):
        size = heads * dims * (3 if attention and axis == 0 else 1)
        wide[f"{name}.{leaf}.{factor}"] = (size, 0) if axis == 0 else (0, size)
        for place, positions in zip(places, units, strict=True):
            place[f"{name}.{leaf}.{factor}"] = (axis, positions)
        setattr(stacked, leaf, _StackedLinear([_linear(branch, leaf) for branch in branches], axis, units, size))
    if attention:
        stacked.num_heads, stacked.head_dim, stacked.attn_dim, stacked.scale = heads, dims, heads * dims, dims**-0.5
        if any(own and own != dims for _, own in shapes):
            factors = [math.sqrt(dims / own) if own else 1.0 for _, own in shapes]
            stacked.q_norm = _QueryScale(factors, _linear(present[0], inner).weight)
    return stacked


class _Constant(nn.Module):
    """A branch that was removed from the models of all devices: their constants (K, d)."""

    def __init__(self, bias: Tensor) -> None:
        super().__init__()
        self.bias = nn.Parameter(bias, requires_grad=False)

    def forward(self, x: Tensor, *_: object, **__: object) -> Tensor:
        return self.bias.repeat_interleave(len(x) // len(self.bias), 0)[:, None, :].expand_as(x)


class _StackedLinear(nn.Module):
    """A frozen linear of each device: weights (K, out, in) and biases (K, 1, out), padded with 0.

    Args:
        linears: of each device; without a weight if the branch was removed, and without a bias if the linear has none.
        axis: the pruned axis of the weights: 0 for rows, 1 for columns.
        units: positions of each device's units on this axis.
        size: length of this axis in the stack.
    """

    def __init__(self, linears: Sequence[Any], axis: int, units: Sequence[Tensor], size: int) -> None:
        super().__init__()
        like = next(own.weight for own in linears if hasattr(own, "weight"))
        shape = (size, like.shape[1]) if axis == 0 else (like.shape[0], size)
        weight, bias = like.new_zeros((len(linears), *shape)), like.new_zeros((len(linears), 1, shape[0]))
        for i, (own, place) in enumerate(zip(linears, units, strict=True)):
            rows, columns = (place, slice(None)) if axis == 0 else (slice(None), place)
            if hasattr(own, "weight"):
                weight[i][rows, columns] = own.weight.detach()
            if getattr(own, "bias", None) is not None:
                bias[i, 0, rows] = own.bias.detach()
        self.weight, self.bias = (nn.Parameter(tensor, requires_grad=False) for tensor in (weight, bias))

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


class _QueryScale(nn.Module):
    """Scales q (K · n, heads, tokens, dims) so that attention in effect divides by the √dims of each device."""

    def __init__(self, factors: Sequence[float], like: Tensor) -> None:
        super().__init__()
        self.factors = nn.Parameter(like.new_tensor(factors), requires_grad=False)

    def forward(self, q: Tensor) -> Tensor:
        return (q.unflatten(0, (len(self.factors), -1)) * self.factors[:, None, None, None, None]).flatten(0, 1)


def _linear(branch: nn.Module, name: str) -> Any:
    """Returns the module with the weight (none if the branch was removed) and the bias of a linear."""
    module = branch.get_submodule(name) if hasattr(branch, name) else nn.Module()
    return module.linear if isinstance(module, BoundLinear) else module


def _shape(branch: Any) -> tuple[int, int]:
    """Returns (heads, dims per head); the neurons of an FFN are the dims of one head."""
    if isinstance(branch, ConstantBranch):
        return 0, 0
    if isinstance(branch, Attention):
        return branch.num_heads, branch.head_dim
    return 1, _linear(branch, "fc1").weight.shape[0]


def _require_plain(model: Any) -> None:
    """Raises ModelError unless all blocks are attention and FFN as in ViT and DeiT."""
    if not isinstance(model, VisionTransformer):
        raise ModelError(f"train.together: {type(model).__name__} trains one by one; accepted: ViT and DeiT")
    zero = next(model.parameters()).new_zeros(1)
    for name, module in model.named_modules():
        refused = name.count(".") == 1 and name.startswith("blocks.") and type(module) is not Block
        if isinstance(module, Attention):
            refused = module.gate is not None or not all(
                isinstance(m, nn.Identity) for m in (module.q_norm, module.k_norm, module.norm)
            )
        elif isinstance(module, Mlp):
            refused = not isinstance(module.norm, nn.Identity) or bool(module.act(zero).any())
        if refused:
            raise ModelError(f"train.together: {name} is not a plain block of ViT or DeiT, or merges tokens")


def _require_same(models: Sequence[nn.Module]) -> None:
    """Raises ModelError unless all tensors outside the branches and heads are equal."""
    first, *others = [{n: t for n, t in model.state_dict().items() if not _is_stacked(n)} for model in models]
    for other in others:
        for name, tensor in first.items():
            if not torch.equal(tensor, other[name]):
                raise ModelError(f"train.together: {name} differs between devices; accepted: 1")


def _is_stacked(name: str) -> bool:
    return ".linear." in name or (name.startswith("blocks.") and name.split(".")[2] in BRANCHES)
