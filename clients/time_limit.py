"""A limit on the time that a device works on one message.

Flower cancels nothing, and a device that hangs would keep its worker for good.
"""

from __future__ import annotations

import faulthandler
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from tapfl.errors import RunError

HARD = 2.0  # after so many limits a worker that is stuck where Python cannot interrupt it ends itself


@contextmanager
def time_limit(seconds: float, what: str) -> Iterator[None]:
    """Ends the block after `seconds` with a RunError that names `what`.

    Where Python is not in charge (a product that never ends, a lock in C) that takes no effect: there a Ray worker,
    which is started anew, ends its process after twice the time. Only the main thread can be interrupted; elsewhere
    nothing is done.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: object) -> None:
        raise RunError(f"{what} took more than {seconds:g} s (faults.device-timeout)")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    if _is_ray_worker():
        faulthandler.dump_traceback_later(HARD * seconds, exit=True)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        faulthandler.cancel_dump_traceback_later()


def _is_ray_worker() -> bool:
    ray = sys.modules.get("ray")
    return bool(ray and ray.is_initialized() and ray.get_runtime_context().worker.mode == ray.WORKER_MODE)
