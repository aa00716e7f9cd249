"""Resuming a run: its images, weights and files must be those with which it began; otherwise the option is named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click import Command
from click.testing import CliRunner
from flwr.app import Context, RecordDict
from PIL import Image
from safetensors.torch import save_file
from test_inprocess_run import tapfl

from clients.client_app import app as client_app
from clients.client_app import device_of
from clients.device import Device
from experiments import cli
from experiments.engines.local import run_inprocess
from experiments.jobs.federation import in_process, shared_folders
from experiments.jobs.pool import ThreadPool
from experiments.sweep.grid import read_sweep, run_sweep
from strategies.server_app import app as server_app
from tapfl.config import RunConfig
from tapfl.data.contents import content_of, contents
from tapfl.data.sources import load_images
from tapfl.errors import ConfigError, DataError, RunError
from tapfl.models.backbone import build, spec_of
from tapfl.models.forward import input_transform
from tapfl.wire import Hello

TINY = "img_size=8,patch_size=2,in_chans=3,embed_dim=32,depth=2,num_heads=2,class_token=False,global_pool=avg"
KEY = "0123456789abcdef"
CLASSES = ("cat", "dog", "owl")


def write_images(folder: Path, seed: int, each: int = 40) -> Path:
    """Writes files with the same names and counts for every seed, but other pixels."""
    noise = np.random.default_rng(seed)
    for channel, name in enumerate(CLASSES):
        (folder / name).mkdir(parents=True)
        for number in range(each):
            pixels = noise.integers(0, 90, (8, 8, 3)).astype(np.uint8)
            pixels[..., channel] += 120
            Image.fromarray(pixels).save(folder / name / f"{number:03d}.png")
    return folder


def write_pool(file: Path, seed: int) -> None:
    images = np.random.default_rng(seed).integers(0, 256, (90, 8, 8, 3), dtype=np.uint8)
    np.savez(file, images=images, labels=np.arange(90) % 3, classes=np.array(CLASSES))


def write_profiles(file: Path, rank: int) -> None:
    file.write_text(f'[[device]]\nbudget = "0.5"\nrank = 4\n[[device]]\nbudget = "0.5"\nrank = {rank}\n')


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with one round, in which every input is a file or a folder."""
    place = tmp_path_factory.mktemp("inputs")
    write_images(place / "images", 1)
    write_pool(place / "pool.npz", 2)
    write_profiles(place / "phones.toml", 6)
    (place / "rows.json").write_text(json.dumps({"cat": 0, "dog": 1, "owl": 2}))
    spec = spec_of(RunConfig.from_flat({"model.args": TINY}).model, ("0", "1", "2", "3"))
    save_file(build(spec, seed=3).state_dict(), place / "weights.safetensors")
    done = tapfl("--out", str(place / "run"), cache=place / "cache", options=[*options(place), "train.rounds=1"])
    assert done.exit_code == 0, done.output
    return place


def options(place: Path) -> list[str]:
    named = {"data.source": "images", "data.public": "pool.npz", "devices.profiles": "phones.toml"}
    named |= {"model.weights": "weights.safetensors", "model.head-rows": "rows.json"}
    fixed = ["devices.count=2", "data.partition=iid", "model.head=rows", f"model.args={TINY}"]
    return [*(f"{option}={place / name}" for option, name in named.items()), *fixed]


@pytest.fixture
def unchanged(place: Path, tmp_path: Path) -> Iterator[None]:
    """Restores the inputs after the test, with their times."""
    kept = tmp_path / "kept"
    shutil.copytree(place, kept, ignore=shutil.ignore_patterns("cache"))
    yield
    for saved in kept.iterdir():
        there = place / saved.name
        shutil.rmtree(there) if there.is_dir() else there.unlink(missing_ok=True)
        (shutil.copytree if saved.is_dir() else shutil.copy2)(saved, there)


def swap_images(place: Path) -> None:
    shutil.rmtree(place / "images")
    write_images(place / "images", 99)


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


OTHERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "private images": (swap_images, "data.source = '{place}/images': the images changed since this run began"),
    "public images": (
        lambda place: write_pool(place / "pool.npz", 99),
        "data.public = '{place}/pool.npz': the images changed since this run began",
    ),
    "weights": (
        lambda place: flip(place / "weights.safetensors"),
        "model.weights = '{place}/weights.safetensors': the contents changed since this run began",
    ),
    "rows of the head": (
        lambda place: (place / "rows.json").write_text('{"cat": 0, "dog": 1, "owl": 3}'),
        "model.head-rows = '{place}/rows.json': the contents changed since this run began",
    ),
    "profiles": (
        lambda place: write_profiles(place / "phones.toml", 5),
        "devices.profiles = '{place}/phones.toml': the contents changed since this run began",
    ),
    "nothing is known": (
        lambda place: (place / "run" / "inputs.json").unlink(),
        "model.weights = '{place}/weights.safetensors': the contents at that time are not known",
    ),
}


def resumed(place: Path) -> tuple[int, str]:
    """Runs the command as `tapfl` does; returns its exit code and its message."""
    command = ["run", "--resume", str(place / "run"), "--engine", "inprocess", "--no-report", "--set", "train.rounds=2"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["tapfl", *command])
        patch.setattr("strategies.progress.SILENCE", (1e9, 1e9))  # on a busy machine the checks may take 10 s
        done = CliRunner().invoke(Command("tapfl", callback=cli.main), [])
    return done.exit_code, done.stderr.strip()


@pytest.mark.usefixtures("unchanged")
@pytest.mark.parametrize("other", OTHERS)
def test_other_inputs_are_refused_and_the_run_is_not_changed(other: str, place: Path) -> None:
    change, named = OTHERS[other]
    change(place)
    before = {file: file.read_bytes() for file in place.rglob("*") if file.is_file()}
    code, said = resumed(place)
    assert code == 2 and named.format(place=place) in said and "\n" not in said
    assert before == {file: file.read_bytes() for file in place.rglob("*") if file.is_file()}


def config_of(place: Path) -> RunConfig:
    flat = json.loads((place / "run" / "config.json").read_text())
    return RunConfig.from_flat(flat | {"resume": True, "train.rounds": 2})


@pytest.mark.usefixtures("unchanged")
def test_a_server_alone_refuses_its_own_inputs_before_it_changes_a_file(place: Path) -> None:
    write_pool(place / "pool.npz", 99)
    before = {file: file.read_bytes() for file in (place / "run").rglob("*") if file.is_file()}
    with pytest.raises(ConfigError, match=r"pool\.npz': the images changed since this run began"):
        run_inprocess(server_app, client_app, config_of(place).flat(), 2)
    assert before == {file: file.read_bytes() for file in (place / "run").rglob("*") if file.is_file()}


@pytest.mark.usefixtures("unchanged")
def test_devices_refuse_their_own_images_and_the_server_learns_why_but_no_fingerprint(place: Path) -> None:
    config = config_of(place)
    (before,) = contents(config, ["data.source"]).values()
    swap_images(place)
    (now,) = contents(config, ["data.source"]).values()
    with pytest.raises(RunError, match=r"hello: no device answered; .*images': the images changed since") as refused:
        run_inprocess(server_app, client_app, config.flat(), 2)
    assert before not in str(refused.value) and now not in str(refused.value)


