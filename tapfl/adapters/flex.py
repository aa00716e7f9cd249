"""FlexLoRA (arXiv 2402.11505) on pruned widths: combines the products B_i A_i instead of the factors.

ΔW[j, :] = Σ_{i∋j} n_i (B_i A_i)[j, :] / Σ_{i∋j} n_i is exact. Each device then receives the best rank-r_i
approximation, restricted to the units that it kept.

Every pruned linear is pruned on one side only. The normaliser therefore depends only on the row (qkv, fc1) or only on
the column (proj, fc2) of ΔW, and is absorbed into the stacked factor of that side: ΔW = B_stack A_stack with inner
dimension Σ r_i. Its SVD is computed from two thin QRs and a small SVD. The dense matrix is formed only if Σ r_i is at
least as large as its shorter side, or if an operation needs its entries: medians and trimmed means, which take a block
of rows at a time, and the server's optimiser.

Shapes: A (r, d_in) and B (d_out, r) of the global adapters. A device has the first r_i of the r directions, and the
rows of B or the columns of A that its plan kept. Both factors are sent in both directions.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tapfl.adapters.combination import PLAIN, Combination, Combine, row_blocks, rows_of
from tapfl.adapters.layout import LORA_A, LORA_B, Part, Placement, Update, scatter_mean, to_global_scale
from tapfl.training import Params

DEAD = 1e-7  # relative to the largest singular value; smaller ones are float32 noise


def aggregate(previous: Params, updates: Sequence[Update], fresh: Params, combination: Combination = PLAIN) -> Params:
    """Returns the global factors (U√Σ, √ΣVᵀ) of the combined product, and the heads, which are combined directly.

    Args:
        previous: global adapters. A row or column of a product that no device has keeps its value.
        updates: in an order that does not depend on arrival.
        fresh: adapters with a random A. If the product has a lower rank than the global adapters, the missing rows of A
            are taken from here and the columns of B are 0; two zero factors would never train again. (This is ours; it
            does not occur if all ranks are equal.)
        combination: applied to the heads, and to the products coordinate by coordinate.
    """
    heads = {name: theta for name, theta in previous.items() if not name.endswith((LORA_A, LORA_B))}
    result = combination.each(heads, updates)
    for a in previous:
        if a.endswith(LORA_A):
            b = a.removesuffix(LORA_A) + LORA_B
            holders = [update for update in updates if a in update.layout]
            result[b], result[a] = previous[b], previous[a]
            if holders:
                result[b], result[a] = next_factors(previous[b], previous[a], holders, b, a, fresh[a], combination)
    return {name: result[name] for name in previous}


def next_factors(
    previous_B: Tensor,
    previous_A: Tensor,
    holders: Sequence[Update],
    b: str,
    a: str,
    fresh_A: Tensor,
    combination: Combination,
) -> tuple[Tensor, Tensor]:
    """Returns the global factors of one linear after a round; `b` and `a` name them.

    Args:
        holders: updates of the devices that have this linear.
        fresh_A: as for `aggregate`.
    """
    mean = combination.combine is scatter_mean
    if mean and combination.step is None:
        return best_rank(*stacked_mean(previous_B, previous_A, holders, b, a), fresh_A)
    before = previous_B.double() @ previous_A.double()
    if mean:
        B, A = stacked_mean(previous_B, previous_A, holders, b, a)
        product = B @ A
    else:
        product = combined_products(before, holders, b, a, combination.combine)
    if combination.step is not None:
        held = torch.zeros(before.shape, dtype=torch.bool)
        for update in holders:
            rows, columns = update.layout[b].index[0], update.layout[a].index[1]
            held[rows[:, None], columns] = True
        product = combination.step(a.removesuffix(LORA_A) + "product", before, product, held)
    U, S, Vh = torch.linalg.svd(product, full_matrices=False)
    return balanced(U, S, Vh, fresh_A)


def combined_products(before: Tensor, holders: Sequence[Update], b: str, a: str, combine: Combine) -> Tensor:
    """Returns `combine` of the devices' products, float64 (d_out, d_in), computed one block of rows at a time."""

    def part(update: Update, start: int, stop: int) -> Part:
        B, rows, weight = rows_of((update.params[b], update.layout[b], update.weight), start, stop)
        A = to_global_scale(update.params[a], update.layout[a])
        return B @ A, Placement((rows.index[0], update.layout[a].index[1])), weight

    blocks = row_blocks(len(before), before.shape[1] * len(holders))
    return torch.cat([combine(before[i:j], [part(update, i, j) for update in holders]) for i, j in blocks])


