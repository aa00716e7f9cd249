"""The benchmarks measure what they say: their references compute the same as what they are compared with."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from backbones import Tiny, tiny_of_family
from torch import Tensor

from experiments.bench.layers import plain_layer_importance
from experiments.bench.scoring import hoisted_loop_terms, loop_terms
from experiments.bench.side_by_side import side_by_side
from tapfl.pruning.layer_importance import layer_importance
from tapfl.pruning.scores import Terms, terms


@pytest.mark.parametrize("heads", [0, 1, 2])
@pytest.mark.parametrize("loop", [loop_terms, hoisted_loop_terms])
def test_the_loops_compute_the_vectorised_terms(heads: int, loop: Callable[[Tensor, Tensor, int], Terms]) -> None:
    generator = torch.Generator().manual_seed(heads)
    X = torch.randn(9, 5, 8, generator=generator)
    P = torch.randn(9, 4, generator=generator).softmax(-1)
    reference, fused = loop(X, P, heads), terms(X, P, heads)
    for name in ("rel", "red", "act"):
        torch.testing.assert_close(getattr(fused, name), getattr(reference, name), rtol=1e-4, atol=1e-5)


def test_the_plain_way_gives_the_cached_layer_importance() -> None:
    t: Tiny = tiny_of_family("vit")
    kept = {layer.name: torch.arange(0, layer.units, 2) for layer in t.layers}
    plain = plain_layer_importance(t.model, t.layers, kept, t.inputs)
    cached = layer_importance(t.model, t.layers, kept, t.inputs, len(t.inputs))
    assert plain == pytest.approx(cached, rel=1e-4)


def test_variants_take_turns() -> None:
    order: list[str] = []
    seconds = side_by_side({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, repeats=3)
    assert order == ["a", "b"] * 3 and set(seconds) == {"a", "b"}
