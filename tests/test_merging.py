"""Token merging: its result, its cost, and models with merging that are saved, sent, exported and trained."""

import copy
from itertools import product

import pytest
import timm
import torch
from backbones import overflowing
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tapfl.adapters.layout import LORA_A, LORA_B, Placement
from tapfl.adapters.lora import AdaptedModel
from tapfl.adapters.stacked_model import StackedModel
from tapfl.config import PruningOptions
from tapfl.errors import BudgetError, ConfigError, ModelError, PlanError
from tapfl.models.backbone import BackboneSpec, build
from tapfl.models.cost import measure_cost
from tapfl.models.merging import (
    Merge,
    Merged,
    MergingBlock,
    Tokens,
    group_means,
    merged_layers,
    merging,
    tokens_seen,
)
from tapfl.models.prunable import prunable_layers
from tapfl.pruning.compensation import cut
from tapfl.pruning.criteria import criterion
from tapfl.pruning.pipeline import prune_model, pruning_task
from tapfl.pruning.plan import PruningPlan
from tapfl.pruning.surgery import load_pruned, rebuild, save_pruned, shrink
from tapfl.pruning.tokens import SHARES, divergence, schedule_of, select
from tapfl.store import pack_tensors

ARGS = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 4, "num_heads": 2}
KINDS = {
    "class token": ("vit_tiny_patch16_224", {}),
    "pooled": ("vit_tiny_patch16_224", {"class_token": False, "global_pool": "avg"}),
    "registers": ("vit_tiny_patch16_224", {"reg_tokens": 2}),
    "distilled": ("deit_tiny_distilled_patch16_224", {}),
    "padded": ("vit_tiny_patch16_224", {"img_size": 26, "dynamic_img_size": True, "dynamic_img_pad": True}),
}


def spec_of(kind: str, **args: object) -> BackboneSpec:
    name, own = KINDS[kind]
    return BackboneSpec(name=name, args=ARGS | own | args, num_classes=5)


@pytest.fixture(scope="module", params=KINDS)
def model(request: pytest.FixtureRequest) -> nn.Module:
    return build(spec_of(request.param), seed=1).requires_grad_(False)


@pytest.fixture(scope="module")
def vit() -> nn.Module:
    return build(spec_of("class token"), seed=1).requires_grad_(False)


def images(count: int, seed: int = 0) -> Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------- what is computed


def test_without_merges_the_model_has_the_same_bits(model: nn.Module) -> None:
    same = merging(copy.deepcopy(model), (0,) * 4)
    assert not any(isinstance(module, MergingBlock) for module in same.modules())
    assert torch.equal(same(images(3)), model(images(3)))


def test_tokens_that_the_head_does_not_read_are_dropped_and_nothing_changes(vit: nn.Module) -> None:
    dropped = merging(copy.deepcopy(vit), (0, 0, 0, 16))
    assert measure_cost(dropped).macs < measure_cost(vit).macs
    torch.testing.assert_close(dropped(images(3)), vit(images(3)), atol=1e-6, rtol=0)


@settings(max_examples=12, deadline=None)
@given(data=st.data(), kind=st.sampled_from(sorted(KINDS)), seed=st.integers(0, 2**16))
def test_merging_equal_tokens_changes_nothing(data: st.DataObject, kind: str, seed: int) -> None:
    """Every patch exists twice, without positions; merging each pair is exact because attention uses the sizes."""
    model = build(spec_of(kind, pos_embed="none"), seed=seed).requires_grad_(False)
    drawn = torch.randn(2, 3, 8, 8, 8, generator=torch.Generator().manual_seed(seed))
    patches = drawn.repeat_interleave(2, dim=2)  # neighbours, so that one is in A and its twin in B
    x = patches.view(2, 3, 4, 4, 8, 8).permute(0, 1, 2, 4, 3, 5).reshape(2, 3, 32, 32)
    first = data.draw(st.integers(0, 8))
    merges = (first, 0, 0, 0) if data.draw(st.booleans()) else (0, first, 0, 0)
    found = merging(copy.deepcopy(model), merges)(x)
    torch.testing.assert_close(found, model(x), atol=1e-5, rtol=1e-5)


@settings(max_examples=12, deadline=None)
@given(st.permutations(range(4)), st.integers(0, 2**16))
def test_an_image_is_merged_as_if_alone(order: list[int], seed: int) -> None:
    model = merging(build(spec_of("pooled"), seed=3).requires_grad_(False), (3, 2, 2, 1))
    x = images(4, seed)
    torch.testing.assert_close(model(x[order]), model(x)[order], atol=1e-5, rtol=0)


