"""Trials on the Ray engine: their servers are threads of this process, their devices share its warm actors."""

from __future__ import annotations

import logging
import traceback
from concurrent.futures import Future, ThreadPoolExecutor

from flwr.common.logger import log

from experiments.engines.ray import ActorPool
from experiments.run_log import own_log
from experiments.search.federation import carry_out
from experiments.search.trials import EngineLostError, Job
from tapfl.errors import RunError, TapflError


class RayTrials:
    """`Trials` on a pool of actors, `count` at a time.

    What is at work ends with the pool, which its owner closes behind this.
    """

    def __init__(self, workers: ActorPool, count: int) -> None:
        self._workers = workers
        self._threads = ThreadPoolExecutor(count, thread_name_prefix="trial")

    def submit(self, job: Job) -> Future[dict[str, float]]:
        return self._threads.submit(self._carry_out, job)

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _carry_out(self, job: Job) -> dict[str, float]:
        file = job.folder.with_suffix(".log")
        file.parent.mkdir(parents=True, exist_ok=True)
        with own_log(file):
            try:
                return carry_out(job, self._workers.run)
            except TapflError as error:
                log(logging.ERROR, "%s", error)
                if self._workers.lost:
                    raise EngineLostError(self._workers.lost) from None
                raise
            except Exception as error:
                log(logging.ERROR, "%s", traceback.format_exc())
                raise RunError(f"{type(error).__name__}: {error}") from None
