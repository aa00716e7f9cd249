"""Devices that step together: the same bits on every engine, with any number of workers, and after a kill."""

from __future__ import annotations

from pathlib import Path

import pytest
from killing import killed_after
from test_inprocess_run import content, tapfl
from test_ray_engine import on_ray

from experiments.engines.ray import ActorPool
from tapfl.personalize import together

pytestmark = pytest.mark.slow
TOGETHER = {"train.rounds": 3, "train.together": "2", "train.label-prior": "counts", "adapters.blocks": 1}
OPTIONS = [f"{name}={value}" for name, value in TOGETHER.items()]


@pytest.fixture(scope="module")
def one_process(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder, sizes, real = tmp_path_factory.mktemp("runs") / "whole", [], together.together

    def noted(tasks: list[together.LocalTask], model: together.StackedModel) -> list[together.Outcome]:
        sizes.append(len(tasks))
        return real(tasks, model)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(together, "together", noted)
        assert tapfl("--out", str(folder), cache=cache, options=OPTIONS).exit_code == 0
    assert sizes == [2] * 6  # four devices, three rounds
    return content(folder)


@pytest.mark.parametrize("count", [1, 2])
def test_ray_gives_the_same_bits_with_any_number_of_workers(
    count: int, cache: Path, tmp_path: Path, one_process: dict[str, bytes], caplog: pytest.LogCaptureFixture
) -> None:
    with ActorPool(count=count) as workers:
        assert on_ray(workers, tmp_path / "run", cache, **TOGETHER) == one_process
        if count == 2:  # a group that is lost with its worker is sent again
            again = tmp_path / "again" / "run"
            again.parent.mkdir()
            assert on_ray(workers, again, cache, "faulty_apps:mortal_together", **TOGETHER) == one_process
            assert (again.parent / "died").exists() and "sent again" in caplog.text


def test_auto_gives_the_same_bits(cache: Path, tmp_path: Path) -> None:
    assert tapfl("--out", str(tmp_path / "here"), cache=cache, options=["train.together=auto"]).exit_code == 0
    with ActorPool(count=2) as workers:
        assert on_ray(workers, tmp_path / "ray", cache, **{"train.together": "auto"}) == content(tmp_path / "here")


def test_killed_within_a_group_and_resumed_on_either_engine(
    cache: Path, tmp_path: Path, one_process: dict[str, bytes]
) -> None:
    """In the second round, one device of the first group has stored its state and the other has not."""
    moment = ("clients.storage", "DeviceStorage.save_state", 5)
    for name in ("here", "ray"):
        killed_after(moment, "--out", str(tmp_path / name), cache=cache, options=OPTIONS)
        assert not (tmp_path / name / "summary.json").exists()
    assert tapfl("--resume", str(tmp_path / "here"), cache=cache, options=OPTIONS).exit_code == 0
    assert content(tmp_path / "here") == one_process
    with ActorPool(count=2) as workers:
        assert on_ray(workers, tmp_path / "ray", cache, resume=True, **TOGETHER) == one_process


def test_an_actor_reports_why_a_group_cannot_step_together(
    cache: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The final norms of recovered models differ."""
    changes = {"train.rounds": 1, "train.together": "4", "pruning.recovery": "fine-tune", "pruning.recovery-steps": 2}
    with ActorPool(count=1) as workers, caplog.at_level("INFO"):
        on_ray(workers, tmp_path / "run", cache, **changes)
    said = [line for line in caplog.messages if "are trained one by one" in line]
    assert len(said) == 1 and said[0].startswith("devices 0, 1, 2, 3 are trained one by one: train.together: ")