@settings(max_examples=50, deadline=None)
@given(st.integers(2, 12), st.integers(0, 2), st.data())
def test_a_merge_counts_every_token_once(free: int, protected: int, data: st.DataObject) -> None:
    merges = data.draw(st.integers(0, free // 2))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**16)))
    x, keys = torch.randn(2, 3, protected + free, 4, generator=generator).unbind(0)
    after = Merge(merges, protected, drop=False)(Merged.of(x), keys)
    assert after.x.shape[1] == protected + free - merges
    assert torch.equal(after.size.sum(1), torch.full((3,), float(protected + free)))
    assert torch.equal(after.x[:, :protected], x[:, :protected]) and bool((after.size[:, :protected] == 1).all())
    counts = torch.stack([source.bincount(minlength=after.x.shape[1]) for source in after.source])
    assert torch.equal(counts.float(), after.size)
    torch.testing.assert_close(group_means(x, after.source, after.x.shape[1]), after.x, atol=1e-5, rtol=1e-5)


def test_sizes_and_sources_are_tracked_through_two_merges() -> None:
    x = torch.randn(2, 9, 4, generator=torch.Generator().manual_seed(0))
    once = Merge(3, 1, drop=False)(Merged.of(x), x)
    twice = Merge(2, 1, drop=False)(once, once.x)
    assert twice.x.shape[1] == 4 and float(twice.size.sum()) == 18
    torch.testing.assert_close(group_means(x, twice.source, 4), twice.x)


def test_the_most_alike_merge_and_ties_go_to_the_first() -> None:
    e = torch.eye(4)
    keys = torch.stack([e[0], e[1], e[0] + 0.1 * e[1], e[0], e[2], e[3], e[2], e[3]])[None]  # A: 0 2 4 6, B: 1 3 5 7
    x = torch.arange(8.0).view(1, 8, 1)
    after = Merge(1, 0, drop=False)(Merged.of(x), keys)
    assert after.x.flatten().tolist() == [2, 4, 6, 1, 1.5, 5, 7]  # first A, then B; 0 was merged into 3, its twin
    equal = Merge(2, 0, drop=False)(Merged.of(x), torch.ones(1, 8, 3))
    assert equal.x.flatten().tolist() == [4, 6, pytest.approx(1.0), 3, 5, 7]  # 0 and 2 of A were merged into 1 of B
    assert equal.source.tolist() == [[2, 2, 2, 3, 0, 4, 1, 5]]


def test_a_token_of_several_counts_as_often_in_attention(vit: nn.Module) -> None:
    block = MergingBlock(copy.deepcopy(vit.blocks[0]), Merge(0, 1, drop=False), last=False, traced=True)
    x = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0))
    twice = torch.cat([x, x[:, 4:]], dim=1)
    size = torch.tensor([1.0, 1, 1, 1, 2]).expand(2, 5)
    found = block(Merged(x, size, torch.zeros(2, 6, dtype=torch.int64)))
    torch.testing.assert_close(found.x, vit.blocks[0](twice)[:, :5], atol=1e-5, rtol=1e-5)


def test_a_pruned_branch_called_separately_has_no_effect(vit: nn.Module) -> None:
    model = merging(copy.deepcopy(vit), (4, 3, 0, 0))
    want, layer, attention = model(images(2)), prunable_layers(vit)[0], model.blocks[0].attn
    cut_one = layer.shrink(attention, torch.cat([torch.arange(4), torch.arange(16, 20)]))
    assert cut_one.k_norm is attention.k_norm

    def beside(_attention: nn.Module, args: tuple[Tensor, ...], _output: Tensor) -> None:
        cut_one(*args)

    attention.register_forward_hook(beside)
    cut_one(torch.zeros(3, 7, 32))
    assert torch.equal(model(images(2)), want)


# ---------------------------------------------------------------- schedules and costs


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 300), st.integers(0, 5), st.integers(1, 30), st.booleans(), st.floats(0.01, 1))
def test_a_schedule_keeps_the_share_and_halves_at_most(
    free: int, protected: int, blocks: int, class_only: bool, share: float
) -> None:
    stream = Tokens(free, protected, blocks, class_only and protected > 0)
    schedule = schedule_of(stream, share)
    kept = stream.without_drop(schedule)
    assert len(schedule) == blocks and sum(schedule) <= free
    left, lefts = free, []
    for merges in kept:
        assert 0 <= merges <= left // 2
        lefts.append(left := left - merges)
    assert sum(lefts) + blocks * protected >= share * blocks * (free + protected) - 1e-6
    assert stream.drops(schedule) == stream.class_only


