"""FlexLoRA on pruned widths: the overlap mean of the products, truncated optimally to the rank."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from backbones import Tiny, golden, plan_of, random_kept
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tapfl.adapters import flex
from tapfl.adapters.layout import Placement, Update, device_layout, gather, gather_all, global_shapes
from tapfl.training import Params

F64 = torch.float64
A, B = "fc.lora_A", "fc.lora_B"
GOLDEN_TOLERANCE = {"rtol": 1e-10, "atol": 1e-10}
SIDES = ["rows", "columns"]


def noise(generator: np.random.Generator, *shape: int) -> Tensor:
    return torch.from_numpy(generator.standard_normal(shape))


def update(b: Tensor, a: Tensor, kept: list[int] | Tensor, weight: float, side: str = "rows") -> Update:
    """Returns an update of a linear layer whose rows, or columns, are reduced to `kept`."""
    axis, rank = torch.as_tensor(kept, dtype=torch.int64), torch.arange(len(a))
    rows = axis if side == "rows" else torch.arange(len(b))
    columns = axis if side == "columns" else torch.arange(a.shape[1])
    return Update({A: a, B: b}, {A: Placement((rank, columns)), B: Placement((rows, rank))}, weight)


def aggregate(previous: tuple[Tensor, Tensor], updates: list[Update], fresh: Tensor) -> tuple[Tensor, Tensor]:
    """Takes and returns (B, A)."""
    result = flex.aggregate({B: previous[0], A: previous[1]}, updates, {A: fresh})
    return result[B], result[A]


def golden_case(side: str) -> tuple[list[Update], dict[str, Tensor]]:
    """Returns the golden layer, or its transpose, an fc2 whose columns are pruned."""
    case = golden("lora")
    updates = []
    for b, a, kept, n in zip(case["B"], case["A"], case["kept_rows"], case["samples"], strict=True):
        b, a = torch.tensor(b, dtype=F64), torch.tensor(a, dtype=F64)
        updates.append(update(b, a, kept, n) if side == "rows" else update(a.T, b.T, kept, n, "columns"))
    want = {"mean": case["overlap_mean_dW"], "singular_values": case["singular_values"]}
    want |= {f"product {i}": case["flex_best_rank_product"][str(i)] for i in range(2)}
    tensors = {name: torch.tensor(values, dtype=F64) for name, values in want.items()}
    if side == "columns":
        tensors = {name: t.T if t.ndim == 2 else t for name, t in tensors.items()}
    return updates, tensors


@pytest.mark.parametrize("side", SIDES)
def test_golden_mean_and_singular_values(side: str) -> None:
    updates, want = golden_case(side)
    d_out, d_in = want["mean"].shape
    zero = torch.zeros(d_out, 4, dtype=F64), torch.zeros(4, d_in, dtype=F64)
    got_B, got_A = aggregate(zero, updates, torch.ones(4, d_in, dtype=F64))
    torch.testing.assert_close(got_B @ got_A, want["mean"], **GOLDEN_TOLERANCE)
    # balanced factors: column k of B and row k of A both have norm sqrt(singular value k)
    torch.testing.assert_close(got_B.square().sum(0), want["singular_values"], **GOLDEN_TOLERANCE)
    torch.testing.assert_close(got_A.square().sum(1), want["singular_values"], **GOLDEN_TOLERANCE)


@pytest.mark.parametrize("side", SIDES)
def test_golden_best_rank_product_of_each_device(side: str) -> None:
    updates, want = golden_case(side)
    d_out, d_in = want["mean"].shape
    zero = torch.zeros(d_out, 2, dtype=F64), torch.zeros(2, d_in, dtype=F64)
    got = aggregate(zero, updates, torch.ones(2, d_in, dtype=F64))
    for i, received in enumerate(updates):
        b, a = (gather(theta, received.layout[name]) for theta, name in zip(got, (B, A), strict=True))
        torch.testing.assert_close(b @ a, want[f"product {i}"], **GOLDEN_TOLERANCE)


# -- any devices ------------------------------------------------------------------------------------------------------


@st.composite
def federations(draw: st.DrawFn) -> tuple[tuple[Tensor, Tensor], list[Update], Tensor]:
    """Returns (previous, updates, dense overlap mean in a plain float64 loop) of very different devices."""
    side = draw(st.sampled_from(SIDES))
    d_out, d_in = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    generator = np.random.default_rng(draw(st.integers(0, 10**6)))
    rank, size = min(d_out, d_in), d_out if side == "rows" else d_in
    previous_B, previous_A = noise(generator, d_out, rank), noise(generator, rank, d_in)
    previous_B[: draw(st.sampled_from([0, 1, d_out]))] = 0  # nothing, one row, or everything
    updates, total, weight = [], np.zeros((d_out, d_in)), np.zeros(size)
    for _ in range(draw(st.integers(1, 4))):
        kept = sorted(draw(st.sets(st.integers(0, size - 1), min_size=1)))
        r, n = draw(st.integers(1, rank)), draw(st.integers(1, 500))
        b = noise(generator, len(kept) if side == "rows" else d_out, r)
        a = noise(generator, r, len(kept) if side == "columns" else d_in)
        updates.append(update(b, a, kept, n, side))
        product = (b @ a).numpy()
        for place, j in enumerate(kept):
            if side == "rows":
                total[j] += n * product[place]
            else:
                total[:, j] += n * product[:, place]
            weight[j] += n
    mean = (previous_B @ previous_A).numpy()
    for j in range(size):
        if weight[j] and side == "rows":
            mean[j] = total[j] / weight[j]
        elif weight[j]:
            mean[:, j] = total[:, j] / weight[j]
    return (previous_B, previous_A), updates, torch.from_numpy(mean)


@given(federation=federations())
def test_the_product_is_the_dense_overlap_mean_if_the_rank_suffices(
    federation: tuple[tuple[Tensor, Tensor], list[Update], Tensor],
) -> None:
    previous, updates, mean = federation
    got_B, got_A = aggregate(previous, updates, torch.ones_like(previous[1]))
    tolerance = 2 * flex.DEAD * float(torch.linalg.matrix_norm(mean, 2)) + 1e-12
    torch.testing.assert_close(got_B @ got_A, mean, rtol=0, atol=tolerance)


@given(federation=federations(), rank=st.integers(1, 3))
def test_every_prefix_is_the_best_product_of_its_rank(
    federation: tuple[tuple[Tensor, Tensor], list[Update], Tensor], rank: int
) -> None:
    previous, updates, mean = federation
    got_B, got_A = aggregate(previous, updates, torch.ones(rank, mean.shape[1], dtype=F64))
    assert got_B.shape == (len(mean), rank) and got_A.shape == (rank, mean.shape[1])
    singular_values = torch.linalg.svdvals(mean)
    for r in range(rank + 1):  # what a device of rank r receives; Eckart-Young gives the smallest possible error
        error = (got_B[:, :r] @ got_A[:r] - mean).norm()
        torch.testing.assert_close(error, singular_values[r:].norm(), rtol=1e-5, atol=1e-5)


@given(k=st.integers(1, 4), rank=st.integers(1, 5), seed=st.integers(0, 999), transposed=st.booleans())
def test_thin_path_equals_dense_path(k: int, rank: int, seed: int, transposed: bool) -> None:
    generator = np.random.default_rng(seed)
    b, a = noise(generator, 6, k), noise(generator, k, 9)
    if transposed:
        b, a = a.T, b.T
    fresh = noise(generator, rank, a.shape[1])
    padding = 6 - k  # zero directions do not change the product, but with k = min(d_out, d_in) the dense path is used
    dense_b = torch.cat([b, torch.zeros(len(b), padding, dtype=F64)], 1)
    dense_a = torch.cat([a, torch.zeros(padding, a.shape[1], dtype=F64)], 0)
    thin, dense = flex.best_rank(b, a, fresh), flex.best_rank(dense_b, dense_a, fresh)
    for got, want in zip(thin, dense, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-8)


def test_the_dense_matrix_of_a_large_layer_is_never_formed(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes: list[torch.Size] = []
    svd = torch.linalg.svd
    monkeypatch.setattr(torch.linalg, "svd", lambda m, **options: shapes.append(m.shape) or svd(m, **options))
    generator = np.random.default_rng(0)
    flex.best_rank(noise(generator, 300, 5), noise(generator, 5, 200), noise(generator, 2, 200))
    assert shapes == [(5, 5)]


# -- directions that are not there ------------------------------------------------------------------------------------


def test_dead_directions_get_a_fresh_a_and_a_zero_b() -> None:
    generator = np.random.default_rng(0)
    b, a, fresh = noise(generator, 5, 1), noise(generator, 1, 4), noise(generator, 3, 4)
    zero = torch.zeros(5, 3, dtype=F64), torch.zeros(3, 4, dtype=F64)
    got_B, got_A = aggregate(zero, [update(b, a, [0, 1, 2, 3, 4], 2.0)], fresh)
    torch.testing.assert_close(got_B @ got_A, b @ a, rtol=1e-12, atol=1e-12)
    assert got_B[:, 0].any() and not got_B[:, 1:].any()
    assert torch.equal(got_A[1:], fresh[1:])


@pytest.mark.parametrize("side", SIDES)
def test_zero_updates_stay_trainable(side: str) -> None:
    generator = np.random.default_rng(0)
    fresh = noise(generator, 2, 4)
    kept = [0, 2]
    b = torch.zeros(2 if side == "rows" else 4, 2, dtype=F64)
    a = fresh if side == "rows" else fresh[:, kept]
    got_B, got_A = aggregate((torch.zeros(4, 2, dtype=F64), fresh), [update(b, a, kept, 1.0, side)], fresh)
    assert not got_B.any() and torch.equal(got_A, fresh)
    # as at the start, the gradient reaches B through A; two zero factors could never be trained
    leaf = got_B.requires_grad_()
    ((leaf @ got_A).sum() - 1).square().backward()
    assert leaf.grad is not None and bool(leaf.grad.all())


def test_a_branch_without_holders_keeps_its_factors() -> None:
    generator = np.random.default_rng(0)
    previous = noise(generator, 3, 2), noise(generator, 2, 3)
    elsewhere = Update({}, {}, 1.0)
    got_B, got_A = aggregate(previous, [elsewhere], noise(generator, 2, 3))
    assert torch.equal(got_B, previous[0]) and torch.equal(got_A, previous[1])


def test_the_head_is_averaged_directly() -> None:
    place = Placement((torch.arange(2),))
    updates = [
        Update({"head.bias": torch.tensor(v)}, {"head.bias": place}, n) for v, n in (([1.0, 2], 1), ([5.0, 2], 3))
    ]
    result = flex.aggregate({"head.bias": torch.zeros(2)}, updates, {})
    assert result["head.bias"].tolist() == [4, 2]


# -- one result -------------------------------------------------------------------------------------------------------


def test_signs_depend_only_on_the_product() -> None:
    generator = np.random.default_rng(3)
    parts = [(noise(generator, 6, 2), noise(generator, 2, 7)) for _ in range(2)]
    zero = torch.zeros(6, 2, dtype=F64), torch.zeros(2, 7, dtype=F64)
    fresh, everything = noise(generator, 2, 7), list(range(6))
    want = aggregate(zero, [update(b, a, everything, 1.0) for b, a in parts], fresh)
    got = aggregate(zero, [update(-b, -a, everything, 1.0) for b, a in parts], fresh)
    for theta, other in zip(got, want, strict=True):
        torch.testing.assert_close(theta, other, rtol=1e-10, atol=1e-10)
    largest = want[0].gather(0, want[0].abs().argmax(0, keepdim=True))
    assert (largest > 0).all()


@given(federation=federations(), order=st.randoms(use_true_random=False))
def test_order_of_arrival_changes_no_bit(
    federation: tuple[tuple[Tensor, Tensor], list[Update], Tensor], order: object
) -> None:
    previous, updates, _ = federation
    arrived = list(enumerate(updates))
    order.shuffle(arrived)  # type: ignore[attr-defined]
    ordered = [received for _, received in sorted(arrived, key=lambda entry: entry[0])]
    want = aggregate(previous, updates, previous[1])
    assert all(torch.equal(x, y) for x, y in zip(aggregate(previous, ordered, previous[1]), want, strict=True))


def test_devices_with_different_head_dims_agree_on_a_dense_update(vit: Tiny) -> None:
    shapes = global_shapes(vit.model, vit.layers, 2)
    generator = torch.Generator().manual_seed(0)
    params: Params = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    layouts = [
        device_layout(shapes, vit.layers, plan_of(vit, random_kept(vit.layers, share, seed)), 2)
        for seed, share in enumerate((0.25, 0.75))
    ]
    updates = [Update(gather_all(params, layout), layout, 3.0 + i) for i, layout in enumerate(layouts)]
    zero = {name: torch.zeros(shape) for name, shape in shapes.items()}
    result = flex.aggregate(zero, updates, params)
    linears = {name.rpartition(".")[0] for name in shapes if "lora" in name}
    assert len(linears) == 8
    for linear in linears:
        a, b = f"{linear}.lora_A", f"{linear}.lora_B"
        got, want = result[b] @ result[a], params[b] @ params[a]
        rows = torch.cat([layout[b].index[0] for layout in layouts]).unique()
        columns = torch.cat([layout[a].index[1] for layout in layouts]).unique()
        torch.testing.assert_close(got[rows][:, columns], want[rows][:, columns], rtol=1e-4, atol=1e-4)
