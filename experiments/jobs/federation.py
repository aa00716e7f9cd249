"""A federation as a job: started or continued in its folder, on a given engine.

Runs whose options have the same effect on round zero share it. The devices' summaries and the plans are stored in a
folder ``round-zero`` next to the runs' folders, by a hash of the options that can change them. A new run starts with
these files, computes only what is missing, and has the same bits.
"""

from __future__ import annotations

import gc
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.command_line import JobOptions, RayOptions, starting
from experiments.jobs.pool import Emit, ProcessPool, ThreadPool
from experiments.jobs.progress import on_both, reporting
from experiments.preflight import absolute_paths, counted, require_same_run
from strategies.binding import inputs_of, write_begun
from strategies.progress import Lines
from strategies.records import SUMMARY, Summary, read_summary
from tapfl.config import FREE_OPTIONS, ComputeOptions, RunConfig
from tapfl.data.contents import contents
from tapfl.errors import ConfigError, RunError
from tapfl.options import Scalar
from tapfl.progress import shown_on, stage
from tapfl.run_folder import RunFolder
from tapfl.store import content_hash, whole_folder

if TYPE_CHECKING:
    from experiments.engines.ray import ActorPool


Engine = Callable[[dict[str, Scalar], int], None]  # called with a run's options and its number of devices


def in_process(run_config: dict[str, Scalar], nodes: int, workers: int = 0) -> None:
    """Runs a federation with its devices in this process, or in `workers` processes forked from it: an `Engine`."""
    from clients.client_app import app as client_app
    from experiments.engines.forked import run_forked
    from experiments.engines.local import run_inprocess
    from strategies.server_app import app as server_app

    if workers > 1:
        run_forked(server_app, client_app, run_config, nodes, workers)
    else:
        run_inprocess(server_app, client_app, run_config, nodes)


def on_flower(run_config: dict[str, Scalar], nodes: int, workers: int, gpus: float) -> None:
    """Runs a federation in Flower's simulation; with `workers` and `gpus` bound, an `Engine`."""
    from experiments.engines.flower import run_flower

    starting("Ray")
    window = max(int(run_config["window"]), 2 * workers)  # Flower's grid does not know its number of workers
    run_flower(run_config | {"window": window}, nodes, workers, gpus=gpus)


def on_actors(run_config: dict[str, Scalar], nodes: int, actors: ActorPool) -> None:
    """Runs a federation on Ray actors, which it may share with others; with `actors` bound, an `Engine`."""
    from strategies.server_app import app as server_app

    actors.run(server_app, run_config, nodes)


@contextmanager
def engine_of(name: str, options: RayOptions) -> Iterator[Engine]:
    """Yields the `Engine` ``inprocess``, ``flower`` or ``ray``; the actors of ``ray`` stop at the end of the block."""
    if name == "inprocess":
        yield partial(in_process, workers=options.workers)
    elif name == "flower":
        yield partial(on_flower, workers=options.workers or os.cpu_count() or 1, gpus=options.actor_gpus)
    else:
        from experiments.engines.ray import ActorPool

        starting("Ray")
        with ActorPool(options.address, options.workers, options.actor_cpus, options.actor_gpus) as actors:
            yield partial(on_actors, actors=actors)


@contextmanager
def federations(engine: str, options: JobOptions) -> Iterator[tuple[ThreadPool, Engine]]:
    """Yields a pool for ``options.jobs`` federations at a time, and the engine that each of them uses.

    Args:
        engine: ``inprocess`` or ``flower``: each federation in its own process; ``ray``: all on the same actors.
    """
    make = ThreadPool if engine == "ray" else ProcessPool
    with engine_of(engine, options) as run, closing(make(options.jobs or os.cpu_count() or 1)) as pool:
        yield pool, run


def require_gpus(engine: str, options: RayOptions, devices: Iterable[str]) -> None:
    """Raises ConfigError if workers would use GPUs without reserving any, or reserve more than there are.

    For Ray the second check is done by `ActorPool`, because a cluster may have more GPUs than this machine.

    Args:
        devices: the values of ``compute.device`` in the runs.
    """
    from tapfl.compute import Compute, gpus_here

    gpus = options.actor_gpus
    if engine == "flower" and gpus > gpus_here():
        raise ConfigError(f"--actor-gpus {gpus:g}: this machine has {gpus_here()} GPUs; accepted: at most that many")
    forked = engine == "inprocess" and options.workers > 1
    if gpus or (engine == "inprocess" and not forked):
        return
    for device in sorted(set(devices) - {"cpu"}):
        if device == "cuda" or Compute.of(ComputeOptions(device="auto")).device.type != "cpu":
            accepted = "above 0, for instance 0.25 for four workers per GPU; or compute.device = cpu"
            if forked:
                accepted = "--workers 1, or --engine ray with --actor-gpus above 0; or compute.device = cpu"
            what = f"--workers {options.workers}" if forked else "--actor-gpus 0"
            raise ConfigError(f"{what}: workers of compute.device = {device!r} need GPUs; accepted: {accepted}")


