"""Everything that can run on an accelerator does, tested with a pretended accelerator that counts the waits."""

from __future__ import annotations

import ast
import copy
import json
import re
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from backbones import DEIT, SWIN, VIT, Tiny, kept_units, plan_of, random_kept, tiny
from pages import ROOT
from pretended import THERE, There, accelerator
from representatives import some_slow
from test_inprocess_run import TINY, tapfl
from test_lora import with_noise
from test_personalize import METHODS
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from experiments.bench.local_training import METHODS as METHODS_MEASURED
from experiments.bench.local_training import Device
from experiments.bench.scores import Sized
from tapfl.adapters.layout import device_layout, gather_all, global_shapes
from tapfl.adapters.lora import AdaptedModel
from tapfl.adapters.rules import initial
from tapfl.adapters.stacked_model import StackedModel
from tapfl.compute import HERE, OF_CPU, OF_GPU, AtOnce, Compute, home
from tapfl.config import AdapterOptions, PruningOptions, TrainOptions
from tapfl.data.augmentation import augmented
from tapfl.models.backbone import BackboneSpec
from tapfl.personalize.apfl import Apfl
from tapfl.personalize.fedala import FedAla
from tapfl.personalize.method import LocalResult, Method, Personal, local_round
from tapfl.personalize.methods import FedAvg
from tapfl.personalize.proximal import Ditto
from tapfl.pruning.criteria import registry, upop
from tapfl.pruning.criteria.criterion import Selection
from tapfl.pruning.criteria.tap import elimination_order
from tapfl.pruning.layer_importance import layer_importance
from tapfl.pruning.pipeline import Pruned, prune_model, pruning_task
from tapfl.pruning.pool import PoolTables
from tapfl.pruning.scores import neuron_importance, terms
from tapfl.pruning.surgery import shrink
from tapfl.pruning.tokens import select
from tapfl.seeds import numpy_generator
from tapfl.training import train_dense

PIT: dict[str, Any] = {"img_size": 32, "base_dims": (8, 8), "depth": (1, 1), "heads": (2, 4)}
NARROW = VIT.model_copy(update={"args": VIT.args | {"mlp_ratio": 2}})
OTHERS: dict[str, tuple[BackboneSpec, dict[str, Any]]] = {
    "distilled": (DEIT, {"criterion": "tap", "compensation": "one-pass", "recovery": "distill"}),
    "reconstructed": (
        DEIT,
        {
            "criterion": "lowrank-heads",
            "compensation": "reconstruction",
            "compensation_steps": 5,
            "recovery": "distill",
            "recovery_held_out": 0.5,
        },
    ),
    "windows that overhang": (
        SWIN.model_copy(update={"args": SWIN.args | {"img_size": 12, "depths": (2, 1), "mlp_ratio": 2}}),
        {"criterion": "tap+"},
    ),
    "pit": (BackboneSpec(name="pit_ti_224", args=PIT, num_classes=10), {"criterion": "tap+"}),
    "no biases": (
        NARROW.model_copy(update={"args": NARROW.args | {"qkv_bias": False, "proj_bias": False}}),
        {"criterion": "tap+"},
    ),
}
SEARCHES_BY_KL = {"updp"}  # the amount of its work depends on its results


def pruned(backbone: Tiny, where: Compute, **options: Any) -> Pruned:
    model, inputs = where.put(backbone.model), where.put(backbone.inputs)
    settings = PruningOptions(align=1, recovery_steps=2, **options)
    return prune_model(pruning_task(model, inputs, 0.6, settings, batch=2), backbone.spec)


