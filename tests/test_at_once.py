"""Two commands in the same folder: the second is refused, and the first loses nothing."""

from __future__ import annotations

import errno
import os
import signal
from pathlib import Path

import pytest
from optuna.exceptions import StorageInternalError

from experiments import cli
from experiments.search import study
from tapfl.errors import ConfigError, ModelError
from tapfl.models.dense import DenseCache
from tapfl.run_folder import RunFolder, only_one
from tapfl.store import write_json

FILES = {
    "sweep": "[grid]\nseed = [0]\n",
    "compare": '[compare]\ncriterion = ["tap"]\n',
}


@pytest.mark.parametrize("command", FILES)
def test_a_folder_in_use_is_refused(
    command: str, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "c.toml").write_text(FILES[command])
    (tmp_path / "out").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["tapfl", command, "--config", "c.toml", "--out", "out"])
    with only_one(tmp_path / "out", "command"), pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2 and "is using this folder" in capfd.readouterr().err
    assert [file.name for file in (tmp_path / "out").iterdir()] == [".lock"]


def test_a_folder_without_locks_is_refused_for_that_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("tapfl.run_folder.fcntl.flock", unsupported)
    with pytest.raises(ConfigError, match=r"out = '.*run': this folder cannot be locked \(No locks available\)"):
        RunFolder.create(tmp_path / "run")


def test_a_killed_run_leaves_no_lock(tmp_path: Path) -> None:
    there, here = os.pipe()
    child = os.fork()
    if child == 0:
        folder = RunFolder.create(tmp_path / "run")
        write_json(folder.path / "config.json", {})
        os.write(here, b"x")
        signal.pause()
    assert os.read(there, 1) == b"x"
    try:
        with pytest.raises(ConfigError, match="another run is using this folder"):
            RunFolder.reopen(tmp_path / "run")
        with pytest.raises(ConfigError, match="exists already"):
            RunFolder.create(tmp_path / "run")
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    with RunFolder.reopen(tmp_path / "run"):
        pass


@pytest.mark.parametrize(
    "url", ["postgresql://me:se%40cr:et@host/db", "mysql://host/db?user=me&password=se%40cr:et&x=1"]
)
def test_a_storage_s_password_is_in_no_error(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: object) -> None:
        raise StorageInternalError(f"cannot connect to {url}")

    monkeypatch.setattr(study, "_storage", unreachable)
    with pytest.raises(ConfigError, match=r"host/db") as refused:
        study.open_study(None, "a", tmp_path, url, False)  # type: ignore[arg-type]
    assert "cr:et" not in str(refused.value) and "***" in str(refused.value)


@pytest.mark.parametrize("key", ["../../etc/secret", "/etc/secret", "a" * 15, "A" * 16, "", "a" * 16 + "\n"])
def test_a_key_from_a_server_cannot_name_a_file_outside_the_cache(key: str, tmp_path: Path) -> None:
    for use in (DenseCache(tmp_path).holds, DenseCache(tmp_path).path):
        with pytest.raises(ModelError, match="must be 16 hex digits"):
            use(key)
