"""Flower apps for comparison, and a program that runs one federation of an app on an engine.

``python -m experiments.bench.flower_apps ENGINE WORK FOLDER OUT WORKERS``, where WORK is

- ``real``: tapfl's own app;
- ``usual``: a Flower app as it is usually written: Flower's FedAvg, peft's LoRA, model and adapters built for each
  message, unchanged state dicts, a train and an evaluate message per round. The images are opened once per process, as
  in quickstarts;
- ``none``: an app that computes nothing, so that only the engine is measured.

With the engine ``ray warm`` the measured federation is the second one on its actors; the first has one round.
"""

from __future__ import annotations

import math
import os
import sys
import traceback
from pathlib import Path
from typing import Any

import numpy as np
import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

from experiments.bench.workload import Workload, note_round
from experiments.engines.actor import load_app
from experiments.engines.flower import run_flower
from experiments.engines.forked import run_forked
from experiments.engines.local import run_inprocess
from experiments.engines.ray import ActorPool
from strategies.exchange import Request, exchange, wait_for_nodes
from tapfl.adapters.peft_format import peft_name
from tapfl.config import RunConfig
from tapfl.options import Scalar, read_toml
from tapfl.store import write_tensors
from tapfl.training import accuracy, predict
from tapfl.wire import Train, TrainReply

APPS = {
    "none": ("experiments.bench.flower_apps:idle_server", "experiments.bench.flower_apps:idle_client"),
    "real": ("strategies.server_app:app", "clients.client_app:app"),
    "usual": ("experiments.bench.flower_apps:usual_server", "experiments.bench.flower_apps:usual_client"),
}
TARGETS = r"blocks\.\d+\.(attn\.(qkv|proj)|mlp\.(fc1|fc2))"
VALUES = 75_000  # float32 in both directions: adapters of rank 8 on the ViT of `tapfl bench simulation`, 299 kB
SLICE = 500  # devices whose replies are in memory at once, so that mainly the engine's memory is measured

idle_client = ClientApp()  # Flower finds an app only if its assignment has a single target
idle_server = ServerApp()


@idle_client.train()
def _echo(message: Message, context: Context) -> Message:
    asked = Train.from_records(message.content)
    reply = TrainReply(
        round=asked.round,
        adapters=asked.adapters,
        loss=0.0,
        alpha=0.0,
        global_accuracy=0.0,
        personal_accuracy=0.0,
        reference_accuracies=np.zeros(0),
        images=np.zeros(0),
    )
    return Message(reply.to_records(), reply_to=message)


@idle_server.main()
def _ask(grid: Grid, context: Context) -> None:
    """Asks all devices in every round, as a federation does, and records the end of each round."""
    config = RunConfig.from_flat(context.run_config)
    nodes = dict(enumerate(wait_for_nodes(grid, config.devices.count, config.node_timeout)))
    for t in range(1, config.train.rounds + 1):
        _round(grid, config, nodes, t)
        note_round(Path(config.out), t)


def _round(grid: Grid, config: RunConfig, nodes: dict[int, int], t: int) -> None:
    message, phase = Train(t, 0, np.zeros(VALUES, np.float32)), f"round {t}"
    request = Request(message, TrainReply, lambda reply: reply.check(t, length=VALUES))
    for first in range(0, len(nodes), SLICE):
        requests = dict.fromkeys(range(first, min(first + SLICE, len(nodes))), request)
        answers = exchange(
            grid, nodes, requests, phase, timeout=math.inf, retries=config.faults.retries, window=config.window
        )
        answers.require(phase, 1.0)


usual_client = ClientApp()
usual_server = ServerApp()


def build(workload: Workload) -> Any:
    """Returns the backbone from its file, with adapters made by peft."""
    from peft import LoraConfig, get_peft_model  # here, because it loads transformers, which the other apps do not need

    options = LoraConfig(
        r=workload.rank,
        lora_alpha=round(workload.config.adapters.scale * workload.rank),
        target_modules=TARGETS,
        modules_to_save=["head"],
    )
    return get_peft_model(workload.dense(), options)


def _workload(context: Context) -> Workload:
    return Workload.read(str(Path(str(context.run_config["cache"])).parent))


def _arrived(message: Message, context: Context) -> tuple[Workload, int, Any]:
    """Returns the workload, the device, and a model with the adapters of a message."""
    from peft import set_peft_model_state_dict

    workload = _workload(context)
    model = build(workload)
    set_peft_model_state_dict(model, message.content.array_records["arrays"].to_torch_state_dict())
    return workload, int(context.node_config["partition-id"]), model


@usual_client.train()
def _train(message: Message, context: Context) -> Message:
    from peft import get_peft_model_state_dict

    workload, device, model = _arrived(message, context)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    round = int(str(message.content.config_records["config"]["server-round"]))
    loss, samples = workload.train(model, trained, round, device)
    metrics = MetricRecord({"loss": loss, "num-examples": samples})
    arrays = ArrayRecord(dict(get_peft_model_state_dict(model)))
    return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=message)


@usual_client.evaluate()
def _evaluate(message: Message, context: Context) -> Message:
    workload, device, model = _arrived(message, context)
    inputs, labels = workload.part(device, "test")
    correct = accuracy(predict(model.eval(), inputs), labels)
    metrics = MetricRecord({"accuracy": correct, "num-examples": len(labels)})
    return Message(RecordDict({"metrics": metrics}), reply_to=message)


@usual_server.main()
def _fedavg(grid: Grid, context: Context) -> None:
    torch.set_num_threads(1)
    workload, out = _workload(context), Path(str(context.run_config["out"]))
    initial = {peft_name(name): theta for name, theta in workload.initial().items()}
    count, rounds = workload.config.devices.count, workload.config.train.rounds

    def note(round: int, arrays: ArrayRecord) -> None:
        if round:
            note_round(out, round)

    strategy = FedAvg(min_train_nodes=count, min_evaluate_nodes=count, min_available_nodes=count)
    result = strategy.start(grid, ArrayRecord(initial), num_rounds=rounds, evaluate_fn=note)
    state = result.arrays.to_torch_state_dict()
    write_tensors(out / "adapters.safetensors", {name: state[peft_name(name)] for name in workload.initial()})


def drive(engine: str, work: str, config: dict[str, Scalar], out: Path, workers: int) -> None:
    """Runs the federation in the folder `out`."""
    server_app, client_app = APPS[work]
    nodes = RunConfig.from_flat(config).devices.count
    if engine == "flower":
        run_flower({**config, "out": str(out)}, nodes, workers, server_app, client_app)
    elif engine == "inprocess":
        run_inprocess(load_app(server_app), load_app(client_app), {**config, "out": str(out)}, nodes)
    elif engine == "forked":
        run_forked(load_app(server_app), load_app(client_app), {**config, "out": str(out)}, nodes, workers)
    else:
        with ActorPool(count=workers) as pool:
            if engine == "ray warm":
                first = {**config, "out": f"{out} before", "train.rounds": 1}
                pool.run(load_app(server_app), first, nodes, client_app)
                out.with_suffix(".warm").touch()
            pool.run(load_app(server_app), {**config, "out": str(out)}, nodes, client_app)


if __name__ == "__main__":
    engine, work, folder, out, workers = sys.argv[1:]
    try:
        options = RunConfig.from_flat(read_toml(Path(folder) / "config.toml")).flat()
        drive(engine, work, options, Path(out), int(workers))
    except Exception:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)  # Flower's server thread would wait for replies forever
