"""Apps that fail on purpose, for the engines' tests."""

from __future__ import annotations

import os
import signal
from pathlib import Path

from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from clients import client_app as real

broken_server = ServerApp()


@broken_server.main()
def _raise(grid: Grid, context: Context) -> None:
    raise ArithmeticError("the server app raised")


mortal = ClientApp()


def _dies_once(context: Context, partition_id: int) -> None:
    """Kills its own process the first time that a device gets here."""
    mark = Path(str(context.run_config["cache"])) / "died"
    if context.node_config["partition-id"] == partition_id and not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)


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
