"""Round zero: what devices share is computed once and changes no plan; the pool can stand in for their probes."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from backbones import Tiny
from torch import Tensor

from experiments.bench.round_zero import synthetic_mixture
from strategies import round_zero
from strategies.round_zero import PublicPool, Shared, describe_pool, device_model, side_by_side
from tapfl.config import PruningOptions, RunConfig
from tapfl.data.sources import load_images
from tapfl.errors import ConfigError
from tapfl.memo import Memo
from tapfl.models.backbone import BackboneSpec, build, spec_of
from tapfl.models.prunable import prunable_layers
from tapfl.models.units import Shape
from tapfl.progress import track
from tapfl.pruning import layer_importance as layer_importance_module
from tapfl.pruning.criteria.criterion import by_layer
from tapfl.pruning.layer_importance import PoolProbe, layer_importance
from tapfl.pruning.pipeline import pruning_task
from tapfl.pruning.plan import PruningPlan
from tapfl.pruning.scores import neuron_importance
from tapfl.pruning.unit_shape import keep_best

BUDGETS = (0.3, 0.5, 0.7)


@dataclass(frozen=True)
class Place:
    config: RunConfig
    pool: PublicPool
    spec: BackboneSpec
    model: torch.nn.Module

    def plan(self, device: int, shared: Shared | None, mixture: int | None = None) -> PruningPlan:
        summary = synthetic_mixture(self.pool.points, device if mixture is None else mixture)
        budget = BUDGETS[device % 3]
        shared = shared or Shared(self.config, self.pool, self.model)
        return device_model(shared, self.spec, summary, device, budget).plan


@pytest.fixture(scope="module")
def place() -> Place:
    config = RunConfig.from_flat(
        {
            "metric.size": 48,
            "metric.batch": 16,
            "pruning.tau": 0.01,
            "pruning.align": 1,
            "model.args": "img_size=8,patch_size=2,in_chans=1,embed_dim=32,depth=2,num_heads=2",
        }
    )
    images = load_images("digits").subset(np.arange(200))
    spec = spec_of(config.model, images.classes)
    torch.manual_seed(0)
    model = build(spec).requires_grad_(False)
    return Place(config, describe_pool(config, images, model), spec, model)


def with_options(place: Place, **options: object) -> Place:
    flat = place.config.flat() | {name.replace("__", "."): value for name, value in options.items()}
    return replace(place, config=RunConfig.from_flat(flat))


@pytest.mark.parametrize("probe", ["own", "pool"])
@pytest.mark.parametrize("rule", ["density-ratio", "top-likelihood", "random"])
def test_shared_plans_are_unshared_plans_bit_by_bit(place: Place, probe: str, rule: str) -> None:
    there = with_options(place, pruning__probe=probe, metric__rule=rule)
    shared = Shared(there.config, there.pool, there.model)
    together = {device: there.plan(device, shared) for device in (4, 0, 3, 1)}
    assert all(plan == there.plan(device, None) for device, plan in together.items())
    assert together[0].layers != together[3].layers  # same budget, another task


@pytest.mark.parametrize("criterion", ["random", "taylor"])
def test_other_criteria_share_as_well(place: Place, criterion: str) -> None:
    there = with_options(place, pruning__criterion=criterion)
    shared = Shared(there.config, there.pool, there.model)
    assert [there.plan(i, shared) for i in range(3)] == [there.plan(i, None) for i in range(3)]


def test_equal_metric_sets_under_equal_budgets_are_scored_once(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    scored: list[float] = []
    select = round_zero.select
    monkeypatch.setattr(round_zero, "select", lambda task: (scored.append(task.options.tau), select(task))[1])
    shared = Shared(place.config, place.pool, place.model)
    plans = [place.plan(device, shared, mixture=9) for device in (0, 3, 1)]  # budgets 0.3, 0.3, 0.5
    assert len(scored) == 2
    assert plans[0].layers == plans[1].layers != plans[2].layers
    assert [plan.provenance["device"] for plan in plans] == [0, 3, 1]


def test_the_pool_is_probed_once_for_a_budget(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    there = with_options(place, pruning__probe="pool")
    pieces: list[int] = []
    measure = layer_importance_module.sample_divergences
    monkeypatch.setattr(
        layer_importance_module, "sample_divergences", lambda *given: (pieces.append(1), measure(*given))[1]
    )
    shared = Shared(there.config, there.pool, there.model)
    passed = []
    for device in range(6):
        there.plan(device, shared)
        passed.append(len(pieces))
    each = passed[0]
    assert len(BUDGETS) == 3 and each > 0
    assert passed == [each, 2 * each, 3 * each, 3 * each, 3 * each, 3 * each]


def test_the_pool_gives_the_layer_importance_of_its_samples(vit: Tiny) -> None:
    """With the same masks, the mean over a part of the pool is the importance measured on that part."""
    pool = torch.cat([vit.inputs, vit.inputs.flip(-1), vit.inputs[:1]])
    options = PruningOptions()
    probe = PoolProbe(vit.model, vit.layers, lambda: pool.split(4), options, batch=4)
    shapes = {layer.name: Shape(layer.heads, layer.units_per_head // 2) for layer in vit.layers}
    chosen = np.array([7, 2, 8])
    kept = {layer.name: keep_best(layer, probe.scores[layer.name], shapes[layer.name]) for layer in vit.layers}
    expected = layer_importance(vit.model, vit.layers, kept, pool[torch.from_numpy(chosen)], batch=4)
    assert probe.importance(shapes, chosen) == pytest.approx(expected, rel=1e-4)
    assert probe.divergences(shapes).shape == (len(vit.layers), 9)
    whole = [
        neuron_importance(vit.model, vit.layers, part, batch=4) for part in (pool[:4], pool[4:8])
    ]  # the last is not
    for layer in vit.layers:
        torch.testing.assert_close(probe.scores[layer.name], whole[0][layer.name] + whole[1][layer.name])


def test_of_a_large_pool_the_metric_set_alone_is_probed(vit: Tiny) -> None:
    """Units are ranked on a part of it; the divergences are those that the whole pool would give."""
    pool, options, seen = torch.cat([vit.inputs, vit.inputs.flip(-1)]), PruningOptions(), list[int]()

    def at(positions: np.ndarray) -> list[Tensor]:
        seen.extend(positions.tolist())
        return [pool[torch.from_numpy(positions)]]

    whole = PoolProbe(vit.model, vit.layers, lambda: pool.split(4), options, batch=4)
    probe = PoolProbe(vit.model, vit.layers, lambda: pool.split(4), options, batch=4, at=at)
    shapes = {layer.name: Shape(layer.heads, layer.units_per_head // 2) for layer in vit.layers}
    chosen = np.array([7, 2, 5])
    assert probe.importance(shapes, chosen) == pytest.approx(whole.importance(shapes, chosen), rel=1e-4)
    assert seen == [7, 2, 5]


def test_a_pool_beyond_the_sample_is_probed_in_part(place: Place) -> None:
    large = replace(place.pool, sample=np.arange(64))
    shared = Shared(with_options(place, pruning__probe="pool").config, large, place.model)
    assert shared.probe.at is not None and sum(map(len, shared.probe.batches())) == 64
    assert Shared(place.config, place.pool, place.model).probe.at is None


def test_probing_on_a_pool_needs_one(vit: Tiny) -> None:
    task = pruning_task(vit.model, vit.inputs, 0.5, PruningOptions(probe="pool", align=1), batch=4)
    scores = {layer.name: torch.arange(float(layer.units)) for layer in prunable_layers(vit.model)}
    with pytest.raises(ConfigError, match=r"pruning\.probe = 'pool': there is no public pool"):
        by_layer(task, scores)


def test_a_memo_keeps_what_was_used_last() -> None:
    memo, made = Memo(2), []
    for key in ("a", "b", "a", "c", "a", "b"):
        assert memo.once(key, lambda key=key: (made.append(key), key.upper())[1]) == key.upper()
    assert made == ["a", "b", "c", "b"]
    with pytest.raises(ZeroDivisionError):
        memo.once("d", lambda: 1 // 0)
    assert memo.once("d", lambda: 4) == 4


def test_smaller_models_made_side_by_side_are_the_same_and_come_in_order(place: Place) -> None:
    shared, devices = Shared(place.config, place.pool, place.model), range(7)
    alone = list(side_by_side(shared, lambda shared, i: place.plan(i, shared), devices, at_once=1))
    assert list(side_by_side(shared, lambda shared, i: place.plan(i, shared), devices, at_once=3)) == alone
    assert [plan.provenance["device"] for plan in alone] == [*devices]


def test_an_error_of_one_ends_the_threads_of_all(place: Place) -> None:
    begun: list[int] = []

    def make(_: Shared, i: int) -> int:
        begun.append(i)
        if i == 1:
            raise ConfigError("one")
        for _ in track(range(i and 10_000), "steps"):  # ended at a step, not after all of them
            time.sleep(0.01)
        return i

    each = side_by_side(Shared(place.config, place.pool, place.model), make, range(50), at_once=2)
    assert next(each) == 0
    with pytest.raises(ConfigError, match="one"):
        next(each)
    assert len(begun) < 10