def check_equal(there: Pruned, here: Pruned, inputs: Tensor) -> None:
    """Call inside `accelerator`. Weights may differ, because Adam makes a full step of a gradient of mere rounding."""
    assert kept_units(there.plan).keys() == kept_units(here.plan).keys()
    assert all(torch.equal(kept, kept_units(here.plan)[name]) for name, kept in kept_units(there.plan).items())
    for one, other in zip(there.plan.layers, here.plan.layers, strict=True):
        assert (one.importance is None) == (other.importance is None)
        assert (one.importance or 0.0) == pytest.approx(other.importance or 0.0, rel=1e-3, abs=1e-7)
    assert all(isinstance(tensor, There) for tensor in there.model.state_dict().values())
    torch.testing.assert_close(home(there.model(THERE.put(inputs))), here.model(inputs), rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def narrow() -> Tiny:
    return tiny(NARROW)


# one for each code path; what the others compute is a part of it
CRITERIA = {"tap+", "fisher", "wanda", "lowrank-heads", "savit", "updp", "upop"}


@pytest.mark.parametrize("name", some_slow(sorted(registry.BUILT_IN), registry.BUILT_IN.keys() - CRITERIA))
def test_a_criterion_has_the_same_result_on_the_accelerator(
    name: str, vit: Tiny, narrow: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The number of waits does not depend on the number of units."""
    monkeypatch.setattr(upop, "STEPS", 4)
    here, waits = pruned(narrow, HERE, criterion=name), []
    for backbone in (narrow, vit):
        with accelerator() as counts:
            there = pruned(backbone, THERE, criterion=name)
            waits.append(counts.waits)
            if backbone is narrow:
                check_equal(there, here, narrow.inputs)
    assert waits[0] == waits[1] or name in SEARCHES_BY_KL


SLOW = {"pit", "no biases"}  # "windows that overhang" is hierarchical as well, and has the same criterion


@pytest.mark.parametrize("family", some_slow(OTHERS, SLOW))
def test_other_backbones_have_the_same_result_on_the_accelerator(family: str) -> None:
    spec, options = OTHERS[family]
    backbone = tiny(spec)
    here = pruned(backbone, HERE, **options)
    with accelerator():
        check_equal(pruned(backbone, THERE, **options), here, backbone.inputs)


def test_a_pool_has_the_same_result_on_the_accelerator(vit: Tiny, tmp_path: Path) -> None:
    def chosen_by_tables(where: Compute) -> Selection:
        images, chosen, options = where.put(vit.inputs), np.array([2, 0, 3]), PruningOptions(align=1, criterion="wanda")
        task = pruning_task(where.put(vit.model), images, 0.6, options, batch=2)
        tables = PoolTables(task, lambda positions: (images[torch.from_numpy(positions)], None), 4, tmp_path)
        return select(replace(task, probe=partial(tables.importance, chosen), sums=partial(tables.sums, chosen)))

    here = chosen_by_tables(HERE)
    with accelerator():
        there = chosen_by_tables(THERE)
    assert all(torch.equal(there.kept[name], kept) for name, kept in here.kept.items())
    assert there.importance == pytest.approx(here.importance, rel=1e-3, abs=1e-7)


def test_scores_wait_once_a_batch_and_an_elimination_a_few_times_a_branch(vit: Tiny) -> None:
    inputs, waits = torch.cat([vit.inputs, vit.inputs]), []
    with accelerator() as counts:
        model, images = THERE.put(vit.model), THERE.put(inputs)
        for count in (4, 8):
            before = counts.waits
            neuron_importance(model, vit.layers, images[:count], 2)
            waits.append(counts.waits - before)
        assert waits == [2, 4]
        before, W = counts.waits, torch.randn(6, 40, dtype=torch.float64)
        elimination_order(THERE.put(W), THERE.put(W.T @ W), THERE.put(W @ W.T))
        assert counts.waits - before <= 8


# -- local training ---------------------------------------------------------------------------------------------------

ROUND = TrainOptions(learning_rate=1e-2, epochs=2, steps=2)
EVERY_METHOD = METHODS | {
    "apfl, α a layer": Apfl(0.5, "step", per="layer"),
    "apfl, α held out": Apfl(0.5, "fixed"),
    "fedala": FedAla(1e-3),  # with larger steps W would be very sensitive to rounding
    "fedala of factors": FedAla(1e-3, products=False),
}


class Place:
    """A device's pruned model, images and adapters, on the CPU or the accelerator."""

    def __init__(self, backbone: Tiny, where: Compute) -> None:
        plan = plan_of(backbone, random_kept(backbone.layers, 0.5))
        shapes = global_shapes(backbone.model, backbone.layers, 4)
        layout = device_layout(shapes, backbone.layers, plan, 3)
        whole = initial(AdapterOptions(), shapes, backbone.layers, backbone.model, torch.Generator().manual_seed(0))
        start = gather_all(whole, layout)
        self.adapted = AdaptedModel(where.put(shrink(backbone.model, plan)), layout, 2.0)
        self.w, v = where.put(with_noise(start, 1)), where.put(with_noise(start, 2))
        self.personal = Personal(v, where.put(torch.tensor(0.3, dtype=torch.float64)))
        self.trained = frozenset(layout)
        self.batch = where.put(backbone.inputs), where.put(torch.tensor([3, 1, 4, 1]))

    def losses(self, params: Any, reduction: str = "none") -> Tensor:
        loss = partial(F.cross_entropy, target=self.batch[1], reduction=reduction)
        return self.adapted.losses(params, self.batch[0], loss)

    def objective(self, params: Any, batch: object) -> Tensor:
        return self.losses(params, "mean")

    def round(self, method: Method[Any]) -> LocalResult:
        weighed = method.weigh(self.w, self.personal, [self.losses])
        return local_round(method, self.objective, self.w, weighed, range(ROUND.steps), ROUND, self.trained)


ROUNDS = {"apfl", "apfl, α held out", "ditto", "fedala", "fedrep", "perfedavg", "pfedme"}


@pytest.mark.parametrize("name", some_slow(EVERY_METHOD, EVERY_METHOD.keys() - ROUNDS))
def test_a_round_has_the_same_result_on_the_accelerator(name: str, vit: Tiny) -> None:
    method, here = EVERY_METHOD[name], Place(vit, HERE)
    want = here.round(method)
    with accelerator():
        place = Place(vit, THERE)
        got = place.round(method)
        used = home(method.inference(place.w, got.personal))
    assert got.loss == pytest.approx(want.loss, rel=1e-4)
    pairs = [(home(got.upload or {}), want.upload or {}), (used, method.inference(here.w, want.personal))]
    if want.personal:
        pairs += [(home(got.personal.params), want.personal.params)]
        pairs += [({"α": home(got.personal.alpha)}, {"α": want.personal.alpha})]
    for there, other in pairs:
        assert there.keys() == other.keys()
        for key in other:
            torch.testing.assert_close(there[key], other[key], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("method", [FedAvg(), Ditto(0.1, 2.0), Apfl(0.5, "step"), Apfl(0.5, "step", per="layer")])
def test_no_step_waits_for_the_device_and_a_round_does_once(method: Method[Any], vit: Tiny) -> None:
    with accelerator() as counts:
        place = Place(vit, THERE)
        state = method.init(place.w, place.personal, ROUND, place.trained)
        before = counts.waits, counts.to_host
        for _ in range(2):
            method.step(state, place.objective, None)
        assert (counts.waits, counts.to_host) == before, counts.by_operation
        local_round(method, place.objective, place.w, place.personal, range(ROUND.steps), ROUND, place.trained)
        assert counts.waits - before[0] <= 1 and counts.to_host - before[1] <= 1, counts.by_operation


def test_a_backbone_is_trained_to_the_same_on_the_accelerator(vit: Tiny) -> None:
    labels, trained = torch.tensor([3, 1, 4, 1]), []
    settings: dict[str, Any] = {"epochs": 2, "batch": 2, "learning_rate": 1e-3}
    with accelerator():
        for where in (HERE, THERE):
            model, order = where.put(copy.deepcopy(vit.model)), numpy_generator(0, "dense")
            images = where.put(vit.inputs)
            train_dense(model, lambda index, x=images: x[index], where.put(labels), generator=order, **settings)
            trained.append(home(model(images)))
    torch.testing.assert_close(trained[1], trained[0], rtol=1e-3, atol=1e-3)


def test_a_stack_is_checked_where_its_models_are() -> None:
    """Also the activations, which may have weights."""
    backbone = tiny(VIT.model_copy(update={"args": VIT.args | {"act_layer": "prelu"}}))
    with accelerator():
        StackedModel([AdaptedModel(THERE.put(backbone.model), {}, 2.0)] * 2)


def test_augmentation_is_the_same_on_the_accelerator(vit: Tiny) -> None:
    with accelerator():
        for where in (HERE, THERE):
            images = where.put(vit.inputs)
            mirrored = home(augmented(images, "flip", np.random.default_rng(3)))
            assert torch.equal(mirrored, augmented(vit.inputs, "flip", np.random.default_rng(3)))


# -- sizes that suit the kind of device -------------------------------------------------------------------------------


def test_the_chunk_sizes_of_cpu_and_gpu_give_the_same(vit: Tiny) -> None:
    kept = random_kept(vit.layers, 0.5)
    found = [
        (
            neuron_importance(vit.model, vit.layers, vit.inputs, 4, compute=Sized(at_once=at_once)),
            layer_importance(vit.model, vit.layers, kept, vit.inputs, 4, Sized(at_once=at_once)),
        )
        for at_once in (OF_CPU, OF_GPU, AtOnce(channels=7, strip=3, stream=1))
    ]
    for scores, divergences in found[1:]:
        assert divergences == pytest.approx(found[0][1], rel=1e-5, abs=1e-7)
        for name, values in scores.items():
            torch.testing.assert_close(values, found[0][0][name], rtol=1e-5, atol=1e-5)


NO_WORK = {
    "aten::_unsafe_view",
    "profiler::_record_function_enter_new",
    "profiler::_record_function_exit._RecordFunction",
}


class Kernels(TorchDispatchMode):
    """Counts the operations that are work for a device: all except views."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not func.is_view and func.name() not in NO_WORK
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("heads", [0, 6])
def test_scores_of_a_layer_take_few_kernels_on_a_gpu(heads: int) -> None:
    """A layer of DeiT-S, 64 images with fewer tokens than at 224 px, which does not change the counts."""
    X, P = torch.randn(64, 3, 1536 if heads == 0 else 384), torch.randn(64, 10).softmax(-1)
    with Kernels() as kernels:
        terms(X, P, heads, OF_GPU)
    assert kernels.count <= 120


@pytest.mark.parametrize(("method", "most"), [("fedavg", 600), ("apfl", 700)])
def test_a_step_takes_few_kernels(method: str, most: int) -> None:
    """A backbone with twelve blocks, as DeiT; their width does not change the counts."""
    small = {"img_size": 8, "patch_size": 2, "in_chans": 1, "embed_dim": 32, "depth": 12, "num_heads": 2}
    device = Device.random(VIT.model_copy(update={"args": small}), 4, HERE)
    state = METHODS_MEASURED[method].init(device.start, None, ROUND, frozenset(device.start))
    for _ in range(2):  # the first step creates the optimiser's state
        with Kernels() as kernels:
            METHODS_MEASURED[method].step(state, device.loss, torch.arange(4))
    assert kernels.count <= most


# -- a whole federation -----------------------------------------------------------------------------------------------

FEDERATION = [
    *(
        "adapters.head=personal",
        "adapters.rule=fedit",
        "privacy.dp-clip=1.0",
        "personalize.references=dense+alone",
    ),
    *(
        "model.epochs=1",
        f"model.args={TINY.replace('depth=2', 'depth=1')},mlp_ratio=8",
        "train.steps=2",
        "train.evaluate-every=2",
        "devices.count=2",
        "data.public-share=0.9",
    ),
]


def test_a_resumed_federation_has_the_same_result_on_the_accelerator(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    assert tapfl("--out", str(here), cache=cache, options=FEDERATION).exit_code == 0
    monkeypatch.setattr(Compute, "of", classmethod(lambda cls, options: THERE))
    monkeypatch.setattr(Compute, "marks", ())  # the same backbone
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # the pretended device works in one thread only
    with accelerator():
        done = tapfl("--out", str(there), cache=cache, options=[*FEDERATION, "train.rounds=1"])
        assert done.exit_code == 0, done.output
        done = tapfl("--resume", str(there), cache=cache, options=FEDERATION)
        assert done.exit_code == 0, done.output
    for plan in sorted((here / "plans").glob("*.json")):
        want, got = (json.loads(file.read_text()) for file in (plan, there / "plans" / plan.name))
        assert [layer["kept"] for layer in got["layers"]] == [layer["kept"] for layer in want["layers"]]
    want, got = (json.loads((folder / "summary.json").read_text())["devices"] for folder in (here, there))
    measures = ("dense_accuracy", "pruned_accuracy", "global_accuracy", "personal_accuracy")
    for one, other in zip(want, got, strict=True):
        np.testing.assert_allclose([other[name] for name in measures], [one[name] for name in measures], atol=0.02)


# -- the source -------------------------------------------------------------------------------------------------------

MAKES = "arange|as_tensor|empty|eye|full|linspace|ones|rand|randn|tensor|zeros"
ON_THE_CPU = {
    "torch.arange(0 if layer.name in drop else layer.units)",  # positions of units and images, and rankings of them
    "torch.arange(0)",
    "torch.arange(count)",
    "torch.arange(layer.units)",
    "torch.ones(layer.units)",
    "torch.ones(self.kept, dtype=torch.bool)",
    "torch.tensor(self.kept, dtype=torch.int64)",
    "torch.zeros(layer.units)",
    "torch.ones(len(kept))",  # moved where they are used: positions in plans and placements
    "torch.linspace(0, 1, 11, dtype=torch.float64)",
    "torch.as_tensor(alpha, dtype=torch.float64)",  # one number, which can be mixed with any device
    "torch.as_tensor(share, dtype=torch.float64)",
    "torch.ones((), dtype=torch.float64)",
}
MATHEMATICS = ("tapfl/pruning", "tapfl/personalize", "tapfl/models", "tapfl/summary", "tapfl/adapters/lora.py")


def test_no_tensor_is_made_on_the_default_device_by_accident() -> None:
    found = {call for file in sources(*MATHEMATICS) for call in made_anywhere(file)}
    assert found <= ON_THE_CPU


def test_only_one_file_names_accelerators() -> None:
    naming = [
        str(file.relative_to(ROOT))
        for file in sources("tapfl", "clients", "strategies")
        if re.search(r"\bcuda\b", file.read_text("utf-8"))
    ]
    assert sorted(naming) == ["clients/client_app.py", "tapfl/compute.py", "tapfl/config/federation.py"]


def sources(*rooms: str) -> list[Path]:
    return [file for room in rooms for file in ([ROOT / room] if room.endswith(".py") else (ROOT / room).rglob("*.py"))]


def made_anywhere(file: Path) -> list[str]:
    """Returns the calls that create tensors on torch's default device; random numbers are always drawn on the CPU."""
    calls = [node for node in ast.walk(ast.parse(file.read_text("utf-8"))) if isinstance(node, ast.Call)]
    return [
        ast.unparse(call)
        for call in calls
        if re.fullmatch(rf"torch\.({MAKES})", ast.unparse(call.func))
        and not {"device", "generator"} & {keyword.arg for keyword in call.keywords}
    ]
