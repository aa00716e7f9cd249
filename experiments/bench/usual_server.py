"""The ServerApp of a Flower app as it is usually written: Flower's own FedAvg, from its start to its end.

``python -m experiments.bench.usual_server CONFIG.toml OUT WORKERS`` carries the federation out on Flower's simulation.
"""

from __future__ import annotations

import os
import sys
import traceback
from pathlib import Path

import torch
from flwr.app import ArrayRecord, Context
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

from experiments.bench.setting import Setting
from experiments.engines.flower import run_flower
from tapfl.adapters.layout import LORA_A, LORA_B
from tapfl.config import Scalar
from tapfl.store import write_tensors

PREFIX = "base_model.model."

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Flower's FedAvg over all devices; notes when each round ended."""
    torch.set_num_threads(1)
    setting, out = Setting.read(Path(str(context.run_config["config"]))), Path(str(context.run_config["out"]))
    initial = {peft_name(name): theta for name, theta in setting.initial().items()}
    count, rounds = setting.config.devices.count, setting.config.train.rounds

    def note(round: int, arrays: ArrayRecord) -> None:
        if round:
            setting.note_round(out, round)

    strategy = FedAvg(min_train_nodes=count, min_evaluate_nodes=count, min_available_nodes=count)
    result = strategy.start(grid, ArrayRecord(initial), num_rounds=rounds, evaluate_fn=note)
    state = result.arrays.to_torch_state_dict()
    write_tensors(out / "adapters.safetensors", {name: state[peft_name(name)] for name in setting.initial()})


def peft_name(name: str) -> str:
    """Returns what peft calls one of tapfl's tensors."""
    return f"{PREFIX}{name}.weight" if name.endswith((LORA_A, LORA_B)) else PREFIX + name


def run(config: Path, out: Path, workers: int) -> None:
    """Carries the federation out on Flower's simulation."""
    options: dict[str, Scalar] = {"config": str(config), "out": str(out)}
    bench = "experiments.bench"
    nodes = Setting.read(config).config.devices.count
    try:
        run_flower(options, nodes, workers, f"{bench}.usual_server:app", f"{bench}.usual_client:app")
    except Exception:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)  # Flower's server thread would wait for answers for ever


if __name__ == "__main__":
    run(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