def resolved(options: Mapping[str, Any], folder: Path) -> RunConfig:
    """Returns the configuration of the run in `folder`, which is continued if it exists."""
    begun = RunFolder(folder).config() if (folder / "config.json").is_file() else {}
    known = {"devices.count": begun.get("devices.count", 0)}  # if it was counted in images, these may no longer exist
    return counted(absolute_paths(RunConfig.from_flat({**known, **options, "out": str(folder), "resume": True})))


def carry_out(emit: Emit, options: Mapping[str, Any], folder: Path, engine: Engine) -> Summary:
    """Starts or continues the run in `folder` up to ``train.rounds``; returns its summary.

    Parts of round zero that another run has stored in ``round-zero``, next to the folder, are taken from there.

    Args:
        emit: called with `StageProgress`.

    Raises:
        ConfigError: if the folder has files, but none of a run.
        TapflError: if the run fails.
    """
    from experiments.feasible import check

    config = resolved(options, folder)
    shared = shared_folders(config, folder.parent / "round-zero")  # now, because inputs may change during the run
    with Lines() as lines, shown_on(on_both(lines, reporting(emit))):
        if not (folder / "config.json").is_file():
            if any(folder.glob("*")):
                accepted = "accepted: an empty folder, one that does not exist, or one of a run"
                raise ConfigError(f"{folder}: has no config.json, so it is not a run's folder; {accepted}")
            with stage("checking"):
                check(config)  # before the folder exists, so that a refused run leaves none
            prepare(folder, config, shared)
        else:
            require_same_run(RunFolder(folder), config)
        try:
            engine(config.flat(), config.devices.count)
        finally:
            gc.collect()  # frees models in reference cycles, because the next run needs the memory
    keep(folder, shared)
    if not (folder / SUMMARY).is_file():
        raise RunError(f"{folder}: the run ended without a result")
    return read_summary(folder)


# options that have an effect only after round zero and cannot change a plan; any other option is assumed to change it
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
BUT = ("adapters.head",)  # an exception: with class-rows, a device's summary reports its classes
# options that cannot change a summary either
AFTER_SUMMARIES = (*AFTER, "metric.", "pruning.", "devices.budgets")
# files of a run: the devices' summaries and the plans, with the files for the report that belong to them
SUMMARIES = ("summaries/*", "devices/*/images.json")
PLANS = ("plans/*", "metric-sets/*")


def keep(run: Path, shared: tuple[Path, Path]) -> None:
    """Stores the round zero of a run for other runs, unless it is stored already."""
    summaries, plans = shared
    _fill(summaries, run, [file for pattern in SUMMARIES for file in run.glob(pattern)])
    # the generic plan of a device that sent no mixture is not shared
    sent = {file.stem for file in run.glob("summaries/*")}
    _fill(plans, run, [file for pattern in PLANS for file in run.glob(pattern) if file.stem in sent])


def name_of(config: RunConfig) -> str:
    """Returns a name that all runs with the same plans share."""
    return shared_folders(config, Path())[1].name


def prepare(run: Path, config: RunConfig, shared: tuple[Path, Path]) -> None:
    """Makes the folder of a new run, with all parts of its round zero that are stored."""
    with whole_folder(run) as folder:
        for source in shared:
            _link_all(source, folder, [file for file in source.rglob("*") if file.is_file()])
        write_begun(RunFolder(folder), config, inputs_of(config))


def shared_folders(config: RunConfig, store: Path) -> tuple[Path, Path]:
    """Returns the folders of the summaries and of the plans that runs with the same options and inputs share."""
    decisive = config.flat() | contents(config, require=False)
    return store / f"summaries-{_hash(decisive, AFTER_SUMMARIES)}", store / f"plans-{_hash(decisive, AFTER)}"


def _hash(flat: Mapping[str, Any], after: tuple[str, ...]) -> str:
    decisive = {k: v for k, v in flat.items() if k.startswith(BUT) or not k.startswith(after)}
    return content_hash(json.dumps(decisive, sort_keys=True))


def _fill(target: Path, run: Path, files: Sequence[Path]) -> None:
    if target.exists() or not files:
        return
    try:
        with whole_folder(target) as folder:
            _link_all(run, folder, files)
    except OSError:
        if not target.exists():  # otherwise another run has just stored the same files
            raise


def _link_all(source: Path, target: Path, files: Iterable[Path]) -> None:
    """Hard-links files into another folder. Sharing is safe because runs replace files and never write into them."""
    for file in files:
        copy = target / file.relative_to(source)
        copy.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(file, copy)
        except OSError:
            shutil.copy2(file, copy)
