"""`personalize.references`: which values are accepted, and what a device needs to train them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from backbones import Tiny, plan_of

from clients.references import References
from clients.storage import DeviceState, DeviceStorage
from experiments.statistics import against_references
from strategies.records import DeviceRecord
from tapfl.compute import Compute
from tapfl.config import RunConfig
from tapfl.errors import ConfigError, RunError
from tapfl.models.dense import DenseCache
from tapfl.profiles import DeviceProfile

KEY = "0123456789abcdef"


def test_each_reference_may_have_a_learning_rate_of_its_own() -> None:
    options = RunConfig.from_flat({"personalize.references": "pooled, alone:0.001 ,dense+alone:3e-4"}).personalize
    assert options.reference_rates == {"pooled": 0.0, "alone": 0.001, "dense+alone": 3e-4}
    assert RunConfig.from_flat(RunConfig(personalize=options).flat()).personalize == options


@pytest.mark.parametrize(
    ("references", "accepted"),
    [
        ("lone", "'lone' cannot be a reference; accepted: alone, dense+alone, pooled"),
        ("alone,alone:0.1", "at most once"),
        ("alone:", "'alone:' cannot"),
        ("alone:fast", "'alone:fast' cannot"),
        ("pooled:0", "'pooled:0' cannot"),
        ("pooled:nan", "'pooled:nan' cannot"),
        ("alone:1e99", "'alone:1e99' cannot"),
    ],
)
def test_an_invalid_reference_is_refused(references: str, accepted: str) -> None:
    with pytest.raises(ConfigError) as refused:
        RunConfig.from_flat({"personalize.references": references})
    assert "personalize.references" in str(refused.value) and accepted in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("options", "accepted"),
    [
        ({"personalize.method": "local", "personalize.references": "alone:0.1"}, "the same model twice"),
        ({"personalize.method": "pooled", "personalize.references": "pooled"}, "the same model twice"),
        (
            {"model.head": "new", "adapters.head": "personal", "personalize.references": "dense+alone,alone,pooled"},
            r"dense\+alone, pooled need one classifier",
        ),
    ],
)
def test_references_that_do_not_fit_the_run_are_refused(options: dict[str, object], accepted: str) -> None:
    with pytest.raises(ConfigError, match=accepted) as refused:
        RunConfig.from_flat(options)
    assert "\n" not in str(refused.value)


def references(names: str, folder: Path) -> References:
    config = RunConfig.from_flat({"personalize.references": names, "cache": str(folder / "cache")})
    return References(config, DeviceStorage(folder / "device"), 4, Compute.of(config.compute))


def test_a_device_refuses_references_that_it_cannot_train(families: dict[str, Tiny], tmp_path: Path) -> None:
    plan = plan_of(families["vit"], {})
    with pytest.raises(ConfigError, match=r"personalize\.references: pooled needs the images of all devices"):
        references("alone,pooled", tmp_path).begin(KEY, plan, simulated=False)
    dense = references("dense+alone", tmp_path)
    with pytest.raises(ConfigError, match=r"references: dense\+alone needs the dense backbone"):
        dense.begin(KEY, plan, simulated=True)
    with pytest.raises(RunError):
        _ = dense.storage.backbone
    DenseCache(tmp_path / "cache").save(KEY, families["vit"].model.state_dict())
    dense.begin(KEY, plan, simulated=True)
    assert dense.storage.backbone[0] == KEY


def test_personal_models_are_tested_against_each_reference() -> None:
    def record(i: int, personal: float, beside: dict[str, float] | None) -> DeviceRecord:
        profile = DeviceProfile(budget=0.5, rank=4)
        return DeviceRecord(
            device=i, profile=profile, train_samples=9, personal_accuracy=personal, reference_accuracies=beside
        )

    found = against_references([record(i, 0.5 + 0.1 * i, {"alone": 0.4, "pooled": 0.9}) for i in range(3)])
    assert found["alone"].difference == pytest.approx(0.2) and found["pooled"].difference == pytest.approx(-0.3)
    assert found["alone"].p == found["pooled"].p == 0.25 and found["alone"].n == 3
    assert against_references([record(0, 0.5, None)]) == {}


def test_references_that_begin_with_the_same_tensors_are_stored_separately(tmp_path: Path) -> None:
    """With a warm start `alone` and `pooled` are the same tensors, and safetensors allows only one name per tensor."""
    storage, start = DeviceStorage(tmp_path), {"head.weight": torch.ones(2, 3)}
    storage.save_state(0, 0, DeviceState(None, start, {"alone": start, "pooled": start}), before=0)
    kept = storage.load_state(0, 0)
    for params in (kept.private, *kept.references.values()):
        assert torch.equal(params["head.weight"], start["head.weight"])
    assert [*kept.references] == ["alone", "pooled"]
