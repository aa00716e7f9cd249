"""A disk that is full or read-only, at any moment: one line that names the file, and a run that can be continued."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from representatives import some_slow
from test_inprocess_run import SMALL, content, tapfl

from experiments import cli
from strategies.records import METRICS, FailureLine, append_lines
from tapfl.errors import RunError
from tapfl.run_folder import RunFolder
from tapfl.store import write_bytes

OPTIONS = ["devices.count=2", "data.public-share=0.9", "personalize.held-out-share=0.1"]


@pytest.fixture(scope="module")
def whole(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "whole"
    assert tapfl("--out", str(folder), cache=cache, options=OPTIONS).exit_code == 0
    return folder


def fails_from(monkeypatch: pytest.MonkeyPatch, count: int, error: int) -> None:
    """Makes the file system refuse to finish any file from the `count`-th on."""
    real, calls = os.fsync, 0

    def refused(file: int) -> None:
        nonlocal calls
        calls += 1
        if calls >= count:
            raise OSError(error, os.strerror(error))
        real(file)

    monkeypatch.setattr(os, "fsync", refused)


FULL, READ_ONLY = errno.ENOSPC, errno.EROFS
# which file of a run cannot be written: its versions, a summary, plan, checkpoint, state or adapter
CASES = [(2, FULL), (6, READ_ONLY), (10, FULL), (16, READ_ONLY), (23, FULL), (31, READ_ONLY)]


@pytest.mark.parametrize(("count", "error"), some_slow(CASES, CASES[::2]))  # neighbours are similar
def test_a_run_whose_disk_was_full_resumes_to_the_same_bits(
    count: int, error: int, whole: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    with monkeypatch.context() as full:
        fails_from(full, count, error)
        with pytest.raises(RunError) as ended:
            tapfl("--out", str(folder), cache=cache, options=OPTIONS)
    said = str(ended.value)
    assert "\n" not in said and os.strerror(error) in said and str(folder) in said
    assert not [file for file in folder.rglob(".*") if file.name != ".lock"], "no half file is left"
    done = tapfl("--resume", str(folder), cache=cache, options=OPTIONS)
    assert done.exit_code == 0, done.output
    assert content(folder) == content(whole)


def test_a_folder_of_a_run_that_did_not_begin_is_removed(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fails_from(monkeypatch, 1, errno.ENOSPC)
    with pytest.raises(RunError, match=r"config\.json: No space left on device$"):
        tapfl("--out", str(tmp_path / "run"), cache=cache, options=OPTIONS)
    assert not list(tmp_path.iterdir())


def test_the_command_reports_it_in_one_line(
    tmp_path: Path, cache: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["tapfl", "sweep", "--config", "s.toml", "--out", "file/out"])
    monkeypatch.chdir(tmp_path)
    (tmp_path / "s.toml").write_text(f'[grid]\nseed = [0]\n[model]\nargs = "{SMALL[1].partition("=")[2]}"\n')
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit) as ended:
        cli.main()
    error = capfd.readouterr().err
    assert ended.value.code == 1 and error == "tapfl: file/out: Not a directory\n"


def test_the_error_names_the_file_that_the_user_knows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fails_from(monkeypatch, 1, errno.ENOSPC)
    with pytest.raises(OSError, match=r"No space left on device: '.*/summary\.json'$"):
        write_bytes(tmp_path / "summary.json", b"{}")
    with RunFolder.create(tmp_path / "run") as folder:
        (folder.path / METRICS).mkdir()
        with pytest.raises(OSError, match=r"Is a directory: '.*/metrics\.jsonl'$"):
            append_lines(folder.path, FailureLine(phase="hello", device=0, reason="lost"))
