"""Latency: a table by width from a few timings, and models that take turns on one thread."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from backbones import Tiny

from tapfl.config import PruningOptions
from tapfl.models import cost
from tapfl.models.cost import interpolated, latencies_ms, measure_timings, median_ms
from tapfl.models.units import Shape
from tapfl.pruning import pipeline


def test_interpolation_between_timings_never_falls() -> None:
    heads = {Shape(h, d): 1.0 * h * d for h in (1, 2) for d in (2, 4)} | {Shape(0, 0): 0.0}
    np.testing.assert_allclose(interpolated(heads), [[0, 0, 0, 0, 0], [0, 1, 2, 3, 4], [0, 2, 4, 6, 8]])
    noisy = interpolated({Shape(0, 0): 0.1, Shape(1, 2): 3.0, Shape(1, 4): 2.0, Shape(1, 8): 5.0})
    np.testing.assert_allclose(noisy[1], [0.1, 1.55, 3, 3, 3, 3.5, 4, 4.5, 5])
    assert (noisy[0] == 0.1).all()


def test_the_median_is_of_calls_that_take_turns_on_one_thread() -> None:
    seen: list[tuple[str, int]] = []
    calls = [lambda name=name: seen.append((name, torch.get_num_threads())) for name in "ab"]
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        found = median_ms(calls, repeats=3)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    assert seen == [("a", 1), ("b", 1)] * (3 + cost.WARM_UP)
    assert len(found) == 2 and all(0 <= value < 1000 for value in found)


def test_the_number_of_threads_is_restored_if_a_call_fails() -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with pytest.raises(ZeroDivisionError):
            median_ms([lambda: 1 / 0], repeats=1)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("family", ["vit", "deit", "swin"])
def test_every_branch_has_a_table_that_rises_with_both_sizes(family: str, families: dict[str, Tiny]) -> None:
    backbone = families[family]
    timings = measure_timings(backbone.model, backbone.layers, align=4, repeats=3)
    assert timings.dense > 0
    for layer in backbone.layers:
        table = timings.branches[layer.name]
        assert table.shape == (layer.heads + 1, layer.units_per_head + 1)
        assert (np.diff(table, axis=0) >= -1e-12).all() and (np.diff(table, axis=1) >= -1e-12).all()
        assert 0 < table[0, 0] <= table[-1, -1] < 1000
    for a, b in itertools.combinations(backbone.layers, 2):
        if cost._likeness(a) == cost._likeness(b):
            assert timings.branches[a.name] is timings.branches[b.name]
    assert len({id(table) for table in timings.branches.values()}) == (4 if family == "swin" else 2)


def test_a_narrower_model_is_faster(deit: Tiny) -> None:
    """Budgets on latency assume this. An FFN of 128 units on 6 tokens is small, so a much narrower one is compared."""
    wide = torch.nn.Linear(512, 512)
    narrow = torch.nn.Linear(64, 64)
    x = {512: torch.zeros(256, 512), 64: torch.zeros(256, 64)}
    slow, fast = median_ms([lambda: wide(x[512]), lambda: narrow(x[64])], repeats=9)
    assert fast < slow
    one, two = latencies_ms([deit.model, deit.model], repeats=3)
    assert one > 0 and two > 0


def test_latency_is_measured_only_where_a_budget_names_it(vit: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def measured(*arguments: object) -> cost.Timings:
        calls.append(arguments)
        return measure_timings(vit.model, vit.layers, repeats=1)

    monkeypatch.setattr(pipeline, "measure_timings", measured)
    pipeline.pruning_task(vit.model, vit.inputs, "macs<=0.5,params<=0.5", PruningOptions(), batch=4)
    assert not calls
    task = pipeline.pruning_task(vit.model, vit.inputs, "macs<=0.5,latency<=0.9", PruningOptions(), batch=4)
    assert len(calls) == 1 and task.costs.dense[1] > 0
