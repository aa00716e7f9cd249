"""A federation in which nothing is computed: what is left is the engine."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from experiments.bench.setting import Setting
from strategies.exchange import exchange, wait_for_nodes
from tapfl.config import RunConfig
from tapfl.wire import Train, TrainReply

VALUES = 75_000  # float32 there and back: adapters of rank 8 on the ViT of `tapfl bench simulation`, 299 kB
SLICE = 500  # devices whose answers are held at once: the memory that is measured is the engine's

client = ClientApp()
server = ServerApp()


@client.train()
def _echo(message: Message, context: Context) -> Message:
    asked = Train.from_records(message.content)
    reply = TrainReply(
        round=asked.round, adapters=asked.adapters, loss=0.0, alpha=0.0, global_accuracy=0.0, personal_accuracy=0.0
    )
    return Message(reply.to_records(), reply_to=message)


@server.main()
def _ask(grid: Grid, context: Context) -> None:
    """Asks all devices in every round, as a federation does, and notes when each round ended."""
    config = RunConfig.from_flat(context.run_config)
    nodes = dict(enumerate(wait_for_nodes(grid, config.devices.count, config.node_timeout)))
    for t in range(1, config.train.rounds + 1):
        _round(grid, config, nodes, t)
        Setting.note_round(Path(config.out), t)


def _round(grid: Grid, config: RunConfig, nodes: dict[int, int], t: int) -> None:
    message = Train(t, 0, np.zeros(VALUES, np.float32))
    for first in range(0, len(nodes), SLICE):
        answers = exchange(
            grid,
            {i: (nodes[i], message) for i in range(first, min(first + SLICE, len(nodes)))},
            TrainReply,
            lambda i, reply: reply.check(t, VALUES),
            timeout=math.inf,
            retries=config.faults.retries,
            window=config.window,
            group=str(t),
        )
        answers.require(f"round {t}", 1.0)
