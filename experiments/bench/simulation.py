"""A round of simulated federated learning against the bare loop that does its work: wall time, CPU time, memory.

Variants, each a process tree of its own, taking turns: the loop by hand (`experiments.bench.bare_loop`), with merged
LoRA as tapfl has it and with plain LoRA; `tapfl run` on Flower's engine; a Flower app as it is usually written
(`experiments.bench.usual_server`). Counted are the rounds after the first; all before is start-up.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from experiments.bench.process_tree import ProcessTree
from experiments.bench.setting import ROUND_LINE, Setting
from tapfl.errors import ConfigError, RunError

LIMIT = "loop by hand"
POLL, MEMORY_EVERY = 0.02, 2.0


@dataclass(frozen=True)
class Timing:
    """Of one run: seconds a round after the first, seconds before that, and the most memory that was seen.

    Attributes:
        peak_bytes: of all its processes together.
        driver_bytes: of the first of them.
    """

    wall: float
    cpu: float
    startup: float
    peak_bytes: int
    driver_bytes: int


def variants(folder: Path, out: Path, workers: int) -> dict[str, list[str]]:
    """Returns the command of every variant, the limit first."""
    config, count = str(folder / "config.toml"), str(workers)
    loop = ["-m", "experiments.bench.bare_loop", config, str(out), count]
    command = ["-m", "experiments.cli", "run", "--config", config, "--out", str(out), "--workers", count]
    return {
        LIMIT: [*loop, "merged"],
        "with plain LoRA": [*loop, "plain"],
        "tapfl run": [*command, "--no-report"],
        "usual Flower app": ["-m", "experiments.bench.usual_server", config, str(out), count],
    }


def bench_simulation(
    devices: int,
    rounds: int,
    repeats: int,
    samples: int,
    model_args: str,
    batch: int,
    workers: int,
    chosen: Sequence[str] = (),
) -> list[Mapping[str, str]]:
    """Returns a row a variant (`chosen` ones besides the limit; none: all): medians over the repeats.

    Raises:
        ConfigError: where Linux's /proc is missing, or there is no round after the first.
        RunError: if a variant fails, with the last line that it said, or its rounds are too short to be timed.
    """
    require_proc("tapfl bench simulation", rounds)
    with tempfile.TemporaryDirectory(prefix="tapfl-bench-") as name:
        folder = Path(name)
        Setting.prepare(folder, devices, rounds, samples, model_args, batch)
        timings: dict[str, list[Timing]] = {}
        for repeat in range(repeats):
            for number, variant in enumerate(variants(folder, folder, workers)):
                if not chosen or variant in (LIMIT, *chosen):
                    out = folder / f"{repeat}-{number}"
                    timing = measure(variants(folder, out, workers)[variant], out, rounds)
                    timings.setdefault(variant, []).append(timing)
    return [_row(variant, taken, timings[LIMIT], devices) for variant, taken in timings.items()]


def require_proc(command: str, rounds: int) -> None:
    """Raises ConfigError where /proc is missing, or there is no round after the first."""
    if not Path("/proc/self/smaps_rollup").is_file():
        raise ConfigError(f"{command}: needs Linux's /proc to count CPU seconds and memory of processes")
    if rounds < 2:
        raise ConfigError(f"--rounds {rounds}: must be at least 2, because the first counts as start-up")


def measure(arguments: Sequence[str], out: Path, rounds: int) -> Timing:
    """Runs a variant to its end and returns what it took.

    It notes the end of each round in ``out/metrics.jsonl``. Start-up counts from its own, or from when it makes the
    file ``OUT.warm``.
    """
    log = out.with_suffix(".log")
    began = time.time()
    marks: list[tuple[float, float]] = []
    peak, driver, looked = 0, 0, began
    with log.open("w") as said:
        process = subprocess.Popen([sys.executable, *arguments], stdout=said, stderr=subprocess.STDOUT)
        tree = ProcessTree(process.pid)
        try:
            while process.poll() is None:
                done = _rounds_done(out / "metrics.jsonl")
                now = time.time()
                if len(marks) < min(done, rounds):
                    marks += [(now, tree.cpu_seconds())] * (min(done, rounds) - len(marks))
                if now - looked > MEMORY_EVERY:
                    peak, driver, looked = max(peak, tree.memory_bytes()), max(driver, tree.root_bytes()), now
                time.sleep(POLL)
        finally:
            tree.end()
            process.wait()
    if process.returncode or len(marks) < rounds:
        last = (log.read_text().strip().splitlines() or ["it said nothing"])[-1]
        raise RunError(f"{' '.join(arguments[:3])}: ended with {process.returncode}: {last}")
    wall, cpu = ((marks[-1][i] - marks[0][i]) / (rounds - 1) for i in (0, 1))
    if (warm := out.with_suffix(".warm")).exists():
        began = warm.stat().st_mtime
    return Timing(wall, cpu, marks[0][0] - began - wall, peak, driver)


def _rounds_done(file: Path) -> int:
    return file.read_text().count(ROUND_LINE) if file.is_file() else 0


def ratios(taken: Sequence[Timing], limit: Sequence[Timing], name: str) -> list[float]:
    """Returns how many times the limit's `wall` or `cpu` seconds each run took, turn by turn.

    Raises:
        RunError: if the limit's are too few to be counted.
    """
    if not all(getattr(timing, name) > 0 for timing in limit):
        raise RunError(
            f"bench: a round of the bare loop is too short for its {name} seconds to be counted; "
            "give more --devices, --samples or --rounds"
        )
    return [getattr(own, name) / getattr(least, name) for own, least in zip(taken, limit, strict=True)]


def told(values: Sequence[float]) -> str:
    """Returns the median of turns and, of more than one, their range."""
    extremes = f" ({min(values):.2f}–{max(values):.2f})" if len(values) > 1 else ""
    return f"{np.median(values):.2f}{extremes}"


def _row(variant: str, taken: Sequence[Timing], limit: Sequence[Timing], devices: int) -> Mapping[str, str]:
    def median(name: str) -> float:
        return float(np.median([getattr(timing, name) for timing in taken]))

    return {
        "devices": str(devices),
        "variant": variant,
        "CPU s a round": f"{median('cpu'):.2f}",
        "wall s a round": f"{median('wall'):.2f}",
        "CPU / limit": told(ratios(taken, limit, "cpu")),
        "wall / limit": told(ratios(taken, limit, "wall")),
        "start-up s": f"{median('startup'):.1f}",
        "peak GB": f"{max(timing.peak_bytes for timing in taken) / 1e9:.2f}",
    }
