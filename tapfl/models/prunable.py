"""Finds the branches of a backbone that can be pruned, and refuses models that cannot be cut exactly."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from timm.layers import Attention, Mlp
from timm.models.swin_transformer import WindowAttention
from torch import nn

from tapfl.errors import ModelError
from tapfl.models.forward import segments, watch_example
from tapfl.models.units import Ffn, PrunableLayer, SelfAttention


def prunable_layers(model: nn.Module) -> list[PrunableLayer]:
    """Returns the prunable branches of `model`, in the order of the forward pass.

    Raises:
        ModelError: if a branch cannot be pruned exactly (query-key norms, gates, other layouts). It names the branch.
    """
    branches = _branches(model)
    shapes: dict[str, torch.Size] = {}

    def record(name: str) -> Callable[..., None]:
        return lambda _module, inputs, _output: shapes.__setitem__(name, inputs[0].shape)

    watch_example(model, {module: record(name) for name, module in branches.items()})
    layers: list[PrunableLayer] = []
    for name in shapes:
        module, shape = branches[name], shapes[name]
        common: dict[str, Any] = {
            "name": name,
            "block": name.rpartition(".")[0],
            "tokens": math.prod(shape[:-1]),
            "embed_dim": shape[-1],
        }
        if isinstance(module, Mlp):
            common |= _biases(module.fc1, module.fc2)
            layers.append(Ffn(**common, heads=1, units=module.fc1.out_features, span=0))
        else:
            common |= _biases(module.qkv, module.proj)
            if isinstance(module, WindowAttention):
                common["params_per_head"] = len(module.relative_position_bias_table)
            units = module.proj.in_features
            layers.append(SelfAttention(**common, heads=module.num_heads, units=units, span=shape[-2]))
    return layers


def _branches(model: nn.Module) -> dict[str, Any]:
    """Returns the branches of all blocks by name. Raises ModelError if one cannot be pruned exactly."""
    branches: dict[str, Any] = {}
    for block in (name for name, _ in segments(model) if ".blocks." in f".{name}"):
        module = model.get_submodule(block)
        own = {
            f"{block}.{child}": branch
            for child, branch in module.named_children()
            if any(isinstance(part, nn.Linear) for part in branch.modules())
        }
        if own and not any(map(_is_plain, own.values())):
            raise ModelError(
                f"{block}: a {type(module).__name__} has no attention or FFN that can be pruned; "
                f"accepted: blocks of timm's Attention and Mlp"
            )
        for name, branch in own.items():
            _check_branch(name, branch)
        branches |= own
    if not branches:
        raise ModelError(f"{type(model).__name__}: has no attention or FFN that can be pruned")
    return branches


def _is_plain(branch: nn.Module) -> bool:
    """Returns whether the branch has timm's own `forward`; a subclass with another one may be wrong after cutting."""
    kinds = (kind for kind in (Attention, WindowAttention, Mlp) if isinstance(branch, kind))
    return any(type(branch).forward is kind.forward for kind in kinds)


def _check_branch(name: str, branch: Any) -> None:
    if not _is_plain(branch):
        raise _refusal(name, f"it is a {type(branch).__name__}, accepted are timm's Attention and Mlp")
    if isinstance(branch, Mlp) and not isinstance(branch.fc1, nn.Linear):
        raise _refusal(name, f"its fc1 is a {type(branch.fc1).__name__}, accepted is a plain Mlp")
    extras = [part for part in ("q_norm", "k_norm", "norm", "gate") if _does_something(getattr(branch, part, None))]
    if extras:
        kind = "a plain Mlp" if isinstance(branch, Mlp) else "attention without norms or gates"
        raise _refusal(name, f"it has {extras[0]}, accepted is {kind}")


def _does_something(module: nn.Module | None) -> bool:
    return module is not None and not isinstance(module, nn.Identity)


def _refusal(name: str, why: str) -> ModelError:
    return ModelError(f"{name}: cannot be pruned exactly; {why}")


def _biases(inner: nn.Linear, output: nn.Linear) -> dict[str, bool]:
    return {"inner_bias": inner.bias is not None, "output_bias": output.bias is not None}