@pytest.mark.parametrize("schedule", [(2, 2, 2, 2), (0, 3, 1, 0), (8, 4, 2, 1)])
def test_macs_are_those_of_the_tokens_that_are_left(model: nn.Module, schedule: tuple[int, ...]) -> None:
    layers, stream = prunable_layers(model), Tokens.of(model)
    small, left = measure_cost(merging(copy.deepcopy(model), schedule)), merged_layers(layers, schedule, stream)
    rest = measure_cost(model).macs - sum(layer.macs(layer.full) for layer in layers)
    sums, tokens = 0, stream.free
    for merges in schedule:
        sums += tokens // 2 * merges * 32
        tokens -= merges
    assert small.macs == rest + sums + sum(layer.macs(layer.full) for layer in left)
    assert small.params == measure_cost(model).params
    assert tokens_seen(layers, schedule)[-1] == stream.free + stream.protected - sum(schedule)


# ---------------------------------------------------------------- pruning


def task_of(model: nn.Module, budget: str = "macs<=0.5", **options: object):
    given = {"criterion": "magnitude", "compensation": "sequential", "align": 1, "tokens": "merge", "token_share": 0.7}
    return pruning_task(model, images(64), budget, PruningOptions(**{**given, **options}), batch=16)


COMPENSATED = {
    ("class token", "none", "even"),
    ("class token", "one-pass", "sensitivity"),
    ("class token", "sequential", "even"),
    ("class token", "reconstruction", "sensitivity"),
    ("pooled", "reconstruction", "even"),
    ("registers", "sequential", "sensitivity"),
    ("distilled", "one-pass", "even"),
}


@pytest.mark.parametrize(
    ("kind", "compensation", "rows"),
    [
        pytest.param(*case, marks=[] if case in COMPENSATED else pytest.mark.slow)
        for case in product(KINDS, ["none", "one-pass", "sequential", "reconstruction"], ["even", "sensitivity"])
    ],
)
def test_budget_and_compensation_know_the_tokens(kind: str, compensation: str, rows: str) -> None:
    model = build(spec_of(kind), seed=1).requires_grad_(False)
    task = task_of(model, compensation=compensation, compensation_rows=rows, compensation_steps=10)
    selection = select(task)
    small = cut(task, selection)
    assert 0.49 <= measure_cost(small).macs / task.dense.macs <= 0.5
    assert small(images(2)).isfinite().all()
    widths = sum(len(kept) for kept in selection.kept.values())
    alone = select(task_of(model, tokens="none"))
    assert selection.tokens and widths > sum(len(kept) for kept in alone.kept.values())


def test_compensation_brings_the_merged_model_closer(vit: nn.Module) -> None:
    x, off = images(64, 9), {}
    for how in ("none", "sequential"):
        task = task_of(vit, compensation=how)
        off[how] = float((cut(task, select(task))(x) - vit(x)).detach().square().mean())
    assert off["sequential"] < 0.7 * off["none"]


def test_auto_takes_the_schedule_with_the_least_loss_on_the_metric_set(vit: nn.Module) -> None:
    how = {"budget": "block-macs<=0.6", "ratio": "uniform"}
    chosen, again = (select(task_of(vit, **how, tokens="auto")) for _ in range(2))
    assert chosen.tokens in [schedule_of(Tokens.of(vit), share) for share in SHARES]
    assert again.tokens == chosen.tokens and all(torch.equal(again.kept[n], chosen.kept[n]) for n in chosen.kept)
    judge = divergence(task_of(vit))
    others = [select(task_of(vit, **how, token_share=share)) for share in SHARES]
    assert judge(chosen) == min(judge(other) for other in others)


def test_auto_is_refused_where_it_cannot_judge(vit: nn.Module) -> None:
    how = {"criterion": "random", "ratio": "uniform", "compensation": "none", "tokens": "auto"}
    with pytest.raises(ModelError, match=r"pruning\.tokens = 'auto': takes a metric set of at least two images"):
        select(pruning_task(vit, images(1), 0.5, PruningOptions(**how), batch=1))
    with pytest.raises(ModelError, match=r"tokens: .* is not finite; its weights are too large"):
        select(task_of(overflowing(vit), **how))


