"""`tapfl compare`: every cell is measured once, with the same test images for all; refusals are reported."""

from __future__ import annotations

import json
from io import StringIO
from pathlib import Path

import pandas as pd
import pytest
from test_inprocess_run import SMALL
from typer.testing import CliRunner

from experiments import cli
from experiments.compare.grid import ResultOptions, read_comparison
from experiments.compare.run import run_comparison
from experiments.compare.tables import table
from tapfl.errors import ConfigError, ModelError


def comparison_file(tmp_path: Path, axes: str, options: str = "", cache: Path | None = None) -> Path:
    shared = [
        option.split("=", 1) for option in SMALL if not option.startswith(("train.", "metric", "pruning.criterion"))
    ]
    lines = [f'"{key}" = {value if value.isdigit() else json.dumps(value)}' for key, value in shared]
    lines += [f'"cache" = {json.dumps(str(cache or tmp_path / "cache"))}']
    lines += ['"metric.size" = 64', '"metric.batch" = 16', options]
    file = tmp_path / "compare.toml"
    file.write_text("\n".join(lines) + f"\n[compare]\n{axes}\n")
    return file


AXES = """criterion = ["tap", "magnitude"]
budget = [0.5]
compensation = ["none", "sequential"]
device = [0, 2]"""


def test_a_comparison_runs_once_and_is_shown(tmp_path: Path, cache: Path) -> None:
    file, out = comparison_file(tmp_path, AXES, cache=cache), tmp_path / "out"
    invoked = ["compare", "--config", str(file), "--out", str(out), "--json", "--jobs"]
    first = CliRunner().invoke(cli.app, [*invoked, "1"], catch_exceptions=False)
    rows = [json.loads(line) for line in first.stdout.splitlines() if line.startswith("{")]
    assert [(row["criterion"], row["compensation"]) for row in rows] == [
        (criterion, how) for criterion in ("tap", "magnitude") for how in ("none", "sequential")
    ]
    assert all(row["50% MACs"].endswith("(2)") for row in rows)
    assert "| tap | none |" in (out / "table.md").read_text()
    results = (out / "results.csv").read_text()
    assert len(results.splitlines()) == 1 + 8
    assert (out / "accuracy-against-macs.png").read_bytes().startswith(b"\x89PNG")
    lines = results.splitlines(keepends=True)
    (out / "results.csv").write_text(
        "".join(lines[:5]) + lines[5][:20]
    )  # as left by a killed comparison of an earlier version
    CliRunner().invoke(cli.app, [*invoked, "2"], catch_exceptions=False)
    again = (out / "results.csv").read_text()
    all_but_seconds = [pd.read_csv(StringIO(each), dtype=str).drop(columns="seconds") for each in (results, again)]
    pd.testing.assert_frame_equal(*all_but_seconds)


@pytest.mark.parametrize("args", ["img_size=8,patch_size=16,in_chans=1", "img_size=8,patch_size=2,qk_norm=True"])
def test_an_unusable_backbone_is_refused_before_anything_is_written(args: str, tmp_path: Path) -> None:
    file = comparison_file(tmp_path, 'criterion = ["tap"]\nbudget = [0.5]\ndevice = [0]')
    with pytest.raises(ModelError, match=rf"model\.args = '{args}"):
        run_comparison(read_comparison(file, [f"model.args={args}"]), tmp_path / "out", lambda *_: None)
    assert not (tmp_path / "out").exists()


def test_measures_are_shares_and_a_budget_that_cannot_be_met_is_reported(tmp_path: Path, cache: Path) -> None:
    axes = 'criterion = ["tap", "updp"]\nbudget = [0.5, 0.01, "macs<=0.9,params<=0.6"]\ndevice = [1]'
    file = comparison_file(tmp_path, axes, cache=cache)
    comparison = read_comparison(file)
    rows = run_comparison(comparison, tmp_path / "out", lambda *_: None)
    by_cell = {(row["criterion"], row["budget"]): row for row in rows}
    assert 0.4975 <= float(by_cell["tap", "macs<=0.5"]["macs_share"]) <= 0.5
    assert float(by_cell["tap", "macs<=0.5"]["dense_own"]) >= float(by_cell["tap", "macs<=0.5"]["dense"])
    assert by_cell["tap", "macs<=0.5"]["dense"] == by_cell["updp", "macs<=0.5"]["dense"]
    both = by_cell["tap", "macs<=0.9,params<=0.6"]
    assert float(both["macs_share"]) <= 0.9 and 0.597 <= float(both["params_share"]) <= 0.6
    assert list(table(pd.DataFrame(rows), comparison)[0])[1:] == ["50% MACs", "1% MACs", "90% MACs, 60% parameters"]
    assert "cannot be met" in by_cell["tap", "macs<=0.01"]["refused"] and not by_cell["tap", "macs<=0.01"]["pruned"]


