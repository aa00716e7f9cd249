"""Comparisons beyond accuracy: coverage, agreement with the oracle, pools that lack classes, and differences."""

from __future__ import annotations

import csv
import json
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import spearmanr
from test_compare import comparison_file
from typer.testing import CliRunner

from experiments import cli
from experiments.compare.cells import rank_correlations, scenario_of
from experiments.compare.folder import Origin
from experiments.compare.grid import IMAGES, Comparison, read_comparison
from experiments.compare.picture import accuracy_against_macs, comparable, points
from experiments.compare.run import run_comparison
from experiments.compare.scenario import DeviceView, Scenario, classes_that_lack
from experiments.compare.tables import caption_of, difference, mean_over_devices, sections
from experiments.figures.figure import write_figure
from experiments.statistics import corrected, from_text, paired
from tapfl.models.prunable import prunable_layers

AXES = """criterion = ["tap", "magnitude", "updp"]
"metric.rule" = ["density-ratio", "shared", "oracle"]
device = [0, 1, 3]"""
RESULTS = """[results]
measures = ["rank"]
show = ["pruned_own", "own_share"]
reference = ["metric.rule=density-ratio"]
chosen-on = [0]"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("evidence")


@pytest.fixture(scope="module")
def finished(place: Path, cache: Path) -> tuple[str, Path]:
    file = comparison_file(place, f"{AXES}\n{RESULTS}", cache=cache)
    arguments = [
        "compare",
        "--config",
        str(file),
        "--out",
        str(place / "out"),
        "--jobs",
        "1",
        "--set",
        "data.source=digits",
    ]
    done = CliRunner().invoke(cli.app, arguments, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout, place / "out"


@pytest.fixture(scope="module")
def rows(finished: tuple[str, Path]) -> list[dict[str, str]]:
    with (finished[1] / "results.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def scenario(place: Path, finished: tuple[str, Path]) -> Scenario:
    comparison = read_comparison(place / "compare.toml")
    return Scenario.of(scenario_of(next(comparison.cells()).config))


def test_coverage_equals_counting_by_hand(scenario: Scenario, rows: list[dict[str, str]], place: Path) -> None:
    view = DeviceView.of(scenario, 1)
    own = set(scenario.private.labels[scenario.splits[1].train].tolist())
    images = scenario.pool.images
    four = np.array(
        [np.flatnonzero(images.labels == label)[0] for label in (*sorted(own)[:1], *sorted(set(range(10)) - own)[:3])]
    )
    assert view.coverage(images.subset(four)) == (0.25, 1 / len(own))
    cells = {cell.point["metric.rule"]: cell for cell in read_comparison(place / "compare.toml").cells()}
    for rule in ("density-ratio", "shared", "oracle"):
        chosen = view.public_images(cells[rule].config.metric, 64, cells[rule].oracle).labels.tolist()
        row = next(r for r in rows if r["device"] == "1" and r["metric.rule"] == rule)
        assert float(row["own_share"]) == sum(label in own for label in chosen) / len(chosen)
        assert float(row["classes_covered"]) == len(own & set(chosen)) / len(own)
    assert {r["own_share"] for r in rows if r["metric.rule"] == "oracle"} == {"1.0"}


def test_scores_agree_with_themselves_and_a_criterion_without_scores_has_no_rank(rows: list[dict[str, str]]) -> None:
    for row in rows:
        ranks = [row["rank_ffn"], row["rank_attention"]]
        if row["criterion"] == "updp":
            assert ranks == ["", ""]
        elif row["metric.rule"] == "oracle" or row["criterion"] == "magnitude":  # which does not use images
            assert [round(float(rank), 12) for rank in ranks] == [1, 1]
        else:
            assert all(-1 < float(rank) < 1 for rank in ranks)


def test_rank_correlation_is_a_mean_over_layers_with_different_scores(scenario: Scenario) -> None:
    layers = prunable_layers(scenario.model)
    generator = torch.Generator().manual_seed(0)
    ours, theirs = ({layer.name: torch.randn(layer.units, generator=generator) for layer in layers} for _ in range(2))
    ffns = [layer.name for layer in layers if layer.kind == "ffn"]
    assert len(ffns) == 2
    expected = np.mean([spearmanr(ours[name].numpy(), theirs[name].numpy()).statistic for name in ffns])
    assert rank_correlations(layers, ours, theirs)["rank_ffn"] == pytest.approx(expected, abs=1e-12)
    ours[ffns[0]] = torch.ones(len(ours[ffns[0]]))
    alone = rank_correlations(layers, ours, theirs)["rank_ffn"]
    assert alone == pytest.approx(spearmanr(ours[ffns[1]].numpy(), theirs[ffns[1]].numpy()).statistic, abs=1e-12)
    nothing = {name: torch.ones(len(values)) for name, values in ours.items()}
    assert rank_correlations(layers, nothing, theirs) == {}


def test_the_shared_plan_uses_the_same_images_for_all_devices(scenario: Scenario, place: Path) -> None:
    metric = next(read_comparison(place / "compare.toml").cells()).config.metric
    shared = metric.model_copy(update={"rule": "shared"})
    chosen = [DeviceView.of(scenario, device).public_images(shared, 64) for device in (0, 1)]
    assert np.array_equal(chosen[0].read(), chosen[1].read())
    assert len(np.unique(chosen[0].labels)) == 10  # of all classes, in whatever order the pool is
    own = [DeviceView.of(scenario, device).public_images(metric, 64) for device in (0, 1)]
    assert not np.array_equal(own[0].read(), own[1].read())


def test_the_removed_classes_are_a_share_of_the_device_s_own() -> None:
    own = np.arange(40, 60)
    gone = [classes_that_lack(own, share, seed=0, device=2).tolist() for share in (0, 0.3, 0.5, 1)]
    assert [len(each) for each in gone] == [0, 6, 10, 20]
    assert set(gone[1]) < set(gone[2]) < set(gone[3]) == set(own.tolist())
    assert gone[2] == classes_that_lack(own, 0.5, 0, 2).tolist() != classes_that_lack(own, 0.5, 0, 3).tolist()
    assert gone[2] != classes_that_lack(own, 0.5, 1, 2).tolist()


def test_a_pool_that_lacks_classes_really_lacks_them(scenario: Scenario) -> None:
    own, images = np.unique(scenario.private.labels[scenario.splits[1].train]), scenario.pool.images
    lacking = scenario.lacking(1, 0.7)
    assert len(own) == 3 and np.isin(own, lacking.pool.images.labels).sum() == 1
    others = np.unique(lacking.pool.images.labels)
    assert len(others) == 10 - 2 and np.isin(images.labels, others).sum() == len(lacking.pool.images)
    assert len(lacking.pool.points) == len(lacking.pool.density) == len(lacking.pool.images)
    view = DeviceView.of(lacking, 1)
    assert view.coverage(lacking.pool.images)[1] == pytest.approx(1 / 3)
    assert view.dense == DeviceView.of(scenario, 1).dense  # the measures are the same


def test_a_pool_that_lacks_classes_is_an_axis(cache: Path, tmp_path: Path) -> None:
    axes = 'criterion = ["magnitude"]\n"metric.rule" = ["random", "density-ratio"]\npool-lacks = [0, 1]\ndevice = [1]'
    comparison = read_comparison(comparison_file(tmp_path, axes, cache=cache))
    rows = run_comparison(comparison, tmp_path / "out", lambda *_: None)
    shares = {(row["metric.rule"], row["pool-lacks"]): float(row["own_share"]) for row in rows}
    assert (
        shares["random", "1"]
        == shares["density-ratio", "1"]
        == 0
        < shares["random", "0"]
        < shares["density-ratio", "0"]
    )


def test_a_cell_records_which_images_were_classified_correctly(rows: list[dict[str, str]]) -> None:
    measured = [row for row in rows if not row["refused"]]
    for accuracy, column in IMAGES.items():
        assert [from_text(row[column]).mean() for row in measured] == [float(row[accuracy]) for row in measured]


def line(values: dict[tuple[int, int], float]) -> pd.DataFrame:
    return pd.DataFrame([{"device": str(d), "seed": str(s), "acc": str(v)} for (d, s), v in values.items()])


def test_differences_are_over_devices_that_both_lines_have() -> None:
    ours = {(0, 0): 0.5, (0, 1): 0.7, (1, 0): 0.4, (1, 1): 0.4, (2, 0): 0.9, (2, 1): 0.7}
    theirs = {(0, 0): 0.4, (0, 1): 0.6, (1, 0): 0.3, (1, 1): 0.4, (2, 0): 0.5, (2, 1): 0.7}
    found = difference(line(ours), line(theirs), "acc")
    assert found is not None and found == paired({0: 0.6, 1: 0.4, 2: 0.8}, {0: 0.5, 1: 0.35, 2: 0.6})
    assert found.difference == pytest.approx((0.1 + 0.05 + 0.2) / 3)
    assert str(found) == f"+0.117 (p = {found.p:.3f}, n = 3)"
    fewer = difference(line(ours), line({(0, 1): 0.6, (2, 0): 0.5, (5, 0): 0.1}), "acc")  # common to both lines
    assert fewer is not None and fewer == paired({0: 0.7, 2: 0.9}, {0: 0.6, 2: 0.5})
    assert difference(line(ours), line({(7, 0): 0.5}), "acc") is None


def test_a_device_that_is_refused_in_one_line_is_left_out() -> None:
    ours, theirs = line({(0, 0): 0.5, (1, 0): 0.5}), line({(0, 0): 1.0, (1, 0): 0.5})
    ours, theirs = (rows.rename(columns={"acc": "pruned"}).assign(right="5") for rows in (ours, theirs))  # 01
    theirs.loc[0, "right"], theirs.loc[1, ["pruned", "right"]] = "7", ""
    found = difference(ours, theirs, "pruned")
    assert found is not None and (found.difference, found.n, found.error) == (-0.5, 1, pytest.approx(0.5))


def test_the_dense_model_counts_once_a_device_however_many_lines_it_has() -> None:
    rows = [
        {"device": d, "seed": "0", "dense": acc} for d, acc in (("0", "0.9"), ("0", "0.9"), ("0", "0.9"), ("1", "0.5"))
    ]
    assert mean_over_devices(pd.DataFrame(rows), "dense") == pytest.approx(0.7)
    other = [*rows, {"device": "1", "seed": "0", "dense": "0.8"}]  # an axis changes the dense model
    assert mean_over_devices(pd.DataFrame(other), "dense") is None
    assert mean_over_devices(pd.DataFrame([rows[0] | {"dense": ""}]), "dense") is None


def grid_of(tmp_path: Path, text: str) -> tuple[Comparison, pd.DataFrame]:
    """Returns a comparison and rows of its cells; `pruned_own` is 0.6, and 0.8 on device 1."""
    (tmp_path / "grid.toml").write_text(text)
    comparison = read_comparison(tmp_path / "grid.toml")
    measures = {"macs_share": "0.5", "dense": "0.8", "dense_own": "0.9", "seconds": "30", "pruned": "", "refused": ""}
    own = {"0": "0.6", "1": "0.8"}
    rows = [cell.point | measures | {"pruned_own": own[cell.point["device"]]} for cell in comparison.cells()]
    return comparison, pd.DataFrame(rows)


def test_the_figure_has_the_standard_error_over_devices_and_the_dense_model(tmp_path: Path) -> None:
    comparison, rows = grid_of(tmp_path, '[compare]\ncriterion = ["tap"]\ndevice = [0, 1]')
    _, drawn = points(rows, comparison, "pruned_own")
    assert drawn["mean"].item() == pytest.approx(0.7) and drawn["error"].item() == pytest.approx(0.1)
    assert points(rows[:1], comparison, "pruned_own")[1]["error"].item() == 0
    figure = accuracy_against_macs(rows, comparison, "pruned_own")
    assert figure is not None and "the dense model has 0.900" in figure.alt and '"dense"' in json.dumps(figure.spec)
    seconds = accuracy_against_macs(rows, comparison, "seconds")
    assert seconds is not None and "dense" not in seconds.alt and '"dense"' not in json.dumps(seconds.spec)
    assert seconds.title.startswith("seconds against MACs")
    write_figure(seconds, tmp_path / "seconds.png")
    assert accuracy_against_macs(rows, comparison, "pruned") is None  # no cell has it


def test_the_caption_says_only_what_holds_for_all_cells(tmp_path: Path) -> None:
    models = [f"img_size={size},patch_size=4,embed_dim=8,depth=1,num_heads=1" for size in (8, 16)]
    axes = f'"metric.size" = [64, 128]\n"model.args" = {models}\n"devices.count" = [2, 3]\ndevice = [0]'
    comparison, rows = grid_of(tmp_path, f"[compare]\n{axes}")
    origin = Origin(options={}, contents={}, versions={})
    said = caption_of(rows, comparison, origin, comparison.results, "tapfl compare")
    name = next(comparison.cells()).config.model.name
    assert f"backbone {name} at 8×8 px or {name} at 16×16 px; 2 or 3 devices, metric set of 64 or 128 images" in said


def test_two_spellings_of_a_budget_or_a_seed_are_one(tmp_path: Path) -> None:
    axes = 'budget = [0.5, "macs<=0.5", "50%"]\nseed = ["1", 2]\ndevice = [0]'
    comparison, rows = grid_of(tmp_path, f'[[compare]]\n{axes}\n[[compare]]\nbudget = ["macs<=0.50"]\ndevice = [1]')
    assert comparison.axes["budget"] == ["macs<=0.5"]
    assert [(cell.device, cell.config.seed) for cell in comparison.cells()] == [(0, 1), (0, 2), (1, 0)]
    said = caption_of(rows, comparison, Origin(options={}, contents={}, versions={}), comparison.results, "tapfl")
    assert "seeds 0, 1, 2; " in said and "cells were finished" not in said


@pytest.mark.parametrize("budgets", ["[0.5]", "[0.5, 0.7]"])
def test_several_grids_are_drawn_also_if_each_has_one_budget(budgets: str, tmp_path: Path) -> None:
    grids = "".join(
        f'[[compare]]\ncriterion = ["{name}"]\nbudget = {budgets}\ndevice = [0]\n' for name in ("tap", "random")
    )
    (tmp_path / "grids.toml").write_text(grids)
    comparison = read_comparison(tmp_path / "grids.toml")
    measures = {"macs_share": "0.5", "dense_own": "0.9", "pruned_own": "0.6", "refused": ""}
    rows = pd.DataFrame([cell.point | measures for cell in comparison.cells()])
    figure = accuracy_against_macs(rows, comparison, "pruned_own")
    assert figure is not None
    write_figure(figure, tmp_path / "lines.png")
    assert (tmp_path / "lines.png").read_bytes().startswith(b"\x89PNG")


def test_lines_are_drawn_over_the_devices_that_all_of_them_have() -> None:
    def had(line: str, budget: str, devices: str, *, lacks: str = "") -> pd.DataFrame:
        values = ["" if device in lacks else "0.5" for device in devices]
        where = {"panel": "", "line": line, "budget": budget, "seed": "0"}
        return pd.DataFrame({"device": list(devices), "pruned_own": values}).assign(**where)

    rows = pd.concat(
        [
            had("on all", "0.5", "0123"),
            had("on all", "0.7", "0123"),
            had("on three", "0.5", "012"),
            had("on three", "0.7", "0123", lacks="3"),
            had("refused", "0.5", "0123", lacks="0123"),
            had("refused", "0.7", "0123", lacks="0123"),
            had("one budget", "0.5", "0123"),
            had("one budget, on one", "0.5", "1"),
        ]
    )
    drawn = comparable(rows, "pruned_own").groupby(["line", "budget"])["device"].agg("".join)
    assert drawn.to_dict() == {
        ("on all", "0.5"): "012",
        ("on all", "0.7"): "012",
        ("on three", "0.5"): "012",
        ("on three", "0.7"): "012",
        ("one budget", "0.5"): "012",
    }
    begun = pd.concat([had("a", "0.5", "0"), had("b", "0.5", "12")])
    assert comparable(begun, "pruned_own").equals(begun)


def test_a_table_leaves_out_devices_on_which_something_was_chosen(
    finished: tuple[str, Path], rows: list[dict[str, str]], place: Path
) -> None:
    comparison = read_comparison(place / "compare.toml")
    shown = list(sections(pd.DataFrame(rows), comparison, comparison.results))
    assert [(each.measure, each.devices) for each in shown] == [
        (measure, devices)
        for measure in ("pruned_own", "own_share")
        for devices in ("devices 1, 3, on which nothing was chosen", "all 3 devices")
    ]
    column = "50% MACs − (metric.rule=density-ratio)"
    lines = {(row["criterion"], row["metric.rule"]): row for row in shown[1].rows}
    assert lines["tap", "density-ratio"][column] == "reference"
    tap = pd.DataFrame([row for row in rows if row["criterion"] == "tap"])
    of = dict(iter(tap.groupby("metric.rule")))
    apart = {rule: difference(of[rule], of["density-ratio"], "pruned_own") for rule in ("oracle", "shared")}
    tests = corrected({rule: test for rule, test in apart.items() if test}, dict.fromkeys(apart, "density-ratio"))
    assert [lines["tap", rule][column] for rule in apart] == [str(test) for test in tests.values()]
    assert all(", Holm " in str(test) and test.error is not None for test in tests.values())
    assert "(2)" in shown[0].rows[0]["50% MACs"] and "(3)" in shown[1].rows[0]["50% MACs"]


def test_the_page_names_its_command_and_is_reproducible(finished: tuple[str, Path], place: Path) -> None:
    page = (place / "out" / "table.md").read_text()
    for said in (
        "tapfl compare --config …/compare.toml --out DIR --set data.source=",
        "8×8 px",
        "seed 0",
        f"torch {version('torch')}",
    ):
        assert said in page
    assert "dense: 0." in page and "sign-flip" in page and str(place) not in page
    assert page.count("\n| criterion |") == 4
    again = [
        "compare",
        "--config",
        str(place / "compare.toml"),
        "--out",
        str(place / "out"),
        "--set",
        "data.source=digits",
        "--json",
    ]
    done = CliRunner().invoke(cli.app, again, catch_exceptions=False)
    first = json.loads(done.stdout.splitlines()[0])
    assert first["measure"] == "pruned_own" and first["devices"].startswith("devices 1, 3")
    assert (place / "out" / "table.md").read_text() == page
