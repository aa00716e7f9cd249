"""FlexLoRA (arXiv 2402.11505) on pruned widths: the overlap mean of the products B_i A_i themselves.

ΔW[j, :] = Σ_{i∋j} n_i (B_i A_i)[j, :] / Σ_{i∋j} n_i is exact; each device then receives the best rank-r_i
approximation, sliced to what it kept. One side of every pruned linear is whole, so the normaliser belongs to the rows
(qkv, fc1) or to the columns (proj, fc2) of ΔW and goes into the stacked factor of that side: ΔW = B_stack A_stack with
Σ r_i columns, and its SVD comes from two thin QRs and a small SVD. The dense matrix is formed only when it is smaller.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tapfl.adapters.layout import LORA_A, LORA_B, Params, Update, to_global_scale
from tapfl.adapters.rule import BOTH, PLAIN, Combination, Rule

DEAD = 1e-7  # singular values below this share of the largest are fp32 noise


def aggregate(previous: Params, updates: Sequence[Update], fresh: Params, combination: Combination = PLAIN) -> Params:
    """Returns the global factors (U√Σ, √ΣVᵀ) of the mean product, and the overlap mean of the head.

    Args:
        previous: global adapters; a row or column that no device holds keeps its product.
        updates: in an order that does not depend on arrival.
        fresh: adapters with a random A. Where the product has no direction left to give, A is taken from here and B is
            0: two zero factors would never train again. (Ours; with equal ranks it does not occur.)
    """
    result: Params = {}
    for name, theta in previous.items():
        if name.endswith(LORA_B):
            continue
        if not name.endswith(LORA_A):
            parts = [(u.params[name], u.layout[name], u.weight) for u in updates if name in u.layout]
            result[name] = combination(name, theta, parts) if parts else theta
            continue
        b = name.removesuffix(LORA_A) + LORA_B
        holders = [u for u in updates if name in u.layout]
        if not holders:
            result[name], result[b] = theta, previous[b]
            continue
        B, A = stacked_mean(previous[b], theta, holders, b, name)
        result[b], result[name] = best_rank(B, A, fresh[name])
    return {name: result[name] for name in previous}


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
    nobody = held == 0
    if nobody.any() and previous_B.any():
        Bs.append(previous_B.double() * nobody[:, None] if by_rows else previous_B.double())
        As.append(previous_A.double() if by_rows else previous_A.double() * nobody)
    return torch.cat(Bs, dim=1), torch.cat(As, dim=0)


def best_rank(B: Tensor, A: Tensor, fresh_A: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the balanced factors of the best approximation of B A with as many directions as `fresh_A` has rows."""
    rank = len(fresh_A)
    if B.shape[1] < min(B.shape[0], A.shape[1]):
        Q_B, R_B = torch.linalg.qr(B)
        Q_A, R_A = torch.linalg.qr(A.T)
        U, S, Vh = torch.linalg.svd(R_B @ R_A.T, full_matrices=False)
        U, Vh = Q_B @ U, Vh @ Q_A.T
    else:
        U, S, Vh = torch.linalg.svd(B @ A, full_matrices=False)
    U, S, Vh = U[:, :rank], S[:rank], Vh[:rank]
    sign = torch.where(U.gather(0, U.abs().argmax(0, keepdim=True))[0] < 0, -1.0, 1.0)  # an SVD is free in its signs
    root = S.sqrt() * sign
    new_B = torch.zeros(len(B), rank, dtype=torch.float64)
    new_A = fresh_A.double().clone()
    alive = int((DEAD * S[0] < S).sum())
    new_B[:, :alive] = (U * root)[:, :alive]
    new_A[:alive] = (root[:, None] * Vh)[:alive]
    return new_B.to(fresh_A.dtype), new_A.to(fresh_A.dtype)


RULE = Rule(aggregate, random="A", down=BOTH, up=lambda round: BOTH, trained=lambda round: BOTH)
