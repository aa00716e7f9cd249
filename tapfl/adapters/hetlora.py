"""HetLoRA's weights (Cho et al. 2024, arXiv 2401.06432, "sparsity-weighted aggregation") for the factors of `fedit`.

A device weighs in a linear with ‖B_i A_i‖_F instead of its samples, so that a large rank that found nothing to say does
not dilute a small one that did. A device whose product is 0 has no say there; heads are weighed by samples. Pruning of
ranks, the other half of that paper, is not done: a device's rank is its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from tapfl.adapters import fedit
from tapfl.adapters.layout import LORA_A, LORA_B, Update, to_global_scale
from tapfl.adapters.rule import PLAIN, Combination
from tapfl.training import Params


def aggregate(previous: Params, updates: Sequence[Update], fresh: Params, combination: Combination = PLAIN) -> Params:
    """Returns every factor averaged by itself with the weights of its linear. `fresh` is not needed by this rule."""
    result: Params = {}
    for name, theta in previous.items():
        a = name.removesuffix(LORA_B) + LORA_A if name.endswith(LORA_B) else name
        weighed = updates
        if a.endswith(LORA_A):
            weighed = [replace(update, weight=product_norm(update, a)) for update in updates if a in update.layout]
        result |= fedit.aggregate({name: theta}, weighed, fresh, combination)
    return result


def product_norm(update: Update, a: str) -> float:
    """Returns ‖BA‖_F on the global scale from ‖BA‖² = tr(BᵀB AAᵀ), which needs two r × r matrices; `a` names A."""
    b = a.removesuffix(LORA_A) + LORA_B
    A, B = (to_global_scale(update.params[name], update.layout[name]) for name in (a, b))
    return float(((B.T @ B) * (A @ A.T)).sum().clamp(min=0).sqrt())


RULE = replace(fedit.RULE, aggregate=aggregate)
