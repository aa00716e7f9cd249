"""Apps for the tests of engines; most of them fail on purpose."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from clients import client_app as real
from clients.client_app import time_limit
from clients.device import Device
from tapfl.wire import Train, TrainReply

broken_server = ServerApp()


@broken_server.main()
def _raise(grid: Grid, context: Context) -> None:
    raise ArithmeticError("the server app raised")


adds_its_number = ClientApp()


@adds_its_number.train()
def _add(message: Message, context: Context) -> Message:
    arrays = message.content.array_records["arrays"]
    more = ArrayRecord({name: Array(arrays[name].numpy() + context.node_config["partition-id"]) for name in arrays})
    return Message(RecordDict({"arrays": more, "metrics": MetricRecord({"num-examples": 1})}), reply_to=message)


mortal = ClientApp()


def _dies_once(context: Context, partition_id: int) -> None:
    """Kills its own process when a device first gets here."""
    mark = Path(str(context.run_config["out"])).with_name("died")  # next to the run, because tests share caches
    if context.node_config["partition-id"] == partition_id and not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)


class MortalTogether(real.DeviceApp):
    """Its worker dies once with a group."""

    def answer_together(self, messages: Sequence[Message], contexts: Sequence[Context]) -> list[Message]:
        for context in contexts:
            _dies_once(context, 1)
        return super().answer_together(messages, contexts)


mortal_together = MortalTogether()
mortal_together.query("hello")(real.hello)
mortal_together.query("summarize")(real.summarize)
mortal_together.query("prune")(real.prune)
mortal_together.train()(real.train)
mortal_together.evaluate()(real.evaluate)

broken_gpu = ClientApp()
broken_gpu.query("hello")(real.hello)
broken_gpu.query("summarize")(real.summarize)
broken_gpu.query("prune")(real.prune)
broken_gpu.evaluate()(real.evaluate)


def _loses_its_gpu_once(device: Device, message: Train) -> TrainReply:
    mark = Path(device.config.out).with_name("broken")
    if device.partition_id == 1 and not mark.exists():
        mark.write_text(str(os.getpid()))
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")
    return device.train(message)


broken_gpu.train()(real._answering(Train, _loses_its_gpu_once))


@mortal.query("hello")
def _hello(message: Message, context: Context) -> Message:
    return real.hello(message, context)


@mortal.query("summarize")
def _summarize(message: Message, context: Context) -> Message:
    return real.summarize(message, context)


@mortal.query("prune")
def _prune(message: Message, context: Context) -> Message:
    return real.prune(message, context)


@mortal.train()
def _train(message: Message, context: Context) -> Message:
    _dies_once(context, 1)
    return real.train(message, context)


@mortal.evaluate()
def _evaluate(message: Message, context: Context) -> Message:
    return real.evaluate(message, context)


# -- chaos: in every round some devices fail, each in a different way -----------------------------------------------

chaos = ClientApp()
chaos.query("hello")(real.hello)
chaos.query("summarize")(real.summarize)
chaos.query("prune")(real.prune)
chaos.evaluate()(real.evaluate)

FAULTS = ("raises", "killed", "nan", "shapes", "garbage", "hangs", "stale")
REASONS = {  # what metrics.jsonl says of each; a worker that was killed is asked again and answers
    "raises": "ArithmeticError: chaos",
    "nan": "must be finite",
    "shapes": "adapters have shape",
    "garbage": "bytes, at most",
    "hangs": "faults.device-timeout",
    "stale": "answers round",
}


def fault_of(round: int, partition_id: int, devices: int) -> str | None:
    """Returns how a device fails in a round, if it does: one device in five fails, over the rounds in every way."""
    step = (partition_id + 3 * round) % devices
    return FAULTS[(round + step) % len(FAULTS)] if step % 5 == 0 else None


@chaos.train()
def _chaotic_train(message: Message, context: Context) -> Message:
    asked = Train.from_records(message.content)
    i, devices = int(context.node_config["partition-id"]), int(context.node_config["num-partitions"])
    fault = fault_of(asked.round, i, devices)
    if fault == "raises":
        raise ArithmeticError("chaos")
    if fault == "killed":
        mark = Path(str(context.run_config["cache"])) / f"killed-{asked.round}-{i}"
        if not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
    if fault == "hangs":
        client_timeout = float(context.run_config["faults.device-timeout"])
        with time_limit(client_timeout, f"device {i}: train"):
            time.sleep(3600)
    answer = real.train(message, context)
    reply = TrainReply.from_records(answer.content)
    if fault == "nan":
        reply = replace(reply, adapters=np.full_like(reply.adapters, np.nan))
    elif fault == "shapes":
        reply = replace(reply, adapters=reply.adapters[:-3])
    elif fault == "garbage":
        reply = replace(reply, adapters=np.ones(25_000_000, np.float32))
    elif fault == "stale":
        reply = replace(reply, round=asked.round - 1)
    return Message(reply.to_records(), reply_to=message)
