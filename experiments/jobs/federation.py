"""One federation as a job: started or continued in its folder, on the engine that it is given.

Runs whose options agree on round zero share it. The answers of the devices and the plans are kept in ``round-zero``
beside the runs' folders, by a hash of the options that can change them. A new run starts as one that has already got
that far: it computes only what is missing, and gives the same bits.
"""

from __future__ import annotations

import gc
import json
import os
import shutil
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.command_line import JobOptions, RayOptions, starting
from experiments.jobs.pool import Emit, Job, Pool, ProcessPool, ThreadPool
from experiments.jobs.progress import on_both, reporting
from experiments.preflight import DEFAULT_DEVICES, absolute_paths
from strategies.progress import Lines
from strategies.records import SUMMARY, Summary, read_summary
from tapfl.config import FREE_OPTIONS, RunConfig
from tapfl.errors import RunError
from tapfl.options import Scalar
from tapfl.progress import shown_on, stage
from tapfl.store import content_hash, whole_folder, write_json

if TYPE_CHECKING:
    from experiments.engines.ray import ActorPool


Engine = Callable[[dict[str, Scalar], int], None]  # of a run's options and its number of devices


def in_process(run_config: dict[str, Scalar], nodes: int) -> None:
    """Carries out a federation with its devices in this process, one after the other: an `Engine`."""
    from clients.client_app import app as client_app
    from experiments.engines.local import run_inprocess
    from strategies.server_app import app as server_app

    run_inprocess(server_app, client_app, run_config, nodes)


def on_flower(workers: int) -> Engine:
    """Returns the `Engine` that is Flower's simulation with so many workers."""
    return partial(_on_flower, workers)


def _on_flower(workers: int, run_config: dict[str, Scalar], nodes: int) -> None:
    from experiments.engines.flower import run_flower

    run_flower(run_config, nodes, workers)


def on_actors(actors: ActorPool) -> Engine:
    """Returns the `Engine` that sends devices' messages to Ray actors which other federations use as well."""

    def run(run_config: dict[str, Scalar], nodes: int) -> None:
        from strategies.server_app import app as server_app

        actors.run(server_app, run_config, nodes)

    return run


@contextmanager
def engine_of(name: str, options: RayOptions) -> Iterator[Engine]:
    """Yields the `Engine` of this name: ``inprocess``, ``flower``, or ``ray`` with actors of its own."""
    if name == "inprocess":
        yield in_process
        return
    starting("Ray")
    if name == "flower":
        yield on_flower(options.workers or os.cpu_count() or 1)
        return
    with actor_pool(options) as actors:
        yield on_actors(actors)


def actor_pool(options: RayOptions) -> ActorPool:
    """Returns the pool of actors that the options describe, not started yet."""
    from experiments.engines.ray import ActorPool

    return ActorPool(options.address, options.workers, options.actor_cpus, options.actor_gpus)


@contextmanager
def federations(engine: str, options: JobOptions) -> Iterator[tuple[Pool, Engine]]:
    """Yields a pool for ``options.jobs`` federations at a time, and the engine that each of them uses.

    Args:
        engine: ``inprocess`` or ``flower``: each federation in a process; ``ray``: all of them on the same actors.
    """
    jobs, cpus = options.jobs or os.cpu_count() or 1, os.cpu_count() or 1
    if engine == "ray":
        starting("Ray")
        with actor_pool(options) as actors, closing(ThreadPool(jobs, lambda: actors.lost)) as threads:
            yield threads, on_actors(actors)
    else:
        with closing(ProcessPool(jobs)) as processes:
            yield processes, in_process if engine == "inprocess" else on_flower(options.workers or cpus)


def resolved(options: Mapping[str, Any], folder: Path) -> RunConfig:
    """Returns the configuration of a run in `folder` that may go on."""
    own = {"out": str(folder), "resume": True}
    return absolute_paths(RunConfig.from_flat({"devices.count": DEFAULT_DEVICES, **options, **own}))


def federation_job(options: Mapping[str, Any], folder: Path, engine: Engine) -> Job:
    """Returns the job that carries out a run; it logs to ``FOLDER.log`` and comes to the run's summary."""
    return Job(carry_out, (dict(options), folder, engine), folder.with_name(f"{folder.name}.log"))


