"""The ClientApp: takes Flower's messages and returns a device's replies, within a time limit."""

from __future__ import annotations

import faulthandler
import json
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache, partial
from pathlib import Path
from traceback import format_exception
from typing import TypeVar

import torch
from flwr.app import Context, Error, Message
from flwr.clientapp import ClientApp
from flwr.common.logger import log

from clients.device import Device
from clients.images import natural_folder
from clients.storage import DeviceStorage
from tapfl.compute import Compute, free_memory, is_fault, within_memory
from tapfl.config import ComputeOptions, RunConfig, names_path
from tapfl.errors import ConfigError, RunError
from tapfl.options import Scalar, expanded, validated
from tapfl.personalize.together import carried_out
from tapfl.profiles import DeviceProfile, profiles_of
from tapfl.run_folder import RunFolder, run_path
from tapfl.wire import PROFILE_FIELDS, Evaluate, Hello, Prune, Summarize, Train, TrainReply
from tapfl.wire_format import WireMessage


class DeviceApp(ClientApp):
    """Flower's ClientApp, which can also answer messages of several devices together, for this project's engines."""

    def answer_together(self, messages: Sequence[Message], contexts: Sequence[Context]) -> list[Message]:
        """Returns the replies to `train` messages of several devices, whose local rounds are computed together.

        The reply of a device that fails is an error. The time limit is the sum of the devices' limits.
        """
        devices = [device_of(context) for context in contexts]
        devices[0].compute.prepare(memory_share())
        what = f"devices {', '.join(str(device.partition_id) for device in devices)}: train"
        requests = [Train.from_records(message.content) for message in messages]

        def carry_out() -> list[TrainReply | Exception]:
            work = [device.training(request) for device, request in zip(devices, requests, strict=True)]
            return carried_out(work, partial(_log_once, devices[0].config.out))

        try:
            with time_limit(len(devices) * devices[0].config.faults.device_timeout, what):
                first = within_memory(carry_out, what)
                if full := [reply for reply in first if isinstance(reply, torch.OutOfMemoryError)]:
                    free_memory(full)  # all of them, before the first is tried again
                replies = [_retried(*entry) for entry in zip(devices, requests, first, strict=True)]
        except Exception as error:
            replies = [error] * len(messages)
        if fault := next((reply for reply in replies if isinstance(reply, Exception) and ends_worker(reply)), None):
            replies = [fault] * len(messages)  # so that the server sends the same group again
        return [
            error_reply(reply, message)
            if isinstance(reply, Exception)
            else Message(reply.to_records(), reply_to=message)
            for reply, message in zip(replies, messages, strict=True)
        ]


app = DeviceApp()

# Flower's simulation puts a worker that died back into its pool without restarting it, so all further messages to it
# fail. Ray can restart actors, and this module is imported before the pool is built. This is only for simulations.
if "flwr.simulation" in sys.modules:
    from flwr.simulation.ray_transport.ray_actor import ClientAppActor

    ClientAppActor._default_options["max_restarts"] = -1  # type: ignore[attr-defined]

FOR_DRIVER = 0.1  # fraction of a GPU's memory that is left to the driver, which prunes models there

LOST, RAISED = 0, 2  # Flower's error codes: the worker is gone (the server asks again); the ClientApp raised
REPLACED = "TAPFL_REPLACED"  # set in the environment of workers that are replaced if they die, as Ray's workers are
HARD = 2.0  # a worker that hangs where Python cannot interrupt it exits after this multiple of the time limit

ENDING = 0.5  # seconds for the last reply to leave a worker; if it does not arrive, the server asks again as well

M = TypeVar("M", bound=WireMessage)


@lru_cache(maxsize=4)
def _config(run_config: str) -> RunConfig:
    return RunConfig.from_flat(json.loads(run_config))


def device_of(context: Context) -> Device:
    """Returns the device that runs on a Flower node.

    In a simulation, the run's options assign the profiles. In a deployment, a node's own configuration overrides them:
    ``--node-config "budget=0.5 rank=6 storage='/var/tapfl' cache='/var/cache/tapfl' data='/photos' secret='…'"``, and
    ``device='cuda'`` for `compute.device`. A node that has a `storage` does not use the run's `out` and `cache`, which
    are folders of the server.

    Raises:
        ConfigError: if a path in the node's configuration is not absolute, its profile is not valid, or the device to
            compute on does not exist or was not reserved by Ray.
    """
    config = _config(json.dumps(dict(context.run_config)))
    node = context.node_config
    storage, cache, source = (_own_path(node, name) for name in ("storage", "cache", "data"))
    if storage or cache:
        config = config.model_copy(update={"cache": cache})
    i, profiles = int(node["partition-id"]), profiles_of(config.devices)
    own = {name: node[name] for name in PROFILE_FIELDS if name in node}
    profile = profiles[i % len(profiles)]
    folder = Path(storage) if storage else RunFolder(run_path(config.out, context.run_id)).device(i)
    if config.data.changing and not source:
        source = natural_folder(config, i, DeviceStorage(folder))
    return Device(
        config=config,
        partition_id=i,
        devices=int(node["num-partitions"]),
        profile=validated(DeviceProfile, profile.model_dump() | own) if own else profile,
        storage=DeviceStorage(folder),
        source=source,
        secret=str(node.get("secret", "")),
        compute=_compute(node, config),
    )


