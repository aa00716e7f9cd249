"""The ClientApp: Flower's messages in, a device's answers out."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import TypeVar

import torch
from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from clients.device import Device
from clients.storage import DeviceStorage
from clients.time_limit import time_limit
from tapfl.config import RunConfig, names_path
from tapfl.errors import ConfigError
from tapfl.options import Scalar
from tapfl.profiles import DeviceProfile, profiles_of
from tapfl.store import RunFolder, run_path
from tapfl.wire import PROFILE_FIELDS, Evaluate, Hello, Prune, Summarize, Train, WireMessage

app = ClientApp()

# Flower's simulation puts a worker that died back into its pool and never replaces it: every later message to it fails.
# Ray restarts actors if it is told to, and this module is imported before the pool is built. Elsewhere it stays away.
if "flwr.simulation" in sys.modules:
    from flwr.simulation.ray_transport.ray_actor import ClientAppActor

    ClientAppActor._default_options["max_restarts"] = -1  # type: ignore[attr-defined]

M = TypeVar("M", bound=WireMessage)


@lru_cache(maxsize=4)
def _config(run_config: str) -> RunConfig:
    return RunConfig.from_flat(json.loads(run_config))


def device_of(context: Context) -> Device:
    """Returns the device that a Flower node is.

    In a simulation the profiles are dealt out by the run's options; in a deployment a node's own configuration
    (``--node-config "budget=0.5 rank=6 storage='/var/tapfl' cache='/var/cache/tapfl' data='/photos' secret='…'"``)
    goes before them. A node that has a storage uses neither `out` nor `cache` of the run, which name folders of the
    server.

    Raises:
        ConfigError: if a path of the node's own is not absolute, or its profile is not possible.
    """
    config = _config(json.dumps(dict(context.run_config)))
    node = context.node_config
    storage, cache, source = (_own_path(node, name) for name in ("storage", "cache", "data"))
    if storage or cache:
        config = config.model_copy(update={"cache": cache})
    i, devices = int(node["partition-id"]), int(node["num-partitions"])
    dealt = profiles_of(config.devices)
    own = {name: node[name] for name in PROFILE_FIELDS if name in node}
    profile = dealt[i % len(dealt)]
    folder = Path(storage) if storage else RunFolder(run_path(config.out, context.run_id)).device(i)
    return Device(
        config=config,
        partition_id=i,
        devices=devices,
        profile=DeviceProfile.of(profile.model_dump() | own) if own else profile,
        storage=DeviceStorage(folder),
        source=source,
        secret=str(node.get("secret", "")),
    )


def _own_path(node: Mapping[str, Scalar], name: str) -> str:
    value = str(node.get(name, ""))
    if not names_path(value):
        return value
    if not (path := Path(value).expanduser()).is_absolute():
        raise ConfigError(f"{name} = {value!r} of the node's configuration: must be an absolute path")
    return str(path)


def _answer(message: Message, context: Context, type: type[M], handler: Callable[[Device, M], WireMessage]) -> Message:
    torch.set_num_threads(1)  # a worker is one thread: more only spin against each other, and change the last bit
    device = device_of(context)
    what = f"device {device.partition_id}: {message.metadata.message_type}"
    with time_limit(device.config.faults.device_timeout, what):
        reply = handler(device, type.from_records(message.content))
    return Message(reply.to_records(), reply_to=message)


@app.query("hello")
def hello(message: Message, context: Context) -> Message:
    return _answer(message, context, Hello, Device.hello)


@app.query("summarize")
def summarize(message: Message, context: Context) -> Message:
    return _answer(message, context, Summarize, Device.summarize)


@app.query("prune")
def prune(message: Message, context: Context) -> Message:
    return _answer(message, context, Prune, Device.prune)


@app.train()
def train(message: Message, context: Context) -> Message:
    return _answer(message, context, Train, Device.train)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    return _answer(message, context, Evaluate, Device.evaluate)
