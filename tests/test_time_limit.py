"""The time that a device may work on one message."""

from __future__ import annotations

import signal
import threading
import time

import pytest

from clients.client_app import time_limit
from tapfl.errors import RunError


def test_what_takes_too_long_is_ended_and_says_so() -> None:
    began = time.monotonic()
    said = r"device 3: train took more than 0.2 s \(faults.device-timeout\)"
    with pytest.raises(RunError, match=said), time_limit(0.2, "device 3: train"):
        time.sleep(30)
    assert time.monotonic() - began < 10


def test_what_is_in_time_is_left_alone_and_no_alarm_stays() -> None:
    before = signal.getsignal(signal.SIGALRM)
    with time_limit(0.2, "a message"):
        pass
    time.sleep(0.3)
    assert signal.getsignal(signal.SIGALRM) is before


def test_an_error_inside_passes_and_disarms() -> None:
    with pytest.raises(ValueError, match="mine"), time_limit(0.1, "a message"):
        raise ValueError("mine")
    time.sleep(0.2)


def test_other_threads_are_not_interrupted() -> None:
    done = []

    def work() -> None:
        with time_limit(0.05, "a message"):
            time.sleep(0.2)
            done.append(True)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert done
