"""`tapfl search` from its file to its results on real federations, what it refuses, and shared round zero."""

from __future__ import annotations

import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any
from unittest.mock import patch

import optuna
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState, create_trial
from test_inprocess_run import SMALL, content
from test_records import a_summary
from typer.testing import CliRunner

from clients.device import Device
from experiments import cli
from experiments.bench.search import METHODS, Toy, search
from experiments.figures.page import render
from experiments.jobs.federation import AFTER, AFTER_SUMMARIES, BUT, carry_out, in_process
from experiments.jobs.pool import ThreadPool, unheard
from experiments.search.page import page_of_search
from experiments.search.sampler import violation_key
from experiments.search.settings import MEASURES, read_search
from experiments.search.study import best_trial, run_search
from strategies import round_zero
from strategies.records import DeviceRecord, Summary
from tapfl.config import RunConfig
from tapfl.errors import ConfigError, RunError
from tapfl.options import parse_assignment
from tapfl.run_folder import only_one

RATE = "train.learning-rate"
SEARCH = '[search]\nmax-rounds = 2\neta = 2\nbrackets = 1\nkeep = "best"\n'
SPACE = '[space]\n"train.learning-rate" = { low = 1e-3, high = 1e-2, log = true }\n'


def search_file(folder: Path, search: str = SEARCH, space: str = SPACE) -> Path:
    small = [*SMALL, f"cache={folder / 'cache'}"]
    lines = [f'"{k}" = {json.dumps(v)}' for k, v in (parse_assignment(o) for o in small if "rounds" not in o)]
    file = folder / "search.toml"
    file.write_text("\n".join(lines) + f"\n{search}{space}")
    return file


def command(file: Path, out: Path, *more: str) -> list[str]:
    return ["search", "--config", str(file), "--out", str(out), "--jobs", "1", *more]


