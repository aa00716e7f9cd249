"""Recovery: training after surgery changes only weights, and whole branches fade out first."""

from __future__ import annotations

import copy
import itertools
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from backbones import Tiny, plan_of, random_kept
from torch import Tensor, nn

from tapfl.config import PruningOptions
from tapfl.errors import ModelError
from tapfl.models.forward import example_input
from tapfl.progress import shown_on
from tapfl.pruning import recovery
from tapfl.pruning.criteria.criterion import Selection
from tapfl.pruning.criteria.updp import updp
from tapfl.pruning.pipeline import pruning_task
from tapfl.pruning.recovery import FadingBranch, FineTuneSet, recovered, recovery_loss, strength, teacher_logits
from tapfl.pruning.surgery import load_pruned, save_pruned, shrink
from tapfl.training import apart, predict

FAMILIES = ["vit", "deit", "swin"]
NOBODY = torch.empty(0, dtype=torch.int64)
PLAIN = {"criterion": "magnitude", "recovery": "fine-tune", "recovery_batch": 8, "recovery_learning_rate": 1e-2}
STILL = 1e-12  # a learning rate at which no weight changes


class Task:
    """A pruned backbone without two whole branches, and 24 images that the dense model has labelled."""

    def __init__(self, backbone: Tiny) -> None:
        self.backbone = backbone
        self.gone = (backbone.layers[0].name, backbone.layers[-1].name)  # an attention and an FFN
        self.kept = random_kept(backbone.layers, 0.5) | dict.fromkeys(self.gone, NOBODY)
        self.dense, self.plan = backbone.model, plan_of(backbone, self.kept)
        self.small = shrink(backbone.model, self.plan)
        shape = example_input(backbone.model, 24).shape
        self.images = torch.randn(shape, generator=torch.Generator().manual_seed(5))
        self.labels = predict(backbone.model, self.images).argmax(1)
        self.fine_tune: FineTuneSet | None = None

    def recovered(
        self, steps: int, seed: int = 0, model: nn.Module | None = None, fades: bool = False, **values: object
    ) -> nn.Module:
        options = PruningOptions.model_validate(PLAIN | {"recovery_steps": steps} | values)
        task = pruning_task(self.dense, self.images, 1.0, options, 24, self.labels)
        selection = Selection(self.kept, fades=fades)
        return recovered(task, selection, self.small if model is None else model, self.fine_tune, seed)

    def loss(self, model: nn.Module, **values: object) -> float:
        teacher = predict(self.dense, self.images) if values.get("recovery") == "distill" else None
        return float(recovery_loss(predict(model, self.images), self.labels, teacher))


@pytest.fixture(scope="module")
def tasks(small_families: dict[str, Tiny]) -> dict[str, Task]:
    return {family: Task(backbone) for family, backbone in small_families.items()}


def bits(model: nn.Module) -> dict[str, bytes]:
    return {name: tensor.numpy().tobytes() for name, tensor in model.state_dict().items()}


# ---------------------------------------------------------------- training


@pytest.mark.parametrize("rate", [1e-3, 0.3])
@pytest.mark.parametrize("recovery", ["fine-tune", "distill"])
def test_the_loss_on_images_held_out_never_rises(recovery: str, rate: float, tasks: dict[str, Task]) -> None:
    task, values = tasks["vit"], {"recovery": recovery, "recovery_held_out": 0.25, "recovery_learning_rate": rate}
    model = task.recovered(25, fades=True, **values)
    _, held = apart(len(task.labels), 0.25, "")
    images, labels = task.images[held], task.labels[held]
    targets = predict(task.dense, images) if recovery == "distill" else None
    before, after = (float(recovery_loss(predict(each, images), labels, targets)) for each in (task.small, model))
    assert after <= before and (after == before) == (bits(model) == bits(task.small))
    assert after < before or rate > 0.1
    if rate < 0.1:
        assert bits(model) == bits(task.recovered(25, fades=True, **values))


