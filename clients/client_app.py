"""The ClientApp: Flower's messages in, a device's replies out, within a limit on time."""

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
from tapfl.compute import Compute, is_fault, within_memory
from tapfl.config import ComputeOptions, RunConfig, names_path
from tapfl.errors import ConfigError, RunError
from tapfl.options import Scalar, validated
from tapfl.personalize.together import carried_out
from tapfl.profiles import DeviceProfile, profiles_of
from tapfl.run_folder import RunFolder, run_path
from tapfl.wire import PROFILE_FIELDS, Evaluate, Hello, Prune, Summarize, Train, TrainReply
from tapfl.wire_format import WireMessage


class DeviceApp(ClientApp):
    """Flower's ClientApp, which can also answer several devices' messages at once, for the engines of this project."""

    def answer_together(self, messages: Sequence[Message], contexts: Sequence[Context]) -> list[Message]:
        """Returns the replies to `train` messages of several devices, whose local rounds step together.

        A device that fails has an error as its reply. All of them have as much time as each would have by itself.
        """
        devices = [device_of(context) for context in contexts]
        devices[0].compute.prepare(memory_share())
        what = f"devices {', '.join(str(device.partition_id) for device in devices)}: train"
        with time_limit(len(devices) * devices[0].config.faults.device_timeout, what):
            asked = [Train.from_records(message.content) for message in messages]

            def carry_out() -> list[TrainReply | Exception]:
                work = [device.training(each) for device, each in zip(devices, asked, strict=True)]
                return carried_out(work, partial(_once, devices[0].config.out))

            try:
                found = within_memory(carry_out, what)
                answers = [_again(*each) for each in zip(devices, asked, found, strict=True)]
            except Exception as error:
                answers = [error] * len(messages)
        if fault := next((each for each in answers if isinstance(each, Exception) and ends_worker(each)), None):
            answers = [fault] * len(messages)  # sent again as the same group
        return [
            error_reply(answer, message)
            if isinstance(answer, Exception)
            else Message(answer.to_records(), reply_to=message)
            for answer, message in zip(answers, messages, strict=True)
        ]


app = DeviceApp()

# Flower's simulation returns a worker that died to its pool and never replaces it, so every later message to it fails.
# Ray can restart actors, and this module is imported before the pool is built. Outside a simulation nothing is done.
if "flwr.simulation" in sys.modules:
    from flwr.simulation.ray_transport.ray_actor import ClientAppActor

    ClientAppActor._default_options["max_restarts"] = -1  # type: ignore[attr-defined]

FOR_DRIVER = 0.1  # of a GPU's memory, for the smaller models that the driver makes there

LOST, RAISED = 0, 2  # Flower's codes: the worker is gone and the server asks again; an exception in the ClientApp
REPLACED = "TAPFL_REPLACED"  # set in the environment of a worker that is replaced when it dies, as Ray's are
HARD = 2.0  # a worker stuck where Python cannot interrupt it ends itself after this many time limits

ENDING = 0.5  # seconds for a last reply to leave a worker; if it does not, the server asks again just the same

M = TypeVar("M", bound=WireMessage)


@lru_cache(maxsize=4)
def _config(run_config: str) -> RunConfig:
    return RunConfig.from_flat(json.loads(run_config))


def device_of(context: Context) -> Device:
    """Returns the device that runs on a Flower node.

    In a simulation the run's options assign the profiles; in a deployment a node's own configuration
    (``--node-config "budget=0.5 rank=6 storage='/var/tapfl' cache='/var/cache/tapfl' data='/photos' secret='…'"``)
    overrides them, and ``device='cuda'`` what it computes on. A node that has a storage uses neither `out` nor `cache`
    of the run, which are folders of the server.

    Raises:
        ConfigError: if a path in the node's configuration is not absolute, its profile is not valid, or there is no
            such device to compute on, or Ray has reserved none.
    """
    config = _config(json.dumps(dict(context.run_config)))
    node = context.node_config
    storage, cache, source = (_own_path(node, name) for name in ("storage", "cache", "data"))
    if storage or cache:
        config = config.model_copy(update={"cache": cache})
    i, dealt = int(node["partition-id"]), profiles_of(config.devices)
    own = {name: node[name] for name in PROFILE_FIELDS if name in node}
    profile = dealt[i % len(dealt)]
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
    if compute.device.type != "cpu" and not gpu_share():  # all workers would use the first GPU
        accepted = "--actor-gpus (flwr run: client-resources-num-gpus) above 0, or compute.device = cpu"
        raise ConfigError(
            f"compute.device = {options.device!r}: this worker has no share of a GPU; accepted: {accepted}"
        )
    return compute


def _own_path(node: Mapping[str, Scalar], name: str) -> str:
    value = str(node.get(name, ""))
    if not names_path(value):
        return value
    if not (path := Path(value).expanduser()).is_absolute():
        raise ConfigError(f"{name} = {value!r} of the node's configuration: must be an absolute path")
    return str(path)


@contextmanager
def time_limit(seconds: float, what: str) -> Iterator[None]:
    """Ends the block after `seconds` with a RunError that names `what`: Flower cancels nothing.

    Inside C code (an endless product, a lock) the error cannot be raised; there a worker that is replaced when it dies
    ends its process after twice the time. Only the main thread can be interrupted; in others nothing is done.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: object) -> None:
        raise RunError(f"{what} took more than {seconds:g} s (faults.device-timeout)")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    if _is_ray_worker() or REPLACED in os.environ:
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


def gpu_share() -> float:
    """Returns how much of a GPU this process has: what Ray reserved for a worker of its, elsewhere all of one."""
    if not _is_ray_worker():
        return 1.0
    return float(sys.modules["ray"].get_runtime_context().get_assigned_resources().get("GPU", 0.0))


def memory_share() -> float:
    """Returns how much of a GPU's memory this process may take: of what Ray gave it, less a part for the driver."""
    return (1 - FOR_DRIVER) * min(gpu_share(), 1.0) if _is_ray_worker() else 1.0


def _again(device: Device, asked: Train, answer: TrainReply | Exception) -> TrainReply | Exception:
    """Returns the answer. A device of a group that goes one by one is tried again if its memory was full."""
    if not isinstance(answer, torch.OutOfMemoryError):
        return answer
    try:
        return within_memory(partial(device.train, asked), f"device {device.partition_id}: train")
    except Exception as error:
        return error


@lru_cache(maxsize=1024)
def _once(run: str, line: str) -> None:
    """Logs a line the first time that this process has it of a run."""
    log(logging.INFO, "%s", line)


def ends_worker(error: Exception) -> bool:
    """Returns whether a Ray worker cannot go on after an error: its GPU can be used again by a new process only."""
    return is_fault(error) and _is_ray_worker()


def error_reply(error: Exception, message: Message) -> Message:
    """Returns the reply of a device that failed. A worker that cannot go on ends; Ray starts it anew."""
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
            asked = type.from_records(message.content)
            try:
                reply = within_memory(lambda: handler(device, asked), what)
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
