"""One rung as a federation in this process."""

from __future__ import annotations

import gc
import json
import shutil
from pathlib import Path

from experiments.search.objective import measures_of
from experiments.search.shared_round_zero import keep, prepare
from experiments.search.trials import Job
from tapfl.config import RunConfig
from tapfl.errors import RunError


def carry_out(job: Job) -> dict[str, float]:
    """Begins the run, or goes on with it, up to the rung's rounds, and returns its measures.

    Round zero is taken from `round-zero` beside the run's folder as far as another trial has left it there.

    Raises:
        TapflError: if the run cannot be carried out.
    """
    from clients.client_app import app as client_app
    from experiments.engines.inprocess import run_inprocess
    from experiments.preflight import absolute_paths
    from strategies.server_app import app as server_app

    own = {"train.rounds": job.rounds, "out": str(job.folder), "resume": True}
    config = absolute_paths(RunConfig.from_flat({**job.options, **own}))
    store = job.folder.parent / "round-zero"
    if not (job.folder / "config.json").exists():
        shutil.rmtree(job.folder, ignore_errors=True)
        prepare(job.folder, config, store)
    try:
        run_inprocess(server_app, client_app, config.flat(), config.devices.count)
    finally:
        gc.collect()  # the run's folder stays locked as long as anything of the run is there
    keep(job.folder, config, store)
    return measures_of(_summary(job.folder))


def _summary(folder: Path) -> dict[str, object]:
    try:
        found: dict[str, object] = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    except OSError:
        raise RunError(f"{folder}: the run ended without a result") from None
    return found
