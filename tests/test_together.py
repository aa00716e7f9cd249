"""Devices that step together: the same results as one by one, for any widths, ranks, steps and numbers of images."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from backbones import Tiny, plan_of
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

from strategies.fleet import groups_of
from tapfl.adapters.layout import device_layout, gather_all, global_shapes
from tapfl.adapters.lora import AdaptedModel
from tapfl.adapters.stack import flat
from tapfl.adapters.stacked_model import StackedModel
from tapfl.compute import within_memory
from tapfl.config import TrainOptions
from tapfl.errors import DataError, ModelError, RunError
from tapfl.personalize.apfl import Apfl
from tapfl.personalize.method import LocalResult, Method, Personal, Trainee, wholly
from tapfl.personalize.methods import FedAvg, FineTune, Local
from tapfl.personalize.perfedavg import PerFedAvg
from tapfl.personalize.proximal import Ditto, FedProx
from tapfl.personalize.together import Batch, LocalTask, Training, all_of, carried_out, stacked, together
from tapfl.pruning.surgery import shrink

METHODS: dict[str, Method] = {
    "fedavg": FedAvg(),
    "local": Local(2e-3),
    "finetune": FineTune(2e-3),
    "fedprox": FedProx(0.5, 2.0),
    "ditto": Ditto(0.5, 2.0),
    "apfl": Apfl(0.4, "fixed"),
    "apfl, α moves": Apfl(0.4, "step", 0.5),
}
RANK = 4


def drawn(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator)


def task(
    backbone: Tiny,
    method: Method,
    train: TrainOptions,
    *,
    seed: int,
    kept: dict[str, Tensor],
    rank: int = 2,
    sizes: tuple[int, ...] = (4, 3),
    begun: bool = True,
    informed: bool = False,
) -> LocalTask:
    """Returns a device's round with random adapters, and one batch for each of `sizes`."""
    generator = torch.Generator().manual_seed(seed)
    plan = plan_of(backbone, kept)
    shapes = global_shapes(backbone.model, backbone.layers, RANK)
    layout = device_layout(shapes, backbone.layers, plan, rank)
    w, v = (gather_all({name: 0.1 * drawn(generator, *s) for name, s in shapes.items()}, layout) for _ in range(2))
    images = [drawn(generator, size, *backbone.inputs.shape[1:]) for size in sizes]
    batches = [(x, torch.randint(10, (len(x),), generator=generator)) for x in images]
    own = Personal(v, torch.tensor(0.2 + 0.1 * seed, dtype=torch.float64)) if isinstance(method, Apfl) else wholly(v)
    options = train.model_copy(update={"steps": len(sizes)})
    model = AdaptedModel(shrink(backbone.model, plan), layout, 2.0)
    prior = drawn(generator, 10) if informed else None
    return LocalTask(method, model, w, own if begun else None, batches, options, frozenset(layout), seed, prior)


def kept_of(data: st.DataObject, backbone: Tiny) -> dict[str, Tensor]:
    kept: dict[str, Tensor] = {}
    for layer in backbone.layers:
        heads = data.draw(st.sets(st.integers(0, layer.heads - 1)), label=f"heads of {layer.name}")
        dims = data.draw(st.integers(1, layer.units_per_head))
        units = [torch.arange(dims) + head * layer.units_per_head for head in sorted(heads)]
        kept[layer.name] = torch.cat(units) if units else torch.zeros(0, dtype=torch.int64)
    return kept


def assert_near(got: object, want: LocalResult) -> None:
    assert isinstance(got, LocalResult)
    assert got.loss == pytest.approx(want.loss, rel=1e-5)
    for mine, theirs in (
        (got.upload, want.upload),
        (got.personal and got.personal.params, want.personal and want.personal.params),
    ):
        assert (mine is None) == (theirs is None)
        if mine is not None and theirs is not None:
            assert {n: t.shape for n, t in mine.items()} == {n: t.shape for n, t in theirs.items()}
            a, b = flat(mine), flat(theirs)
            assert float((a - b).norm()) <= 1e-6 * float(b.norm()) + 1e-7
    if got.personal and want.personal:
        torch.testing.assert_close(got.personal.alpha, want.personal.alpha, rtol=1e-5, atol=1e-7)


