"""Adapters in peft's configuration, names and files, so that a device's personal model loads with stock peft."""

from __future__ import annotations

from pathlib import Path

from tapfl.adapters.layout import LORA_A, LORA_B
from tapfl.store import write_bytes, write_tensors
from tapfl.training import Params

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"


def save_peft(params: Params, scale: float, folder: Path, base: str) -> None:
    """Writes adapters to `folder`; `PeftModel.from_pretrained(tapfl.load_pruned(base), folder)` loads them.

    Args:
        params: A (r, d_in) and B (d_out, r) by linear, equal r everywhere, and whole heads.
        scale: s = lora_alpha / r.
        base: where the pruned model is; recorded only.
    """
    from peft import LoraConfig  # two seconds with all of transformers, and only the last message of a run needs it

    linears = [name.removesuffix(f".{LORA_A}") for name in params if name.endswith(LORA_A)]
    heads = sorted({name.rpartition(".")[0] for name in params if not name.endswith((LORA_A, LORA_B))})
    rank = len(params[f"{linears[0]}.{LORA_A}"])
    config = LoraConfig(
        r=rank,
        lora_alpha=scale * rank,  # type: ignore[arg-type]  # peft divides by r; a fraction is fine
        target_modules=linears,
        modules_to_save=heads,
        base_model_name_or_path=base,
        inference_mode=True,
    )
    state = {
        f"base_model.model.{name}.weight" if name.endswith((LORA_A, LORA_B)) else f"base_model.model.{name}": tensor
        for name, tensor in params.items()
    }
    write_tensors(folder / WEIGHTS_FILE, state, {"format": "pt"})
    config.target_modules = sorted(linears)  # peft keeps a set, whose order in the file would change from run to run
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(str(folder))
    write_bytes(folder / CONFIG_FILE, (folder / CONFIG_FILE).read_bytes())
