"""Layouts of adapters: gather and overlap mean with literal numbers, and index maps checked on a pruned model."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import numpy as np
import pytest
import torch
from backbones import Tiny, golden, plan_of, random_kept
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from tapfl.adapters.layout import (
    LORA_A,
    LORA_B,
    Placement,
    Update,
    adapted_share,
    device_layout,
    gather,
    gather_all,
    global_shapes,
    pack,
    packed_size,
    scatter_mean,
    to_global_scale,
    unpack,
)
from tapfl.adapters.lora import AdaptedModel
from tapfl.adapters.rules import RULES, initial
from tapfl.config import AdapterOptions
from tapfl.errors import ConfigError
from tapfl.pruning.surgery import shrink
from tapfl.training import Params

FAMILIES = ["vit", "deit", "swin"]
NOBODY = torch.empty(0, dtype=torch.int64)


def at(*axes: list[int], row_scale: list[float] | None = None) -> Placement:
    scale = None if row_scale is None else torch.tensor(row_scale, dtype=torch.float64)
    return Placement(tuple(torch.tensor(axis) for axis in axes), scale)


def random_adapters(backbone: Tiny, rank: int, seed: int = 0) -> Params:
    """Random global adapters and heads, including B."""
    generator = torch.Generator().manual_seed(seed)
    shapes = global_shapes(backbone.model, backbone.layers, rank)
    return {name: 0.3 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def merged(model: nn.Module, params: Params, rank: int, scale: float) -> nn.Module:
    """The dense model with the first `rank` directions of `params` added to its weights, and with their heads."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for name, theta in params.items():
            if name.endswith(LORA_A):
                linear = name.removesuffix(f".{LORA_A}")
                product = params[f"{linear}.{LORA_B}"][:, :rank] @ theta[:rank]
                model.get_parameter(f"{linear}.weight").add_(scale * product)
            elif not name.endswith(LORA_B):
                model.get_parameter(name).copy_(theta)
    return model


# -- the two primitives -----------------------------------------------------------------------------------------------


def test_worked_example() -> None:
    # one B of 4 rows and rank 2; device 0 kept rows 0 and 2 at rank 2, device 1 rows 2 and 3 at rank 1
    previous = torch.tensor([[10.0, 11.0], [12.0, 13.0], [14.0, 15.0], [16.0, 17.0]])
    zero, one = at([0, 2], [0, 1]), at([2, 3], [0])
    assert gather(previous, zero).tolist() == [[10, 11], [14, 15]]
    assert gather(previous, one).tolist() == [[14], [16]]
    mean = scatter_mean(
        previous,
        [(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), zero, 1.0), (torch.tensor([[7.0], [8.0]]), one, 3.0)],
    )
    assert mean.tolist() == [[1, 2], [12, 13], [(1 * 3 + 3 * 7) / 4, 4], [8, 17]]
    assert mean.dtype == previous.dtype


def test_vectors_have_one_axis() -> None:
    previous = torch.tensor([0.5, 0.5, 0.5])
    mean = scatter_mean(previous, [(torch.tensor([2.0, 4.0]), at([0, 1]), 1), (torch.tensor([8.0]), at([1]), 1)])
    assert mean.tolist() == [2, 6, 0.5]


def test_entries_without_a_holder_keep_their_bits() -> None:
    previous = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    assert torch.equal(scatter_mean(previous, []), previous)
    mean = scatter_mean(previous, [(torch.ones(2, 3), at([1, 4], [0, 1, 2]), 7.0)])
    assert torch.equal(mean[[0, 2, 3]], previous[[0, 2, 3]])
    assert (mean[[1, 4]] == 1).all()


def test_row_scale_is_applied_on_download_and_undone_on_upload() -> None:
    theta = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    place = at([1], [0, 1], row_scale=[0.5])
    assert gather(theta, place).tolist() == [[1.5, 2]]
    assert to_global_scale(gather(theta, place), place).tolist() == [[3, 4]]
    assert torch.equal(scatter_mean(torch.zeros(2, 2), [(gather(theta, place), place, 2.0)])[1], theta[1])


