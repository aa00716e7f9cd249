"""Reports: they show the content of the run's folder, say what is missing, and refuse folders that are no runs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.numpy import load_file
from test_inprocess_run import tapfl
from typer.testing import CliRunner

from experiments import cli
from experiments.figures.figure import Figure, chart, write_figure
from experiments.figures.page import Page, for_script, render
from experiments.report.cli import write_report
from experiments.report.comparison import differing, names, page_of_all
from experiments.report.heatmaps import coverage
from experiments.report.reading import Alphas, Run, read_run
from experiments.report.series import curves
from experiments.report.single import changed_options, events, lead, page_of
from strategies.records import AbsenceLine, DeviceLine, TrafficLine
from tapfl.pruning.plan import read_plan

HOSTILE = (
    "</script><script>window.pwned = 1</script>",
    "<img src=x onerror='window.pwned = 1'>",
    "<!--",
    "{{ 7 * 7 }}",
    '" onmouseover="window.pwned = 1',
    "five",
    "a\u2028b",
    "& sons",
    "8",
    "9",
)
FIGURES = {
    *(
        "accuracy",
        "curves",
        "alpha",
        "alpha-oracle",
        "partition",
        "metric-classes",
        "coverage",
        "kept-attention",
        "kept-ffn",
    ),
    *("bytes", "simulated-rounds", "real-phases", "real-rounds"),
}


@pytest.fixture(scope="module")
def run(reported: tuple[Path, str]) -> Run:
    return read_run(reported[0])


@pytest.fixture(scope="module")
def page(run: Run) -> Page:
    return page_of(run)


@pytest.fixture(scope="module")
def drawn(page: Page) -> dict[str, Figure]:
    return {figure.name: figure for figure in page.figures}


@pytest.fixture
def _made_once(page: Page, monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands get the page that is made already."""
    monkeypatch.setattr("experiments.report.single.page_of", lambda run: page)


@pytest.fixture(scope="module")
def summary(reported: tuple[Path, str]) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((reported[0] / "summary.json").read_text())
    return content


def rows(figure: Figure, *keys: str) -> list[dict[str, Any]]:
    """Returns those rows of a figure's description, as a browser gets it, that have these fields."""
    return [row for values in figure.spec["datasets"].values() for row in values if set(keys) <= row.keys()]


def altered(run: Path, folder: Path, change: Callable[[Path], object]) -> Run:
    copy = folder / "copy"
    shutil.copytree(run, copy)
    change(copy)
    return read_run(copy)


# -- numbers ---------------------------------------------------------------------------------------------------------


def test_all_figures_are_there(drawn: dict[str, Figure], run: Run) -> None:
    assert drawn.keys() == FIGURES and not run.missing
    for figure in drawn.values():
        assert figure.spec["description"].startswith(figure.title) and len(figure.alt) > 30 and figure.rows


def test_accuracies_are_those_of_the_summary(drawn: dict[str, Figure], summary: dict[str, Any]) -> None:
    shown = {(row["device"], row["stage"]): row["accuracy"] for row in rows(drawn["accuracy"], "stage")}
    assert shown == {
        (record["device"], stage): record[f"{stage}_accuracy"]
        for record in summary["devices"]
        for stage in ("dense", "pruned", "global", "personal")
    }


def test_the_oracle_is_the_best_alpha_on_the_test_images(drawn: dict[str, Figure], run: Run) -> None:
    shown = {row["device"]: row for row in rows(drawn["alpha-oracle"], "device", "best")}
    assert shown.keys() == {record.device for record in run.equipped if record.rounds}
    for record in run.equipped:
        if record.rounds:
            tested = dict(zip(run.alphas[record.device].alpha, run.alphas[record.device].accuracy, strict=True))
            assert list(tested) == [0, 0.25, 0.5, 0.75, 1] and tested[0] == record.global_accuracy
            assert shown[record.device]["α"] == record.alpha
    assert Alphas(alpha=[0, 0.5, 1], accuracy=[0.2, 0.9, 0.9]).best == 0.75
    assert "oracle" in drawn["alpha-oracle"].title and "no choice uses the test images" in drawn["alpha-oracle"].alt


