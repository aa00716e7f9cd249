"""Refused input: one line with option, value and what is accepted; exit code 2; nothing written."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from test_inprocess_run import SMALL
from typer.testing import CliRunner

from experiments import cli

REFUSED = {
    "unknown key": ("train.roundz=3", "train.roundz: is not an option", "rounds"),
    "unknown section": ("trian.rounds=3", "trian", "train"),
    "wrong type": ("train.rounds=many", "train.rounds = 'many'", "integer"),
    "no assignment": ("train.rounds", "train.rounds", "key=value"),
    "share over 1": ("devices.budgets=1.7", "devices.budgets = 1.7", "less than or equal to 1"),
    "share of 0": ("data.public-share=0", "data.public-share = 0", "greater than 0"),
    "choice": ("adapters.rule=median", "adapters.rule = 'median'", "embed_side, hetlora, flex, or module:name"),
    "unpaired": ("devices.budgets=0.3,0.5", "devices", "equally long"),
    "too many devices": ("devices.count=400", "devices.count = 400", "at most"),
    "too many classes": ("data.classes-per-device=11", "pathological", "11"),
    "class too small": ("data.public-share=0.001", "data.public-share = 0.001", "at least 2"),
    "no data named": ("data.source=", "data.source = ''", "at least 1 character"),
    "no such data": ("data.source=/no/such/place", "/no/such/place", "accepted"),
    "unknown model": ("model.name=vit_huge_patch99", "vit_huge_patch99", "timm has no such model"),
    "bad model arguments": ("model.args=img_size", "model.args", "key=value"),
    "no such weights": ("model.weights=/no/such.safetensors", "/no/such.safetensors", "accepted"),
    "rows without weights": ("model.head=rows", "model.head = 'rows'", "model.weights"),
    "metric set over pool": ("metric.size=4096", "metric.size = 4096", "898"),
    "metric set in parts": ("metric.size=100", "size=100", "multiple of batch=64"),
    "budget too small": ("devices.budgets=0.01,0.3,0.5", "budget 0.01", "can"),
    "unknown criterion": ("pruning.criterion=tapp", "pruning.criterion = 'tapp'", "tap, tap+, taylor"),
    "fine-tune set over pool": ("pruning.recovery-size=4096", "pruning.recovery-size = 4096", "898"),
    "no steps of reconstruction": ("pruning.compensation-steps=0", "pruning.compensation-steps = 0", "greater than"),
    "all images held out": ("pruning.recovery-held-out=1", "pruning.recovery-held-out = 1", "less than 1"),
    "an unknown compensation": ("pruning.compensation=both", "pruning.compensation = 'both'", "'reconstruction'"),
    "nobody asked": ("devices.participation=0", "devices.participation = 0", "greater than 0"),
    "all drop out": ("devices.dropout=1", "devices.dropout = 1", "less than 1"),
    "negative deadline": ("devices.deadline=-1", "devices.deadline = -1", "greater than or equal to 0"),
    "no such profiles": ("devices.profiles=/no/such.toml", "devices.profiles = '/no/", "equal, tiers, mobile"),
    "success over 1": ("faults.min-success=1.5", "faults.min-success = 1.5", "less than or equal to 1"),
    "no time at all": ("faults.device-timeout=0", "faults.device-timeout = 0", "greater than 0"),
    "nothing to go on with": ("resume=true", "resume = true", "needs out, the folder of the run"),
    "neither yes nor no": ("resume=maybe", "resume = 'maybe'", "boolean"),
    "rounds without end": ("train.rounds=1000000000000000000000000000000", "train.rounds = 1", "less than or equal to"),
    "batch without end": ("train.batch=1000000000000000000000000000000", "train.batch = 1", "less than or equal to"),
    "devices without end": ("devices.count=1000000000000", "devices.count = 1000000000000", "less than or equal"),
    "a rank without end": ("devices.ranks=4,6,1000000", "rank 1000000", "accepted: ≤ 256"),
    "images too small": ("data.image-size=64", "data.image-size: is not an option", "public-share"),
    "a crop of nothing": ("model.crop-pct=-0.5", "model.crop-pct = -0.5", "greater than or equal to 0"),
    "four channels": ("model.args=img_size=8,patch_size=2,in_chans=4", "in_chans=4", "1 (grey) or 3 (colour)"),
    "two channels": ("model.mean=0.4,0.5", "model.mean = (0.4, 0.5)", "accepted: 3, or 1 for all channels"),
    "an odd interpolation": ("model.interpolation=cubic", "model.interpolation = 'cubic'", "bicubic"),
    "a backbone without end": ("model.args=depth=1000000000", "depth=1000000000", "beyond 65536"),
    "thousands of digits": (f"train.rounds={'9' * 5000}", "train.rounds = '999", "integer"),
    "a backbone of digits": (f"model.args=depth={'9' * 5000}", "model.args", "depth"),
    "thousands of brackets": (f"train.rounds={'[' * 100_000}", "train.rounds = '[[", "integer"),
    "a key that clears the screen": ("\x1b[2J=1", "'\\x1b[2J': is not an option", "seed"),
    "a rate of infinity": ("train.learning-rate=1e309", "train.learning-rate = inf", "finite"),
    "a rate of nothing": ("train.learning-rate=NaN", "train.learning-rate = nan", "finite"),
    "budget too fine": ("pruning.align=16", "budget 0.3", "pruning.align"),
}


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TAPFL_CACHE", str(tmp_path / "cache"))


def refused(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: str) -> str:
    monkeypatch.setattr("sys.argv", ["tapfl", "run", "--engine", "inprocess", *arguments])
    monkeypatch.setattr("strategies.progress.SILENCE", (1e9, 1e9))  # on a busy machine the checks may take 10 s
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    out, err = capsys.readouterr()
    assert stopped.value.code == 2 and not out
    assert "Traceback" not in err and len(err.strip().splitlines()) == 1
    return err


@pytest.mark.parametrize("case", REFUSED)
def test_options(
    case: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    option, named, accepted = REFUSED[case]
    error = refused(capsys, monkeypatch, "--set", option)
    assert named in error and accepted in error
    assert not list(tmp_path.iterdir())


def test_a_basis_that_the_criterion_does_not_support(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    options = ["--set", "pruning.criterion=lowrank-heads", "--set", "pruning.basis=none"]
    error = refused(capsys, monkeypatch, *options)
    assert "pruning.basis = 'none'" in error and "lowrank-heads needs 'canonical'; accepted: auto" in error
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("text", ["seed = " + "[" * 100_000, "seed = " + "9" * 5000])
def test_toml_without_end(
    text: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "a.toml").write_text(text)
    assert "a.toml: is not TOML" in refused(capsys, monkeypatch, "--config", "a.toml")


FILES = {
    "sweep.toml": '[grid]\n"train.roundz" = [1]\n',
    "search.toml": '[space]\n"train.roundz" = { low = 1, high = 2 }\n',
    "compare.toml": '[compare]\ncriterion = ["tapp"]\n',
}
BEFORE_TORCH = [
    "run --set train.roundz=1",
    "run --set pruning.criterion=tapp",
    "run --out .",
    "run --resume nowhere",
    "run --engine ray --address head",
    "sweep --config sweep.toml --out out",
    "search --config search.toml --out out",
    "search --config search.toml --out out --workers 2",
    "compare --config compare.toml --out out",
    "prune --budget 0.5 --out out --set train.roundz=1",
    "prune --budget 1.5 --out out",
    "prune --budget 0.5 --out out --criterion tapp",
    "prune --plan plan --out out --set train.roundz=1",
]


SLOW = {"torch", "timm", "flwr", "ray", "scipy", "sklearn", "pandas", "matplotlib"}  # a tenth of a second to two each


PROGRAM = """
import contextlib, io, json, sys
from experiments import cli
for command in sys.argv[1:]:
    sys.argv[1:] = command.split()
    out, err = (io.TextIOWrapper(io.BytesIO(), "utf-8") for _ in range(2))
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            cli.main()
        except SystemExit as ended:
            code = ended.code
    print(json.dumps([command, code, *(each.seek(0) or each.read() for each in (out, err)), [*sys.modules]]))
