"""The warm start: distillation on the server, aggregated by the rule of the rounds, never worse than no adapters."""

from __future__ import annotations

import itertools
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from backbones import Tiny, plan_of, random_kept
from personal_problems import same_bits
from torch import Tensor

from tapfl.adapters import rules
from tapfl.adapters.layout import LORA_A, LORA_B, Layout, device_layout, global_shapes, last_blocks
from tapfl.adapters.lora import AdaptedModel
from tapfl.adapters.warm_start import Lesson, Pupil, Teacher, WarmStart, warm_start
from tapfl.config import AdapterOptions
from tapfl.errors import ConfigError, ModelError
from tapfl.pruning.surgery import shrink
from tapfl.training import Params

RANK, POOL = 4, torch.randn(48, 1, 8, 8, generator=torch.Generator().manual_seed(3))


def options(rule: str = "flex", **others: Any) -> AdapterOptions:
    given = {"start": "metric-sets", "start_rounds": 2, "start_steps": 8, "start_learning_rate": 0.01} | others
    return AdapterOptions.model_validate({"rule": rule} | {key.replace("_", "-"): each for key, each in given.items()})


def inputs(positions: np.ndarray) -> Tensor:
    return POOL[torch.from_numpy(positions)]


def initial(vit: Tiny, given: AdapterOptions) -> Params:
    shapes = global_shapes(vit.model, vit.layers, RANK)
    return rules.initial(given, shapes, vit.layers, vit.model, torch.Generator().manual_seed(0))


def pupil(vit: Tiny, device: int, share: float, rank: int) -> Pupil:
    """Returns a device with a share of the units; 1: all of them."""
    plan = plan_of(vit, {} if share == 1 else random_kept(vit.layers, share, device))
    layout = device_layout(global_shapes(vit.model, vit.layers, RANK), vit.layers, plan, rank)
    classes = torch.arange(10) % 2 == device
    return Pupil(device, partial(shrink, vit.model, plan), layout, 10.0 + device, classes, np.arange(8 * device, 40))


def warmed(vit: Tiny, given: AdapterOptions, seed: int = 0) -> WarmStart:
    pupils = [pupil(vit, 0, 0.7, 4), pupil(vit, 1, 0.5, 2)]
    return warm_start(given, initial(vit, given), pupils, inputs, vit.model, seed)


HEADS = ("class-rows", "personal")
RULES = [*zip(rules.RULES, itertools.cycle(HEADS), strict=False), ("flex", "mean")]
OTHERS = [pair for pair in itertools.product(rules.RULES, HEADS) if pair not in RULES]


@pytest.mark.parametrize(("rule", "head"), [*RULES, *(pytest.param(*pair, marks=pytest.mark.slow) for pair in OTHERS)])
def test_every_rule_learns_from_the_dense_model_and_repeats_to_the_bit(rule: str, head: str, vit: Tiny) -> None:
    given = options(rule, head=head)
    made, again, start = warmed(vit, given), warmed(vit, given), initial(vit, given)
    assert same_bits(made.params, again.params) and made.losses == again.losses
    assert list(made.params) == list(start) and made.losses[1] < made.losses[0]
    changed = {name for name in start if not torch.equal(start[name], made.params[name])}
    full = pupil(vit, 0, 1, RANK).layout
    travels = set(rules.down(given, full)) & set().union(*(rules.trained(given, full, t) for t in (1, 2)))
    # if one factor is 0 and frozen, or was not trained, the other may have no gradient
    assert changed and changed <= travels
    assert any("head" in name for name in changed) == (head != "personal")


def test_another_seed_is_another_start(vit: Tiny) -> None:
    assert not same_bits(warmed(vit, options()).params, warmed(vit, options(), seed=1).params)


