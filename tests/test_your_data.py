"""A run with natural devices from the command line: one device per folder, whose names appear only in the report."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import Result
from PIL import Image
from sklearn.datasets import load_digits
from test_inprocess_run import TINY, tapfl

from experiments.compare.grid import read_comparison
from experiments.jobs.federation import resolved
from experiments.preflight import counted
from experiments.search.settings import read_search
from tapfl.config import RunConfig
from tapfl.errors import DataError
from tapfl.summary.heterogeneity import label_shift

WRITERS = ("ada", "bob", "zoë")


@pytest.fixture(scope="module")
def writers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders with 30, 50 and 80 digits."""
    root, digits = tmp_path_factory.mktemp("data") / "writers", load_digits()
    for number, writer in enumerate(np.repeat(WRITERS, (60, 100, 160))):
        folder = root / writer / str(digits.target[number])
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray((digits.images[number] * 15.9).astype("uint8")).save(folder / f"{number}.png")
    return root


@pytest.fixture(scope="module")
def finished(writers: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    folder = tmp_path_factory.mktemp("runs") / "writers"
    own = ["devices.count=0", "data.public-share=0.5", f"data.source={writers}", "data.partition=natural"]
    done = tapfl("--out", str(folder), cache=cache, options=own, report="--report")
    assert done.exit_code == 0, done.output
    return folder, done


def test_one_device_per_folder(finished: tuple[Path, Result]) -> None:
    folder, _ = finished
    assert json.loads((folder / "config.json").read_text())["devices.count"] == 3
    assert len(json.loads((folder / "summary.json").read_text())["devices"]) == 3


def test_ids_are_only_in_the_device_s_folder_and_in_the_report(finished: tuple[Path, Result]) -> None:
    folder, _ = finished
    kept = [json.loads((folder / f"devices/0{i}/images.json").read_text())["ids"] for i in range(3)]
    assert kept == [[writer] for writer in WRITERS]
    report = (folder / "report.html").read_text()
    assert all(f">{writer}</td>" in report for writer in WRITERS)
    for file in ("summary.json", "metrics.jsonl", "config.json"):
        assert not any(f'"{writer}"' in (folder / file).read_text() for writer in WRITERS)


def test_the_run_prints_how_much_its_devices_differ(finished: tuple[Path, Result]) -> None:
    folder, done = finished
    summary = json.loads((folder / "summary.json").read_text())
    counts = np.array([json.loads((folder / f"devices/0{i}/images.json").read_text())["train"] for i in range(3)])
    n = counts.sum(1)
    gini = sum(abs(a - b) for a in n for b in n) / (2 * 3 * n.sum())
    assert summary["quantity_shift"] == pytest.approx(gini) and gini > 0.1
    assert 0 < summary["feature_shift"] < 1
    said = " ".join(done.stdout.split())
    assert f"How much the devices differ: labels {label_shift(counts):.3f} (mean total variation" in said
    assert f"quantity {gini:.3f} (Gini" in said and f"features {summary['feature_shift']:.3f} (mean squared" in said


@pytest.mark.parametrize("count", [2, 4])
def test_another_number_of_devices_is_refused(count: int, writers: Path, cache: Path, tmp_path: Path) -> None:
    own = [f"devices.count={count}", f"data.source={writers}", "data.public-share=0.5", "data.partition=natural"]
    with pytest.raises(DataError, match=rf"devices\.count = {count}: data\.partition = 'natural' makes 3; accepted: 3"):
        tapfl("--out", str(tmp_path / "run"), cache=cache, options=own)
    assert not (tmp_path / "run").exists()


def test_other_partitions_have_ten_devices_by_default() -> None:
    assert counted(RunConfig()).devices.count == 10
    sizes = {"data.partition": "SizePartitioner", "data.partition-args": "partition_sizes=100/200", "model.args": TINY}
    assert counted(RunConfig.from_flat(sizes)).devices.count == 2


def test_comparisons_and_searches_count_the_devices_too(writers: Path, cache: Path, tmp_path: Path) -> None:
    lines = [f'cache = "{cache}"', f'[data]\nsource = "{writers}"\npartition = "natural"', f'[model]\nargs = "{TINY}"']
    (tmp_path / "compare.toml").write_text("\n".join([*lines, '[compare]\ncriterion = ["tap"]\nbudget = [0.5]']))
    (tmp_path / "search.toml").write_text(
        "\n".join([*lines, '[space]\n"train.learning-rate" = { low = 1e-3, high = 1e-2 }'])
    )
    comparison = read_comparison(tmp_path / "compare.toml")
    assert comparison.axes["device"] == [0, 1, 2] and comparison.options["devices.count"] == 3
    search = read_search(tmp_path / "search.toml")
    assert resolved(search.options, tmp_path / "trial").devices.count == 3
    assert search.options.get("devices.count") is None
