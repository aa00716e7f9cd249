"""Adapters in peft's format, so that a device's personal model loads with stock peft."""

from __future__ import annotations

import copy
import json
from pathlib import Path

from torch import nn

from tapfl.adapters.layout import LORA_A, LORA_B
from tapfl.errors import PlanError, message_of
from tapfl.store import read_tensors, write_json, write_tensors
from tapfl.training import Params

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."


def peft_name(name: str) -> str:
    """Returns the name of an adapter tensor in peft's files."""
    return f"{PREFIX}{name}" + (".weight" if name.endswith((LORA_A, LORA_B)) else "")


def save_peft(params: Params, scale: float, folder: Path, base: str) -> None:
    """Writes adapters to `folder`; `PeftModel.from_pretrained(tapfl.load_pruned(base), folder)` loads them.

    The configuration is written without importing peft, which imports all of transformers and would take a worker
    several seconds at the end of every run. peft sets missing fields to their defaults.

    Args:
        params: A (r, d_in) and B (d_out, r) of each linear, with the same r everywhere, and whole heads.
        scale: s = lora_alpha / r.
        base: folder of the pruned model; it is only recorded.
    """
    linears = [name.removesuffix(f".{LORA_A}") for name in params if name.endswith(LORA_A)]
    heads = sorted({name.rpartition(".")[0] for name in params if not name.endswith((LORA_A, LORA_B))})
    rank = len(params[f"{linears[0]}.{LORA_A}"])
    config = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": scale * rank,  # peft divides it by r; it need not be an integer
        "target_modules": sorted(linears),
        "modules_to_save": heads,
        "inference_mode": True,
    }
    state = {peft_name(name): tensor for name, tensor in params.items()}
    write_tensors(folder / WEIGHTS_FILE, state, {"format": "pt"})
    write_json(folder / CONFIG_FILE, config)


def merge_peft(model: nn.Module, folder: Path) -> nn.Module:
    """Returns a copy of a pruned model with the adapters that `save_peft` wrote to `folder`: W₀ + s B A, and the heads.

    Raises:
        PlanError: if a file is missing or damaged, or the adapters are those of another model.
    """
    tensors, merged = read_tensors(folder / WEIGHTS_FILE), copy.deepcopy(model)
    try:
        config, state = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8")), model.state_dict()
        for linear in config["target_modules"]:
            A, B = (tensors.pop(peft_name(f"{linear}.{factor}")) for factor in (LORA_A, LORA_B))
            state[f"{linear}.weight"] = state[f"{linear}.weight"] + config["lora_alpha"] / config["r"] * (B @ A)
        merged.load_state_dict({**state, **{name.removeprefix(PREFIX): theta for name, theta in tensors.items()}})
    except (OSError, ValueError, TypeError, LookupError, ArithmeticError, RuntimeError) as error:
        raise PlanError(f"{folder}: is not an adapter of this pruned model ({message_of(error)})") from None
    return merged