# -- the whole -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The folder of a search, with its file next to it, and its output; in this process, as new ones take seconds."""
    folder = tmp_path_factory.mktemp("search")
    arguments = command(search_file(folder), folder / "out", "--json")
    with patch("experiments.jobs.federation.ProcessPool", ThreadPool):
        done = CliRunner().invoke(cli.app, arguments, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return folder / "out", json.loads(done.stdout.splitlines()[-1])


def test_a_search_ends_with_options_that_run_accepts(finished: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    out, said = finished
    rows = table(out)
    assert sorted(row["state"] for row in rows) == ["complete", "pruned"]
    best = rows[said["trial"]]
    assert float(best["loss@2"]) == said["loss"] and float(best[RATE]) == said["params"][RATE]
    assert "evaluate" not in (out / "best.toml").read_text(), "a run reports on the test part"
    again = ["run", "--engine", "inprocess", "--config", str(out / "best.toml"), "--out", str(tmp_path / "run")]
    again += ["--set", "data.evaluate=validation"]  # as in the trials
    run = CliRunner().invoke(cli.app, [*again, "--json"], catch_exceptions=False)
    accuracy = json.loads(run.stdout.splitlines()[-1])["personal_accuracy"]
    assert 1 - accuracy == said["loss"], "a run with the best options comes to what the trial came to"
    assert content(tmp_path / "run") == content(out / "trials" / f"{said['trial']:04d}")
    (loser,) = {"0000", "0001"} - {f"{said['trial']:04d}"}
    assert {file.name for file in (out / "trials" / loser).iterdir()} >= {"summary.json", "metrics.jsonl", "plans"}
    assert not any((out / "trials" / loser / heavy).exists() for heavy in ("server", "devices"))


def test_the_page_contains_its_figures_and_the_study_is_optunas(finished: tuple[Path, dict[str, Any]]) -> None:
    out, said = finished
    page = (out / "search.html").read_text()
    figures = re.findall(r'data-figure="(\w+)"', page)
    assert figures == ["history", "configurations", "rounds"] and "The importance of options" in page  # one completed
    assert "default-src 'none'" in page and "<script src=" not in page and len(page) > 8e5, "the library is in it"
    study = optuna.load_study(
        study_name="search", storage=JournalStorage(JournalFileBackend(str(out / "study.journal")))
    )
    assert len(study.trials) == 2 and study.best_trial.number == said["trial"]


def test_the_page_of_a_search_shows_the_results_of_the_trials() -> None:
    study = optuna.create_study()
    space: dict[str, Any] = {"rate": FloatDistribution(1e-4, 1e-1, log=True), "batch": IntDistribution(8, 16)}
    space |= {"rule": CategoricalDistribution(["a", "</script>"])}
    tried = [(1e-4, 8, "a"), (1e-1, 16, "</script>"), (1e-2, 12, "a"), (1e-3, 16, "a")]
    for k, values in enumerate(tried):
        losses = {1: 0.9 - 0.1 * k} | ({3: 0.8 - 0.1 * k} if k < 3 else {})
        ended: Any = {"state": TrialState.COMPLETE, "value": losses[3]} if k < 3 else {"state": TrialState.PRUNED}
        params = dict(zip(space, values, strict=True))
        study.add_trial(create_trial(params=params, distributions=space, intermediate_values=losses, **ended))
    study.add_trial(create_trial(state=TrialState.FAIL, intermediate_values={1: float("nan")}))
    page = page_of_search(study, [1, 3], "loss (mean)", *best_trial(study.trials))
    drawn = {figure.name: figure.spec["datasets"] for figure in page.figures}
    assert list(drawn) == ["history", "importances", "configurations", "rounds"]
    assert [row["best"] for row in drawn["history"]["trials"]] == pytest.approx([0.8, 0.7, 0.6])
    assert sum(row["importance"] for row in drawn["importances"]["options"]) == pytest.approx(1)
    places = {(row["trial"], row["option"]): row["place"] for row in drawn["configurations"]["trials"]}
    assert places[0, "rate"] == 0 and places[1, "rate"] == 1 and places[2, "rate"] == pytest.approx(2 / 3)
    assert places[2, "batch"] == 0.5 and places[0, "rule"] == 0.25 and len(places) == 3 * 3
    assert {row["round"] for row in drawn["rounds"]["rungs"]} == {1, 3} and len(drawn["rounds"]["trials"]) == 7
    assert "5 trials: 3 complete, 1 fail, 1 pruned" in page.lead[0] and "trial is 2" in page.lead[1]
    assert render(page).count("</script>") == 3
    pruned = optuna.create_study()
    pruned.add_trial(create_trial(state=TrialState.PRUNED, intermediate_values={1: 0.5}))
    short = page_of_search(pruned, [1, 3], "loss", *best_trial(pruned.trials))
    assert [figure.name for figure in short.figures] == ["rounds"] and "importance" in short.missing[0]
    assert "trial is 0, loss 0.5 after 1 rounds" in short.lead[1]


def test_the_page_and_the_best_options_name_the_same_trial_if_the_least_loss_violates_a_constraint() -> None:
    study = optuna.create_study()
    for loss, violation in ((0.2, 0.5), (0.4, 0.0), (0.3, 0.0), (0.1, 0.1)):
        shared: Any = {"params": {"rate": loss}, "distributions": {"rate": FloatDistribution(0, 1)}}
        attributes = {violation_key(3): violation}
        study.add_trial(create_trial(value=loss, intermediate_values={3: loss}, user_attrs=attributes, **shared))
    best, rounds = best_trial(study.trials)
    page = page_of_search(study, [3], "loss", best, rounds)
    drawn = {figure.name: figure for figure in page.figures}
    assert best.number == 2 and "The best trial is 2, loss 0.3 " in page.lead[1]
    assert [row["best"] for row in drawn["history"].spec["datasets"]["trials"]] == [0.2, 0.4, 0.3, 0.3]
    assert "to 0.3, the best of 4" in drawn["history"].alt and "trial is 2." in drawn["configurations"].alt


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_an_interrupted_search_leaves_no_process_and_can_be_resumed(
    number: int, finished: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    file, out = finished[0].parent / "search.toml", tmp_path / "out"
    arguments = [sys.executable, "-m", "experiments.cli", *command(file, out)]
    searching = subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True, start_new_session=True)
    until(lambda: (out / "trials" / "0001" / "server").exists() or searching.poll() is not None)
    if number != signal.SIGKILL:
        (os.killpg if number == signal.SIGINT else os.kill)(searching.pid, number)  # Ctrl-C goes to the whole group
        _, said = searching.communicate(timeout=60)
        assert searching.returncode == 130 and "--resume" in said and "Traceback" not in said
    else:
        searching.kill()
        searching.wait()
    until(lambda: not running(searching.pid))
    assert not (out / "trials.csv").exists()
    done = CliRunner().invoke(cli.app, command(file, out, "--resume"), catch_exceptions=False)
    assert done.exit_code == 0 and table(out) == table(finished[0])


def test_only_one_search_can_use_a_folder(tmp_path: Path) -> None:
    with only_one(tmp_path, "search"), pytest.raises(ConfigError, match="another search"), only_one(tmp_path, "search"):
        pass


def table(out: Path) -> list[dict[str, str]]:
    with (out / "trials.csv").open() as file:
        return list(csv.DictReader(file))


def until(condition: Callable[[], bool], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def running(session: int) -> list[int]:
    """Returns the processes of a session, without zombies."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            state, _, _, its = stat.read_text().rpartition(")")[2].split()[:4]
            if int(its) == session and state != "Z":
                found.append(int(stat.parent.name))
    return found


def test_a_device_without_a_model_saves_no_macs() -> None:
    known = a_summary().devices
    without = DeviceRecord(device=7, profile=known[0].profile, train_samples=9)
    assert MEASURES["macs"](a_summary(devices=[*known, without])) == known[0].macs_share


# -- round zero ------------------------------------------------------------------------------------------------------


def test_round_zero_is_shared_by_runs_with_the_same_options_for_it(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = {"summaries": 0, "plans": 0}
    summarize, model = Device.summarize, round_zero.device_model

    def counted_summarize(self: Device, message: object) -> object:
        calls["summaries"] += 1
        return summarize(self, message)  # type: ignore[arg-type]

    def counted_model(*arguments: object) -> object:
        calls["plans"] += 1
        return model(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(Device, "summarize", counted_summarize)
    monkeypatch.setattr(round_zero, "device_model", counted_model)
    two = ["devices.count=2", "data.public-share=0.9"]
    options = dict(parse_assignment(option) for option in [*SMALL, *two, f"cache={cache}"])
    one_round(options, tmp_path / "trials" / "0000")
    assert calls == {"summaries": 2, "plans": 2}
    other = options | {"pruning.tau": 0.3}
    changes = [({"train.learning-rate": 0.01}, 0, 0), ({"summary.dim": 8}, 2, 2), ({"pruning.tau": 0.3}, 0, 2)]
    for i, (change, summaries, plans) in enumerate(changes):
        calls.update(summaries=0, plans=0)
        summary = one_round(options | change, tmp_path / "trials" / f"000{i + 1}")
        assert calls == {"summaries": summaries, "plans": plans}, change
    alone = one_round(other, tmp_path / "alone" / "0003")
    assert [measure(summary) for measure in MEASURES.values()] == [measure(alone) for measure in MEASURES.values()]
    assert content(tmp_path / "alone" / "0003") == content(tmp_path / "trials" / "0003")


def one_round(options: dict[str, Any], folder: Path) -> Summary:
    return carry_out(unheard, options | {"train.rounds": 1}, folder, in_process)


def test_names_of_options_after_round_zero_exist() -> None:
    """Options that are not named are assumed to change round zero; an outdated name would have no effect."""
    for names in (AFTER, AFTER_SUMMARIES, BUT):
        for name in names:
            assert any(option.startswith(name) for option in RunConfig().flat()), name


# -- refused ---------------------------------------------------------------------------------------------------------

REFUSED = {
    "unknown option": ('"train.learning-rat" = { low = 1, high = 2 }', r"space\.train\.learning-rat: is not an option"),
    "the budget": ('"train.rounds" = { low = 1, high = 2 }', r"space\.train\.rounds: is the budget"),
    "a folder": ('out = { choices = ["a"] }', r"space\.out: changes no result"),
    "empty": ('"train.batch" = { low = 4, high = 4 }', "low=4 must be below high=4"),
    "upside down": ('"train.batch" = { low = 8, high = 4 }', "low=8 must be below high=4"),
    "log of 0": (
        '"train.learning-rate" = { low = 0, high = 1, log = true }',
        "needs low above 0 and no step, got low=0",
    ),
    "no choices": ('"adapters.rule" = { choices = [] }', "must be a list of values, at least one"),
    "twice": ('"adapters.rule" = { choices = ["flex", "flex"] }', "names a value twice"),
    "a bad choice": ('"adapters.rule" = { choices = ["flex", "fedex"] }', "'fedex' is not accepted: adapters.rule"),
    "out of range": ('"data.test-share" = { low = 0.5, high = 1.5 }', r"1\.5 is not accepted: data\.test-share"),
    "no number": ('"adapters.rule" = { low = 0, high = 1 }', "this option is not a number and needs choices"),
    "no whole number": ('"train.batch" = { low = 1, high = 2.5 }', "takes whole numbers, got low=1, high=2.5"),
    "text": (
        '"train.batch" = { low = "1", high = 2 }',
        r"space\.train\.batch\.low = '1': input should be a valid number",
    ),
    "bad step": (
        '"metric.size" = { low = 64, high = 200, step = 64 }',
        "high=200 minus low=64 is not a multiple of step=64",
    ),
    "a step that does not divide": (
        '"train.learning-rate" = { low = 0.001, high = 0.01, step = 0.004 }',
        "high=0.01 minus low=0.001 is not a multiple of step=0.004",
    ),
    "no criterion": (
        '"pruning.criterion" = { choices = ["tap", "tapp"] }',
        r"space\.pruning\.criterion: 'tapp' is not accepted: pruning\.criterion = 'tapp': there is no such criterion",
    ),
    "misspelt": ('"train.batch" = { low = 1, hihg = 2 }', r"space\.train\.batch\.high: field required"),
    "not a table": ('"train.batch" = [1, 2]', "needs low and high"),
    "condition below": (
        '"adapters.trim" = { low = 0.1, high = 0.2, if = { "adapters.combine" = "mean" } }',
        r"space\.adapters\.trim\.if: adapters\.combine must be in \[space\], before this option",
    ),
    "condition never": (
        '"adapters.combine" = { choices = ["mean", "median"] }\n'
        '"adapters.trim" = { low = 0.1, high = 0.2, if = { "adapters.combine" = "trimmed-mean" } }',
        "adapters.combine is never 'trimmed-mean', only mean, median",
    ),
    "condition of no value": (
        '"adapters.combine" = { choices = ["mean", "median"] }\n'
        '"adapters.clip" = { low = 0.1, high = 0.2, if = { "adapters.combine" = [] } }',
        r"space\.adapters\.clip\.if: adapters\.combine = \[\]: must be a value of this option, or a list of at least",
    ),
    "condition of a table": (
        '"adapters.combine" = { choices = ["mean", "median"] }\n'
        '"adapters.clip" = { low = 0.1, high = 0.2, if = { "adapters.combine" = { is = "mean" } } }',
        r"adapters\.combine = {'is': 'mean'}: must be a value of this option",
    ),
    "condition beyond a range": (
        '"train.epochs" = { low = 1, high = 5 }\n'
        '"adapters.clip" = { low = 0.1, high = 0.2, if = { "train.epochs" = [2, 9] } }',
        r"space\.adapters\.clip\.if: train\.epochs is never 9, only 1 to 5",
    ),
    "no space": ("", r"needs a table \[space\]"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_an_invalid_space_is_refused(name: str, tmp_path: Path) -> None:
    entry, message = REFUSED[name]
    with pytest.raises(ConfigError, match=message):
        read_search(search_file(tmp_path, space=f"[space]\n{entry}\n" if entry else ""))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("etaa = 3", r"search\.etaa: is not an option; accepted here: .*eta"),
        ("eta = 1.5", r"search\.eta = 1\.5"),
        ("min-rounds = 10", "min-rounds=10 must not be above max-rounds=9"),
        ('objective = "median"', "median is not a measure; accepted: mean, worst-decile"),
        ("objective = { mean = -1 }", "needs weights above 0"),
        ('constraints = "bytes_up>5"', "must have the form measure<=number"),
        ('constraints = ["macs<=0.5", "accuracy<=1"]', "'accuracy<=1' must have the form"),
        ("brackets = 1\nrounds = 100", "only one of them can be given"),
        ('eta = 2.5\nmethod = "tpe-hyperband"', "eta=2.5 must be a whole number with method=tpe-hyperband"),
        ('method = "grid"', r"search\.method = 'grid'"),
    ],
)
def test_invalid_settings_are_refused(line: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        read_search(search_file(tmp_path, search=f"[search]\n{line}\n"))


CHANGING = [
    '"train.schedule" = "cosine"\n',
    '[space]\n"train.schedule" = { choices = ["constant", "cosine"] }\n',
    '"train.schedule" = "cosine"\n[space]\n"train.optimizer" = { choices = ["sgd", "adam"] }\n'
    '"train.schedule" = { choices = ["constant"], if = { "train.optimizer" = "sgd" } }\n',
]
SEVERAL, ONE = "[search]\nmax-rounds = 9\n", "[search]\nmin-rounds = 4\nmax-rounds = 9\n"


@pytest.mark.parametrize("text", CHANGING)
def test_a_schedule_that_depends_on_the_rounds_needs_trials_of_one_rung(text: str, tmp_path: Path) -> None:
    """With it, `train.rounds` must not change when a run is continued, and a trial continues from rung to rung."""
    shared, _, space = text.partition("[space]\n")

    def read(search: str, method: str) -> object:
        file = search_file(tmp_path, search, SPACE + space)
        file.write_text(shared + file.read_text())
        return read_search(file, method)

    for method in ("bohb", "tpe-hyperband"):
        with pytest.raises(ConfigError, match=r"train\.schedule = 'cosine': .*; accepted: constant, or search\.method"):
            read(SEVERAL, method)
        read(ONE, method)
    read(SEVERAL, "random")


def test_the_check_of_a_search_counts_the_devices_of_changing_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = search_file(tmp_path)
    changing = '"data.partition" = "natural"\n"data.changing" = true\n'
    lines = [line for line in file.read_text().splitlines() if "devices.count" not in line]
    file.write_text(changing + "\n".join(lines))
    checked: list[int] = []

    def check(config: RunConfig) -> None:
        checked.append(config.devices.count)
        raise ConfigError("enough")

    monkeypatch.setattr("experiments.search.study.check", check)
    monkeypatch.setattr("experiments.feasible.devices_of", lambda config: 3)
    with pytest.raises(ConfigError, match="enough"):
        run_search(read_search(file), "search", tmp_path / "out", lambda: pytest.fail("started"))
    assert checked == [3]


def test_a_search_with_an_unknown_criterion_is_refused(tmp_path: Path) -> None:
    file = search_file(tmp_path)
    file.write_text(file.read_text().replace('"pruning.criterion" = "tap"', '"pruning.criterion" = "tapp"'))
    with pytest.raises(ConfigError, match=r"^pruning\.criterion = 'tapp': there is no such criterion"):
        read_search(file)


def test_a_step_is_compared_with_the_range_as_it_is_written(tmp_path: Path) -> None:
    space = '[space]\n"train.learning-rate" = { low = 0.1, high = 0.7, step = 0.2 }\n'  # 0.6 % 0.2 > 0 in floats
    (found,) = read_search(search_file(tmp_path, space=space)).space.distributions().values()
    assert found == FloatDistribution(0.1, 0.7, step=0.2)


def test_an_interrupted_search_names_the_command_that_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("experiments.search.study.run_search", interrupted)
    monkeypatch.setattr(os, "_exit", sys.exit)
    for begun, more, said in ((False, [], ""), (True, [], " and --resume"), (True, ["--resume"], "")):
        if begun:
            (tmp_path / "out" / "trials").mkdir(parents=True, exist_ok=True)
        done = CliRunner().invoke(cli.app, command(search_file(tmp_path), tmp_path / "out", *more))
        assert done.exit_code == 130
        assert done.stderr.endswith(f"tapfl: interrupted; continue with: the same command{said}\n")


def test_a_single_choice_is_accepted(tmp_path: Path) -> None:
    space = '[space]\n"train.learning-rate" = { low = 1e-3, high = 1e-2 }\n"adapters.rule" = { choices = ["fedit"] }\n'
    assert set(read_search(search_file(tmp_path, space=space)).space.parameters) == {
        "train.learning-rate",
        "adapters.rule",
    }


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--resume"], "--resume: there is no study in"),
        (["--storage", "mysql://nowhere/none"], "storage mysql://nowhere/none: cannot be used"),
    ],
)
def test_a_refusal_is_immediate_and_writes_nothing(more: list[str], message: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = CliRunner().invoke(cli.app, command(search_file(tmp_path), out, *more))
    assert (
        isinstance(done.exception, ConfigError) and message in str(done.exception) and "\n" not in str(done.exception)
    )
    assert not out.exists()


@pytest.mark.slow
def test_a_search_in_which_every_run_fails_says_why(tmp_path: Path) -> None:
    file = search_file(tmp_path, space='[space]\n"devices.profiles" = { choices = ["/no/such/file"] }\n')
    done = CliRunner().invoke(cli.app, command(file, tmp_path / "out"))
    assert isinstance(done.exception, RunError) and "/no/such/file" in str(done.exception)


# -- the toy ---------------------------------------------------------------------------------------------------------


def test_every_method_approaches_the_optimum_of_the_toy() -> None:
    toy = Toy(3)
    anywhere = {"speed": 1e-2, "x": 0.5, "y": 0.5, "n": 10, "kind": "a"}
    assert 0 <= toy.least() < toy.loss(anywhere, 27) < toy.loss(anywhere, 1)
    rows = list(search(seeds=2, rounds=[60, 200]))
    assert [row["method"] for row in rows] == list(METHODS)
    for row in rows:
        early, late = (float(row[f"{total} rounds"].split()[0]) for total in (60, 200))
        assert 0 <= late < 1 and early >= 0


def test_the_ready_search_is_valid() -> None:
    search = read_search(Path(__file__).parent.parent / "experiments" / "configs" / "search-digits.toml")
    assert search.rounds == 138 and len(search.space.parameters) == 8
