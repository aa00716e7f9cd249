"""Units: the parts of a block that can be pruned, and the weights that belong to them.

A *prunable layer* is one residual branch. In an FFN, the units are the hidden neurons. In an attention, a unit is one
dim of one head, in q, k and v together. The algorithms use only the interface `PrunableLayer`; to support another kind
of branch, add a subclass here.

Example: with embedding 6 and two heads of three dims, ``units = 6``, and unit 4 is dim 1 of head 1. Dropping it removes
rows 4, 10 and 16 of qkv and column 4 of proj. All heads need the same number of dims, so one dim of head 0 has to be
dropped as well.
"""

from __future__ import annotations

import copy
import math
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from timm.models.swin_transformer import WindowAttention
from torch import Tensor, nn

from tapfl.errors import PlanError

Side = Literal["rows", "columns"]


class Shape(NamedTuple):
    """The size of a layer: number of heads that stay (1 or 0 for an FFN), and number of units in each of them."""

    heads: int
    dims: int

    @property
    def units(self) -> int:
        return self.heads * self.dims


@dataclass(frozen=True)
class LinearCut:
    """The part of a linear that stays: `index` into its rows (outputs) or columns (inputs), and a scale of each row."""

    linear: str
    side: Side
    index: Tensor
    scale: Tensor | None = None


