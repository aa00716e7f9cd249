"""`tapfl bench all`: rows are stored, goals are judged, and a failing command does not affect the others."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from experiments.bench.goals import Goal, measure_all
from tapfl.errors import ConfigError, RunError
from tapfl.options import validated

ROWS = [
    {"model": "a", "ratio": "1.07 (1.02–1.10)"},
    {"model": "b", "ratio": "2e-7", "rate": "1.23e+03 (2)"},
    {"took s": 3.5},
]


@pytest.mark.parametrize(
    ("goal", "measured", "verdict"),
    [
        ({"column": "ratio", "at-most": 1.08}, "1.07", "met"),
        ({"column": "ratio", "at-least": 1.08}, "1.07", "**missed**"),
        ({"column": "ratio", "where": {"model": "b"}, "at-most": 0}, "2e-07", "**missed**"),
        ({"column": "rate", "at-least": 1000}, "1230", "met"),
        ({"column": "took s", "at-most": 4}, "3.5", "met"),
        ({"column": "ratio", "where": {"model": "c"}, "at-most": 1}, "", "not measured"),
        ({"column": "speed", "at-most": 1}, "", "not measured"),
        ({"column": "model", "at-most": 1}, "", "not measured"),
    ],
)
def test_a_goal_is_judged_by_the_first_number_of_its_cell(goal: dict[str, object], measured: str, verdict: str) -> None:
    judged = validated(Goal, {"what": "speed", **goal}).judged(ROWS)
    assert (judged["measured"], judged[""]) == (measured, verdict)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "measure: field required"),
        ("measure = []", "measure"),
        ('[[measure]]\ncommand = "rm -rf x"', "measure.command"),
        ('[[measure]]\ncommand = "tapfl run"\ngoal = [{ what = "x", column = "y" }]', "at-least or at-most"),
        ('[[measure]]\ncommand = "tapfl run"\ngoal = [{ what = "x", column = "y", most = 1 }]', "is not an option"),
    ],
)
def test_a_file_without_measurements_is_refused(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "bench.toml").write_text(text)
    with pytest.raises(ConfigError, match=said):
        measure_all(tmp_path / "bench.toml", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_page_names_the_versions_with_which_its_rows_were_measured(tmp_path: Path) -> None:
    (tmp_path / "bench.toml").write_text(
        '[[measure]]\ncommand = "tapfl bench a"\n[[measure]]\ncommand = "tapfl bench b"\n'
    )
    for name, versions in (("a", "torch 1.0"), ("b", "torch 2.0")):
        rows = [{"speed": name}, {"took s": 1.0, "versions": versions}]
        (tmp_path / f"bench-{name}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    measure_all(tmp_path / "bench.toml", tmp_path)
    text = (tmp_path / "bench.md").read_text()
    assert "; torch 1.0; or torch 2.0." in text.splitlines()[0] and "versions" not in text


@pytest.mark.slow
def test_measured_rows_are_kept_if_another_command_fails(tmp_path: Path) -> None:
    file, out = tmp_path / "bench.toml", tmp_path / "out"
    devices = """[[measure]]
command = "tapfl bench devices --devices 1 --probe own"
goal = [{ what = "a device, s", where = { devices = "1" }, column = "s a device", at-most = 1e9 }]
"""
    file.write_text('[[measure]]\ncommand = "tapfl bench apfl --steps 0"\n' + devices)
    with pytest.raises(
        RunError, match=r"tapfl bench apfl --steps 0: ended with 2.*\n.*run the same command again to continue"
    ):
        measure_all(file, out)
    (rows,) = out.glob("*.jsonl")
    before = rows.stat().st_mtime_ns
    file.write_text(devices)
    (goal,) = measure_all(file, out)
    text = (out / "bench.md").read_text()
    assert rows.stat().st_mtime_ns == before
    assert "| a device, s | ≤ 1e+09 |" in text and "| met |" in text and "took s" not in text
    assert "| probe | devices |" in text and goal[""] == "met"
