"""The limit of a simulation: rounds of FedAvg as a loop written by hand, on long-lived processes with one thread.

``python -m experiments.bench.bare_loop FOLDER OUT WORKERS merged|plain`` does the same work as `tapfl run` with
``personalize.method=fedavg``, ``adapters.rule=fedit`` and full budgets: the same images, batches, optimiser,
evaluations and average. It has no messages to check, no engine, and stores nothing for a resume. Each worker has one
model and all images; for each device it receives a flat vector and returns one.
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
    """A frozen linear layer with its adapter, computed as one product (`merged`) or as the usual three."""

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
    """A model whose adapters are set to the values of one device after the other."""

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
        """Returns a device's adapters after training, its mean loss, and its accuracy before training."""
        params: list[Tensor] = list(self.params.values())
        vector_to_parameters(torch.from_numpy(vector), params)
        inputs, labels = self.workload.part(device, "test")
        before = accuracy(predict(self.model, inputs), labels)
        loss, _ = self.workload.train(self.model, params, round, device)
        return parameters_to_vector(params).detach().numpy(), loss, before


def serve(pipe: Connection, workload: Workload, merged: bool) -> None:
    """Runs in a worker process: computes the turns that it receives, until it receives None."""
    torch.set_num_threads(1)
    worker = LoopWorker(workload, merged)
    while (task := pipe.recv()) is not None:
        pipe.send((task[1], worker.turn(*task)))


def run(workload: Workload, out: Path, workers: int, merged: bool) -> None:
    """Runs all rounds, records the end of each, and writes the final adapters by name."""
    torch.set_num_threads(1)
    names = LoopWorker(workload, merged).params
    initial = workload.initial()
    vector = parameters_to_vector([initial[name] for name in names]).numpy()
    samples = [len(workload.part(i, "train")[1]) for i in range(workload.config.devices.count)]
    context = multiprocessing.get_context("spawn")
    pipes = []
    for _ in range(workers):
        ours, theirs = context.Pipe()
        context.Process(target=serve, args=(theirs, workload, merged), daemon=True).start()
        pipes.append(ours)
    for t in range(1, workload.config.train.rounds + 1):
        vector = average(_round(pipes, t, len(samples), vector), samples)
        note_round(out, t)
    time.sleep(0.5)  # the benchmark reads the CPU seconds of the processes while they are alive
    for pipe in pipes:
        pipe.send(None)
    parts = torch.from_numpy(vector).split([p.numel() for p in names.values()])
    last = {name: part.view(p.shape) for (name, p), part in zip(names.items(), parts, strict=True)}
    write_tensors(out / "adapters.safetensors", last)


def average(vectors: dict[int, np.ndarray], samples: list[int]) -> np.ndarray:
    """Returns the mean weighted by `samples`, computed in float64 and in the order of the devices."""
    total = sum(n * vectors[i].astype(np.float64) for i, n in enumerate(samples))
    return np.asarray(total / sum(samples), dtype=np.float32)


def _round(pipes: list[Connection], t: int, devices: int, vector: np.ndarray) -> dict[int, np.ndarray]:
    """Sends one device after the other to any free worker; returns the trained vectors by device."""
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