def test_any_option_is_an_axis_and_the_oracle_is_the_device_s_own_images(tmp_path: Path, cache: Path) -> None:
    axes = """criterion = ["taylor"]
"metric.rule" = ["density-ratio", "oracle"]
unit-shape = ["head-dims", "heads"]
recovery = ["none", "fine-tune"]
device = [1]"""
    file = comparison_file(tmp_path, axes, '"pruning.recovery-steps" = 3', cache)
    comparison = read_comparison(file)
    rows = run_comparison(comparison, tmp_path / "out", lambda *_: None)
    assert len(rows) == 8 and all(float(row["macs_share"]) <= 0.5 for row in rows)
    shown = table(pd.DataFrame(rows), comparison)
    assert list(shown[0]) == ["criterion", "metric.rule", "unit-shape", "recovery", "50% MACs"]
    with pytest.raises(ConfigError, match="--measure loss: accepted are macs_share"):
        comparison.results.override(["loss"], None).check(comparison.axes)
    for line in ("budget=macs<=0.5", "device=1", "recovery=distill"):
        with pytest.raises(ConfigError, match=f"--reference {line}: is not a line of the table; "):
            comparison.results.override(None, [line]).check(comparison.axes)
    other = read_comparison(comparison_file(tmp_path, 'criterion = ["tap"]\ndevice = [1]'))
    assert other.axes["compensation"] == ["auto"]  # options that are not named have the defaults of a run
    with pytest.raises(ConfigError, match="is a comparison with other axes"):
        run_comparison(other, tmp_path / "out", lambda *_: None)


@pytest.mark.parametrize("line", ["data.test-share=0.3", "devices.count=2", "data.public=a"])
def test_a_reference_that_changes_the_test_images_is_refused(line: str) -> None:
    axes = {"device": [0], "data.test-share": [0.3, 0.5], "devices.count": [2, 3], "data.public": ["", "a"]}
    with pytest.raises(ConfigError, match=f"^--reference {line}: lines cannot be paired over other images; accepted"):
        ResultOptions(reference=(line,)).check(axes)
    ResultOptions(reference=("data.public=a",)).check(axes | {"data.public": ["a", "b"]})  # only another pool


@pytest.mark.parametrize(
    ("results", "said"),
    [
        ("results = 3", r"^results = 3: is a table of options"),
        ("results.chosen-on = [0.5]", r"^results\.chosen-on = 0\.5: "),
        ("results.show = []", r"^results\.show = \[\]: "),
    ],
)
def test_invalid_results_are_refused_by_their_names(results: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=said):
        read_comparison(comparison_file(tmp_path, "device = [0]", results))


def test_a_list_of_one_may_be_written_as_its_value(tmp_path: Path) -> None:
    lines = 'results.show = "pruned"\nresults.reference = "criterion=tap+"\nresults.chosen-on = 0'
    results = read_comparison(comparison_file(tmp_path, "device = [0]", lines)).results
    assert (results.show, results.reference, results.chosen_on) == (("pruned",), ("criterion=tap+",), (0,))


def test_an_axis_may_be_named_with_or_without_its_section(tmp_path: Path) -> None:
    axes = '"pruning.criterion" = ["tap", "random"]\n"pruning.compensation" = ["none"]\ndevice = [0]'
    comparison = read_comparison(comparison_file(tmp_path, axes))
    assert {"criterion", "compensation"} < comparison.axes.keys() and "pruning.criterion" not in comparison.axes
    cells = [(cell.point["criterion"], cell.config.pruning.criterion) for cell in comparison.cells()]
    assert cells == [("tap", "tap"), ("random", "random")]
    assert comparison.results.override(None, ["pruning.criterion=tap"]).values == {"criterion": "tap"}
    twice = comparison_file(tmp_path, f'{axes}\ncriterion = ["tap"]')
    with pytest.raises(ConfigError, match=r"compare\.pruning\.criterion and compare\.criterion are one axis"):
        read_comparison(twice)
    with pytest.raises(ConfigError, match=r"compare\.pruning\.seed is not an axis"):
        read_comparison(comparison_file(tmp_path, '"pruning.seed" = [0]'))


