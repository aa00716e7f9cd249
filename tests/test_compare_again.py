"""Continuing a comparison: cells are added along an axis, and never mixed with those of other options or inputs."""

from __future__ import annotations

import csv
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from click import Command
from click.testing import CliRunner, Result
from test_compare import comparison_file

from experiments import cli
from experiments.compare.folder import FILE, origin_of, read_origin, write_origin
from experiments.compare.grid import read_comparison
from experiments.compare.run import finished_rows, run_comparison
from experiments.output import as_csv
from tapfl.data.sources import load_images
from tapfl.errors import ConfigError, DataError

AXES = 'criterion = ["magnitude"]\ndevice = [0]'
MEASURED = {"macs_share": "0.5", "dense": "0.75", "dense_own": "0.9", "pruned_own": "0.6", "pruned": "0.5"}


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with images, weights, and a finished comparison that uses both."""
    digits = load_images("digits")
    np.savez(tmp_path / "images.npz", images=digits.read(), labels=digits.labels)
    (tmp_path / "w.safetensors").write_bytes(b"weights" * 1000)
    write_file(tmp_path)
    comparison = read_comparison(tmp_path / "compare.toml")
    rows = [cell.point | MEASURED for cell in comparison.cells()]
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "results.csv").write_bytes(as_csv(rows, comparison.columns))
    write_origin(tmp_path / "out", origin_of(comparison).measured_now())
    return tmp_path


def write_file(place: Path, axes: str = AXES, options: str = "", source: str = "images.npz") -> Path:
    named = f'"data.source" = "{place / source}"\n"model.weights" = "{place / "w.safetensors"}"'
    return comparison_file(place, axes, f"{named}\n{options}")


def compare(place: Path, *arguments: str, out: str = "out") -> Result:
    """Runs the command as `tapfl` does; returns its exit code and its error line."""
    options = ["--config", str(place / "compare.toml"), "--out", str(place / out), "--jobs", "1"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["tapfl", "compare", *options, *arguments])
        return CliRunner().invoke(Command("tapfl", callback=cli.main), [])


def refused(place: Path, *arguments: str, out: str = "out") -> str:
    """Returns the line with which the command refuses."""
    said = compare(place, *arguments, out=out)
    assert said.exit_code == 2 and not said.stdout
    (line,) = said.stderr.splitlines()
    return line


def unheard(*_: object) -> None:
    pass


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def rewrite(place: Path, before: str, after: str) -> None:
    file = place / "compare.toml"
    file.write_text(file.read_text().replace(before, after))


def rewrite_images(place: Path) -> None:
    digits = load_images("digits")
    np.savez(place / "images.npz", images=255 - digits.read(), labels=digits.labels)


OTHERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "backbone": (partial(write_file, options='"model.name" = "deit_tiny_patch16_224"'), "model.name: 'vit_tiny"),
    "size of the metric set": (
        partial(rewrite, before='size" = 64', after='size" = 32'),
        "metric.size: 64 then, 32 now",
    ),
    "training of the backbone": (partial(write_file, options='"model.learning-rate" = 0.01'), "0.003 then, 0.01 now"),
    "partition": (partial(write_file, options='"data.partition" = "iid"'), "'pathological' then, 'iid' now"),
    "images under another name": (
        lambda place: ((place / "images.npz").rename(place / "b.npz"), write_file(place, source="b.npz")),
        "b.npz' now",
    ),
    "images": (rewrite_images, "images.npz': the images changed since its cells were measured"),
    "weights": (lambda place: flip(place / "w.safetensors"), "w.safetensors': the contents changed since its cells"),
}


@pytest.mark.parametrize("finished", [False, True], ids=["measuring", "--finished"])
@pytest.mark.parametrize("other", OTHERS)
def test_cells_of_another_comparison_are_not_returned(other: str, finished: bool, place: Path) -> None:
    change, named = OTHERS[other]
    before = {file: file.read_bytes() for file in (place / "out").iterdir()}
    change(place)
    comparison = read_comparison(place / "compare.toml")
    ask = partial(finished_rows, comparison) if finished else partial(run_comparison, comparison, progress=unheard)
    with pytest.raises(ConfigError, match="has the cells of another comparison: ") as refused:
        ask(out=place / "out")
    assert named in str(refused.value) and "\n" not in str(refused.value)
    assert before == {file: file.read_bytes() for file in (place / "out").iterdir()}


def test_everything_that_differs_is_named(place: Path) -> None:
    write_file(place, options='"summary.dim" = 8\n"data.test-share" = 0.25')
    flip(place / "w.safetensors")
    said = refused(place, "--finished")
    for named in ("summary.dim: 32 then, 8 now", "data.test-share: 0.3 then, 0.25 now", "w.safetensors': the contents"):
        assert named in said


def test_the_same_comparison_is_shown_again_also_with_options_that_change_no_result(place: Path) -> None:
    os.utime(place / "images.npz")
    write_file(place, options='"node-timeout" = 3.0\n"log.tensorboard" = true')
    rows = run_comparison(read_comparison(place / "compare.toml"), place / "out", unheard)
    assert [row["pruned_own"] for row in rows] == ["0.6"]
    assert finished_rows(read_comparison(place / "compare.toml"), place / "out") == rows


def test_an_axis_may_grow_along_options_that_name_files(place: Path) -> None:
    (place / "v.safetensors").write_bytes(b"other weights")
    weights = [str(place / name) for name in ("w.safetensors", "v.safetensors")]

    def file(values: list[str]) -> Path:
        axes = f'{AXES}\n"model.weights" = [{", ".join(map(repr, values))}]'
        return comparison_file(place, axes, f'"data.source" = "{place / "images.npz"}"')

    out, one = place / "grown", read_comparison(file(weights[:1]))
    out.mkdir()
    rows = [cell.point | MEASURED for cell in one.cells()]
    (out / "results.csv").write_bytes(as_csv(rows, one.columns))
    write_origin(out, origin_of(one))
    both = read_comparison(file(weights))
    assert len(finished_rows(both, out)) == 1
    flip(place / "v.safetensors")  # no cell has it yet
    assert len(finished_rows(both, out)) == 1
    flip(place / "w.safetensors")
    with pytest.raises(ConfigError, match=r"w\.safetensors': the contents changed"):
        finished_rows(both, out)


def test_an_edited_plugin_criterion_counts_as_another_one(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = place / "my_criteria.py"
    module.write_text("from tapfl.pruning.criteria.norms import random_units as mine\n")
    monkeypatch.syspath_prepend(place)
    own, out = read_comparison(write_file(place, AXES.replace("magnitude", "my_criteria:mine"))), place / "own"
    out.mkdir()
    (out / "results.csv").write_bytes(as_csv([cell.point | MEASURED for cell in own.cells()], own.columns))
    write_origin(out, origin_of(own))
    assert len(finished_rows(own, out)) == 1
    module.write_text("from tapfl.pruning.criteria.norms import random_units as mine  # better\n")
    with pytest.raises(ConfigError, match=r"pruning\.criterion = 'my_criteria:mine': the lines of its module changed"):
        finished_rows(own, out)


@pytest.mark.parametrize("damage", [Path.unlink, lambda file: file.write_text("{}")], ids=["missing", "damaged"])
def test_cells_of_unknown_origin_are_not_returned(damage: Callable[[Path], object], place: Path) -> None:
    damage(place / "out" / FILE)
    assert f"{FILE}, the origin of its cells, is missing or damaged" in refused(place)


def test_a_folder_without_finished_cells_takes_any_comparison(place: Path) -> None:
    file = place / "out" / "results.csv"
    file.write_text(file.read_text().splitlines()[0] + "\n")  # a first start that was refused leaves only the header
    write_file(place, options='"summary.dim" = 8')
    rewrite(place, str(place / "w.safetensors"), "")
    done = compare(place)
    assert done.exit_code == 0, done.output
    with file.open(newline="") as rows:
        assert len(list(csv.DictReader(rows))) == 1
    origin = read_origin(place / "out")
    assert origin is not None and origin.options["summary.dim"] == 8
    table = (place / "out" / "table.md").read_text()
    (fingerprint,) = origin.contents.values()
    assert f"images …/images.npz ({fingerprint[:8]})" in table


def test_results_are_shown_although_inputs_no_longer_exist(place: Path) -> None:
    comparison = read_comparison(place / "compare.toml")
    (place / "images.npz").unlink()
    assert len(finished_rows(comparison, place / "out")) == 1
    with pytest.raises(DataError, match=r"images.npz"):
        run_comparison(comparison, place / "out", unheard)
    assert "images.npz" in refused(place, out="new") and not (place / "new").exists()


def test_the_caption_names_the_versions_of_the_cells_not_the_installed_ones(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    origin = read_origin(place / "out")
    assert origin is not None
    older = origin.model_copy(update={"versions": {**origin.versions, "torch": ("1.0",)}})
    write_origin(place / "out", older)
    monkeypatch.setattr("experiments.compare.tables.input_transform", lambda options: type("T", (), {"size": (8, 8)}))
    assert compare(place, "--finished").exit_code == 0
    assert "torch 1.0," in (place / "out" / "table.md").read_text()
    assert older.measured_now().versions["torch"] == ("1.0", *origin.versions["torch"])