@settings(max_examples=12, phases=[Phase.generate], deadline=None)
@given(data=st.data())
def test_together_equals_one_by_one(data: st.DataObject, families: dict[str, Tiny]) -> None:
    backbone = families[data.draw(st.sampled_from(["vit", "deit"]))]
    method = METHODS[data.draw(st.sampled_from(sorted(METHODS)))]
    clip = data.draw(st.sampled_from([0.0, 0.05]))
    train = TrainOptions(optimizer="sgd", momentum=0.9, learning_rate=3e-2, clip_gradient=clip, label_smoothing=0.1)
    begun, informed = data.draw(st.booleans()), data.draw(st.booleans())

    def tasks() -> list[LocalTask]:
        return [
            task(backbone, method, train, seed=i, kept=k, rank=r, sizes=s, begun=begun, informed=informed)
            for i, (k, r, s) in enumerate(each)
        ]

    count = data.draw(st.integers(2, 3))
    sizes = st.lists(st.integers(1, 4), min_size=1, max_size=3).map(tuple)
    each = [(kept_of(data, backbone), data.draw(st.integers(1, RANK)), data.draw(sizes)) for _ in range(count)]
    for got, alone in zip(together(tasks(), stacked(tasks())), tasks(), strict=True):
        assert_near(got, alone.alone())


def two(backbone: Tiny, method: Method | None = None, train: TrainOptions | None = None) -> list[LocalTask]:
    """Returns the rounds of a narrow device with rank 1 and without one FFN, and of an unpruned device."""
    narrow = {"blocks.0.attn": torch.arange(5), "blocks.1.mlp": torch.zeros(0, dtype=torch.int64)}
    method, train = method or FedAvg(), train or TrainOptions()
    return [
        task(backbone, method, train, seed=0, kept=narrow, rank=1, sizes=(4, 3)),
        task(backbone, method, train, seed=1, kept={}, rank=4, sizes=(2, 3, 4)),
    ]


@pytest.mark.parametrize("optimizer", ["adam", "adamw", "sgd"])
def test_the_padding_has_no_gradient_and_stays_zero(optimizer: str, families: dict[str, Tiny]) -> None:
    tasks = two(families["vit"])
    model = StackedModel([each.model for each in tasks])
    ones = [{name: torch.ones_like(theta) for name, theta in each.received.items()} for each in tasks]
    own = model.stacking.up(ones)
    assert not all(bool(mask.all()) for mask in own.values())  # padding exists
    train = TrainOptions(optimizer=optimizer, weight_decay=0.0 if optimizer == "adam" else 0.1)
    trainee = Trainee.of(model.stacking.up([each.received for each in tasks]), train, frozenset(own))
    for step in range(2):
        logits = model(trainee.params, torch.cat([drawn(torch.Generator().manual_seed(step), 8, 1, 8, 8)]))
        gradients = trainee.gradients(logits.square().sum())
        for (name, mask), gradient in zip(own.items(), gradients, strict=True):
            assert not gradient[mask == 0].any(), name
        assert any(gradient[mask == 1].any() for mask, gradient in zip(own.values(), gradients, strict=True))
        trainee.apply(gradients)
    for name, theta in trainee.values().items():
        assert not theta[own[name] == 0].any(), name


def test_a_device_that_diverges_leaves_the_others_their_bits(families: dict[str, Tiny]) -> None:
    well = two(families["vit"])
    calm = together(well, StackedModel([each.model for each in well]))
    tasks = two(families["vit"])
    tasks[0].received["head.weight"].fill_(float("nan"))
    wild, other = together(tasks, StackedModel([each.model for each in tasks]))
    assert isinstance(wild, ModelError) and "train.learning-rate" in str(wild)
    assert isinstance(other, LocalResult) and isinstance(calm[1], LocalResult)
    assert torch.equal(flat(other.upload or {}), flat(calm[1].upload or {})) and other.loss == calm[1].loss


