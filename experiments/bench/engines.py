"""A simulated round of federated learning: on each engine, as a usual Flower app, and as the bare loop.

All variants are process trees that take turns. The bare loop does the same work without messages, checks or an engine,
and is the limit. The measured times are wall and CPU seconds of the rounds after the first; everything before is
start-up.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import psutil
import tomli_w
import typer

from experiments.bench.timing import Counts, Row, chosen
from experiments.bench.workload import ROUND_LINE, FederationOptions, Workload
from experiments.deploy.processes import end_processes
from tapfl.config import RunConfig
from tapfl.errors import ConfigError, RunError

LIMIT = "loop by hand"
VARIANTS = ("with plain LoRA", "tapfl run", "usual Flower app")
ENGINES = ("inprocess", "forked", "flower", "ray", "ray warm")
POLL, MEMORY_EVERY = 0.02, 2.0  # seconds


def simulation(
    *,
    devices: Counts = [20],
    options: FederationOptions,
    variant: Annotated[
        list[str], typer.Option(help=f"in addition to the loop by hand: {', '.join(VARIANTS + ENGINES)}")
    ] = [*VARIANTS],
) -> Iterator[Row]:
    """A round of FedAvg on any engine, and in a usual Flower app, against the bare loop that does the same work.

    The engines are Flower's, Ray actors (cold and warm), forked workers, and one process.
    """
    require_proc("tapfl bench simulation")
    names = (LIMIT, *chosen("--variant", variant, VARIANTS + ENGINES))
    for count in devices:
        with tempfile.TemporaryDirectory(prefix="tapfl-bench-") as folder:
            Workload.prepare(Path(folder), count, options)
            timings = take_turns(names, partial(_command, Path(folder), options.workers, "real"), Path(folder), options)
        for name, taken in timings.items():
            limits = {f"{unit} / limit": ratio(taken, timings[LIMIT], unit.lower()) for unit in ("CPU", "wall")}
            yield {"devices": str(count), "variant": name} | limits | medians(taken)


def engine(
    *,
    devices: Counts = [10, 200],
    options: FederationOptions,
    variant: Annotated[list[str], typer.Option(help=", ".join(ENGINES))] = [*ENGINES],
) -> Iterator[Row]:
    """Engines alone: time per round, start-up and memory, with devices that only return the 299 kB they receive."""
    require_proc("tapfl bench engine")
    names = chosen("--variant", variant, ENGINES)
    for count in devices:
        with tempfile.TemporaryDirectory(prefix="tapfl-bench-") as folder:
            config = RunConfig.from_flat({"devices.count": count, "train.rounds": options.rounds})
            (Path(folder) / "config.toml").write_text(tomli_w.dumps(config.flat()))
            timings = take_turns(names, partial(_command, Path(folder), options.workers, "none"), Path(folder), options)
        for name, taken in timings.items():
            yield {"devices": str(count), "engine": name} | medians(taken)


def _command(folder: Path, workers: int, work: str, variant: str, out: Path) -> list[str]:
    """Returns the arguments of Python that run a variant."""
    places = [str(folder), str(out), str(workers)]
    if variant == "tapfl run":
        options = ["--config", str(folder / "config.toml"), "--out", str(out), "--workers", str(workers)]
        return ["-m", "experiments.cli", "run", "--no-report", *options]
    if variant in (LIMIT, "with plain LoRA"):
        return ["-m", "experiments.bench.bare_loop", *places, "merged" if variant == LIMIT else "plain"]
    engine, work = ("flower", "usual") if variant == "usual Flower app" else (variant, work)
    return ["-m", "experiments.bench.flower_apps", engine, work, *places]


class ProcessTree:
    """The process `root` and its descendants that are alive at each call."""

    def __init__(self, root: int) -> None:
        self.root = root
        self._seen: set[psutil.Process] = set()

    def processes(self) -> list[psutil.Process]:
        """Returns the processes, parents before their children."""
        found = []
        with suppress(psutil.NoSuchProcess):
            root = psutil.Process(self.root)
            found = [process for process in (root, *root.children(recursive=True)) if _is_alive(process)]
        self._seen.update(found)
        return found

    def cpu_seconds(self) -> float:
        """Returns the user and system time of all processes, and of their children that have ended."""
        return float(sum(sum(times[:4]) for times in self._each(psutil.Process.cpu_times)))

    def memory_bytes(self) -> list[int]:
        """Returns the proportional set size of each process, the root first; a shared page counts once in the sum."""
        return [memory.pss for memory in self._each(psutil.Process.memory_full_info)]

    def end(self) -> None:
        """Ends all processes that are alive, including those that were seen earlier and have lost their parent."""
        self.processes()
        end_processes(lambda: [process for process in self._seen if _is_alive(process)])

    def _each(self, ask: Callable[[psutil.Process], Any]) -> list[Any]:
        answers = []
        for process in self.processes():
            with suppress(psutil.Error):
                answers.append(ask(process))
        return answers


def _is_alive(process: psutil.Process) -> bool:
    with suppress(psutil.Error):
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    return False


@dataclass(frozen=True)
class Timing:
    """The timing of one run.

    Attributes:
        wall, cpu: seconds per round, over the rounds after the first.
        startup: seconds before the first round.
        peak_bytes: peak memory of all its processes together.
        driver_bytes: peak memory of its first process.
    """

    wall: float
    cpu: float
    startup: float
    peak_bytes: int
    driver_bytes: int


def take_turns(
    variants: Sequence[str], arguments: Callable[[str, Path], list[str]], folder: Path, options: FederationOptions
) -> dict[str, list[Timing]]:
    """Returns the timings of each variant, one per turn.

    Args:
        arguments: (variant, folder of its run) → the arguments of Python.
        folder: where the folders of the runs are created.

    Raises:
        RunError: if a variant fails, with the last line of its output.
    """
    timings: dict[str, list[Timing]] = {variant: [] for variant in variants}
    for repeat in range(options.repeats):
        for number, variant in enumerate(variants):
            out = folder / f"{repeat}-{number}"
            timings[variant].append(measure(arguments(variant, out), out, options.rounds))
    return timings


def measure(arguments: Sequence[str], out: Path, rounds: int) -> Timing:
    """Runs a variant until it ends and returns its timing.

    The variant appends a line to ``out/metrics.jsonl`` at the end of each round. Start-up begins with the process, or
    when the process creates the file ``OUT.warm``.
    """
    log = out.with_suffix(".log")
    began = time.time()
    marks: list[tuple[float, float]] = []
    peak, driver, looked = 0, 0, began
    with log.open("w") as output:
        process = subprocess.Popen([sys.executable, *arguments], stdout=output, stderr=subprocess.STDOUT)
        tree = ProcessTree(process.pid)
        try:
            while process.poll() is None:
                done = min(_rounds_done(out / "metrics.jsonl"), rounds)
                now = time.time()
                if len(marks) < done:
                    marks += [(now, tree.cpu_seconds())] * (done - len(marks))
                if now - looked > MEMORY_EVERY:
                    sizes = tree.memory_bytes() or [0]
                    peak, driver, looked = max(peak, sum(sizes)), max(driver, sizes[0]), now
                time.sleep(POLL)
        finally:
            tree.end()
            process.wait()
    if process.returncode or len(marks) < rounds:
        last = (log.read_text().strip().splitlines() or ["no output"])[-1]
        raise RunError(f"{' '.join(arguments[:3])}: ended with {process.returncode}: {last}")
    wall, cpu = ((marks[-1][i] - marks[0][i]) / (rounds - 1) for i in (0, 1))
    if (warm := out.with_suffix(".warm")).exists():
        began = warm.stat().st_mtime
    return Timing(wall, cpu, marks[0][0] - began - wall, peak, driver)


def _rounds_done(file: Path) -> int:
    return file.read_text().count(ROUND_LINE) if file.is_file() else 0


def require_proc(command: str) -> None:
    """Raises ConfigError if /proc is not available."""
    if not os.access("/proc/self/smaps_rollup", os.R_OK):
        raise ConfigError(f"{command}: needs Linux's /proc to count CPU seconds and memory of processes")


def medians(taken: Sequence[Timing]) -> dict[str, str]:
    """Returns the columns of a table for the turns of one variant: medians, and peaks of memory."""
    return {
        "CPU s a round": f"{np.median([timing.cpu for timing in taken]):.2f}",
        "wall s a round": f"{np.median([timing.wall for timing in taken]):.2f}",
        "start-up s": f"{np.median([timing.startup for timing in taken]):.1f}",
        "peak GB": f"{max(timing.peak_bytes for timing in taken) / 1e9:.2f}",
        "driver GB": f"{max(timing.driver_bytes for timing in taken) / 1e9:.2f}",
    }


def ratio(taken: Sequence[Timing], limit: Sequence[Timing], name: str) -> str:
    """Returns the ratio of the turns' `wall` or `cpu` seconds to those of the limit: the median, and the range.

    Raises:
        RunError: if the rounds of the limit are too short to be measured.
    """
    if not all(getattr(timing, name) > 0 for timing in limit):
        raise RunError(
            f"bench: a round of the bare loop is too short to measure its {name} seconds; "
            "use more --devices, --samples or --rounds"
        )
    values = [getattr(own, name) / getattr(least, name) for own, least in zip(taken, limit, strict=True)]
    extremes = f" ({min(values):.2f}–{max(values):.2f})" if len(values) > 1 else ""
    return f"{np.median(values):.2f}{extremes}"
