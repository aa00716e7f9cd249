"""Results of a sweep: measures by run and device, means and tests, learning curves, and shared round zero."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from test_inprocess_run import THREE, content, tapfl
from test_records import a_summary
from test_sweep import in_threads, sweep_file

from experiments.figures.figure import write_figure
from experiments.sweep.grid import SweepOptions, group_of, read_sweep, references
from experiments.sweep.picture import _panels, learning_curves
from experiments.sweep.results import (
    MEASURES,
    Outcome,
    caption_of,
    grouped,
    means_over_seeds,
    outcomes,
    write_results,
    write_table,
)
from strategies.records import CurvePoint, Summary, read_summary, write_summary
from tapfl.config import RunConfig
from tapfl.errors import ConfigError
from tapfl.store import write_json

GRID = '"personalize.method" = ["local", "fedavg"]\nseed = [0, 1]'
REFERENCE = {"personalize.method": "local"}


def carry_out(file: Path, out: Path, changes: Mapping[str, Any] | None = None) -> list[Outcome]:
    cells = read_sweep(file, changes)[0]
    assert not in_threads(cells, out)
    return outcomes(cells, out)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sweep_file(tmp_path_factory.mktemp("sweep"), GRID, *THREE)


@pytest.fixture(scope="module")
def runs(file: Path) -> list[Outcome]:
    return carry_out(file, file.parent / "out")


def rows_of(file: Path) -> list[dict[str, str]]:
    with file.open(newline="") as table:
        return list(csv.DictReader(table))


def test_one_line_per_run_and_one_per_device(runs: list[Outcome], tmp_path: Path) -> None:
    lowest = runs[0].curve[0].accuracy
    write_results(runs, tmp_path, SweepOptions(reach=(lowest, 1.0)))
    results, devices = rows_of(tmp_path / "results.csv"), rows_of(tmp_path / "devices.csv")
    assert len(results) == 4 and len(devices) == 4 * 3
    for run, row in zip(runs, results, strict=True):
        assert {key: row[key] for key in run.point} == {key: str(value) for key, value in run.point.items()}
        own = [d for d in devices if all(d[key] == row[key] for key in run.point)]
        assert np.mean([float(d["personal_accuracy"]) for d in own]) == pytest.approx(float(row["personal_accuracy"]))
        for side in ("bytes_up", "bytes_down"):
            assert sum(int(d[side]) for d in own) == int(row[side])
        assert row["bytes_to_1"] == row["seconds_to_1"] == ""
    first = results[0]
    assert int(first[f"bytes_to_{lowest:g}"]) == 0 == float(first[f"seconds_to_{lowest:g}"])
    assert int(first["round_zero_bytes"]) == runs[0].curve[0].bytes


def test_a_run_with_missing_or_damaged_files_does_not_stop_the_others(tmp_path: Path) -> None:
    planned = read_sweep(sweep_file(tmp_path, "seed = [0, 1, 2, 3]"))[0]
    for run, versions in zip(planned, ({"torch": "2"}, None, ["torch"], {}), strict=True):
        write_json(tmp_path / run.name / "config.json", RunConfig.from_flat(run.options).flat())
        write_summary(tmp_path / run.name, a_summary())
        if versions is not None:
            write_json(tmp_path / run.name / "versions.json", versions)
    (tmp_path / planned[3].name / "config.json").unlink()
    found = outcomes(planned, tmp_path)
    assert [run.versions for run in found] == [{"torch": "2"}, {}, {}]
    assert caption_of(found, "tapfl sweep", SweepOptions()).startswith("made by `tapfl sweep`; seeds 0, 1, 2; ")


def test_the_cost_to_an_accuracy_is_counted_after_round_zero() -> None:
    curve = [CurvePoint(seconds=5.0 + t, bytes=100 + 10 * t, accuracy=0.2 * t) for t in range(4)]
    run = Outcome({}, Path(), {}, {}, Summary.model_construct(**dict.fromkeys(MEASURES, 0.0), curve=curve))
    found = run.measures((0.4, 0.7))
    assert (found["round_zero_bytes"], found["round_zero_seconds"]) == (100, 5.0)
    assert (found["bytes_to_0.4"], found["seconds_to_0.4"]) == (20, 2.0)
    assert found["bytes_to_0.7"] is found["seconds_to_0.7"] is None


def test_means_over_seeds_and_a_test_over_devices(runs: list[Outcome], tmp_path: Path) -> None:
    options = SweepOptions(reach=(1.0,), reference=REFERENCE)
    local, fedavg = means_over_seeds(runs, options)
    assert (local["personalize.method"], local["runs"], local["bytes to 1"]) == ("local", "2", "never")
    assert local["difference"] == local["p"] == local["Holm"] == ""
    assert fedavg["Holm"] == fedavg["p"].split()[0]  # one comparison
    personal = [np.mean([run.summary.personal_accuracy for run in runs[i : i + 2]]) for i in (0, 2)]
    assert fedavg["difference"] == f"{personal[1] - personal[0]:+.3f}" and fedavg["p"].endswith("(n = 3)")
    assert fedavg["personal"].startswith(f"{personal[1]:.3f} ± ")
    said = caption_of(runs, "tapfl sweep --config x.toml", options)
    assert "`tapfl sweep --config x.toml`; seeds 0, 1; " in said and "3 devices, rounds: 1" in said and "torch" in said
    assert "personalize.method = local" in said and "permutation" in said and "Holm's correction" in said
    write_table([local, fedavg], said, tmp_path / "table.md")
    lines = (tmp_path / "table.md").read_text().splitlines()
    assert lines[0].count("|") == lines[1].count("|") == lines[3].count("|") and lines[-1] == f"M{said[1:]}"


def test_learning_curves_are_drawn(runs: list[Outcome], tmp_path: Path) -> None:
    drawn = learning_curves(runs)
    for run in runs[0::2]:
        name = f"method {run.point['personalize.method']}"
        both = [other.curve for other in runs if other.group == run.group]
        for k, across in enumerate(("rounds", "MB", "seconds")):
            points = [row for row in drawn.data[f"panel {k}"] if row["line"] == name]
            assert [row["mean"] for row in points] == pytest.approx(
                [np.mean([curve[t].accuracy for curve in both]) for t in range(len(both[0]))]
            )
            ends = {"rounds": 1, "MB": np.mean([c[-1].bytes - c[0].bytes for c in both]) / 1e6}
            ends["seconds"] = np.mean([c[-1].seconds - c[0].seconds for c in both])
            assert points[0]["x"] == 0 and points[-1]["x"] == pytest.approx(ends[across])
    write_figure(drawn, tmp_path / "curves.png")
    picture = Image.open(tmp_path / "curves.png")
    assert picture.width > 1000 and len(picture.getcolors(2**24)) > 50


def test_panels_are_the_values_of_the_first_axis_that_varies() -> None:
    def points(*places: Mapping[str, Any]) -> dict[Any, Any]:
        return {group_of(place): None for place in places}

    two = points(*({"run": run, "train.epochs": 1, "a.rule": rule} for run in "xy" for rule in ("p", "q")))
    assert {title: list(lines) for title, lines in _panels(two).items()} == {
        "x": ["rule p", "rule q"],
        "y": ["rule p", "rule q"],
    }
    assert {k: list(v) for k, v in _panels(points({"a.rule": "p"}, {"a.rule": "q"})).items()} == {
        "": ["rule p", "rule q"]
    }
    assert {k: list(v) for k, v in _panels(points({"run": "p"}, {"a.rule": "q"})).items()} == {"": ["p", "rule q"]}
    rates = points({"run": "p"}, {"train.learning-rate": 0.1}, {"personalize.learning-rate": 0.1})
    assert list(_panels(rates)[""]) == ["p", "train.learning-rate 0.1", "personalize.learning-rate 0.1"]
    empty = points({"a.rule": "p"}, {"a.rule": "p", "b.file": ""}, {"a.rule": "q"})
    assert sum(map(len, _panels(empty).values())) == 3
    assert {k: list(v) for k, v in _panels(points({"a.rule": "p"})).items()} == {"": ["rule p"]}
    assert {k: list(v) for k, v in _panels(points({"seed": 0})).items()} == {"": ["all seeds"]}


def test_round_zero_is_shared_and_changes_nothing(runs: list[Outcome], file: Path, tmp_path: Path) -> None:
    for local, fedavg in zip(runs[:2], runs[2:], strict=True):
        one, other = (run.folder / "plans" / "00.json" for run in (local, fedavg))
        assert one.samefile(other)
    options = [f"{key}={value}" for key, value in runs[2].options.items() if key not in ("out", "resume")]
    done = tapfl("--out", str(tmp_path / "alone"), cache=Path(runs[2].options["cache"]), options=options)
    assert done.exit_code == 0, done.output
    assert content(tmp_path / "alone") == content(runs[2].folder)
    for told in ("metric-sets/*.json", "devices/*/images.json"):  # what the report says about round zero
        kept = {file.relative_to(tmp_path / "alone"): file.read_bytes() for file in (tmp_path / "alone").glob(told)}
        assert kept and kept == {name: (runs[2].folder / name).read_bytes() for name in kept}
    assert read_summary(tmp_path / "alone").curve == runs[2].curve


def test_a_sweep_continues_for_more_rounds_but_not_with_other_options(tmp_path: Path) -> None:
    file = sweep_file(tmp_path, '"personalize.method" = ["fedavg"]', *THREE)
    (short,) = carry_out(file, tmp_path / "out")
    (long,) = carry_out(file, tmp_path / "out", {"train.rounds": 2})
    assert len(short.curve) == 2 and len(long.curve) == 3 and long.curve[:2] == short.curve
    assert carry_out(file, tmp_path / "out", {"train.rounds": 1})[0].summary == long.summary
    with pytest.raises(ConfigError, match=r"train\.epochs: 1 then, 2 now"):
        carry_out(file, tmp_path / "out", {"train.epochs": 2})


def test_an_option_in_which_runs_differ_cannot_be_set_for_all(file: Path) -> None:
    assert read_sweep(file, {"train.rounds": 7})[0][0].options["train.rounds"] == 7
    with pytest.raises(ConfigError, match=r"--set seed: the runs of .* differ in this option"):
        read_sweep(file, {"seed": 3})


def test_every_point_is_tested_against_its_own_reference() -> None:
    points = [group_of({"run": run, "m": method}) for run in "xy" for method in ("local", "apfl")]
    assert references(points, {"m": "local"}) == {points[1]: points[0], points[3]: points[2]}
    assert references(points, {"run": "x", "m": "local"}) == dict.fromkeys(points[1:], points[0])
    assert references([group_of({"n": 1}), group_of({"n": 2})], {"n": "1"}) == {(("n", 2),): (("n", 1),)}
    for reference, said in (({"m": "ditto"}, "m: local, apfl"), ({"rounds": 1}, "accepted: run, m")):
        with pytest.raises(ConfigError, match=said):
            references(points, reference)


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ("[sweep]\nreach = [0.5, 1.2]", r"^sweep\.reach = "),
        ('[sweep]\nreference = "local"', r"^sweep\.reference = 'local'"),
        ("[sweep]\nreech = 0.5", r"^sweep\.reech: .*reach"),
        ("sweep = 3", "must be a table"),
    ],
)
def test_invalid_report_options_are_refused(tmp_path: Path, table: str, said: str) -> None:
    file = tmp_path / "sweep.toml"
    file.write_text(table)
    with pytest.raises(ConfigError, match=said):
        read_sweep(file)


def test_a_sweep_s_file_determines_how_it_is_reported(tmp_path: Path) -> None:
    file = tmp_path / "sweep.toml"
    file.write_text('[sweep]\nreach = 0.5\nreference = { "personalize.method" = "local" }\n[grid]\nseed = [0]')
    assert read_sweep(file)[1] == SweepOptions(reach=(0.5,), reference=REFERENCE)
    assert read_sweep(file, reference={"seed": 1})[1].reference == {"seed": 1}
    assert grouped([]) == {} and len(read_sweep(file)[0]) == 1
