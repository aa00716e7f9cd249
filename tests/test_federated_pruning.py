"""Criteria and options that change weights, in a federation: devices get exactly the models that the server made."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from representatives import some_slow
from safetensors.torch import load_file
from test_inprocess_run import tapfl
from torch import Tensor, nn

from strategies import round_zero
from strategies.round_zero import device_model, task_images
from tapfl import load_plan, load_pruned
from tapfl.errors import PlanError
from tapfl.models.dense import DenseCache
from tapfl.models.forward import transform_of
from tapfl.pruning.criteria import upop
from tapfl.pruning.pipeline import Pruned
from tapfl.pruning.recovery import FineTuneSet
from tapfl.pruning.surgery import rebuild, shrink
from tapfl.store import pack_tensors

CHANGED = {
    "one-pass": ["pruning.compensation=one-pass"],
    "low-rank heads, sequential": ["pruning.criterion=lowrank-heads", "pruning.compensation=sequential"],
    "merged tokens, sequential": ["pruning.tokens=merge", "pruning.token-share=0.7", "pruning.compensation=sequential"],
    "upop": ["pruning.criterion=upop"],
    "fine-tune": ["pruning.recovery=fine-tune", "pruning.recovery-steps=3"],
}
SHORT = ["devices.count=2", "data.public-share=0.9", "train.rounds=1", "train.steps=1", "personalize.method=fedavg"]


@dataclass
class Run:
    """A finished federation: its folder, the dense backbone, and the models that the server made, by device."""

    folder: Path
    dense: nn.Module
    made: dict[int, Pruned]
    given: dict[int, tuple[Any, ...]]

    @property
    def records(self) -> list[dict[str, Any]]:
        devices: list[dict[str, Any]] = json.loads((self.folder / "summary.json").read_text())["devices"]
        return devices

    def kept(self, device: int) -> dict[str, Tensor]:
        """Returns the model in the device's storage."""
        return load_file(self.folder / "devices" / f"{device:02d}" / "pruned" / "model.safetensors")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The cache of one backbone, which these tests inspect."""
    return tmp_path_factory.mktemp("cache")


Alter = Callable[[int, Pruned], Pruned]


def carry_out(
    folder: Path, cache: Path, options: list[str], patch: pytest.MonkeyPatch, alter: Alter = lambda _, pruned: pruned
) -> Run:
    made: dict[int, Pruned] = {}
    given: dict[int, tuple[Any, ...]] = {}

    def spy(*arguments: Any) -> Pruned:
        i = arguments[3]
        given[i], made[i] = arguments, device_model(*arguments)
        return alter(i, made[i])

    patch.setattr(round_zero, "device_model", spy)
    patch.setattr(upop, "STEPS", 4)
    done = tapfl("--out", str(folder), cache=cache, options=[*SHORT, *options])
    assert done.exit_code == 0, done.output
    (key,) = {file.stem for file in (cache / "backbones").iterdir()}
    return Run(folder, DenseCache(cache).load(key, made[0].plan.backbone), made, given)


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def plain(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    with pytest.MonkeyPatch.context() as patch:
        return carry_out(tmp_path_factory.mktemp("runs") / "plain", cache, [], patch)


def test_weights_are_not_sent_if_none_changed(plain: Run) -> None:
    for i, pruned in plain.made.items():
        assert pruned.exact and pruned.weights() == b""
        down = plain.records[i]["bytes_down"]
        assert set(down) == {"hello", "backbone", "plan", "adapters"}
        assert down["plan"] == len(pruned.plan.model_dump_json()) + 16  # the backbone's key
        assert same(plain.kept(i), shrink(plain.dense, pruned.plan).state_dict())


def test_requested_weights_are_sent_and_equal_the_backbones(
    plain: Run, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = carry_out(tmp_path / "run", cache, ["pruning.send=weights"], monkeypatch)
    for i, pruned in run.made.items():
        assert pruned.exact and run.records[i]["bytes_down"]["weights"] == len(pruned.weights(always=True))
        assert same(run.kept(i), plain.kept(i))


@pytest.mark.parametrize("case", some_slow(CHANGED, {"upop", "one-pass"}))
def test_devices_store_exactly_the_models_that_the_server_made(
    case: str, plain: Run, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = carry_out(tmp_path / "run", cache, CHANGED[case], monkeypatch)
    assert set(run.made) == {0, 1}
    for i, pruned in run.made.items():
        record, folder = run.records[i], run.folder / "devices" / f"{i:02d}" / "pruned"
        assert same(run.kept(i), pruned.model.state_dict())
        assert not same(run.kept(i), shrink(run.dense, pruned.plan).state_dict())
        assert load_plan(folder)[0] == pruned.plan
        assert record["bytes_down"]["weights"] == len(pruned.weights()) > 4 * record["params"]
        assert record["failures"] == 0 and 0 < float(record["profile"]["budget"]) - record["macs_share"] < 0.01
        assert record["dense_accuracy"] == plain.records[i]["dense_accuracy"]  # of the original backbone
    assert same(run.dense.state_dict(), plain.dense.state_dict())


def test_with_the_shared_rule_devices_with_equal_budgets_get_one_model(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ["metric.rule=shared", "pruning.compensation=one-pass", "devices.count=3", "devices.budgets=0.5,0.3,0.5"]
    run = carry_out(tmp_path / "run", cache, options, monkeypatch)
    assert set(run.made) == {0, 1}
    plans = [load_plan(run.folder / "devices" / f"{i:02d}" / "pruned")[0] for i in range(3)]
    assert [plan.provenance["device"] for plan in plans] == [0, 1, 2]
    assert plans[0].layers == plans[2].layers != plans[1].layers
    for i, made in enumerate((0, 1, 0)):
        assert same(run.kept(i), run.made[made].model.state_dict())
        assert run.records[i]["components"] > 0  # mixtures are sent, and described in the report


def test_one_basis_serves_all_devices(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If all units stay, a device's attention is the server's rotated one, so dims are the same on every device."""
    turned: list[nn.Module] = []
    turn = round_zero.turned_on_pool
    monkeypatch.setattr(round_zero, "turned_on_pool", lambda *given: turned.append(turn(*given)) or turned[-1])
    run = carry_out(tmp_path / "run", cache, ["pruning.basis=canonical"], monkeypatch)
    assert len(turned) == 1
    for i, pruned in run.made.items():
        assert pruned.plan.provenance["basis"] == "canonical"
        assert same(run.kept(i), shrink(turned[0], pruned.plan).state_dict())


