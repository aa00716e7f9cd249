from __future__ import annotations

import gc
import signal
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
from backbones import SWIN, Tiny, tiny, tiny_of_family
from hypothesis import settings

settings.register_profile("tapfl", max_examples=25, deadline=None, derandomize=True)
settings.load_profile("tapfl")


def pytest_collection_finish() -> None:
    """A full collection, as at the end of every job, takes 0.4 s with all that the imports of the tests have made."""
    gc.freeze()


def pytest_sessionfinish() -> None:
    gc.unfreeze()  # otherwise extension modules report at the end what was never freed


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def _heed_interrupts() -> None:
    """What a shell starts in the background ignores Ctrl-C, and so would the commands that tests interrupt."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True, scope="session")
def _no_waiting_for_the_disk() -> Iterator[None]:
    """What is lost without `fsync` is lost when the machine fails, not when a process is killed."""
    with patch("os.fsync", lambda file: None):
        yield


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The cache of trained backbones, shared by all tests of this worker."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def vit() -> Tiny:
    return tiny_of_family("vit")


@pytest.fixture(scope="session")
def deit() -> Tiny:
    return tiny_of_family("deit")


@pytest.fixture(scope="session")
def swin() -> Tiny:
    return tiny_of_family("swin")


@pytest.fixture(scope="session")
def families(vit: Tiny, deit: Tiny, swin: Tiny) -> dict[str, Tiny]:
    return {"vit": vit, "deit": deit, "swin": swin}


@pytest.fixture(scope="session")
def small_swin() -> Tiny:
    """With fewer tokens than `swin`."""
    return tiny(SWIN)


@pytest.fixture(scope="session")
def small_families(vit: Tiny, deit: Tiny, small_swin: Tiny) -> dict[str, Tiny]:
    return {"vit": vit, "deit": deit, "swin": small_swin}


@pytest.fixture(scope="session")
def reported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A small run with a report, on classes whose names look like markup or scripts; and its output."""
    from test_inprocess_run import tapfl
    from test_report import HOSTILE

    from tapfl.data.sources import load_images

    folder, digits = tmp_path_factory.mktemp("reported"), load_images("digits")
    source = folder / "digits & <i>more.npz"
    np.savez(source, images=digits.read(), labels=digits.labels, classes=np.array(HOSTILE))
    options = [f"data.source={source}", "devices.dropout=0.4", "data.partition=dirichlet", "data.dirichlet-alpha=1.0"]
    run = folder / "run & <b>one"
    done = tapfl("--out", str(run), cache=folder / "cache", options=options, report="--report")
    assert done.exit_code == 0, done.output
    return run, done.stdout
