"""Units: the parts of a block that can be pruned, and the weights that belong to them.

A *prunable layer* is one residual branch: an FFN, whose units are its hidden neurons, or an attention, whose units are
the dims of its heads (one unit = one dim of one head, in q, k and v together). The algorithms see only the interface
`PrunableLayer`; a new kind of branch is one more subclass here.

Worked example, embedding 6, two heads of three dims: ``units = 6``, unit 4 is dim 1 of head 1; to drop it removes rows
4, 10 and 16 of qkv and column 4 of proj. Attention needs equal dims a head, so one dim of head 0 has to go with it.
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
    """How large a layer is: heads that stay (1 or 0 for an FFN), and units in each of them."""

    heads: int
    dims: int

    @property
    def units(self) -> int:
        return self.heads * self.dims


@dataclass(frozen=True)
class LinearCut:
    """What remains of one linear: `index` into its rows (outputs) or columns (inputs), and a factor for each row."""

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
        units: number of units when dense.
        embed_dim: width of the residual stream at this block.
        tokens: tokens an image, as they pass the branch's linears.
        span: tokens that attend to each other (0 for an FFN).
        inner_bias: whether the linears that write the units have biases.
        output_bias: whether the output linear has one.
        params_per_head: parameters that go with a whole head alone (Swin's column of relative position biases).
        pairs: of tokens whose keys are compared, where tokens are merged.
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
    inner: ClassVar[str]  # the linear that writes the units
    parts: ClassVar[int]  # its rows for one unit: one in fc1, three in qkv
    output: ClassVar[str]  # the linear whose input are the units' activations

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
        """Multiply-accumulates an image that one unit costs, with its part in the two products of attention."""
        return self.tokens * ((self.parts + 1) * self.embed_dim + 2 * self.span) + self.pairs

    @property
    def params_per_unit(self) -> int:
        """Weights and biases that go with one unit."""
        return (self.parts + 1) * self.embed_dim + self.parts * self.inner_bias

    @property
    def full(self) -> Shape:
        """The shape when dense."""
        return Shape(self.heads, self.units_per_head)

    def macs(self, shape: Shape) -> int:
        """Returns the MACs an image of the branch in that shape; without keys, tokens are compared by its input."""
        return shape.units * self.macs_per_unit or self.pairs * self.embed_dim

    def params(self, shape: Shape) -> int:
        """Returns the parameters of the branch in that shape; without units it is a `ConstantBranch`."""
        if shape.units == 0:
            return self.embed_dim
        bias = self.embed_dim if self.output_bias else 0
        return shape.units * self.params_per_unit + shape.heads * self.params_per_head + bias

    def shape_of(self, kept: Tensor) -> Shape:
        """Returns the shape of the branch when the units `kept` stay, which are balanced over the heads that stay."""
        sizes = self._per_head(kept)
        return Shape(int((sizes > 0).sum()), int(sizes.max()))

    def cuts(self, kept: Tensor) -> list[LinearCut]:
        """Returns what remains of the branch's linears when the units `kept` (sorted, int64) stay."""
        rows = torch.cat([kept + part * self.units for part in range(self.parts)])
        return [LinearCut(self.inner, "rows", rows, self._scale(kept)), LinearCut(self.output, "columns", kept)]

    def _scale(self, kept: Tensor) -> Tensor | None:
        """Returns a factor for each row of the inner linear that keeps the branch's function, or None."""
        return None

    def _resize(self, module: Any, kept: Tensor) -> None:
        """Sets the attributes of a branch whose linears were cut already."""

    def activations(self, x: Tensor, images: int) -> Tensor:
        """Returns the input of the output linear as (images, tokens, units): one row of windows an image for Swin."""
        return x.reshape(images, -1, x.shape[-1])

    def shrink(self, module: Any, kept: Tensor) -> nn.Module:
        """Returns a smaller copy of the branch that computes what `module` does with all but `kept` masked to 0.

        Raises:
            PlanError: if `kept` is not sorted, unique and in range, or leaves heads of different size.
        """
        self.check(kept)
        if len(kept) == self.units:
            return copy.deepcopy(module)
        if len(kept) == 0:
            return ConstantBranch(self.output, module.get_submodule(self.output))
        small = _bare_copy(module)
        for cut in self.cuts(kept):
            setattr(small, cut.linear, _cut_linear(module.get_submodule(cut.linear), cut))
        self._resize(small, kept)
        return small

    def check(self, kept: Tensor) -> None:
        """Raises PlanError unless `kept` is sorted, unique, in range and balanced over the heads that stay."""
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
    """qkv -> heads -> proj, the heads attending to `span` tokens (all of an image, or one window of it)."""

    kind, inner, parts, output = "attention", "qkv", 3, "proj"

    def _scale(self, kept: Tensor) -> Tensor:
        # The softmax divides by sqrt(dims a head). With fewer dims it divides by less, so q takes the difference:
        # q' = q sqrt(k / d), exact for timm's fused and unfused paths alike.
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
    """What is left of a branch without units: the bias of its output linear. State-dict keys stay as they were."""

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
    """Puts `module` in the place `name` of `model` for the duration of the block."""
    original = model.get_submodule(name)
    put(model, name, module)
    try:
        yield
    finally:
        put(model, name, original)


def put(model: nn.Module, name: str, module: nn.Module) -> None:
    """Puts `module` in the place `name` of `model`."""
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)


def _bare_copy(module: Any) -> Any:
    """A module with the same children and parameters, in dictionaries of its own, and without hooks."""
    bare = copy.copy(module)
    bare._modules, bare._parameters = dict(module._modules), dict(module._parameters)
    bare._buffers = dict(module._buffers)
    for name in [name for name in vars(bare) if name.endswith("_hooks")]:
        setattr(bare, name, OrderedDict())  # hooks on the one are not hooks on the other
    return bare


def _cut_linear(linear: nn.Linear, cut: LinearCut) -> nn.Linear:
    small = _bare_copy(linear)  # a new one would be initialised first, on any device
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