def test_a_run_that_could_not_begin_leaves_no_folder(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = RunConfig.from_flat(config_of(place).flat() | {"out": str(tmp_path / "run"), "resume": False})
    monkeypatch.setattr("strategies.server_app.write_begun", lambda folder, *_: _full(folder.path / "inputs.json"))
    with pytest.raises(OSError, match="full"):
        run_inprocess(server_app, client_app, config.flat(), 2)
    assert not (tmp_path / "run").exists()


def _full(file: Path) -> None:
    file.write_text("{}")
    raise OSError("full")


@pytest.mark.usefixtures("unchanged")
def test_a_run_with_the_same_inputs_continues(place: Path) -> None:
    assert resumed(place)[0] == 0
    assert json.loads((place / "run" / "config.json").read_text())["train.rounds"] == 2


# -- a device of a deployment, which has images and a storage of its own -----------------------------------------------


def own_device(folder: Path) -> Device:
    node = {"partition-id": 0, "num-partitions": 1, "data": str(folder / "mine"), "storage": str(folder / "storage")}
    return device_of(Context(1, 2, node, RecordDict(), {"model.args": TINY, "cache": str(folder / "cache")}))


def test_a_device_continues_only_with_its_own_images(tmp_path: Path) -> None:
    write_images(tmp_path / "mine", 1)
    began = own_device(tmp_path).hello(Hello(KEY))
    assert own_device(tmp_path).hello(Hello(KEY)) == began
    write_images(tmp_path / "mine" / "owl" / "more", 5, each=1)
    message = r"^data = '.*mine': the images changed since this run began; accepted: the original content"
    with pytest.raises(DataError, match=message):
        own_device(tmp_path).hello(Hello(KEY))


def test_a_new_run_uses_the_current_images(tmp_path: Path) -> None:
    write_images(tmp_path / "mine", 1)
    before = own_device(tmp_path).hello(Hello(KEY))
    write_images(tmp_path / "mine" / "owl" / "more", 5)  # in this process the previous images are in the caches
    shutil.rmtree(tmp_path / "storage")
    after = own_device(tmp_path).hello(Hello(KEY))
    assert after.train_samples > before.train_samples
    assert own_device(tmp_path).hello(Hello(KEY)) == after


def test_a_new_worker_during_a_run_refuses_other_images(tmp_path: Path) -> None:
    write_images(tmp_path / "mine", 1)
    own_device(tmp_path).hello(Hello(KEY))
    shutil.rmtree(tmp_path / "mine")
    write_images(tmp_path / "mine", 99)
    fresh = replace(own_device(tmp_path), config=RunConfig.from_flat({"model.args": TINY, "seed": 7}))  # in no cache
    fresh.storage.save_classes(CLASSES)
    with pytest.raises(DataError, match="the images changed since this run began"):
        fresh._images.part("train")


@pytest.mark.parametrize("source", ["images", "pool.npz"])
def test_what_is_compared_is_the_fingerprint_of_the_images_that_are_loaded(source: str, tmp_path: Path) -> None:
    write_images(tmp_path / "images", 1)
    write_pool(tmp_path / "pool.npz", 2)
    transform = input_transform(RunConfig.from_flat({"model.args": TINY}).model)
    loaded = load_images(str(tmp_path / source), transform, tmp_path / "cache")
    assert loaded.fingerprint == content_of("data.source", str(tmp_path / source))


# -- many runs ---------------------------------------------------------------------------------------------------------


def test_runs_share_round_zero_only_if_their_inputs_are_the_same(tmp_path: Path) -> None:
    write_images(tmp_path / "images", 1)
    write_pool(tmp_path / "pool.npz", 2)
    flat = {"data.source": str(tmp_path / "images"), "data.public": str(tmp_path / "pool.npz")}
    config = RunConfig.from_flat(flat)
    before = shared_folders(config, tmp_path)
    assert before == shared_folders(RunConfig.from_flat(flat | {"train.rounds": 3}), tmp_path)
    write_pool(tmp_path / "pool.npz", 3)
    second = shared_folders(config, tmp_path)
    shutil.rmtree(tmp_path / "images")
    write_images(tmp_path / "images", 4)
    third = shared_folders(config, tmp_path)
    assert len({*before, *second, *third}) == 6


@pytest.mark.usefixtures("unchanged")
def test_a_sweep_does_not_return_runs_with_other_images(place: Path, tmp_path: Path) -> None:
    file, out = tmp_path / "sweep.toml", tmp_path / "out"
    shared = json.loads((place / "run" / "config.json").read_text())
    file.write_text(
        "\n".join(f"{json.dumps(k)} = {json.dumps(v)}" for k, v in shared.items()) + "\n[grid]\nseed = [0]\n"
    )
    file.write_text(file.read_text().replace('"seed" = 0\n', ""))
    (run,) = runs = read_sweep(file)[0]
    shutil.copytree(place / "run", out / run.name)

    def again() -> dict[str, str]:
        return run_sweep(runs, out, ThreadPool(1), in_process, lambda *_: None)

    assert again() == {}
    swap_images(place)
    with pytest.raises(DataError, match=r"data\.source = .*: the images changed since this run began"):
        again()
    shutil.rmtree(place / "images")
    assert again() == {}  # missing inputs are not compared, so that the tables can still be made
