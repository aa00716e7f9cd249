"""Files: written completely or not at all, named by content; and no run overwrites another."""

from __future__ import annotations

import json
import os
import pwd
from pathlib import Path

import pytest
import torch

from tapfl.errors import ConfigError, PlanError
from tapfl.run_folder import RunFolder, run_path
from tapfl.store import (
    cache_folder,
    content_hash,
    read_tensors,
    remove_leftovers,
    whole_file,
    whole_folder,
    write_bytes,
    write_json,
    write_tensors,
)


@pytest.mark.parametrize("step", ["replace", "fsync"])
def test_a_write_that_fails_leaves_the_old_content(step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "state.json"
    write_bytes(file, b"old")

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, step, killed)
    with pytest.raises(KeyboardInterrupt):
        write_bytes(file, b"new and longer")
    assert file.read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["state.json"]


def test_the_content_is_complete_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, seen = os.replace, []

    def observed(source: str, target: Path) -> None:
        seen.append((Path(source).read_bytes(), Path(source).parent, target.exists()))
        real(source, target)

    monkeypatch.setattr(os, "replace", observed)
    write_bytes(tmp_path / "deep" / "file", b"content")
    assert seen == [(b"content", tmp_path / "deep", False)]
    assert (tmp_path / "deep" / "file").stat().st_mode & 0o777 == 0o644


def test_json_and_tensors_round_trip(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"ü": [1, 2.5, None]})
    text = (tmp_path / "a.json").read_text(encoding="utf-8")
    assert json.loads(text) == {"ü": [1, 2.5, None]}
    assert text.endswith("\n")
    tensors = {"x": torch.randn(3, 4).T, "n": torch.tensor(7), "empty": torch.zeros(0, 2), "half": torch.ones(2).half()}
    write_tensors(tmp_path / "a.safetensors", tensors, {"round": "3"})
    found = read_tensors(tmp_path / "a.safetensors")
    assert found.keys() == tensors.keys()
    assert all(
        torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype for name, tensor in tensors.items()
    )


def test_what_killed_processes_have_left_is_removed(tmp_path: Path) -> None:
    for name in ("state.json", ".lock", ".hidden", "deep/a.npy", ".sweep.lock"):
        write_bytes(tmp_path / name, b"kept")
    kept = sorted(tmp_path.rglob("*"))
    if not (child := os.fork()):
        with whole_file(tmp_path / "deep" / "a.npy") as file, whole_folder(tmp_path / "plans") as folder:
            file.write_bytes(b"half")
            (folder / "00.json").write_bytes(b"half")
            os._exit(0)
    os.waitpid(child, 0)
    assert len(list(tmp_path.rglob("*"))) > len(kept)
    remove_leftovers(tmp_path, age=3600.0)  # a living process may be writing them
    assert len(list(tmp_path.rglob("*"))) > len(kept)
    remove_leftovers(tmp_path)
    assert sorted(tmp_path.rglob("*")) == kept


@pytest.mark.parametrize("content", [b"", b"\x80\x04pickle", b"x" * 100])
def test_a_file_without_tensors_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "w.safetensors").write_bytes(content)
    with pytest.raises(PlanError, match=r"w\.safetensors: is not a complete safetensors file"):
        read_tensors(tmp_path / "w.safetensors")


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"none\.safetensors: cannot be read"):
        read_tensors(tmp_path / "none.safetensors")


def test_the_hash_names_the_content_and_nothing_else() -> None:
    x = torch.arange(6.0)
    assert content_hash({"a": x, "b": x + 1}) == content_hash({"b": x + 1, "a": x.clone()})
    assert content_hash({"a": x.reshape(2, 3).T.contiguous()}) == content_hash({"a": x.reshape(2, 3).T})
    assert len(content_hash()) == 16


def test_the_hash_sees_every_difference() -> None:
    x = torch.arange(6.0)
    nudged = x.clone()
    nudged[3] += 1e-6
    contents = [
        (),
        ("",),
        ("", ""),
        ("ab",),
        ("a", "b"),
        ("b", "a"),
        ("a\0", "b"),
        ("a", "\0b"),
        ("a\0\0b",),
        ({},),
        ({"a": x},),
        ({"b": x},),
        ({"a": nudged},),
        ({"a": x.reshape(2, 3)},),
        ({"a": x.reshape(3, 2)},),
        ({"a": x.double()},),
        ({"a": x.to(torch.int32)},),
        ({"a": x.bfloat16()},),
        ({"a": torch.zeros(0)},),
        ({"a": x, "b": x},),
        ({"a": x}, {"b": x}),
    ]
    assert len({content_hash(*parts) for parts in contents}) == len(contents)


def test_a_run_s_folder_is_new(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "runs" / "1")
    assert folder.device(3) == folder.path / "devices" / "03"
    with pytest.raises(ConfigError, match="exists already; give a folder that does not exist"):
        RunFolder.create(folder.path)
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"out = .*file.*: exists already"):
        RunFolder.create(tmp_path / "file")
    with pytest.raises(ConfigError, match=r"out = .*: cannot be created \(Not a directory\)"):
        RunFolder.create(tmp_path / "file" / "below")


def test_a_user_without_a_home_folder_is_told_which_option_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HOME", "TAPFL_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", {}.__getitem__)  # as in a container whose user has no account
    for place, option in ((cache_folder, "cache or TAPFL_CACHE"), (lambda: run_path("", 1), "out")):
        with pytest.raises(ConfigError, match=rf"^{option}: is not set, and this user has no home folder"):
            place()
    assert cache_folder("here") == Path("here")