def test_curves_begin_at_the_pruned_models_and_end_at_the_summary(
    drawn: dict[str, Figure], summary: dict[str, Any]
) -> None:
    means = {(row["round"], row["kind"]): row["mean"] for row in rows(drawn["curves"], "mean")}
    assert means.keys() == {(t, kind) for t in range(3) for kind in ("personal", "global")}
    assert means[0, "personal"] == means[0, "global"] == pytest.approx(summary["pruned_accuracy"])
    assert means[2, "personal"] == pytest.approx(summary["personal_accuracy"])
    assert means[2, "global"] == pytest.approx(summary["global_accuracy"])
    last = {r["device"]: r["accuracy"] for r in rows(drawn["curves"], "accuracy") if r["kind"] == "personal"}
    assert last == {record["device"]: record["personal_accuracy"] for record in summary["devices"]}


def test_before_its_first_answer_a_device_has_the_accuracies_before_training(run: Run) -> None:
    """Those of the pruned model, except for the reference that is trained from the dense one."""
    references = {"alone": 0.9, "dense+alone": 0.9}
    devices = [device.model_copy(update={"reference_accuracies": references}) for device in run.devices]
    silent = replace(run, devices=devices, lines=[line for line in run.lines if not isinstance(line, DeviceLine)])
    means = curves(silent).groupby("kind")["accuracy"].mean()
    before = {model: np.mean([device.accuracy_of(model) for device in devices]) for model in ("pruned", "dense")}
    assert before["pruned"] != before["dense"] == pytest.approx(means.pop("dense+alone"))
    assert [*means] == pytest.approx([before["pruned"]] * 3)


def test_a_device_that_does_not_answer_keeps_its_value(run: Run, drawn: dict[str, Figure]) -> None:
    """In the middle of the run some devices dropped out; a mean over those that answered would differ."""
    heard = {line.device for line in run.of(DeviceLine) if line.round == 1}
    assert 0 < len(heard) < 4
    assert {r["device"] for r in rows(drawn["curves"], "accuracy") if r["round"] == 1} == {0, 1, 2, 3}


def test_alphas_end_at_the_summary(drawn: dict[str, Figure], summary: dict[str, Any]) -> None:
    shown = {row["device"]: row["α"] for row in rows(drawn["alpha"], "α", "device")}
    assert shown == {record["device"]: record["alpha"] for record in summary["devices"] if record["rounds"]}
    assert {row["α"] for row in rows(drawn["alpha"], "α", "device") if row["round"] == 0} == {0.0}


def test_the_partition_sums_to_the_images(drawn: dict[str, Figure], summary: dict[str, Any]) -> None:
    shown = rows(drawn["partition"], "train")
    for record in summary["devices"]:
        own = [row for row in shown if row["device"] == record["device"]]
        assert sum(row["train"] for row in own) == record["train_samples"]
        assert sum(row["test"] for row in own) == record["test_samples"]
        assert sum(1 for row in own if row["train"]) == record["classes"]
    assert {row["class"] for row in shown} <= set(HOSTILE)


def test_kept_widths_are_those_of_the_plans(drawn: dict[str, Figure], reported: tuple[Path, str]) -> None:
    shown = {
        (row["device"], row["layer"]): (row["kept"], row["units"], row["width"])
        for name in ("kept-attention", "kept-ffn")
        for row in rows(drawn[name], "kept")
    }
    for i in range(4):
        plan = read_plan(reported[0] / "plans" / f"{i:02d}.json")
        for layer in plan.layers:
            kept, units, width = shown.pop((i, layer.name))
            assert (kept, units) == (len(layer.kept), layer.units)
            assert eval(width.replace("x", "*")) == kept  # heads x dims
    assert not shown


def test_the_metric_sets_are_counted(drawn: dict[str, Figure], run: Run, reported: tuple[Path, str]) -> None:
    for row in drawn["coverage"].rows:
        i = row["device"]
        images = json.loads((reported[0] / "devices" / f"{i:02d}" / "images.json").read_text())
        chosen = json.loads((reported[0] / "metric-sets" / f"{i:02d}.json").read_text())
        assert sum(chosen["metric"]) == 64 and sum(chosen["pool"]) == round(0.8 * 1797)
        own = np.array(images["train"]) > 0
        assert row["own share"] == pytest.approx(np.array(chosen["metric"])[own].sum() / 64)
        assert row["by chance"] == pytest.approx(np.array(chosen["pool"])[own].sum() / 1438)
        assert row["covered"] == np.count_nonzero(np.array(chosen["metric"])[own])
    assert sum(row["images"] for row in drawn["metric-classes"].rows) == 4 * 64


