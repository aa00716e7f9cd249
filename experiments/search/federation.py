"""One rung as a federation."""

from __future__ import annotations

import gc
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from experiments.search.objective import measures_of
from experiments.search.trials import Job
from experiments.shared_round_zero import keep, prepare
from tapfl.config import RunConfig
from tapfl.errors import RunError
from tapfl.options import Scalar

Engine = Callable[[Any, dict[str, Scalar], int], None]  # of a ServerApp, the run's options and the number of devices


def in_this_process(server_app: Any, run_config: dict[str, Scalar], nodes: int) -> None:
    """Carries out a federation with its devices in this process, one after the other: an `Engine`."""
    from clients.client_app import app as client_app
    from experiments.engines.local import run_inprocess

    run_inprocess(server_app, client_app, run_config, nodes)


def carry_out(job: Job, engine: Engine = in_this_process) -> dict[str, float]:
    """Begins the run, or goes on with it, up to the rung's rounds, and returns its measures.

    Round zero is taken from `round-zero` beside the run's folder as far as another trial has left it there.

    Raises:
        TapflError: if the run cannot be carried out.
    """
    from experiments.preflight import absolute_paths
    from strategies.server_app import app as server_app

    own = {"train.rounds": job.rounds, "out": str(job.folder), "resume": True}
    config = absolute_paths(RunConfig.from_flat({**job.options, **own}))
    store = job.folder.parent / "round-zero"
    if not (job.folder / "config.json").exists():
        shutil.rmtree(job.folder, ignore_errors=True)
        prepare(job.folder, config, store)
    try:
        engine(server_app, config.flat(), config.devices.count)
    finally:
        gc.collect()  # models that hold on to each other go now: the next run needs their room
    keep(job.folder, config, store)
    return measures_of(_summary(job.folder))


def _summary(folder: Path) -> dict[str, object]:
    try:
        found: dict[str, object] = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    except OSError:
        raise RunError(f"{folder}: the run ended without a result") from None
    return found
