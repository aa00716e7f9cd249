"""A run that kills its own process at a chosen moment."""

from __future__ import annotations

import importlib
import multiprocessing
import os
import signal
from pathlib import Path
from typing import Any

from test_inprocess_run import tapfl

# A fork of pytest's own process would do, did not torch refuse autograd in the fork of a process in which some test had
# it start threads. So the fork is of a process that has imported what a run takes seconds to, and done nothing since.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    ["clients.client_app", "strategies.server_app", "flwr_datasets", "pytest", "sklearn.mixture", "timm"]
)

Moment = tuple[str, str, int]


def killed_after(moment: Moment, *arguments: str, cache: Path, options: list[str]) -> None:
    """Runs `tapfl` in a process that kills itself (SIGKILL) right after the n-th call of a function.

    moment: the function's module, its name in there, n.
    """
    process = FORKS.Process(target=_killed_after, args=(moment, arguments, cache, options))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL, "the process was not killed"


def _killed_after(moment: Moment, arguments: tuple[str, ...], cache: Path, options: list[str]) -> None:
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
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(owner, last, counted)
    tapfl(*arguments, cache=cache, options=options)