"""


def ended(*commands: str) -> Iterator[tuple[str, int, str, str, set[str]]]:
    """Calls commands in one new process; yields each with its exit code, outputs and the modules imported so far."""
    arguments = [sys.executable, "-c", PROGRAM, *commands]
    here = os.environ | {"PYTHONPATH": str(Path(cli.__file__).parent.parent)}
    done = subprocess.run(arguments, capture_output=True, text=True, env=here, check=True, timeout=60)
    for line in done.stdout.splitlines():
        command, code, out, err, loaded = json.loads(line)
        yield command, code, out, err, set(loaded)


def test_a_bad_option_is_refused_before_anything_slow_is_loaded(tmp_path: Path) -> None:
    """Importing torch takes seconds, and a minute on a busy machine."""
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    told = list(ended(*BEFORE_TORCH))
    assert [command for command, *_ in told] == BEFORE_TORCH
    for command, code, out, err, loaded in told:
        assert code == 2 and not out and err.startswith("tapfl: ") and len(err.splitlines()) == 1, command
        assert not loaded & SLOW, command
    assert {file.name for file in tmp_path.iterdir()} == set(FILES)


def test_help_loads_no_options_and_nothing_slow() -> None:
    for command, code, out, _, loaded in ended("--help", "run --help"):
        assert code == 0 and "Usage" in out, command
        assert not loaded & {*SLOW, "numpy", "pydantic", "grpc", "optuna"}, command


def test_actor_resources_must_be_finite() -> None:
    done = CliRunner().invoke(cli.app, ["run", "--engine", "ray", "--actor-cpus", "nan"])
    assert done.exit_code == 2 and "nan is not a finite number" in done.output


def test_every_invalid_option_is_named_at_once(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["tapfl", "run", "--set", "seed=-1", "--set", "train.rounds=0"])
    with pytest.raises(SystemExit):
        cli.main()
    error = capsys.readouterr().err
    assert "seed = -1" in error and "train.rounds = 0" in error


def test_an_output_folder_that_exists(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    assert "exists already" in refused(capsys, monkeypatch, "--out", "mine")
    assert [file.name for file in (tmp_path / "mine").iterdir()] == ["thesis.tex"]


def test_a_folder_that_was_deleted(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert "was deleted; accepted: cd to an existing folder" in refused(capsys, monkeypatch)


def test_a_missing_or_invalid_config(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert "none.toml" in refused(capsys, monkeypatch, "--config", "none.toml")
    (tmp_path / "bad.toml").write_text("[train\n")
    assert "is not TOML" in refused(capsys, monkeypatch, "--config", "bad.toml")
    (tmp_path / "odd.toml").write_text("[train]\nrounds = 'x'\n")
    assert "train.rounds = 'x'" in refused(capsys, monkeypatch, "--config", "odd.toml")


def test_weights_that_do_not_fit_the_backbone(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    save_file({"blocks.0.attn.qkv.weight": torch.zeros(3, 3)}, tmp_path / "other.safetensors")
    error = refused(capsys, monkeypatch, "--set", "model.weights=other.safetensors")
    assert "other.safetensors" in error and "do not fit" in error


def test_a_backbone_that_diverged(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    options = [*SMALL, "cache=cache", "model.learning-rate=1e20"]
    sets = [part for option in options for part in ("--set", option)]
    monkeypatch.setattr("sys.argv", ["tapfl", "run", "--engine", "inprocess", *sets])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and "Traceback" not in said
    assert "tapfl: model.learning-rate = 1e+20: dense backbone diverged at step 2 of" in said.splitlines()[-1]
    assert not list((tmp_path / "cache" / "backbones").glob("*"))


def test_head_rows_that_lack_a_class(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    save_file({"head.weight": torch.zeros(1000, 64), "head.bias": torch.zeros(1000)}, tmp_path / "w.safetensors")
    (tmp_path / "rows.json").write_text(json.dumps({str(digit): digit for digit in range(9)}))
    options = ["model.weights=w.safetensors", "model.head=rows", "model.head-rows=rows.json"]
    error = refused(capsys, monkeypatch, *(part for option in options for part in ("--set", option)))
    assert "rows.json" in error and "'9'" in error


def test_a_hub_that_cannot_be_reached_leaves_nothing_behind(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "none"))
    options = ["model.weights=hub", "model.name=deit_tiny_patch16_224", "model.args=img_size=32", "pruning.align=8"]
    sets = [part for option in options for part in ("--set", option)]
    assert "model.weights = 'hub': no weights" in refused(capsys, monkeypatch, *sets, "--out", "run")
    assert not (tmp_path / "run").exists()
    sets += ["--set", "model.head=rows"]
    assert "needs model.head-rows" in refused(capsys, monkeypatch, *sets, "--out", "run")