def stacked_mean(
    previous_B: Tensor, previous_A: Tensor, holders: Sequence[Update], b: str, a: str
) -> tuple[Tensor, Tensor]:
    """Returns factors, float64 (d_out, k) and (k, d_in), whose product is the overlap mean of the devices' products."""
    d_out, d_in = len(previous_B), previous_A.shape[1]
    by_rows = any(len(u.layout[b].index[0]) < d_out for u in holders)
    size = d_out if by_rows else d_in
    held = torch.zeros(size, dtype=torch.float64)
    axes = [u.layout[b].index[0] if by_rows else u.layout[a].index[1] for u in holders]
    for axis, update in zip(axes, holders, strict=True):
        held[axis] += update.weight
    share = torch.where(held > 0, 1 / held.clamp(min=torch.finfo(torch.float64).tiny), 0.0)
    Bs, As = [], []
    for axis, update in zip(axes, holders, strict=True):
        B, A = (to_global_scale(update.params[key], update.layout[key]) for key in (b, a))
        whole_B, whole_A = torch.zeros(d_out, A.shape[0], dtype=B.dtype), torch.zeros(A.shape[0], d_in, dtype=A.dtype)
        factor = update.weight * share[axis]
        whole_B[update.layout[b].index[0]] = B * factor[:, None] if by_rows else B
        whole_A[:, update.layout[a].index[1]] = A if by_rows else A * factor
        Bs.append(whole_B)
        As.append(whole_A)
    unheld = held == 0
    if unheld.any() and previous_B.any():
        Bs.append(previous_B.double() * unheld[:, None] if by_rows else previous_B.double())
        As.append(previous_A.double() if by_rows else previous_A.double() * unheld)
    return torch.cat(Bs, dim=1), torch.cat(As, dim=0)


def best_rank(B: Tensor, A: Tensor, fresh_A: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the balanced factors of the best approximation of B A by a matrix of the rank of `fresh_A` (its rows)."""
    thin = B.shape[1] < min(B.shape[0], A.shape[1])
    U, S, Vh = thin_svd(B, A) if thin else torch.linalg.svd(B @ A, full_matrices=False)
    return balanced(U, S, Vh, fresh_A)


def thin_svd(B: Tensor, A: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the SVD (U, Σ, Vᵀ) of B A, B (d_out, k) and A (k, d_in), from two QRs and the SVD of a k × k matrix."""
    Q_B, R_B = torch.linalg.qr(B)
    Q_A, R_A = torch.linalg.qr(A.T)
    U, S, Vh = torch.linalg.svd(R_B @ R_A.T, full_matrices=False)
    return Q_B @ U, S, Vh @ Q_A.T


def balanced(U: Tensor, S: Tensor, Vh: Tensor, fresh_A: Tensor) -> tuple[Tensor, Tensor]:
    """Returns (U√Σ, √ΣVᵀ) for the largest singular values, as many as `fresh_A` has rows.

    For singular values that are 0 up to rounding (`DEAD`), A has the rows of `fresh_A` and B is 0.
    """
    rank = len(fresh_A)
    U, S, Vh = U[:, :rank], S[:rank], Vh[:rank]
    largest = U.gather(0, U.abs().argmax(0, keepdim=True))[0]
    sign = torch.where(largest < 0, -1.0, 1.0)  # the signs of an SVD are arbitrary
    root = S.sqrt() * sign
    new_B = U.new_zeros(len(U), rank)
    new_A = fresh_A.double().clone()
    alive = int((DEAD * S[0] < S).sum())
    new_B[:, :alive] = (U * root)[:, :alive]
    new_A[:alive] = (root[:, None] * Vh)[:alive]
    return new_B.to(fresh_A.dtype), new_A.to(fresh_A.dtype)