@pytest.mark.parametrize("family", ["swin"])
def test_devices_that_cannot_step_together_train_one_by_one(family: str, families: dict[str, Tiny]) -> None:
    with pytest.raises(ModelError, match="accepted: ViT and DeiT"):
        StackedModel([AdaptedModel(families[family].model, {}, 2.0)] * 2)
    said: list[str] = []
    first, second = two(families["vit"], PerFedAvg())
    for got, alone in zip(all_of([first, second], said.append), two(families["vit"], PerFedAvg()), strict=True):
        assert isinstance(got, LocalResult)
        assert torch.equal(flat(got.upload or {}), flat(alone.alone().upload or {}))
    assert said == ["devices 0, 1 are trained one by one: their method cannot train devices together"]


def test_the_reason_for_training_one_by_one_is_logged(families: dict[str, Tiny]) -> None:
    def reason(tasks: list[LocalTask]) -> str:
        with pytest.raises(ModelError) as refused:
            stacked(tasks)
        return str(refused.value)

    one, other = two(families["vit"])
    without = "device 1 has no private model of an earlier round, but others do"
    assert reason([one, replace(other, personal=None)]) == without
    assert "α" in reason([replace(each, personal=Personal(each.received, torch.zeros(2))) for each in (one, other)])
    assert "arrive at different blocks" in reason([one, replace(other, model=other.model.beyond)])
    with torch.no_grad():
        other.model.model.norm.weight.add_(1)
    assert "norm.weight differs between devices" in reason([one, other])
    said: list[str] = []
    assert all(isinstance(each, LocalResult) for each in all_of([one, other], said.append))
    assert len(said) == 1 and said[0].startswith("devices 0, 1 are trained one by one: train.together: norm.weight")


def test_an_error_fails_only_its_device(families: dict[str, Tiny]) -> None:
    def work(each: LocalTask) -> Training[float]:
        return (yield each).loss

    tasks = two(families["vit"])
    tasks[0].received["head.weight"].fill_(float("nan"))
    wild, loss = carried_out([work(each) for each in tasks])
    assert isinstance(wild, ModelError) and isinstance(loss, float)


@pytest.mark.parametrize("readable", [0, 1])
def test_an_image_that_cannot_be_read_fails_only_its_device(readable: int, families: dict[str, Tiny]) -> None:
    def damaged(each: LocalTask) -> LocalTask:
        def batches() -> Iterator[Batch]:
            yield from list(each.batches)[:readable]
            raise DataError("an image cannot be read")

        return replace(each, batches=batches())

    calm = all_of(two(families["vit"]))
    first, second = two(families["vit"])
    failed, other = all_of([damaged(first), second])
    assert isinstance(failed, DataError) and isinstance(calm[1], LocalResult)
    assert_near(other, calm[1])
    assert [type(each) for each in all_of([damaged(each) for each in two(families["vit"])])] == [DataError, DataError]


MACS = {0: 50, 1: 10, 2: 49, 3: 11, 4: 400, 5: 12}


def test_groups_depend_only_on_the_sizes_of_devices() -> None:
    assert groups_of(MACS, TrainOptions(together=1)) == []
    assert groups_of(MACS, TrainOptions(together=2)) == [[0, 4], [2, 5], [1, 3]]
    assert groups_of(MACS, TrainOptions(together=4)) == [[0, 2, 4, 5], [1, 3]]
    assert groups_of(MACS, TrainOptions(together="auto")) == [[0, 2], [1, 3, 5]]
    assert groups_of(dict(reversed(MACS.items())), TrainOptions(together=2)) == [[0, 4], [2, 5], [1, 3]]
    of_one_size = groups_of(dict.fromkeys(range(13), 50), TrainOptions(together="auto"))
    assert [len(group) for group in of_one_size] == [7, 6]  # equal parts of at most ten
    assert groups_of(dict.fromkeys(range(4), 10**9), TrainOptions(together="auto")) == []


@pytest.mark.parametrize("times", [1, 2])
def test_a_full_memory_is_freed_once_and_then_fails_the_device(times: int) -> None:
    full = [torch.OutOfMemoryError("CUDA out of memory.\nMore")] * times

    def call() -> int:
        if full:
            raise full.pop()
        return 7

    if times == 1:
        assert within_memory(call, "device 3: train") == 7
    else:
        with pytest.raises(RunError, match=r"device 3: train: the memory is full .CUDA out of memory.* train.batch"):
            within_memory(call, "device 3: train")
