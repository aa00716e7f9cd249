"""Device profiles: files, client sampling, and simulated time."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from strategies.fleet import sample_clients, seconds, training_macs
from strategies.records import CurvePoint, first_at, milestones
from tapfl.config import PROFILE_SETS, DeviceOptions
from tapfl.errors import ConfigError
from tapfl.profiles import DeviceProfile, max_rank, profiles_of

PHONE = DeviceProfile(budget="0.5", rank=4, compute=1e6, upload=100.0, download=1000.0)


def written(folder: Path, text: str) -> DeviceOptions:
    file = folder / "devices.toml"
    file.write_text(text)
    return DeviceOptions(profiles=str(file))


@pytest.mark.parametrize("name", PROFILE_SETS)
def test_the_built_in_sets_are_valid(name: str) -> None:
    assert all(profile.name for profile in profiles_of(DeviceOptions(profiles=name)))


def test_without_a_set_budgets_and_ranks_are_assigned_in_turn() -> None:
    dealt = profiles_of(DeviceOptions(budgets=(0.3, 0.7), ranks=(4, 8)))
    assert [(profile.budget, profile.rank) for profile in dealt] == [("0.3", 4), ("0.7", 8)]
    assert max_rank(DeviceOptions(budgets=(0.3, 0.7), ranks=(4, 8))) == 8


def test_a_file_of_profiles(tmp_path: Path) -> None:
    options = written(
        tmp_path,
        '[[device]]\nbudget = "macs<=0.5,params<=4e6"\nrank = 4\ncount = 2\n'
        "[[device]]\nbudget = 0.7\nrank = 8\navailability = 0.5\n",
    )
    dealt = profiles_of(options)
    assert [profile.budget for profile in dealt] == ["macs<=0.5,params<=4e6"] * 2 + ["0.7"]
    assert dealt[2].availability == 0.5 and max_rank(options) == 8


REFUSED = {
    "a budget above 1": ("budget = 1.7\nrank = 4", r"device 1: budget = 1.7: .*must lie in \(0, 1\]"),
    "latency": ('budget = "latency<=5ms"\nrank = 4', "device 1: budget = .*accepted: macs, block-macs, params"),
    "a budget over all": ("budget = 2\nrank = 4", "device 1: budget = 2: is a share"),
    "no rank": ("budget = 0.5", "device 1: rank"),
    "a rank of 0": ("budget = 0.5\nrank = 0", "device 1: rank = 0: .*greater than or equal to 1"),
    "no speed": ("budget = 0.5\nrank = 4\ncompute = 0", "device 1: compute = 0: .*greater than or equal"),
    "an endless upload": ("budget = 0.5\nrank = 4\nupload = inf", "device 1: upload"),
    "never there": ("budget = 0.5\nrank = 4\navailability = 0", "device 1: availability = 0"),
    "a count of 0": ("budget = 0.5\nrank = 4\ncount = 0", "device 1: count = 0: must be at least 1"),
    "an unknown entry": (
        "budget = 0.5\nrank = 4\nspeed = 3",
        "device 1: speed: is not an option",
    ),
    "another table": ("budget = 0.5\nrank = 4\n[other]\nx = 1", "tables .*device.* and nothing else"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_an_impossible_profile_is_refused(case: str, tmp_path: Path) -> None:
    text, said = REFUSED[case]
    with pytest.raises(ConfigError, match=rf"devices.profiles .*devices.toml: {said}|devices.profiles .*{said}"):
        profiles_of(written(tmp_path, f"[[device]]\n{text}\n"))


def test_a_set_that_is_neither_built_in_nor_a_file() -> None:
    with pytest.raises(ConfigError, match=r"profiles = 'laptops': there is no such file; accepted: .*equal, tiers"):
        profiles_of(DeviceOptions(profiles="laptops"))


# -- who takes part --------------------------------------------------------------------------------------------------


@given(
    devices=st.integers(1, 40),
    availability=st.floats(0.05, 1),
    participation=st.floats(0.05, 1),
    dropout=st.floats(0, 0.9),
    round=st.integers(1, 1000),
)
def test_a_client_sample_is_a_function_of_seed_and_round(
    devices: int, availability: float, participation: float, dropout: float, round: int
) -> None:
    options = DeviceOptions(participation=participation, dropout=dropout)
    profiles = {i: PHONE.model_copy(update={"availability": availability}) for i in range(devices)}
    drawn = sample_clients(profiles, options, 7, round)
    backwards = {i: profiles[i] for i in sorted(profiles, reverse=True)}
    assert drawn == sample_clients(backwards, options, 7, round)
    present = devices - len(drawn.away)
    assert len(drawn.asked) + len(drawn.dropped) == (
        max(1, int(participation * present + 0.5 + 1e-9)) if present else 0
    )
    assert not set(drawn.asked) & set(drawn.dropped) and not set(drawn.away) & {*drawn.asked, *drawn.dropped}


def test_all_take_part_by_default_and_shares_hold_on_average() -> None:
    profiles = dict.fromkeys(range(20), PHONE)
    assert sample_clients(profiles, DeviceOptions(), 0, 1).asked == tuple(range(20))
    many = dict.fromkeys(range(45), PHONE)
    assert len(sample_clients(many, DeviceOptions(participation=0.7), 0, 1).asked) == 32  # 31.5, rounded half up
    away = {i: PHONE.model_copy(update={"availability": 0.7}) for i in range(20)}
    drawn = [sample_clients(away, DeviceOptions(participation=0.5, dropout=0.25), 0, t) for t in range(300)]
    assert sum(len(d.away) for d in drawn) / 6000 == pytest.approx(0.3, abs=0.03)
    sampled = sum(len(d.asked) + len(d.dropped) for d in drawn)
    assert sampled / 6000 == pytest.approx(0.35, abs=0.03)
    assert sum(len(d.dropped) for d in drawn) / sampled == pytest.approx(0.25, abs=0.04)
    assert len({d.asked for d in drawn}) > 100


# -- how long it would have taken ------------------------------------------------------------------------------------


def test_simulated_seconds_by_hand() -> None:
    assert seconds(PHONE, bytes_down=2000, macs=3e6, bytes_up=50) == pytest.approx(2 + 3 + 0.5)
    # 10 images, 2 epochs, two models: 3 x 2 x 2 x 10 forward passes, and 4 test images in two models
    assert training_macs(1000, trained=20, evaluated=4, models=2) == 1000 * (120 + 8)
    # adapters in a quarter of the model: each step is a pass through all of it, and twice through that quarter
    assert training_macs(1000, trained=20, evaluated=4, models=2, adapted=0.25) == 1000 * (40 * 1.5 + 8)


def test_time_and_bytes_to_accuracy_are_those_when_it_was_first_reached() -> None:
    curve = [
        CurvePoint(seconds=seconds, bytes=size, accuracy=accuracy)
        for seconds, size, accuracy in ((0.0, 7, 0.12), (3.0, 8, 0.31), (6.0, 9, 0.29), (9.0, 10, 0.35))
    ]
    accuracies = ("0.05", "0.10", "0.15", "0.20", "0.25", "0.30", "0.35")
    assert milestones(curve) == dict(zip(accuracies, [curve[0]] * 2 + [curve[1]] * 4 + [curve[3]], strict=True))
    assert first_at(curve, 0.31) == curve[1] and first_at(curve, 0.12 + 1e-12) == curve[0]
    assert first_at(curve, 0.36) is None