def _compute(node: Mapping[str, Scalar], config: RunConfig) -> Compute:
    own = {"device": node["device"]} if "device" in node else {}
    options = validated(ComputeOptions, config.compute.model_dump() | own) if own else config.compute
    compute = Compute.of(options)
    if compute.device.type != "cpu" and not gpu_share():  # otherwise all workers would use the first GPU
        accepted = "--actor-gpus (flwr run: client-resources-num-gpus) above 0, or compute.device = cpu"
        raise ConfigError(
            f"compute.device = {options.device!r}: this worker has no share of a GPU; accepted: {accepted}"
        )
    return compute


def _own_path(node: Mapping[str, Scalar], name: str) -> str:
    value = str(node.get(name, ""))
    if not names_path(name, value):
        return value
    if not (path := expanded(name, value)).is_absolute():
        raise ConfigError(f"{name} = {value!r} of the node's configuration: must be an absolute path")
    return str(path)


class _Overtime(BaseException):
    """The time limit is over. It is no Exception, so that code which handles a device's errors lets it pass."""


@contextmanager
def time_limit(seconds: float, what: str) -> Iterator[None]:
    """Raises a RunError that names `what` if the block takes longer than `seconds`. Flower itself never cancels a call.

    While C code is running (a very large product, a lock), Python cannot raise the error. A worker that is replaced if
    it dies then exits after `HARD` times the limit. Only the main thread can be interrupted; in other threads this does
    nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: object) -> None:
        raise _Overtime

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    if _is_ray_worker() or REPLACED in os.environ:
        faulthandler.dump_traceback_later(HARD * seconds, exit=True)
    try:
        yield
    except _Overtime:
        raise RunError(f"{what} took more than {seconds:g} s (faults.device-timeout)") from None
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        faulthandler.cancel_dump_traceback_later()


def _is_ray_worker() -> bool:
    ray = sys.modules.get("ray")
    return bool(ray and ray.is_initialized() and ray.get_runtime_context().worker.mode == ray.WORKER_MODE)


def gpu_share() -> float:
    """Returns the fraction of a GPU that this process has: in a Ray worker what Ray reserved, elsewhere 1."""
    if not _is_ray_worker():
        return 1.0
    return float(sys.modules["ray"].get_runtime_context().get_assigned_resources().get("GPU", 0.0))


def memory_share() -> float:
    """Returns the fraction of a GPU's memory that this process may use; Ray workers leave a part for the driver."""
    return (1 - FOR_DRIVER) * min(gpu_share(), 1.0) if _is_ray_worker() else 1.0


def _retried(device: Device, request: Train, reply: TrainReply | Exception) -> TrainReply | Exception:
    """Returns a device's reply; if it ran out of memory in its group, the device alone is tried again."""
    if not isinstance(reply, torch.OutOfMemoryError):
        return reply
    try:
        return within_memory(partial(device.train, request), f"device {device.partition_id}: train")
    except Exception as error:
        return error


@lru_cache(maxsize=1024)
def _log_once(run: str, line: str) -> None:
    """Logs a line of a run only the first time in this process."""
    log(logging.INFO, "%s", line)


def ends_worker(error: Exception) -> bool:
    """Returns whether an error ends a Ray worker, because its GPU can then be used only by a new process."""
    return is_fault(error) and _is_ray_worker()


def error_reply(error: Exception, message: Message) -> Message:
    """Returns the reply of a device that failed. A worker that cannot continue exits, and Ray restarts it."""
    code = RAISED
    if ends_worker(error):
        code = LOST
        end = threading.Timer(ENDING, os._exit, [1])
        end.daemon = True
        end.start()
    return Message(Error(code, "".join(format_exception(error))), reply_to=message)


def _answering(type: type[M], handler: Callable[[Device, M], WireMessage]) -> Callable[[Message, Context], Message]:
    def answer(message: Message, context: Context) -> Message:
        device = device_of(context)
        device.compute.prepare(memory_share())
        what = f"device {device.partition_id}: {message.metadata.message_type}"
        with time_limit(device.config.faults.device_timeout, what):
            request = type.from_records(message.content)
            try:
                reply = within_memory(lambda: handler(device, request), what)
            except Exception as error:
                if ends_worker(error):
                    return error_reply(error, message)
                raise
        return Message(reply.to_records(), reply_to=message)

    return answer


hello = app.query("hello")(_answering(Hello, lambda device, message: device.hello(message)))
summarize = app.query("summarize")(_answering(Summarize, lambda device, message: device.summarize(message)))
prune = app.query("prune")(_answering(Prune, lambda device, message: device.prune(message)))
train = app.train()(_answering(Train, lambda device, message: device.train(message)))
evaluate = app.evaluate()(_answering(Evaluate, lambda device, message: device.evaluate(message)))