def test_recovery_is_on_the_best_public_images_of_the_device(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sets: list[FineTuneSet] = []
    prune_model = round_zero.prune_model

    def spy(task: Any, spec: Any, fine_tune: FineTuneSet, *rest: Any) -> Pruned:
        sets.append(fine_tune)
        return prune_model(task, spec, fine_tune, *rest)

    monkeypatch.setattr(round_zero, "prune_model", spy)
    options = ["recovery=fine-tune", "recovery-steps=1", "recovery-size=100", "labels=public"]
    run = carry_out(tmp_path / "run", cache, [f"pruning.{option}" for option in options], monkeypatch)
    for (shared, _, summary, device, _), fine_tune in zip(run.given.values(), sets, strict=True):
        config, pool, model = shared.config, shared.pool, shared.model
        best = task_images(pool, summary, config.metric, config.seed, device, size=100)
        assert fine_tune.size == 100 == len(set(best))
        assert fine_tune.labels is not None and fine_tune.labels.tolist() == pool.images.labels[best].tolist()
        assert torch.equal(fine_tune.inputs(np.arange(100)), transform_of(model)(pool.images.read(best)))
        assert best[:64].tolist() == task_images(pool, summary, config.metric, config.seed, device).tolist()
    assert sets[0].labels is not None and sets[0].labels.tolist() != sets[1].labels.tolist()


def test_a_device_refuses_weights_that_do_not_fit_its_plan(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second device gets its plan with the first device's weights; it stores nothing, and the other one continues.

    It is offered its model again when the next round begins.
    """
    first: dict[int, Pruned] = {}

    def swap(i: int, pruned: Pruned) -> Pruned:
        first.setdefault(0, pruned)
        return replace(pruned, model=first[0].model) if i == 1 else pruned

    run = carry_out(tmp_path / "run", cache, ["pruning.compensation=one-pass"], monkeypatch, swap)
    lines = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    failures = [line for line in lines if line["kind"] == "failure"]
    assert len(failures) == 2
    for failure in failures:
        assert failure["device"] == 1 and failure["phase"] == "surgery"
        assert "weights for vit_tiny_patch16_224: do not fit their plan (blocks.0" in failure["reason"]
        assert "\n" not in failure["reason"]
    assert not (run.folder / "devices" / "01" / "pruned").exists()
    assert [line["devices"] for line in lines if line["kind"] == "round"] == [1, 1]


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda state: pack_tensors(state)[:-1], "is not a complete safetensors file"),
        (lambda state: b"\x00", "is not a complete safetensors file"),
        (lambda state: pack_tensors(dict(list(state.items())[1:])), "expected"),
        (lambda state: pack_tensors(state | {"more": torch.zeros(1)}), r"\(more: expected none, found \[1\]\)"),
        (lambda state: pack_tensors({k: v * torch.nan for k, v in state.items()}), "are not finite"),
        (
            lambda state: pack_tensors({k: v.int() for k, v in state.items()}),
            "expected torch.float32, found torch.int32",
        ),
    ],
    ids=["cut short", "not safetensors", "one missing", "one too many", "not finite", "integers"],
)
def test_damaged_weights_end_with_one_line(plain: Run, damage: Callable[..., bytes], said: str) -> None:
    pruned = plain.made[0]
    with pytest.raises(PlanError, match=said) as refused:
        rebuild(pruned.plan, damage(pruned.model.state_dict()))
    assert "\n" not in str(refused.value)


def test_plan_and_weights_give_the_same_model(plain: Run) -> None:
    pruned = plain.made[1]
    again = rebuild(pruned.plan, pack_tensors(pruned.model.state_dict()))
    loaded = load_pruned(plain.folder / "devices" / "01" / "pruned")
    x = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(again(x), pruned.model(x)) and torch.equal(loaded(x), again(x))
    assert not again.training and not any(parameter.requires_grad for parameter in again.parameters())