def test_fedit_is_golden() -> None:
    case = golden("lora")
    tensor = {k: torch.tensor(case[k], dtype=torch.float64) for k in ("A", "B", "previous_A", "previous_B")}
    updates = [
        Update(
            {"fc1.lora_A": tensor["A"][i], "fc1.lora_B": tensor["B"][i]},
            {"fc1.lora_A": at([0, 1], [0, 1, 2, 3]), "fc1.lora_B": at(case["kept_rows"][i], [0, 1])},
            case["samples"][i],
        )
        for i in range(2)
    ]
    previous = {"fc1.lora_A": tensor["previous_A"], "fc1.lora_B": tensor["previous_B"]}
    result = RULES["fedit"].aggregate(previous, updates, previous)
    for part in "AB":
        want = torch.tensor(case["fedit"][part], dtype=torch.float64)
        torch.testing.assert_close(result[f"fc1.lora_{part}"], want, rtol=1e-12, atol=1e-12)


@given(
    widths=st.lists(st.integers(0, 6), min_size=1, max_size=4),
    weights=st.lists(st.integers(1, 9), min_size=4, max_size=4),
    seed=st.integers(0, 999),
)
def test_prefixes_are_heterofl(widths: list[int], weights: list[int], seed: int) -> None:
    generator = np.random.default_rng(seed)
    previous = generator.standard_normal((6, 2))
    values = [generator.standard_normal((width, 2)) for width in widths]
    want = previous.copy()
    for row in range(6):
        holders = [i for i, width in enumerate(widths) if row < width]
        if holders:
            want[row] = sum(weights[i] * values[i][row] for i in holders) / sum(weights[i] for i in holders)
    parts = [
        (torch.from_numpy(value), at(list(range(width)), [0, 1]) if width else Placement((NOBODY, torch.arange(2))), n)
        for value, width, n in zip(values, widths, weights, strict=False)
    ]
    got = scatter_mean(torch.from_numpy(previous), parts)
    np.testing.assert_allclose(got.numpy(), want, rtol=1e-12, atol=1e-12)


# -- a plan's layout --------------------------------------------------------------------------------------------------


def test_layout_of_a_plan_by_hand(vit: Tiny) -> None:
    # two heads of 16 dims: dims 0 and 5 of head 0, 3 and 4 of head 1; of the FFN only neuron 7
    kept = {"blocks.0.attn": torch.tensor([0, 5, 19, 20]), "blocks.0.mlp": torch.tensor([7]), "blocks.1.mlp": NOBODY}
    shapes = global_shapes(vit.model, vit.layers, 3)
    layout = device_layout(shapes, vit.layers, plan_of(vit, kept), 2)
    qkv = layout["blocks.0.attn.qkv.lora_B"]
    assert shapes["blocks.0.attn.qkv.lora_B"] == (96, 3)
    assert qkv.index[0].tolist() == [0, 5, 19, 20, 32, 37, 51, 52, 64, 69, 83, 84]
    assert qkv.index[1].tolist() == [0, 1]
    assert qkv.row_scale is not None
    np.testing.assert_allclose(qkv.row_scale, [(2 / 16) ** 0.5] * 4 + [1] * 8, rtol=1e-6)
    assert layout["blocks.0.attn.qkv.lora_A"].shape == (2, 32)
    assert layout["blocks.0.attn.proj.lora_A"].index[1].tolist() == [0, 5, 19, 20]
    assert layout["blocks.0.attn.proj.lora_B"].shape == (32, 2)
    assert layout["blocks.0.mlp.fc1.lora_B"].index[0].tolist() == [7]
    assert layout["blocks.0.mlp.fc2.lora_A"].index[1].tolist() == [7]
    assert layout["blocks.1.attn.qkv.lora_B"].shape == (96, 2)
    assert not [name for name in layout if name.startswith("blocks.1.mlp")]
    assert layout["head.weight"].shape == (10, 32) and layout["head.bias"].shape == (10,)


