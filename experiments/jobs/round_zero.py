"""Round zero, shared among runs that agree on what it depends on.

What devices said of their images and the plans that came of it are kept by the options that can change them. A new run
begins as one that goes on and has got so far: it asks and computes only what is missing, and comes to the same bits.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Container, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tapfl.config import FREE_OPTIONS, RunConfig
from tapfl.store import content_hash, whole_folder, write_json

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