def test_auto_measures_layer_importance_once(vit: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    measure = criterion.layer_importance
    monkeypatch.setattr(criterion, "layer_importance", lambda *args: calls.append(1) or measure(*args))
    chosen = select(task_of(vit, "block-macs<=0.6", ratio="adaptive", tokens="auto"))
    assert len(calls) == 1 and len(chosen.importance) == 8


def test_merging_alone_may_meet_a_budget(vit: nn.Module) -> None:
    selection = select(task_of(vit, "block-macs<=0.9", token_share=0.5))
    assert all(len(selection.kept[layer.name]) == layer.units for layer in prunable_layers(vit))


def test_a_budget_that_cannot_be_met_is_refused(vit: nn.Module) -> None:
    for tokens in ("merge", "auto"):
        with pytest.raises(BudgetError, match="cannot be met"):
            select(task_of(vit, "macs<=0.01", tokens=tokens))


@pytest.mark.parametrize("name", ["swin_tiny_patch4_window7_224", "pit_ti_224"])
@pytest.mark.parametrize("tokens", ["merge", "auto"])
def test_other_families_are_refused_by_name(name: str, tokens: str) -> None:
    model = timm.create_model(name, num_classes=3).eval()
    with pytest.raises(
        ConfigError,
        match=rf"pruning.tokens = '{tokens}': .*only ViT and DeiT can.; accepted here: none",
    ):
        pruning_task(model, torch.zeros(8, 3, 224, 224), 0.5, PruningOptions(tokens=tokens), batch=8)


# ---------------------------------------------------------------- plan, folder, message, export, adapters


@pytest.fixture(scope="module")
def pruned(vit: nn.Module):
    found = prune_model(task_of(vit), spec_of("class token"))
    found.model.requires_grad_(False)
    return found


def test_a_model_is_determined_by_its_plan_and_weights(pruned, tmp_path) -> None:
    assert pruned.plan.tokens and pruned.plan.provenance["tokens"] == "merge"
    save_pruned(pruned.model, pruned.plan, tmp_path / "phone")
    x = images(3)
    for model in (load_pruned(tmp_path / "phone"), rebuild(pruned.plan, pack_tensors(pruned.model.state_dict()))):
        assert torch.equal(model(x), pruned.model(x)) and measure_cost(model) == pruned.plan.cost


def test_a_plan_without_tokens_is_written_as_before(vit: nn.Module) -> None:
    plan = prune_model(task_of(vit, tokens="none"), spec_of("class token")).plan
    assert "tokens" not in plan.content() and PruningPlan.from_json(plan.model_dump_json()) == plan


@pytest.mark.parametrize("tokens", [[1], [9, 0, 0, 0], [0, 0, 9, 0], [0, 0, 0, 15], [0] * 3 + [2**15], [1] * 5])
def test_a_schedule_that_does_not_fit_is_refused(pruned, vit: nn.Module, tokens: list[int]) -> None:
    plan = pruned.plan.model_copy(update={"tokens": tuple(tokens)})
    with pytest.raises(PlanError, match="tokens"):
        shrink(vit, PruningPlan.from_json(plan.model_dump_json()))


@pytest.mark.parametrize("tokens", [[-1, 0, 0, 0], [2**16 + 1], ["a"], [0.5], [0] * (2**16 + 1), 3, None])
def test_a_hostile_schedule_is_refused(pruned, tokens: object) -> None:
    import json

    content = json.dumps(pruned.plan.content() | {"tokens": tokens})
    with pytest.raises(PlanError, match="tokens"):
        PruningPlan.from_json(content)


def test_a_schedule_of_another_family_is_refused() -> None:
    swin = timm.create_model("swin_tiny_patch4_window7_224", num_classes=3).eval()
    with pytest.raises(Exception, match="only ViT and DeiT can"):
        merging(swin, (1,) * 12)


def test_adapters_train_with_merging(pruned) -> None:
    names = [f"blocks.{i}.{part}" for i in range(4) for part in ("attn.qkv", "mlp.fc2")]
    shapes = {name: pruned.model.get_submodule(name).weight.shape for name in names}
    generator, params = torch.Generator().manual_seed(0), {}
    for name, (rows, columns) in shapes.items():
        params[f"{name}.{LORA_A}"] = torch.randn(2, columns, generator=generator).requires_grad_()
        params[f"{name}.{LORA_B}"] = torch.zeros(rows, 2).requires_grad_()
    layout = {name: Placement(tuple(map(torch.arange, theta.shape))) for name, theta in params.items()}
    adapted = AdaptedModel(pruned.model, layout, 2.0)
    torch.testing.assert_close(adapted(params, images(2)), pruned.model(images(2)), atol=1e-6, rtol=0)
    adapted(params, images(2)).square().sum().backward()
    assert all(params[f"{name}.{LORA_B}"].grad.abs().sum() > 0 for name in names)
    with pytest.raises(
        ModelError, match=r"train.together: blocks.. is not a plain block of ViT or DeiT, or merges tokens"
    ):
        StackedModel([adapted, adapted])