def test_mixtures_of_one_component_are_named_and_explained(reported: tuple[Path, str], run: Run) -> None:
    for device in run.devices:
        file = reported[0] / "summaries" / f"{device.device:02d}.safetensors"
        assert device.components == len(load_file(file)["weights"]) > 0

    def caption(rule: str, components: tuple[int, ...], classes: int = 3) -> str:
        devices = [
            record.model_copy(update={"components": k, "classes": classes})
            for record, k in zip(run.devices, components, strict=True)
        ]
        figure = coverage(replace(run, devices=devices, config=run.config | {"metric.rule": rule}))
        assert figure is not None
        return figure.alt

    coarse = caption("density-ratio", (1, 3, 1, 1))
    assert "The mixture of devices 0, 2, 3 has one component" in coarse and "between a device's classes" in coarse
    assert "the same as top-likelihood" in caption("component-quota", (1, 2, 2, 2))
    assert "one component" not in caption("random", (1, 1, 1, 1))
    assert "one component" not in caption("density-ratio", (2, 2, 2, 0))
    assert "one component" not in caption("density-ratio", (1, 1, 1, 1), classes=1)


def test_bytes_and_time_sum_to_the_summary(drawn: dict[str, Figure], summary: dict[str, Any]) -> None:
    shown = rows(drawn["bytes"], "direction")
    for direction in ("up", "down"):
        assert sum(r["bytes"] for r in shown if r["direction"] == direction) == summary[f"bytes_{direction}"]
    rounds = rows(drawn["simulated-rounds"], "slowest")
    assert sum(row["seconds"] for row in rounds) == pytest.approx(summary["simulated_seconds"])
    assert [row["round"] for row in rounds] == [0, 1, 2]
    phases = {row["phase"]: row["seconds"] for row in rows(drawn["real-phases"], "phase")}
    assert list(phases.values()) == list(summary["seconds"].values())


def test_the_header_has_the_numbers_of_the_summary(run: Run, summary: dict[str, Any]) -> None:
    what, result, cost = lead(run)
    assert "4 devices took part" in what and "dirichlet" in what and "2 rounds" in what
    assert f"{summary['personal_accuracy']:.3f}" in result and f"{summary['dense_accuracy']:.3f}" in result
    best = max(summary["devices"], key=lambda d: d["personal_accuracy"] - d["pruned_accuracy"])
    assert f"device {best['device']} most" in result or "helped no device" in result
    assert f"{summary['bytes_up'] / 1e3:.1f} kB" in cost


def test_absences_are_listed_with_their_reason(run: Run) -> None:
    lost = [line for line in run.of(AbsenceLine) if line.reason == "dropped out"]
    assert lost
    (row,) = [row for row in events(run).rows if row[-1] == "dropped out"]
    assert row[0] == "absence" and row[2] == str(len(lost))


def test_options_that_are_not_the_defaults_come_first(run: Run) -> None:
    shown = {row[0]: row[1:] for row in changed_options(run).rows}
    assert shown["devices.dropout"] == ["0.4", "0.0"] and "out" not in shown and "pruning.tau" not in shown


# -- what is written ---------------------------------------------------------------------------------------------------


def test_a_run_leaves_its_report_and_says_where(reported: tuple[Path, str]) -> None:
    folder, said = reported
    assert said.rstrip().endswith(f"\nreport: {folder / 'report.html'}")
    assert not (folder / "figures").exists()