def test_the_share_of_the_work_that_has_adapters(vit: Tiny) -> None:
    half = {"blocks.0.attn": torch.arange(8), "blocks.0.mlp": NOBODY}  # of 32 units; the second block is complete
    attention, ffn = (layer.macs_per_unit * layer.units for layer in vit.layers[:2])
    share = adapted_share(vit.layers, plan_of(vit, half), 1)
    assert share == pytest.approx((attention + ffn) / (attention / 4 + attention + ffn))
    gone = plan_of(vit, {"blocks.1.attn": NOBODY, "blocks.1.mlp": NOBODY})
    with pytest.raises(ConfigError, match=r"adapters\.blocks = 1: pruning removed everything in these blocks"):
        adapted_share(vit.layers, gone, 1)
    assert adapted_share(vit.layers, plan_of(vit, half), 0) == adapted_share(vit.layers, plan_of(vit, half), 2) == 1


def test_the_size_of_a_placement_includes_tensor_overhead() -> None:
    """For a small model most is the tensor overhead: 590 bytes per torch tensor with six positions, measured."""
    assert 1000 < Placement((torch.arange(6), torch.arange(6))).nbytes < 2000


@pytest.mark.parametrize("family", FAMILIES)
def test_head_of_every_family_is_in_the_layout(family: str, families: dict[str, Tiny]) -> None:
    backbone = families[family]
    heads = {"vit": {"head"}, "deit": {"head", "head_dist"}, "swin": {"head.fc"}}[family]
    layout = device_layout(global_shapes(backbone.model, backbone.layers, 1), backbone.layers, plan_of(backbone, {}), 1)
    assert {name.rpartition(".")[0] for name in layout if not name.endswith((LORA_A, LORA_B))} == heads


def head_gone(backbone: Tiny) -> dict[str, Tensor]:
    """Keeps half of the dims of every head, except the first head of the first attention, which is removed."""
    kept = random_kept(backbone.layers, 0.5)
    attention = next(layer for layer in backbone.layers if layer.kind == "attention")
    units = kept[attention.name]
    kept[attention.name] = units[units >= attention.units_per_head]
    return kept


def branches_gone(backbone: Tiny) -> dict[str, Tensor]:
    kept = random_kept(backbone.layers, 0.25)
    return kept | {backbone.layers[0].name: NOBODY, backbone.layers[-1].name: NOBODY}


WIDTHS = {
    "dense": lambda backbone: {},
    "0.5": lambda backbone: random_kept(backbone.layers, 0.5),
    "0.1": lambda backbone: random_kept(backbone.layers, 0.1, seed=1),
    "a head gone": head_gone,
    "branches gone": branches_gone,
}


@pytest.mark.parametrize("widths", WIDTHS)
@pytest.mark.parametrize("family", FAMILIES)
def test_gathered_adapters_on_the_shrunk_model_equal_the_shrunk_adapted_model(
    family: str, widths: str, families: dict[str, Tiny]
) -> None:
    backbone, rank, scale = families[family], 2, 1.5
    plan = plan_of(backbone, WIDTHS[widths](backbone))
    params = random_adapters(backbone, rank + 1)
    layout = device_layout({name: tuple(p.shape) for name, p in params.items()}, backbone.layers, plan, rank)
    adapted = AdaptedModel(shrink(backbone.model, plan), layout, scale)
    want = shrink(merged(backbone.model, params, rank, scale), plan)(backbone.inputs)
    got = adapted(gather_all(params, layout), backbone.inputs)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    assert (want - shrink(backbone.model, plan)(backbone.inputs)).abs().max() > 0.1  # the adapters must have an effect


