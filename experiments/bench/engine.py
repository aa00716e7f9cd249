"""The engines side by side: a round, the start, and the memory, with nothing to compute and with real local work.

Each variant is a process of its own (`experiments.bench.engine_driver`), and they take turns. Real work is the
federation of `tapfl bench simulation`, whose limit is the loop by hand; without work (`experiments.bench.noop_apps`)
every device gets and gives back adapters of 299 kB.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import tomli_w

from experiments.bench.setting import Setting
from experiments.bench.simulation import LIMIT, Timing, measure, ratios, require_proc, told
from tapfl.config import RunConfig
from tapfl.errors import ConfigError

ENGINES = ("inprocess", "flower", "ray", "ray warm")
WORKS = ("none", "real")


def bench_engine(
    devices: int,
    work: str,
    rounds: int,
    repeats: int,
    workers: int,
    samples: int,
    model_args: str,
    engines: Sequence[str] = (),
) -> list[Mapping[str, str]]:
    """Returns a row an engine (`engines`; none: all): medians over the repeats.

    Raises:
        ConfigError: if an engine is unknown, Linux's /proc is missing, or there is no round after the first.
        RunError: if a run fails, with the last line that it said.
    """
    require_proc("tapfl bench engine", rounds)
    if unknown := [name for name in engines if name not in ENGINES]:
        raise ConfigError(f"--variant {unknown[0]}: accepted: {', '.join(ENGINES)}")
    with tempfile.TemporaryDirectory(prefix="tapfl-bench-") as name:
        folder = Path(name)
        if work == "real":
            Setting.prepare(folder, devices, rounds, samples, model_args, batch=32)
        else:
            options = RunConfig.from_flat({"devices.count": devices, "train.rounds": rounds})
            (folder / "config.toml").write_text(tomli_w.dumps(options.flat()))
        config, timings = str(folder / "config.toml"), dict[str, list[Timing]]()
        for repeat in range(repeats):
            for variant in ([LIMIT] if work == "real" else []) + list(engines or ENGINES):
                out = folder / f"{repeat} {variant}"
                driver = ["-m", "experiments.bench.engine_driver", variant, work, config, str(out), str(workers)]
                loop = ["-m", "experiments.bench.bare_loop", config, str(out), str(workers), "merged"]
                taken = measure(loop if variant == LIMIT else driver, out, rounds)
                timings.setdefault(variant, []).append(taken)
    return [_row(devices, work, variant, taken, timings.get(LIMIT, [])) for variant, taken in timings.items()]


def _row(devices: int, work: str, variant: str, taken: list[Timing], limit: list[Timing]) -> Mapping[str, str]:
    return {
        "devices": str(devices),
        "work": work,
        "engine": variant,
        "wall s a round": f"{np.median([timing.wall for timing in taken]):.2f}",
        "CPU s a round": f"{np.median([timing.cpu for timing in taken]):.2f}",
        "wall / limit": told(ratios(taken, limit, "wall")) if limit else "",
        "start-up s": f"{np.median([timing.startup for timing in taken]):.1f}",
        "peak GB": f"{max(timing.peak_bytes for timing in taken) / 1e9:.2f}",
        "driver GB": f"{max(timing.driver_bytes for timing in taken) / 1e9:.2f}",
    }
