"""A run that kills its own process at a chosen moment, and copies of the files that it would leave at such moments."""

from __future__ import annotations

import importlib
import multiprocessing
import os
import shutil
import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

# A fork of pytest's own process would do, did not torch refuse autograd in the fork of a process in which some test had
# it start threads. So the fork is of a process that has imported what a run takes seconds to, and done nothing since.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    ["clients.client_app", "strategies.server_app", "flwr_datasets", "pytest", "sklearn.mixture", "timm"]
)

Moment = tuple[str, str, int]  # right after the n-th call of a function: its module, its name in there, n


def killed_after(moment: Moment, *arguments: str, cache: Path, options: list[str]) -> None:
    """Runs `tapfl` in a process that kills itself (SIGKILL) at the moment."""
    process = FORKS.Process(target=_killed_after, args=(moment, arguments, cache, options))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL, "the process was not killed"


def _killed_after(moment: Moment, arguments: tuple[str, ...], cache: Path, options: list[str]) -> None:
    from test_inprocess_run import tapfl  # which itself uses this module

    with _right_after(moment, lambda: os.kill(os.getpid(), signal.SIGKILL)):
        tapfl(*arguments, cache=cache, options=options)


@contextmanager
def copied_after(moments: Mapping[str, Moment], folder: Path, copies: Path) -> Iterator[None]:
    """Copies a run's folder at each of the moments in the block: the files that it would leave if it was killed then.

    The copies have the names of their moments. One uninterrupted run so stands for many killed ones, which would each
    repeat its beginning in a process of their own.
    """
    with ExitStack() as stack:
        for name, moment in moments.items():
            stack.enter_context(_right_after(moment, partial(shutil.copytree, folder, copies / name)))
        yield
    assert {copy.name for copy in copies.iterdir()} == {*moments}, "the run has passed the other moments by"


@contextmanager
def _right_after(moment: Moment, act: Callable[[], object]) -> Iterator[None]:
    module, name, count = moment
    *path, last = name.split(".")
    owner: Any = importlib.import_module(module)
    for part in path:
        owner = getattr(owner, part)
    real, calls = getattr(owner, last), 0

    def counted(*arguments: Any, **named: Any) -> Any:
        nonlocal calls
        result = real(*arguments, **named)
        calls += 1
        if calls == count:
            act()
        return result

    with patch.object(owner, last, counted):
        yield