def carry_out(emit: Emit, options: Mapping[str, Any], folder: Path, engine: Engine) -> Summary:
    """Begins a run in `folder`, or goes on with it, up to ``train.rounds``; returns its summary.

    Round zero is taken from ``round-zero`` beside the folder as far as another run has left it there.

    Args:
        emit: gets `StageProgress`.

    Raises:
        TapflError: if the run cannot be carried out.
    """
    from experiments.feasible import check

    config, store = resolved(options, folder), folder.parent / "round-zero"
    with Lines() as lines, shown_on(on_both(lines, reporting(emit))):
        if not (folder / "config.json").is_file():
            with stage("checking"):
                check(config)  # a run that is refused leaves no folder
            shutil.rmtree(folder, ignore_errors=True)
            prepare(folder, config, store)
        try:
            engine(config.flat(), config.devices.count)
        finally:
            gc.collect()  # models that hold on to each other go now: the next run needs their room
    keep(folder, config, store)
    if not (folder / SUMMARY).is_file():
        raise RunError(f"{folder}: the run ended without a result")
    return read_summary(folder)


# what cannot change a plan: all that comes after round zero. An option that is not named here is taken to change it
AFTER = (
    *FREE_OPTIONS,
    "train.",
    "adapters.",
    "personalize.",
    "privacy.",
    "devices.ranks",
    "devices.participation",
    "devices.dropout",
    "devices.deadline",
)
BUT = ("adapters.head",)  # for class rows a device says which classes it has
# what cannot change a summary either
AFTER_SUMMARIES = (*AFTER, "metric.", "pruning.", "devices.budgets")
# the files of a run: what devices said, and the plans; with each what the report tells of it
SUMMARIES = ("summaries/*", "devices/*/images.json")
PLANS = ("plans/*", "metric-sets/*")


def keep(run: Path, config: RunConfig, store: Path) -> None:
    """Leaves the round zero of a run for others, if none is there."""
    summaries, plans = _folders(config, store)
    told = {file.stem for file in run.glob("summaries/*")}
    _fill(summaries, run, SUMMARIES)
    # the plan of a device that gave no mixture is for want of a better one
    _fill(plans, run, PLANS, told)


def is_kept(config: RunConfig, store: Path) -> bool:
    """Says whether plans are kept for a run like this."""
    return _folders(config, store)[1].is_dir()


def name_of(config: RunConfig) -> str:
    """Returns a name that runs have in common which come to the same plans."""
    return _hash(config.flat(), AFTER)


def prepare(run: Path, config: RunConfig, store: Path) -> None:
    """Makes the folder of a new run, to go on with, and puts into it what is kept of its round zero."""
    with whole_folder(run) as folder:
        for source in _folders(config, store):
            _link_all(source, folder, [file for file in source.rglob("*") if file.is_file()])
        write_json(folder / "config.json", config.flat() | {"resume": False})


def _folders(config: RunConfig, store: Path) -> tuple[Path, Path]:
    flat = config.flat()
    return store / f"summaries-{_hash(flat, AFTER_SUMMARIES)}", store / f"plans-{_hash(flat, AFTER)}"


def _hash(flat: Mapping[str, Any], after: tuple[str, ...]) -> str:
    decisive = {k: v for k, v in flat.items() if k.startswith(BUT) or not k.startswith(after)}
    return content_hash(json.dumps(decisive, sort_keys=True))


def _fill(target: Path, run: Path, patterns: Sequence[str], stems: Container[str] | None = None) -> None:
    files = [file for pattern in patterns for file in run.glob(pattern) if stems is None or file.stem in stems]
    if target.exists() or not files:
        return
    try:
        with whole_folder(target) as folder:
            _link_all(run, folder, files)
    except OSError:
        if not target.exists():  # else another trial has just left the same
            raise


def _link_all(source: Path, target: Path, files: Iterable[Path]) -> None:
    for file in files:
        same = target / file.relative_to(source)
        same.parent.mkdir(parents=True, exist_ok=True)
        _link(file, same)


def _link(source: Path, target: Path) -> None:
    """Files of a run are replaced, never written into: so two runs can have one in common."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
