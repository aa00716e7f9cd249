"""The time limit of a device for one message."""

from __future__ import annotations

import signal
import threading
import time

import pytest

from clients.client_app import time_limit
from tapfl.errors import RunError
from tapfl.personalize.together import Training, carried_out


def test_work_that_takes_too_long_is_ended_and_reported() -> None:
    began = time.monotonic()
    said = r"device 3: train took more than 0.2 s \(faults.device-timeout\)"
    with pytest.raises(RunError, match=said), time_limit(0.2, "device 3: train"):
        time.sleep(30)
    assert time.monotonic() - began < 10


def test_code_that_handles_errors_of_a_device_does_not_handle_the_time_limit() -> None:
    def slow() -> Training[None]:
        time.sleep(30)
        yield from ()

    began = time.monotonic()
    said = r"devices 3, 4: train took more than 0.2 s"
    with pytest.raises(RunError, match=said), time_limit(0.2, "devices 3, 4: train"):
        carried_out([slow(), slow()])
    assert time.monotonic() - began < 10


def test_work_in_time_is_not_interrupted_and_no_alarm_remains() -> None:
    before = signal.getsignal(signal.SIGALRM)
    with time_limit(0.2, "a message"):
        pass
    time.sleep(0.3)
    assert signal.getsignal(signal.SIGALRM) is before


def test_an_error_inside_is_raised_and_disarms_the_alarm() -> None:
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
