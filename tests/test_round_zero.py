"""Round zero: sharing computations between devices changes no plan, and layers can be probed on the pool."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from backbones import Tiny
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from experiments.bench.round_zero import synthetic_mixture
from strategies import round_zero
from strategies.round_zero import PublicPool, Shared, describe_pool, device_model, probed, side_by_side
from tapfl.config import PruningOptions, RunConfig
from tapfl.data.sources import load_images
from tapfl.errors import ConfigError
from tapfl.memo import Memo
from tapfl.models.backbone import BackboneSpec, build, spec_of
from tapfl.models.prunable import prunable_layers
from tapfl.models.units import PrunableLayer, Shape
from tapfl.progress import track
from tapfl.pruning import pool as pool_module
from tapfl.pruning.criteria.criterion import OverImages, PruningTask, by_layer
from tapfl.pruning.criteria.registry import BUILT_IN, criterion_of
from tapfl.pruning.layer_importance import layer_importance
from tapfl.pruning.pipeline import pruning_task
from tapfl.pruning.plan import PruningPlan
from tapfl.pruning.pool import PoolTables, mapped
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
            "pruning.ratio": "adaptive",
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


@pytest.mark.parametrize(
    ("probe", "rule"),
    [
        ("own", "density-ratio"),
        pytest.param("own", "top-likelihood", marks=pytest.mark.slow),
        pytest.param("own", "random", marks=pytest.mark.slow),
        ("pool", "density-ratio"),
    ],
)
def test_shared_plans_are_unshared_plans_bit_by_bit(place: Place, probe: str, rule: str) -> None:
    there = with_options(place, pruning__probe=probe, metric__rule=rule)
    shared = Shared(there.config, there.pool, there.model)
    together = {device: there.plan(device, shared) for device in (4, 0, 3, 1)}
    assert all(plan == there.plan(device, None) for device, plan in together.items())
    assert together[0].layers != together[3].layers  # same budget, another task


@pytest.mark.parametrize(("probe", "criterion"), [("own", "random"), ("own", "taylor"), ("pool", "wanda")])
def test_other_criteria_share_as_well(place: Place, probe: str, criterion: str) -> None:
    there = with_options(place, pruning__criterion=criterion, pruning__probe=probe)
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
    measure = pool_module.divergences
    monkeypatch.setattr(pool_module, "divergences", lambda *given: (pieces.append(1), measure(*given))[1])
    shared = Shared(there.config, there.pool, there.model)
    passed = []
    for device in range(6):
        there.plan(device, shared)
        passed.append(len(pieces))
    each = passed[0]
    assert len(BUDGETS) == 3 and each > 0
    assert passed == [each, 2 * each, 3 * each, 3 * each, 3 * each, 3 * each]


@dataclass(frozen=True)
class Pool:
    """Twelve images, and the pruning task of those at some positions."""

    backbone: Tiny
    task: PruningTask
    images: Tensor
    tables: PoolTables
    seen: list[int]

    def of(self, chosen: Sequence[int]) -> PruningTask:
        return replace(self.task, inputs=self.images[list(chosen)])


def pool_of(backbone: Tiny, folder: Path, criterion: str = "tap") -> Pool:
    options = PruningOptions(criterion=criterion, align=1)
    images = torch.cat([backbone.inputs, backbone.inputs.flip(-1), backbone.inputs.roll(1, -1)])
    task, seen = pruning_task(backbone.model, backbone.inputs, 0.5, options, batch=4), list[int]()

    def at(positions: np.ndarray) -> tuple[Tensor, None]:
        seen.extend(positions.tolist())
        return images[torch.from_numpy(positions)], None

    return Pool(backbone, task, images, PoolTables(task, at, len(images), folder), seen)


def halves(layers: Sequence[PrunableLayer]) -> dict[str, Shape]:
    return {layer.name: Shape(layer.heads, layer.units_per_head // 2) for layer in layers}


def criteria_over_images() -> list[str]:
    return [name for name in BUILT_IN if isinstance(criterion_of(name).scores, OverImages)]


def test_which_criteria_are_sums_over_images() -> None:
    names = {"taylor", "taylor-global", "isomorphic", "fisher", "fisher-global", "wanda", "lowrank-heads"}
    assert set(criteria_over_images()) == names


@pytest.mark.parametrize("name", criteria_over_images())
def test_scores_of_a_metric_set_are_those_of_the_sums_over_its_images(name: str, vit: Tiny, tmp_path: Path) -> None:
    """For any part of the pool in any order the scores equal separate scoring to 1e-6 of the largest score."""
    pool, scores = pool_of(vit, tmp_path, name), criterion_of(name).scores
    assert isinstance(scores, OverImages)

    @settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(st.lists(st.integers(0, 11), min_size=4, max_size=12, unique=True))
    def check(chosen: list[int]) -> None:
        own, known = pool.of(chosen), partial(pool.tables.sums, np.array(chosen))
        shared = scores(replace(own, sums=known))
        for layer, values in scores(own).items():
            torch.testing.assert_close(shared[layer], values, rtol=0, atol=1e-6 * float(values.abs().max()))

    check()
    assert pool.seen == [*range(12)]  # once


def test_a_table_is_an_unnamed_file_and_a_full_disk_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = mapped(tmp_path / "new", 3, 2)
    assert table.shape == (3, 2) and not table.any() and not list((tmp_path / "new").iterdir())

    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match="No space"):
        mapped(tmp_path, 3, 2)


def test_the_pool_gives_the_layer_importance_of_its_samples(vit: Tiny, tmp_path: Path) -> None:
    """With the same masks, the mean over a part of the pool equals the importance measured on that part."""
    pool, chosen, shapes = pool_of(vit, tmp_path), np.array([7, 2, 8]), halves(vit.layers)
    tables = pool.tables
    kept = {layer.name: keep_best(layer, tables.ranking[layer.name], shapes[layer.name]) for layer in vit.layers}
    expected = layer_importance(vit.model, vit.layers, kept, pool.of(chosen).inputs, batch=4)
    assert tables.importance(chosen, shapes) == pytest.approx(expected, rel=1e-4)
    assert tables.divergences(shapes).shape == (len(vit.layers), 12)
    parts = [neuron_importance(vit.model, vit.layers, part, batch=4) for part in pool.images.split(4)]
    for layer in vit.layers:
        torch.testing.assert_close(tables.ranking[layer.name], sum(part[layer.name] for part in parts))


def test_where_masks_do_not_depend_on_images_the_pool_gives_the_exact_importance(vit: Tiny, tmp_path: Path) -> None:
    """Attentions of `lowrank-heads` are ranked by their energy in the canonical basis."""
    pool, chosen = pool_of(vit, tmp_path, "lowrank-heads"), np.array([7, 2, 8, 0])
    task = replace(pool.of(chosen), layers=tuple(n for n in vit.layers if n.kind == "attention"))
    shapes = halves(task.layers)
    own = criterion_of("lowrank-heads").scores(pool.of(chosen))
    kept = {layer.name: keep_best(layer, own[layer.name], shapes[layer.name]) for layer in task.layers}
    expected = layer_importance(task.model, task.layers, kept, task.inputs, batch=4)
    found = pool.tables.importance(chosen, halves(vit.layers))
    assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-4)


def test_a_task_uses_pool_tables_only_with_probe_pool(place: Place) -> None:
    shared = [
        Shared(with_options(place, pruning__probe=way).config, place.pool, place.model) for way in ("own", "pool")
    ]
    own, pool = (each.task(np.arange(48), 0.5) for each in shared)
    assert own.sums is own.probe is None and pool.sums is not None and pool.probe is not None


def test_auto_probes_the_pool_if_the_metric_sets_have_more_images(place: Place) -> None:
    """With 200 images in the pool and 48 per device: from 5 devices on with one budget, or 13 with three."""
    there = with_options(place, pruning__probe="auto")

    def decided(budgets: Sequence[float | str]) -> str:
        return probed(there.config, budgets, place.pool).pruning.probe

    assert [decided([0.5] * count) for count in (1, 4, 5)] == ["own", "own", "pool"]
    assert [decided([0.3, 0.5, 0.7] * count) for count in (4, 5)] == ["own", "pool"]
    assert probed(place.config, [0.5] * 99, place.pool) is place.config


def test_probing_on_a_pool_needs_one(vit: Tiny) -> None:
    task = pruning_task(vit.model, vit.inputs, 0.5, PruningOptions(ratio="adaptive", probe="pool", align=1), batch=4)
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


@pytest.mark.parametrize(
    ("probe", "criterion"), [pytest.param("own", "tap", marks=pytest.mark.slow), ("pool", "lowrank-heads")]
)
def test_smaller_models_made_side_by_side_are_the_same_and_come_in_order(
    place: Place, probe: str, criterion: str
) -> None:
    place = with_options(place, pruning__probe=probe, pruning__criterion=criterion)
    shared, devices = Shared(place.config, place.pool, place.model), range(7)
    alone = list(side_by_side(shared, lambda shared, i: place.plan(i, shared), devices, at_once=1))
    shared = Shared(place.config, place.pool, place.model)
    assert list(side_by_side(shared, lambda shared, i: place.plan(i, shared), devices, at_once=3)) == alone
    assert [plan.provenance["device"] for plan in alone] == [*devices]


def test_an_error_in_one_thread_ends_all_threads(place: Place) -> None:
    begun: list[int] = []

    def make(_: Shared, i: int) -> int:
        begun.append(i)
        if i == 1:
            raise ConfigError("one")
        for _ in track(range(i and 10_000), "steps"):  # ended at a step, not after all steps
            time.sleep(0.01)
        return i

    each = side_by_side(Shared(place.config, place.pool, place.model), make, range(50), at_once=2)
    assert next(each) == 0
    with pytest.raises(ConfigError, match="one"):
        next(each)
    assert len(begun) < 10