def test_devices_with_different_head_dims_agree_on_a_dense_update(vit: Tiny) -> None:
    params, shapes = random_adapters(vit, 2), global_shapes(vit.model, vit.layers, 2)
    layouts = [
        device_layout(shapes, vit.layers, plan_of(vit, random_kept(vit.layers, share, seed)), 2)
        for seed, share in enumerate((0.25, 0.75))
    ]
    updates = [Update(gather_all(params, layout), layout, 3.0 + i) for i, layout in enumerate(layouts)]
    previous = {name: torch.zeros(shape) for name, shape in shapes.items()}
    name = "blocks.0.attn.qkv.lora_B"
    result = RULES["fedit"].aggregate(previous, updates, previous)[name]
    held = torch.cat([layout[name].index[0] for layout in layouts]).unique()
    torch.testing.assert_close(result[held], params[name][held], rtol=1e-6, atol=1e-6)
    # the trap: rows averaged without their scale
    both = set(layouts[0][name].index[0][:8].tolist()) & set(layouts[1][name].index[0][:24].tolist())
    row = next(iter(both))
    raw = [update.params[name][(update.layout[name].index[0] == row).nonzero().item()] for update in updates]
    assert not torch.allclose(raw[0], raw[1], rtol=0.1)


def test_initial_adapters(vit: Tiny) -> None:
    shapes = global_shapes(vit.model, vit.layers, 4)
    params, again = (
        initial(AdapterOptions(), shapes, vit.layers, vit.model, torch.Generator().manual_seed(5)) for _ in range(2)
    )
    assert all(torch.equal(params[name], again[name]) for name in shapes)
    assert {name: tuple(p.shape) for name, p in params.items()} == shapes
    for name, theta in params.items():
        if name.endswith(LORA_A):
            bound = shapes[name][1] ** -0.5
            assert 0.9 * bound < theta.abs().max() <= bound
            assert theta.min() < -0.5 * bound
        elif name.endswith(LORA_B):
            assert not theta.any()
    assert torch.equal(params["head.weight"], vit.model.head.weight)
    params["head.weight"][0] = 0  # a copy, not the model's tensor
    assert vit.model.head.weight[0].any()


def test_pack_and_unpack_are_inverse(vit: Tiny) -> None:
    params = random_adapters(vit, 3)
    plan = plan_of(vit, branches_gone(vit))
    layout = device_layout({name: tuple(p.shape) for name, p in params.items()}, vit.layers, plan, 2)
    own = gather_all(params, layout)
    vector = pack(own, layout)
    assert vector.dtype == np.float32 and vector.shape == (packed_size(layout),)
    assert list(unpack(vector, layout)) == list(layout)
    assert all(torch.equal(theta, own[name]) for name, theta in unpack(vector, layout).items())
    precise = {name: theta.double() for name, theta in own.items()}  # as in a clipped update
    assert pack(precise, layout).dtype == np.float32 and np.array_equal(pack(precise, layout), vector)
    # the order is that of the layout, not of the parameters
    assert np.array_equal(pack(dict(reversed(own.items())), layout), vector)
    vector.setflags(write=False)  # as received
    unpacked = unpack(vector, layout)
    unpacked["head.bias"].zero_()
    assert not np.shares_memory(unpacked["head.bias"].numpy(), vector)
    assert len({theta.untyped_storage().data_ptr() for theta in unpacked.values()}) == len(unpacked)  # nor each other


@pytest.mark.parametrize("rule", RULES)
def test_order_of_arrival_changes_no_bit(rule: str, vit: Tiny) -> None:
    shapes = global_shapes(vit.model, vit.layers, 2)
    previous = random_adapters(vit, 2)
    updates: dict[int, Update] = {}
    for i, share in enumerate((0.25, 0.5, 0.75, 0.9)):
        kept = random_kept(vit.layers, share, i) | ({"blocks.0.mlp": NOBODY} if i == 1 else {})  # one lacks a branch
        layout = device_layout(shapes, vit.layers, plan_of(vit, kept), 1 + i % 2)
        updates[i] = Update(gather_all(random_adapters(vit, 2, seed=i + 1), layout), layout, 10.0 + 7 * i)

    def aggregate(arrived: Mapping[int, Update]) -> Params:
        return RULES[rule].aggregate(previous, [update for _, update in sorted(arrived.items())], previous)

    want = aggregate(updates)
    for order in ((3, 1, 0, 2), (2, 3, 1, 0)):
        got = aggregate({i: updates[i] for i in order})
        assert all(torch.equal(got[name], want[name]) for name in want)
        assert list(got) == list(previous)