@pytest.fixture(scope="module")
def pictures(reported: tuple[Path, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_report([read_run(reported[0])], tmp_path_factory.mktemp("pictures")).parent / "figures"


def test_a_report_draws_every_figure_in_the_given_folder(pictures: Path, reported: tuple[Path, str]) -> None:
    assert {file.stem for file in pictures.iterdir()} == FIGURES and pictures.with_name("report.html").is_file()
    assert not (reported[0] / "figures").exists()


@pytest.mark.parametrize("name", sorted(FIGURES))
def test_pictures_are_not_blank(name: str, pictures: Path) -> None:
    picture = Image.open(pictures / f"{name}.png").convert("RGB")
    assert picture.width * picture.height > 400_000
    colours = picture.getcolors(2**24)
    assert max(colours)[1] == (255, 255, 255)
    assert sum(count for count, colour in colours if max(colour) - min(colour) > 60) > 300  # more than grey text


def test_the_page_requests_nothing_and_escapes_everything(reported: tuple[Path, str]) -> None:
    page = (reported[0] / "report.html").read_text()
    assert "default-src 'none'" in page and "unsafe-eval" not in page
    assert page.count("<script") == page.count("</script") == 3
    for name in HOSTILE[:2]:
        assert name not in page
    assert "&lt;b&gt;one" in page and "<b>one" not in page
    assert "{{ 7 * 7 }}" in page  # names are not parsed as templates either


@given(st.recursive(st.text() | st.floats(allow_nan=False, allow_infinity=False), lambda each: st.lists(each)))
def test_json_in_a_script_element_is_the_same_and_ends_no_element(content: Any) -> None:
    text = for_script(content)
    assert json.loads(text) == content and not set("<>&\u2028\u2029") & set(text)


@pytest.mark.usefixtures("_made_once")
def test_no_report_with_no_report(reported: tuple[Path, str], tmp_path: Path) -> None:
    """The run is finished, so `--resume` only prints the table and writes the report."""
    folder = shutil.copytree(reported[0], tmp_path / "run")
    (folder / "report.html").unlink()
    resume(folder, "--no-report")
    assert not (folder / "report.html").exists()
    resume(folder)
    assert (folder / "report.html").read_text().count("<figure") == len(FIGURES)


def test_a_figure_is_drawn_whatever_text_is_in_the_run(tmp_path: Path) -> None:
    """The drawing library aborts the process if a text has characters that SVG does not allow."""
    names = ["\x00", "\x1b[2J", "\x08", "\ufffe", "\ud800"]
    bars = chart("rows").mark_bar().encode(x="name:N", y="count:Q")
    rows = [{"name": name, "count": 1} for name in names]
    write_figure(Figure("odd", "".join(names), "", bars, {"rows": rows}, rows), tmp_path / "odd.png")
    assert Image.open(tmp_path / "odd.png").width > 720


@pytest.mark.usefixtures("_made_once")
def test_a_report_that_fails_does_not_fail_the_run(
    reported: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> None:
        raise OSError("no space left")

    folder = shutil.copytree(reported[0], tmp_path / "run")
    monkeypatch.setattr("experiments.figures.page.render", fails)
    said = resume(folder)
    assert "no report was written" in said and f"tapfl report {folder}" in said


def resume(folder: Path, report: str = "--report") -> str:
    """Resumes a finished run, whose options are in its folder, and returns the output."""
    done = CliRunner().invoke(
        cli.app, ["run", "--engine", "inprocess", report, "--resume", str(folder)], catch_exceptions=False
    )
    assert done.exit_code == 0, done.output
    return done.output


# -- what is missing ---------------------------------------------------------------------------------------------------


def forget(*names: str) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        for name in names:
            path = folder / name
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    return change


def damage(folder: Path) -> None:
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "device", "round": 1}\n{"kind": "rou\n[1]\n')


CASES: dict[str, tuple[Callable[[Path], object], Sequence[str], Iterable[str]]] = {
    "a deployment without clock and versions": (
        forget("devices", "timing.json", "versions.json"),
        ["Devices do not send them", "the versions of the packages are not known"],
        {"partition", "alpha-oracle", "real-rounds"},
    ),
    "older plans, of which one is missing, and damaged lines": (
        lambda folder: (forget("metric-sets", "plans/01.json")(folder), damage(folder)),
        [
            "The metric sets are missing",
            "The plans of device 1 are missing",
            "3 lines of metrics.jsonl are damaged",
        ],
        {"coverage", "metric-classes"},
    ),
    "no metrics": (
        forget("metrics.jsonl"),
        ["no curves, no times and no list of faults"],
        {"curves", "simulated-rounds"},
    ),
    "not finished": (forget("summary.json"), ["its state after round 2 of 2"], {"alpha-oracle"}),
    "before the first round": (
        forget("summary.json", "server"),
        ["its state before the first round"],
        FIGURES - {"real-phases", "real-rounds", "simulated-rounds"},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_missing_part_is_named_and_the_rest_is_shown(case: str, reported: tuple[Path, str], tmp_path: Path) -> None:
    change, sentences, gone = CASES[case]
    page = page_of(altered(reported[0], tmp_path, change))
    shown = {figure.name for figure in page.figures}
    assert all(sentence in " ".join(page.missing) for sentence in sentences)
    assert not shown & set(gone)
    if case != "no metrics":
        assert shown == FIGURES - set(gone)
    if case == "before the first round":
        assert "What this report cannot show" in render(page)


def test_without_the_devices_the_server_knows_the_classes(reported: tuple[Path, str], run: Run, tmp_path: Path) -> None:
    """With `adapters.head=class-rows` devices report which classes they have, which is enough for the coverage."""
    before, after = coverage(run), coverage(altered(reported[0], tmp_path, forget("devices")))
    assert before is not None and after is not None and before.rows == after.rows


# -- refused -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", [None, "{}", "[1]", "nonsense", '{"a": {}}'])
def test_a_folder_that_is_not_a_run_is_refused(
    content: str | None,
    reported: tuple[Path, str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = tmp_path / "folder"
    if content is not None:
        folder.mkdir()
        (folder / "config.json").write_text(content)
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["tapfl", "report", str(reported[0]), str(folder)])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    out, err = capsys.readouterr()
    assert stopped.value.code == 2 and not out and len(err.strip().splitlines()) == 1
    assert f"report {folder}: is not a run's folder" in err and sorted(tmp_path.rglob("*")) == before


@pytest.mark.usefixtures("_made_once")
def test_a_place_that_cannot_be_written_is_refused(
    reported: tuple[Path, str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr("sys.argv", ["tapfl", "report", str(reported[0]), "--out", str(tmp_path / "file")])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 2
    assert f"--out {tmp_path / 'file'}: cannot be written" in capsys.readouterr().err


# -- several runs ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def others(reported: tuple[Path, str], tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The run, and another one with one round less, FedAvg, and the same folder name elsewhere."""
    folder = tmp_path_factory.mktemp("others") / reported[0].name
    options = ["personalize.method=fedavg", "train.rounds=1"]
    done = tapfl("--out", str(folder), cache=reported[0].parent / "cache", options=options)
    assert done.exit_code == 0, done.output
    return [reported[0], folder]


def test_several_runs_are_told_apart(others: list[Path]) -> None:
    runs = [read_run(path) for path in others]
    called = names(runs)
    assert len(set(called)) == 2 and all(name.endswith(others[0].name) for name in called)
    assert names([runs[0], runs[0]]) == [runs[0].path.name, f"{runs[0].path.name} (2)"]
    assert {"personalize.method", "train.rounds", "data.source"} <= set(differing(runs))
    assert "out" not in differing(runs)
    page = page_of_all(runs)
    results = page.sections[0].table
    assert results is not None
    for row, run in zip(results.rows, runs, strict=True):
        shown = dict(zip(results.columns, row, strict=True))
        assert shown["personal"] == f"{run.summary.personal_accuracy:.3f}"
        assert shown["personalize.method"] == run.config["personalize.method"]
    curves = [figure for figure in page.figures if figure.group == "curves"]
    assert [figure.choice for figure in curves] == ["rounds", "bytes", "simulated time"]
    for run, name in zip(runs, called, strict=True):
        last = {figure.name: [row for row in figure.rows if row["run"] == name][-1] for figure in curves}
        assert last["curves-over-round"]["round"] == run.rounds
        assert last["curves-over-seconds"]["seconds"] == pytest.approx(run.summary.simulated_seconds)
        assert all(row["accuracy"] == pytest.approx(run.summary.personal_accuracy) for row in last.values())
        evaluation = sum(
            sum(line.down.values()) + sum(line.up.values())
            for line in run.of(TrafficLine)
            if line.phase == "evaluation"
        )
        total = run.summary.bytes_up + run.summary.bytes_down
        assert last["curves-over-mb"]["MB"] * 1e6 == pytest.approx(total - evaluation)


def test_a_comparison_is_written_to_the_given_folder(
    others: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(cli.app, ["report", *map(str, others)], catch_exceptions=False)
    assert done.exit_code == 0 and "report/report.html" in done.stdout
    assert len(list((tmp_path / "report" / "figures").glob("*.png"))) == 6
    assert not any((other / "figures").exists() for other in others)


def test_more_runs_than_colours(run: Run) -> None:
    page = page_of_all([run] * 20)
    (figure,) = [figure for figure in page.figures if figure.choice == "rounds"]
    (dashes,) = [
        layer["encoding"]["strokeDash"]["scale"]["range"]
        for layer in figure.spec["layer"]
        if "strokeDash" in layer["encoding"]
    ]
    colours = [k % 8 for k in range(20)]
    assert len({(colour, tuple(dash)) for colour, dash in zip(colours, dashes, strict=True)}) == 20