def test_images_held_out_are_not_trained_on(tasks: dict[str, Task], monkeypatch: pytest.MonkeyPatch) -> None:
    task, seen = tasks["vit"], []
    monkeypatch.setattr(recovery, "minimise", lambda params, loss, order, *rest: seen.extend(order))
    task.recovered(6, recovery_held_out=0.25)
    assert sorted({*np.concatenate(seen)}) == apart(len(task.labels), 0.25, "")[0].tolist()


@pytest.mark.parametrize("recovery", ["fine-tune", "distill"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_pruned_model_improves_on_its_fine_tune_set(family: str, recovery: str, tasks: dict[str, Task]) -> None:
    task = tasks[family]
    model = task.recovered(16, recovery=recovery)
    assert task.loss(model, recovery=recovery) < 0.7 * task.loss(task.small, recovery=recovery)
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("recovery", ["fine-tune", "distill"])
def test_the_arguments_are_not_changed(recovery: str, tasks: dict[str, Task]) -> None:
    task = tasks["swin"]
    before = bits(task.small), bits(task.dense)
    task.recovered(4, recovery=recovery, fades=True)
    assert (bits(task.small), bits(task.dense)) == before


def test_the_same_seed_gives_the_same_bits(tasks: dict[str, Task]) -> None:
    task = tasks["vit"]
    torch.manual_seed(1)
    first = bits(task.recovered(5, recovery="distill"))
    torch.manual_seed(2)
    assert bits(task.recovered(5, recovery="distill")) == first
    assert bits(task.recovered(5, recovery="distill", seed=1)) != first


@pytest.mark.parametrize(("recovery", "steps"), [("fine-tune", 0), ("distill", 0), ("none", 9)])
def test_without_steps_the_model_is_not_changed(recovery: str, steps: int, tasks: dict[str, Task]) -> None:
    task = tasks["vit"]
    before = bits(task.small)
    assert task.recovered(steps, recovery=recovery, fades=True) is task.small and bits(task.small) == before


@pytest.mark.parametrize("searched", [0, 3])
def test_fewer_steps_use_the_same_first_batches(searched: int, tasks: dict[str, Task]) -> None:
    """The steps that a criterion's search has used are deducted at the end, so that all criteria start equally."""
    task, seen = tasks["vit"], []

    def inputs(chosen: np.ndarray) -> Tensor:
        seen.append(chosen.tolist())
        return task.images[torch.from_numpy(chosen)]

    options = PruningOptions.model_validate(PLAIN | {"recovery_steps": 7})
    problem = pruning_task(task.dense, task.images, 1.0, options, 24)
    for steps in (0, searched):
        recovered(problem, Selection(task.kept, steps=steps), task.small, FineTuneSet(inputs, 24, task.labels))
    assert len(seen) == 14 - searched and seen[7:] == seen[: 7 - searched]
    assert sorted(itertools.chain(*seen[:3])) == list(range(24))  # a pass sees every image once
    assert seen[:3] != seen[3:6]


def test_progress_is_reported_and_no_dropout_is_active(tasks: dict[str, Task]) -> None:
    task, told = tasks["vit"], []
    lively = copy.deepcopy(task.small).train()
    for module in lively.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.5
    with shown_on(lambda name: nullcontext(lambda *done: told.append((name, *done)))):
        model = task.recovered(3, model=lively)
    assert told == [("recovery", done, 3) for done in range(4)]
    assert bits(model) == bits(task.recovered(3))
    assert lively.training


def test_a_recovered_model_can_be_saved(tasks: dict[str, Task], tmp_path: Path) -> None:
    task = tasks["deit"]
    model = task.recovered(2, fades=True)
    save_pruned(model, task.plan, tmp_path)
    assert torch.equal(load_pruned(tmp_path)(task.images), model(task.images))


@pytest.mark.parametrize("recovery", ["fine-tune", "distill"])
@pytest.mark.parametrize(("steps", "sign"), [(9, "its loss is nan"), (1, "its weights reach 1e")])
def test_diverging_recovery_says_what_to_lower(recovery: str, steps: int, sign: str, tasks: dict[str, Task]) -> None:
    said = rf"pruning\.recovery-learning-rate = 1e\+30: recovery diverged at step \d of {steps} \({sign}"
    with pytest.raises(ModelError, match=said):
        tasks["vit"].recovered(steps, recovery=recovery, recovery_learning_rate=1e30)


# ---------------------------------------------------------------- the loss


def test_the_loss_and_its_gradient_match_the_formula(monkeypatch: pytest.MonkeyPatch) -> None:
    """z = (0, 0), t = (2 ln 3, 0), T = 2: the teacher predicts (3/4, 1/4), and the label is 1."""
    z = torch.zeros(1, 2, requires_grad=True)
    teacher = torch.tensor([[2 * np.log(3), 0.0]], dtype=torch.float32)
    monkeypatch.setattr(recovery, "TEMPERATURE", 2.0)
    monkeypatch.setattr(recovery, "SOFT_SHARE", 0.75)
    loss = recovery_loss(z, torch.tensor([1]), teacher)
    loss.backward()
    assert loss.item() == pytest.approx(0.75 * 4 * 0.130812 + 0.25 * 0.693147, abs=1e-5)
    # T (softmax(z/T) - softmax(t/T)) = (-1/2, 1/2), softmax(z) - y = (1/2, -1/2)
    assert z.grad is not None
    assert z.grad.tolist()[0] == pytest.approx([-0.25, 0.25], abs=1e-6)


def test_the_loss_is_the_mean_over_images() -> None:
    z = torch.tensor([[0.0, 0.0], [1.0, 3.0]])
    teacher, labels = torch.tensor([[1.0, 2.0], [0.0, -1.0]]), torch.tensor([1, 0])
    for own in (teacher, None):
        parts = [
            recovery_loss(z[i : i + 1], labels[i : i + 1], None if own is None else own[i : i + 1]) for i in range(2)
        ]
        assert recovery_loss(z, labels, own).item() == pytest.approx(float(sum(parts)) / 2)
    assert recovery_loss(z, labels).item() == pytest.approx((0.693147 + 2.126928) / 2, abs=1e-5)


def test_the_teacher_sees_each_needed_image_once() -> None:
    seen: list[int] = []

    def inputs(chosen: np.ndarray) -> Tensor:
        seen.extend(chosen.tolist())
        return torch.from_numpy(chosen).float()[:, None]

    order = [np.array([5, 1]), np.array([3, 0]), np.array([1, 3])]
    logits = teacher_logits(nn.Linear(1, 2), inputs, 6, order)
    assert sorted(seen) == [0, 1, 3, 5]
    assert logits.shape == (6, 2)
    assert torch.isfinite(logits).all(1).tolist() == [True, True, False, True, False, True]


@pytest.mark.parametrize("how", ["fine-tune", "distill"])
def test_the_teacher_labels_an_image_in_the_pass_that_gives_its_soft_targets(how: str, tasks: dict[str, Task]) -> None:
    task, seen = copy.copy(tasks["vit"]), list[int]()
    known = bits(task.recovered(2, recovery=how))  # with labels that were predicted before
    task.fine_tune = FineTuneSet(lambda chosen: task.images[torch.from_numpy(chosen)], 24, None)
    handle = task.dense.register_forward_hook(lambda _module, images, _output: seen.append(len(images[0])))
    try:
        assert bits(task.recovered(2, recovery=how)) == known
    finally:
        handle.remove()
    assert [size for size in seen if size > 1] == [8, 8]  # the images of the two steps, and one to measure the cost


def test_each_image_has_its_own_soft_targets(tasks: dict[str, Task], monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that equals its teacher learns nothing from soft targets, in any order."""
    task = tasks["vit"]
    monkeypatch.setattr(recovery, "SOFT_SHARE", 1.0)
    model = task.recovered(6, model=task.dense, recovery="distill", recovery_learning_rate=1e-5)
    assert (predict(model, task.images) - predict(task.dense, task.images)).abs().max() < 0.05


# ---------------------------------------------------------------- steps and fading


def test_the_fading_is_linear_over_the_first_30_percent() -> None:
    assert [strength(step, 10) for step in range(5)] == pytest.approx([1, 2 / 3, 1 / 3, 0, 0])
    assert [strength(step, 100) for step in (0, 15, 30, 99)] == pytest.approx([1, 0.5, 0, 0])
    assert strength(0, 1) == 1


def test_a_branch_fades_to_its_constant(vit: Tiny) -> None:
    layer = vit.layers[0]
    f = vit.model.get_submodule(layer.name)
    x = torch.randn(2, layer.tokens, layer.embed_dim)
    fader = FadingBranch(f, layer.shrink(f, NOBODY))
    torch.testing.assert_close(fader(x), f(x))
    fader.strength = 0.25
    torch.testing.assert_close(fader(x), f.proj.bias + 0.25 * (f(x) - f.proj.bias))


def logits_on_the_way(task: Task, steps: int) -> tuple[list[Tensor], Tensor]:
    """Returns the logits of all images at every step of a recovery in which no weight changes, and of its result."""
    whole = {layer.name: torch.arange(layer.units) for layer in task.backbone.layers}
    way = copy.copy(task)
    way.kept = whole | dict.fromkeys(task.gone, NOBODY)
    way.fine_tune = FineTuneSet(lambda _chosen: task.images, 24, task.labels)
    small = shrink(task.dense, plan_of(task.backbone, way.kept))
    seen: list[Tensor] = []
    small.register_forward_hook(lambda _module, _inputs, output: seen.append(output.detach()))
    end = way.recovered(steps, model=small, fades=True, recovery_learning_rate=STILL, recovery_batch=24)
    return seen, end(task.images)


@pytest.mark.parametrize("family", FAMILIES)
def test_fading_goes_from_the_dense_to_the_shrunk_model(family: str, tasks: dict[str, Task]) -> None:
    task = tasks[family]
    seen, end = logits_on_the_way(task, steps=10)
    dense = task.dense(task.images)
    torch.testing.assert_close(seen[0], dense, rtol=1e-4, atol=1e-4)
    far = [float((logits - end).abs().mean()) for logits in seen[:10]]
    assert far[0] > far[1] > far[2] > 1e-2
    assert max(far[3:]) < 1e-4  # the dense branch has vanished after 30 % of the steps


@pytest.mark.parametrize("family", FAMILIES)
def test_fading_ends_in_the_structure_of_the_shrunk_model(family: str, tasks: dict[str, Task]) -> None:
    task = tasks[family]
    for steps in (1, 2, 7):
        model = task.recovered(steps, fades=True)
        assert {name: type(m) for name, m in model.named_modules()} == {
            name: type(m) for name, m in task.small.named_modules()
        }
        assert {k: v.shape for k, v in model.state_dict().items()} == {
            k: v.shape for k, v in task.small.state_dict().items()
        }
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert bits(model) != bits(task.recovered(7))  # fading makes a difference


def test_only_whole_branches_of_a_criterion_that_asks_for_it_fade(
    tasks: dict[str, Task], monkeypatch: pytest.MonkeyPatch
) -> None:
    task, faded = tasks["vit"], []
    monkeypatch.setattr(recovery, "_fade", lambda small, faders, strength: faded.append(set(faders)))
    for fades in (True, False):
        task.recovered(1, fades=fades)
    assert faded == [set(task.gone)] * 2 + [set()] * 2
    assert updp(pruning_task(task.dense, task.images, 0.8, batch=4)).fades