def test_a_cell_that_does_not_support_an_option_is_refused_and_the_others_are_measured(
    tmp_path: Path, cache: Path
) -> None:
    axes = 'criterion = ["magnitude"]\ntokens = ["none", "merge"]\nprobe = ["own", "pool"]\ndevice = [0]'
    name, args = "swin_tiny_patch4_window7_224", "img_size=16,embed_dim=8,depths=1/1,num_heads=1/1,window_size=2"
    options = f'"model.name" = "{name}"\n"model.epochs" = 1\n"pruning.ratio" = "adaptive"\n"pruning.floor" = 0.0'
    file = comparison_file(tmp_path, axes, options, cache)
    file.write_text(file.read_text().replace('"model.epochs" = 2\n', ""))
    comparison = read_comparison(file, [f"model.args={args}"])
    rows = run_comparison(comparison, tmp_path / "out", lambda *_: None)
    refused = {(row["tokens"], row["probe"]): row["refused"] for row in rows}
    assert refused["none", "own"] == "" and "pruning.probe = 'pool'" in refused["none", "pool"]
    assert all("pruning.tokens = 'merge'" in refused["merge", probe] for probe in ("own", "pool"))
    assert sum(row["pruned"] != "" for row in rows) == 1


def test_a_cell_whose_images_or_training_fail_is_refused_and_the_others_are_measured(
    tmp_path: Path, cache: Path
) -> None:
    axes = """criterion = ["magnitude"]
"metric.size" = [64, 9984]
recovery = ["fine-tune"]
recovery-learning-rate = [1e-5, 1e20]
device = [0]"""
    file = comparison_file(tmp_path, axes, '"pruning.recovery-steps" = 3\n"pruning.compensation" = "none"', cache)
    file.write_text(file.read_text().replace('"metric.size" = 64\n', ""))
    rows = run_comparison(read_comparison(file), tmp_path / "out", lambda *_: None)
    refused = {(row["metric.size"], float(row["recovery-learning-rate"])): row["refused"] for row in rows}
    assert refused.pop(("64", 1e-5)) == "" and sum(row["pruned"] != "" for row in rows) == 1
    assert "recovery diverged" in refused.pop(("64", 1e20))
    assert len(refused) == 2 and all("accepted: at most" in reason for reason in refused.values())


def test_a_comparison_of_refused_cells_alone_has_a_table_and_no_figure(tmp_path: Path, cache: Path) -> None:
    file = comparison_file(tmp_path, 'criterion = ["magnitude"]\nbudget = [0.01]\ndevice = [0]', cache=cache)
    invoked = ["compare", "--config", str(file), "--out", str(tmp_path / "out"), "--jobs", "1"]
    done = CliRunner().invoke(cli.app, invoked, catch_exceptions=False)
    assert "| magnitude | refused |" in (tmp_path / "out" / "table.md").read_text()
    assert "table.md\n" in done.stderr and not (tmp_path / "out" / "accuracy-against-macs.png").exists()


def test_widths_are_aligned_to_heads_by_default(tmp_path: Path, cache: Path) -> None:
    axes = 'criterion = ["magnitude"]\ncompensation = ["none", "one-pass"]\ndevice = [0]'
    file = comparison_file(tmp_path, axes, cache=cache)
    file.write_text("\n".join(line for line in file.read_text().splitlines() if "pruning.align" not in line))
    rows = run_comparison(read_comparison(file), tmp_path / "out", lambda *_: None)
    assert [row["compensation"] for row in rows] == ["none", "one-pass"]
    assert all("a smaller pruning.align than 4" in row["refused"] or row["pruned"] for row in rows)


@pytest.mark.parametrize(
    ("axes", "named"),
    [
        ("criterion = 3", "compare"),
        ('critereon = ["tap"]', "critereon"),
        ('criterion = ["best"]', "'best'"),
        ("budget = [1.5]", "1.5"),
        ('budget = ["params<=0"]', "params<=0"),
        ('compensation = ["full"]', "'full'"),
        ("device = [99]", "99"),
        ('"metric.rule" = ["nearest"]', "metric.rule"),
        ("seed = [-1]", "seed"),
    ],
)
def test_an_invalid_axis_is_refused_before_anything_runs(tmp_path: Path, axes: str, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        read_comparison(comparison_file(tmp_path, axes))
