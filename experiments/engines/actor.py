"""Code that runs in a worker: the Ray actor, and functions that the workers of all engines use."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Iterable, Sequence
from functools import lru_cache
from importlib import metadata
from typing import Any

from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from flwr.common.logger import FLOWER_LOGGER, log

from experiments.engines.local import answer_group
from tapfl.config import ComputeOptions

Processors = tuple[str, str]
Answer = tuple[list[Message], list[tuple[int, str]]]
"""Replies, and the lines that were logged meanwhile with their levels."""
CLIENT_APP = "clients.client_app:app"
MUST_AGREE = ("tapfl", "torch", "timm", "flwr", "numpy", "scikit-learn")


class Actor:
    """A Ray actor that answers for one device after the other, on one torch thread."""

    def __init__(self) -> None:
        import torch

        torch.set_num_threads(1)
        load_app(CLIENT_APP)  # its imports take seconds, which would delay the first message

    def ready(self) -> tuple[dict[str, str], Processors]:
        """Returns the versions of the packages that can change a result, and the kinds of its processors."""
        return versions(), processors()

    def answer(self, client_app: str, messages: list[Message], contexts: list[Context]) -> Answer:
        return answer_aside(load_app(client_app), messages, contexts)


def answer_aside(client_app: ClientApp, messages: Sequence[Message], contexts: Sequence[Context]) -> Answer:
    """Returns the replies of a ClientApp in a process without a screen, and the lines that it logged."""
    logged = _Lines()
    FLOWER_LOGGER.addHandler(logged)
    try:
        return answer_group(client_app, messages, contexts), logged.lines
    finally:
        FLOWER_LOGGER.removeHandler(logged)


def log_all(lines: Iterable[tuple[int, str]]) -> None:
    for level, line in lines:
        log(level, "%s", line)


class _Lines(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[tuple[int, str]] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append((record.levelno, record.getMessage()))


def versions() -> dict[str, str]:
    return {name: metadata.version(name) for name in MUST_AGREE}


def processors() -> Processors:
    """Returns the kinds of processor that ``compute.device = cpu`` and ``auto`` use in this process."""
    from tapfl.compute import Compute

    return Compute().kind, Compute.of(ComputeOptions(device="auto")).kind


@lru_cache(maxsize=8)
def load_app(name: str) -> Any:
    """Imports and returns the app ``module:name``."""
    module, _, attribute = name.partition(":")
    return getattr(importlib.import_module(module), attribute)