@pytest.mark.parametrize("rate", [0.003, 1.0])
def test_a_warm_start_is_never_worse_on_held_out_images_than_no_adapters(rate: float, vit: Tiny) -> None:
    """With a rate that is far too high the adapters are those without effect."""
    given = options(start_learning_rate=rate)
    made, start = warmed(vit, given), initial(vit, given)
    assert same_bits(made.params, start) == (rate == 1)
    pupils = [pupil(vit, 0, 0.7, 4), pupil(vit, 1, 0.5, 2)]
    lessons = [Lesson(given, start, each, 0) for each in pupils]
    teacher = Teacher(vit.model, inputs, np.arange(48))
    losses = [[lesson.loss(w, teacher) for lesson in lessons] for w in (start, made.params)]
    before, after = (float(np.average(each, weights=[10, 11])) for each in losses)
    assert after == pytest.approx(min(made.losses), rel=1e-5) and before == pytest.approx(made.losses[0], rel=1e-5)
    assert after <= before
    for lesson in lessons:
        trained_on = {int(i) for t in (1, 2) for batch in lesson.order(t) for i in batch}
        assert not trained_on & set(lesson.held_out.tolist()) and len(lesson.held_out) >= 8


def test_a_diverging_warm_start_says_what_to_lower(vit: Tiny) -> None:
    with pytest.raises(ModelError, match=r"adapters\.start-learning-rate = 1e\+30: the warm start diverged at step"):
        warmed(vit, options(start_learning_rate=1e30))


@pytest.mark.parametrize("rule", rules.RULES)
def test_a_device_of_full_width_and_rank_gets_back_what_it_learnt(rule: str, vit: Tiny) -> None:
    given = options(rule, head="mean", start_rounds=1)
    start, whole = initial(vit, given), pupil(vit, 0, 1, RANK)
    small = pupil(vit, 0, 0.5, RANK)
    # a pruned model has something to learn; its layout has all its rows, and no device has the others
    lesson = Lesson(given, start, small, 0)
    learnt = lesson.update(start, Teacher(vit.model, inputs, np.arange(48)), 1).params
    made = warm_start(given, start, [small], inputs, vit.model, 0).params
    received = {name: rules.gather(made[name], place) for name, place in small.layout.items()}
    assert set(whole.layout) == set(start)
    for name in rules.down(given, small.layout):
        if name.endswith(LORA_A) and rule == "flex":
            b = name.removesuffix(LORA_A) + LORA_B
            assert torch.allclose(received[b] @ received[name], learnt[b] @ learnt[name], atol=1e-5)
        elif rule != "flex" or "lora" not in name:
            assert torch.allclose(received[name], learnt[name], rtol=1e-6, atol=1e-8)


# -- adapters in the last blocks --------------------------------------------------------------------------------------


def test_only_the_last_blocks_have_adapters(vit: Tiny, swin: Tiny) -> None:
    assert last_blocks(vit.layers, 0) == vit.layers == last_blocks(vit.layers, 2)
    assert [layer.name for layer in last_blocks(vit.layers, 1)] == ["blocks.1.attn", "blocks.1.mlp"]
    assert {layer.name.rpartition(".")[0] for layer in last_blocks(swin.layers, 3)} == {
        *("layers.0.blocks.1", "layers.1.blocks.0", "layers.1.blocks.1"),
    }
    with pytest.raises(ConfigError, match=r"adapters\.blocks = 3: the backbone has 2; accepted: at most that, or 0"):
        last_blocks(vit.layers, 3)


def test_blocks_without_adapters_build_no_graph(vit: Tiny) -> None:
    layers = last_blocks(vit.layers, 1)
    shapes = global_shapes(vit.model, layers, RANK)
    layout: Layout = device_layout(shapes, layers, plan_of(vit, random_kept(vit.layers, 0.5)), RANK)
    assert {name.split(".")[1] for name in layout if name.startswith("blocks")} == {"1"}
    adapted = AdaptedModel(shrink(vit.model, plan_of(vit, random_kept(vit.layers, 0.5))), layout, 2.0)
    params = rules.initial(options(), shapes, layers, vit.model, torch.Generator().manual_seed(0))
    own = {name: rules.gather(params[name], place).requires_grad_() for name, place in layout.items()}
    graphs: list[bool] = []
    for block in adapted.model.blocks:  # type: ignore[union-attr]
        block.register_forward_hook(lambda module, given, out: graphs.append(out.requires_grad))  # type: ignore[operator]
    assert adapted(own, vit.inputs).requires_grad
    assert graphs == [False, True]