@dataclass(frozen=True)
class PrunableLayer:
    """One residual branch of a backbone.

    Attributes:
        name: module path, such as ``blocks.3.attn``.
        block: module path of the block it belongs to.
        heads: groups of units that must stay equally large (1 for an FFN).
        units: number of units in the dense model.
        embed_dim: width of the residual stream at this block.
        tokens: number of tokens per image that pass through the branch's linears.
        span: number of tokens that attend to each other (0 for an FFN).
        inner_bias: whether the inner linear has a bias.
        output_bias: whether the output linear has a bias.
        params_per_head: parameters that belong to a head as a whole (Swin's column of relative position biases).
        pairs: number of token pairs per image whose keys are compared, if the block merges tokens.
    """

    name: str
    block: str
    heads: int
    units: int
    embed_dim: int
    tokens: int
    span: int
    inner_bias: bool = True
    output_bias: bool = True
    params_per_head: int = 0
    pairs: int = 0

    kind: ClassVar[Literal["attention", "ffn"]]
    inner: ClassVar[str]  # the linear whose outputs are the units
    parts: ClassVar[int]  # its number of rows per unit: one in fc1, three in qkv
    output: ClassVar[str]  # the linear whose inputs are the units' activations

    def output_of(self, model: nn.Module) -> nn.Linear:
        """Returns the linear of this branch of `model` that reads the units."""
        linear = model.get_submodule(f"{self.name}.{self.output}")
        assert isinstance(linear, nn.Linear)
        return linear

    @property
    def units_per_head(self) -> int:
        return self.units // self.heads

    @property
    def macs_per_unit(self) -> int:
        """MACs per image of one unit, including its part in the two matrix products of attention."""
        return self.tokens * ((self.parts + 1) * self.embed_dim + 2 * self.span) + self.pairs

    @property
    def params_per_unit(self) -> int:
        """Number of weights and biases that belong to one unit."""
        return (self.parts + 1) * self.embed_dim + self.parts * self.inner_bias

    @property
    def full(self) -> Shape:
        """The shape in the dense model."""
        return Shape(self.heads, self.units_per_head)

    def macs(self, shape: Shape) -> int:
        """Returns the MACs per image of the branch in a shape."""
        # without units there are no keys, and merging compares tokens by the input of the branch
        return shape.units * self.macs_per_unit or self.pairs * self.embed_dim

    def params(self, shape: Shape) -> int:
        """Returns the number of parameters of the branch in a shape; without units it is a `ConstantBranch`."""
        if shape.units == 0:
            return self.embed_dim
        bias = self.embed_dim if self.output_bias else 0
        return shape.units * self.params_per_unit + shape.heads * self.params_per_head + bias

    def shape_of(self, kept: Tensor) -> Shape:
        """Returns the shape of the branch if the units `kept` stay; every head that stays has equally many of them."""
        sizes = self._per_head(kept)
        return Shape(int((sizes > 0).sum()), int(sizes.max()))

    def cuts(self, kept: Tensor) -> list[LinearCut]:
        """Returns the parts of the branch's linears that stay with the units `kept` (sorted, int64)."""
        rows = torch.cat([kept + part * self.units for part in range(self.parts)])
        return [LinearCut(self.inner, "rows", rows, self._scale(kept)), LinearCut(self.output, "columns", kept)]

    def _scale(self, kept: Tensor) -> Tensor | None:
        """Returns a factor for each row of the inner linear that preserves the branch's function, or None."""
        return None

    def _resize(self, module: Any, kept: Tensor) -> None:
        """Sets the attributes of a branch whose linears have been cut."""

    def activations(self, x: Tensor, images: int) -> Tensor:
        """Returns the input x of the output linear as (images, tokens, units); a Swin's windows are concatenated."""
        return x.reshape(images, -1, x.shape[-1])

    def shrink(self, module: Any, kept: Tensor) -> nn.Module:
        """Returns a smaller copy of the branch that computes what `module` does with all units but `kept` set to 0.

        Raises:
            PlanError: if `kept` is not sorted, unique and in range, or leaves heads of different sizes.
        """
        self.check(kept)
        if len(kept) == self.units:
            return copy.deepcopy(module)
        if len(kept) == 0:
            return ConstantBranch(self.output, module.get_submodule(self.output))
        small, cuts = _bare_copy(module), {cut.linear: cut for cut in self.cuts(kept)}
        for name, child in module.named_children():
            if name in cuts:
                setattr(small, name, _cut_linear(child, cuts[name]))
            elif any(True for _ in child.parameters()):  # such as PReLU's; training must not change the dense model's
                setattr(small, name, copy.deepcopy(child))
        self._resize(small, kept)
        return small

    def check(self, kept: Tensor) -> None:
        """Raises PlanError unless `kept` is sorted, unique, in range, and of equal size in all heads that stay."""
        if len(kept) and not (bool((kept[1:] > kept[:-1]).all()) and int(kept[0]) >= 0 and int(kept[-1]) < self.units):
            raise PlanError(f"{self.name}: kept units must be sorted, unique and lie in 0..{self.units - 1}")
        if len(set(self._per_head(kept).tolist()) - {0}) > 1:
            raise PlanError(f"{self.name}: every head that stays must keep the same number of dims")

    def _per_head(self, kept: Tensor) -> Tensor:
        return torch.bincount(kept // self.units_per_head, minlength=self.heads)


class Ffn(PrunableLayer):
    """fc1 -> activation -> fc2."""

    kind, inner, parts, output = "ffn", "fc1", 1, "fc2"


class SelfAttention(PrunableLayer):
    """qkv -> heads -> proj. The heads attend to `span` tokens: all of an image, or one window of it."""

    kind, inner, parts, output = "attention", "qkv", 3, "proj"

    def _scale(self, kept: Tensor) -> Tensor:
        # Attention divides logits by sqrt(dims per head). With k instead of d dims it would divide by less, so q is
        # scaled: q' = q sqrt(k / d). This is exact in timm's fused and unfused code.
        dims = int(self._per_head(kept).max()) if len(kept) else 0
        factor = math.sqrt(dims / self.units_per_head)
        ones = torch.ones(len(kept))
        return torch.cat([ones * factor, ones, ones])

    def _resize(self, module: Any, kept: Tensor) -> None:
        sizes = self._per_head(kept)
        stay = torch.nonzero(sizes).flatten()
        dims = int(sizes.max())
        module.num_heads = len(stay)
        module.head_dim, module.attn_dim = dims, len(kept)
        module.scale = dims**-0.5
        if isinstance(module, WindowAttention):
            table = module.relative_position_bias_table
            module.relative_position_bias_table = nn.Parameter(table.detach()[:, stay].clone())


class ConstantBranch(nn.Module):
    """A branch without units, of which only the bias of its output linear is left, under the same state-dict key."""

    def __init__(self, output: str, linear: nn.Linear) -> None:
        super().__init__()
        self.output = output
        bias = linear.bias.detach().clone() if linear.bias is not None else linear.weight.new_zeros(linear.out_features)
        holder = nn.Module()
        holder.bias = nn.Parameter(bias)
        self.add_module(output, holder)

    def forward(self, x: Tensor, *_: object, **__: object) -> Tensor:
        bias: Tensor = self.get_submodule(self.output).bias  # type: ignore[assignment]
        return bias.expand_as(x)


@contextmanager
def replaced(model: nn.Module, name: str, module: nn.Module) -> Iterator[None]:
    """Replaces the submodule `name` of `model` by `module` while the context is active."""
    original = model.get_submodule(name)
    put(model, name, module)
    try:
        yield
    finally:
        put(model, name, original)


def put(model: nn.Module, name: str, module: nn.Module) -> None:
    """Replaces the submodule `name` of `model` by `module`."""
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)


def _bare_copy(module: Any) -> Any:
    """Returns a shallow copy of a module, with the same children and parameters but no hooks."""
    bare = copy.copy(module)
    bare._modules, bare._parameters = dict(module._modules), dict(module._parameters)
    bare._buffers = dict(module._buffers)
    for name in [name for name in vars(bare) if name.endswith("_hooks")]:
        setattr(bare, name, OrderedDict())
    return bare


def _cut_linear(linear: nn.Linear, cut: LinearCut) -> nn.Linear:
    small = _bare_copy(linear)  # a new nn.Linear would be initialised first, which takes time
    for name, tensor in linear.named_parameters():
        part = tensor.detach()
        if cut.side == "rows":
            part = part[cut.index]
            if cut.scale is not None:
                scale = cut.scale.to(part.device)
                part = part * (scale[:, None] if part.ndim == 2 else scale)
        elif name == "weight":
            part = part[:, cut.index]
        setattr(small, name, nn.Parameter(part.clone()))
    small.out_features, small.in_features = small.weight.shape
    return small
