from __future__ import annotations

import pytest
import torch
from backbones import Tiny, tiny_of_family
from hypothesis import settings

settings.register_profile("tapfl", max_examples=40, deadline=None, derandomize=True)
settings.load_profile("tapfl")


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)


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
