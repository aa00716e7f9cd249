"""The limit of a simulation: a round of FedAvg as a loop, by hand, on processes of one thread that stay alive.

``python -m experiments.bench.bare_loop FOLDER OUT WORKERS merged|plain`` does the work of `tapfl run` with
``personalize.method=fedavg``, ``adapters.rule=fedit`` and full budgets: the same images, batches, optimiser,
evaluations and average, but without messages to check, an engine, or anything that is kept for later. Each worker holds
one model and all images; a device's turn is a flat vector in and one out.
"""

from __future__ import annotations

import multiprocessing
import sys
import time
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from experiments.bench.workload import Workload, note_round
from tapfl.adapters.lora import MergedLora
from tapfl.store import write_tensors
from tapfl.training import accuracy, predict


class LoraLinear(nn.Module):
    """A frozen linear with its adapter, as one product or the usual three."""

    def __init__(self, linear: nn.Linear, rank: int, scale: float, merged: bool) -> None:
        super().__init__()
        self.linear, self.scale, self.merged = linear, scale, merged
        self.lora_A = nn.Parameter(torch.zeros(rank, linear.in_features))
        self.lora_B = nn.Parameter(torch.zeros(linear.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        if self.merged:
            return MergedLora.apply(x, self.linear.weight, self.linear.bias, self.lora_A, self.lora_B, self.scale)
        return self.linear(x) + (x @ self.lora_A.T @ self.lora_B.T) * self.scale


class LoopWorker:
    """One model whose adapters take the values of one device after the other."""

    def __init__(self, workload: Workload, merged: bool) -> None:
        self.workload, self.model = workload, workload.dense()
        blocks: Any = self.model.blocks
        for block in blocks:
            for parent, name in ((block.attn, "qkv"), (block.attn, "proj"), (block.mlp, "fc1"), (block.mlp, "fc2")):
                scale = workload.config.adapters.scale
                setattr(parent, name, LoraLinear(getattr(parent, name), workload.rank, scale, merged))
        self.model.head.requires_grad_(True)
        self.params = {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def turn(self, round: int, device: int, vector: np.ndarray) -> tuple[np.ndarray, float, float]:
        """Returns a device's adapters after training, its mean loss, and its accuracy before."""
        params: list[Tensor] = list(self.params.values())
        vector_to_parameters(torch.from_numpy(vector), params)
        inputs, labels = self.workload.part(device, "test")
        before = accuracy(predict(self.model, inputs), labels)
        loss, _ = self.workload.train(self.model, params, round, device)
        return parameters_to_vector(params).detach().numpy(), loss, before


def serve(pipe: Connection, workload: Workload, merged: bool) -> None:
    """A worker process: turns as they are asked for, until there is nothing more."""
    torch.set_num_threads(1)
    worker = LoopWorker(workload, merged)
    while (task := pipe.recv()) is not None:
        pipe.send((task[1], worker.turn(*task)))


def run(workload: Workload, out: Path, workers: int, merged: bool) -> None:
    """Carries out all rounds; notes when each ended, and writes the last adapters by name."""
    torch.set_num_threads(1)
    names = LoopWorker(workload, merged).params
    initial = workload.initial()
    vector = parameters_to_vector([initial[name] for name in names]).numpy()
    samples = [len(workload.part(i, "train")[1]) for i in range(workload.config.devices.count)]
    context = multiprocessing.get_context("spawn")
    pipes = []
    for _ in range(workers):
        here, there = context.Pipe()
        context.Process(target=serve, args=(there, workload, merged), daemon=True).start()
        pipes.append(here)
    for t in range(1, workload.config.train.rounds + 1):
        vector = average(_round(pipes, t, len(samples), vector), samples)
        note_round(out, t)
    time.sleep(0.5)  # what the processes took is read off them while they are there
    for pipe in pipes:
        pipe.send(None)
    parts = torch.from_numpy(vector).split([p.numel() for p in names.values()])
    last = {name: part.view(p.shape) for (name, p), part in zip(names.items(), parts, strict=True)}
    write_tensors(out / "adapters.safetensors", last)


def average(vectors: dict[int, np.ndarray], samples: list[int]) -> np.ndarray:
    """Returns the mean weighted by samples, in float64 and in the order of the devices."""
    total = sum(n * vectors[i].astype(np.float64) for i, n in enumerate(samples))
    return np.asarray(total / sum(samples), dtype=np.float32)


def _round(pipes: list[Connection], t: int, devices: int, vector: np.ndarray) -> dict[int, np.ndarray]:
    """One device after the other to whichever worker is free."""
    waiting = iter(range(devices))
    done: dict[int, np.ndarray] = {}
    for pipe, i in zip(pipes, waiting, strict=False):
        pipe.send((t, i, vector))
    while len(done) < devices:
        for ready in wait(pipes):
            assert isinstance(ready, Connection)
            i, (trained, _, _) = ready.recv()
            done[i] = trained
            if (following := next(waiting, None)) is not None:
                ready.send((t, following, vector))
    return done


if __name__ == "__main__":
    run(Workload.read(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4] == "merged")
