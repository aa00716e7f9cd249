"""The runs of a sweep: a grid or a list of options, with one run folder for each combination.

A sweep's TOML has a table `[grid]`, whose lists are crossed, or tables `[[run]]`, or both; then each `[[run]]` is
crossed with the grid. The other options are shared by all runs. A `[[run]]` may have a `name`, its label in the table.

```toml
[grid]
"personalize.method" = ["apfl", "fedavg", "local"]
seed = [0, 1, 2]

[[run]]
name = "plain"

[[run]]
name = "with DP"
privacy = { dp-clip = 1.0, dp-noise = 1.0 }

[train]
rounds = 10

[sweep]
reach = [0.5, 0.6]                                # report bytes and simulated time until these accuracies
reference = { "personalize.method" = "local" }    # test every point against the one that differs only in this option
```

A run that has its `summary.json` is finished and is not repeated. A run that has none, or has fewer rounds than the
file now asks for, continues from its checkpoint. Runs that differ only in options with an effect after round zero share
round zero: one of them runs first, and the others take its summaries and plans from `round-zero/`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field, field_validator

from experiments.engines.cluster import EngineLostError
from experiments.jobs.federation import Engine, carry_out, name_of, resolved
from experiments.jobs.pool import Job, ThreadPool, first_done
from experiments.jobs.progress import Overview
from experiments.preflight import require_same_run
from strategies.records import SUMMARY
from tapfl.config import RunConfig
from tapfl.errors import ConfigError, TapflError
from tapfl.options import AnyShares, Scalar, Section, flatten, read_toml_tables, validated
from tapfl.progress import Advance
from tapfl.pruning.criteria.registry import require_criterion
from tapfl.run_folder import RunFolder

LONGEST_NAME = 240  # bytes of a run's name; file systems allow 255, and the name of its log is longer
Point = tuple[tuple[str, Any], ...]  # options in which runs differ, without the seed


@dataclass(frozen=True)
class SweepRun:
    """One run of a sweep: the options in which it differs from the others, and all its options."""

    name: str
    point: dict[str, Any]
    options: dict[str, Any]


class SweepOptions(Section):
    """The table ``[sweep]``: how a sweep is reported."""

    reach: AnyShares = Field(
        (), description="mean personal accuracies; the table lists bytes and simulated time until each is reached"
    )
    reference: dict[str, Scalar] = Field(
        {}, description="option values; each point is tested against the point that differs only in these"
    )

    @field_validator("reference", mode="before")
    @classmethod
    def _dotted(cls, value: object) -> object:
        return flatten(value) if isinstance(value, Mapping) else value


class _File(Section):
    sweep: SweepOptions = SweepOptions()


def group_of(point: Mapping[str, Any]) -> Point:
    """Returns the options of a point without the seed."""
    return tuple((key, value) for key, value in point.items() if key != "seed")


def read_sweep(
    file: Path, changes: Mapping[str, Any] | None = None, reference: Mapping[str, Scalar] | None = None
) -> tuple[list[SweepRun], SweepOptions]:
    """Returns the runs of a sweep, and how it is reported.

    Args:
        changes: options that override the options that all runs of the file share.
        reference: overrides the reference of the file, unless it is empty.

    Raises:
        ConfigError: if a table or any run is not valid, or if the runs differ in an option of `changes`.
    """
    tables = read_toml_tables(file)
    table = tables.pop("sweep", {})
    if not isinstance(table, dict):
        raise ConfigError(f"{file}: sweep = {table!r}: must be a table, [sweep]")
    options = validated(_File, {"sweep": table | ({"reference": reference} if reference else {})}).sweep
    grid, runs = tables.pop("grid", {}), tables.pop("run", [])
    if not isinstance(grid, dict) or not all(isinstance(v, list) and v for v in grid.values()) or not (grid or runs):
        raise ConfigError(f"{file}: needs a table [grid] with a list of values for each option, or tables [[run]]")
    if not isinstance(runs, list) or not all(isinstance(run, dict) for run in runs):
        raise ConfigError(f"{file}: runs are tables [[run]], with two brackets")
    changes = changes or {}
    shared = flatten(tables) | dict(changes)
    crossings = [flatten(dict(zip(grid, values, strict=True))) for values in itertools.product(*grid.values())]
    varied = {key for part in (*crossings, *map(flatten, runs)) for key in part}
    if odd := sorted(varied & {"out", "resume"}):
        raise ConfigError(f"{file}: {odd[0]}: each run has its own folder in --out; accepted: other options")
    if fixed := sorted(varied & {*changes}):
        raise ConfigError(f"--set {fixed[0]}: the runs of {file} differ in this option; change it in the file")
    planned: dict[str, SweepRun] = {}
    for run, crossed in itertools.product(runs or [{}], crossings):
        own = flatten(run)
        title = own.pop("name", "")
        if not (title or own) and (runs or not crossed):  # its folder would be `--out`, its label empty
            raise ConfigError(f'{file}: a run without options needs a name; accepted: [[run]] with name = "baseline"')
        if both := sorted(own.keys() & crossed.keys()):
            accepted = "accepted: in one of the two"
            raise ConfigError(f"{file}: {both[0]} = {own[both[0]]!r} in [[run]], but it is also in [grid]; {accepted}")
        point = ({"run": title} if title else own) | crossed
        name = " ".join(f"{key}={value}" for key, value in point.items()).replace("/", "-")
        if name in planned:
            raise ConfigError(f"{file}: two runs are {name!r}; give them different names")
        if (size := len(name.encode())) > LONGEST_NAME:
            accepted = f"accepted: at most {LONGEST_NAME}; give a [[run]] a name, or cross fewer options"
            raise ConfigError(f"{file}: the name of the folder of run {name:.60}… has {size} bytes; {accepted}")
        planned[name] = SweepRun(name, point, shared | own | crossed)
        require_criterion(RunConfig.from_flat(planned[name].options).pruning.criterion)
    return list(planned.values()), options


def run_sweep(runs: list[SweepRun], out: Path, pool: ThreadPool, engine: Engine, progress: Advance) -> dict[str, str]:
    """Executes the runs that are not finished. Of runs that share round zero, one runs before the others.

    Returns:
        The error of each run that failed, by name; its output is in ``NAME.log``.

    Raises:
        ConfigError: if a run in `out` was started with other options, images or weights.
        EngineLostError: if the engine has no workers left.
    """
    waiting = [run for run in runs if not _finished(run, out)]
    out.mkdir(parents=True, exist_ok=True)
    alike: dict[str, list[SweepRun]] = {}
    for run in waiting:
        alike.setdefault(name_of(resolved(run.options, out / run.name)), []).append(run)
    overview = Overview(progress, len(runs), len(runs) - len(waiting), pool.jobs)
    in_flight: dict[Future[Any], tuple[SweepRun, list[SweepRun]]] = {}

    def begin(run: SweepRun, followers: list[SweepRun]) -> None:
        job = Job(carry_out, (run.options, out / run.name, engine), out / f"{run.name}.log")
        in_flight[pool.submit(job, overview.listen(run.name))] = run, followers

    for first, *others in alike.values():
        begin(first, others)
    failures: dict[str, str] = {}
    while in_flight:
        for future in first_done(in_flight):
            run, followers = in_flight.pop(future)
            for follower in followers:
                begin(follower, [])
            error = future.exception()
            if isinstance(error, TapflError) and not isinstance(error, EngineLostError):
                failures[run.name] = str(error)
            else:
                future.result()
            overview.end(run.name)
    return failures


def _finished(run: SweepRun, out: Path) -> bool:
    """Returns whether a run has finished all its rounds. Raises ConfigError if it has other options or inputs."""
    folder = RunFolder(out / run.name)
    if not (folder.path / "config.json").is_file():
        return False
    wanted = resolved(run.options, folder.path)
    require_same_run(folder, wanted, require=False)
    return (folder.path / SUMMARY).is_file() and folder.config()["train.rounds"] >= wanted.train.rounds


def references(points: Iterable[Point], reference: Mapping[str, Scalar]) -> dict[Point, Point]:
    """Returns, for each point that has one, the other point with `reference`'s values and otherwise equal values.

    Values are compared as text.

    Raises:
        ConfigError: if `reference` names something that is not an axis, or no point has such another point.
    """
    if not reference:
        return {}
    texts = {point: {key: str(value) for key, value in point} for point in points}
    axes: dict[str, dict[str, None]] = {}  # the values of each axis, in order
    for text in texts.values():
        for key, value in text.items():
            axes.setdefault(key, {})[value] = None
    if unknown := [key for key in reference if key not in axes]:
        raise ConfigError(f"reference {unknown[0]}: is not an axis of this sweep; accepted: {', '.join(axes)}")
    wanted = {key: str(value) for key, value in reference.items()}
    by_text = {frozenset(text.items()): point for point, text in texts.items()}
    others = {point: by_text.get(frozenset((text | wanted).items())) for point, text in texts.items()}
    if found := {point: other for point, other in others.items() if other is not None and other != point}:
        return found
    named = ", ".join(f"{key}={value}" for key, value in wanted.items())
    accepted = "; ".join(f"{key}: {', '.join(axes[key])}" for key in wanted)
    raise ConfigError(f"reference {named}: no two points of the sweep differ only in this; accepted: {accepted}")
