"""The ClientApp: Flower's messages in, a device's answers out."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import TypeVar

import torch
from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from clients.device import Device
from clients.storage import DeviceStorage
from tapfl.config import RunConfig
from tapfl.store import RunFolder, run_path
from tapfl.wire import Evaluate, Hello, Prune, Summarize, Train, WireMessage

app = ClientApp()

# Flower's simulation puts a worker that died back into its pool and never replaces it: every later message to it fails.
# Ray restarts actors if it is told to, and this module is imported before the pool is built.
with suppress(ImportError):
    from flwr.simulation.ray_transport.ray_actor import ClientAppActor

    ClientAppActor._default_options["max_restarts"] = -1  # type: ignore[attr-defined]

M = TypeVar("M", bound=WireMessage)


@lru_cache(maxsize=4)
def _config(run_config: str) -> RunConfig:
    return RunConfig.from_flat(json.loads(run_config))


def device_of(context: Context) -> Device:
    """Returns the device that a Flower node is.

    In a simulation budget and rank are dealt out by the run's options; in a deployment a node's own configuration
    (``--node-config "budget=0.5 rank=6 storage='/data/tapfl' secret='...'"``) goes before them.
    """
    config = _config(json.dumps(dict(context.run_config)))
    node = context.node_config
    i, devices = int(node["partition-id"]), int(node["num-partitions"])
    options = config.devices
    storage = node.get("storage")
    folder = Path(str(storage)) if storage else RunFolder(run_path(config.out, context.run_id)).device(i)
    return Device(
        config=config,
        partition_id=i,
        devices=devices,
        budget=float(node.get("budget", options.budgets[i % len(options.budgets)])),
        rank=int(node.get("rank", options.ranks[i % len(options.ranks)])),
        storage=DeviceStorage(folder),
        secret=str(node.get("secret", "")),
    )


def _answer(message: Message, context: Context, type: type[M], handler: Callable[[Device, M], WireMessage]) -> Message:
    torch.set_num_threads(1)  # a worker is one thread: more only spin against each other, and change the last bit
    reply = handler(device_of(context), type.from_records(message.content))
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
