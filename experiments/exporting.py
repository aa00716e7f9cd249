"""A pruned model's folder as one file of another format, and how fast that runs here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from experiments.inspection import pruned_folder
from tapfl.models.forward import example_input
from tapfl.models.latency import median_ms
from tapfl.pruning.export import export, load_exported
from tapfl.pruning.plan import load_plan
from tapfl.pruning.surgery import load_pruned

REPEATS = 30


def export_folder(folder: Path, out: Path, format: str, batch: int | None, opset: int | None) -> dict[str, Any]:
    """Returns what was written to `out`, and milliseconds a pass of `batch` images (else of one) on one thread.

    Raises:
        TapflError: if the folder or an argument is off, or the file would not compute the same; there is no file then.
    """
    folder = pruned_folder(folder)
    model, (plan, _) = load_pruned(folder), load_plan(folder)
    written = export(model, plan, out, format, batch, opset)
    exported, x = load_exported(out, format), example_input(model, batch or 1)
    exported_ms, torch_ms = median_ms([lambda: exported(x), lambda: model(x)], REPEATS)
    return {
        "file": str(written.file),
        "format": written.format,
        "bytes": written.bytes,
        "max_abs_difference": written.max_abs_difference,
        "top1_equal": written.top1_equal,
        "batches_checked": list(written.batches),
        "plan": plan.checksum,
        "latency_batch": batch or 1,
        "latency_ms": exported_ms,
        "latency_ms_torch": torch_ms,
    }
