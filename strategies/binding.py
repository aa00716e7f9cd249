"""What must stay the same when a run goes on: its options, and what lies behind those that name images or files.

``inputs.json`` in the run's folder holds the fingerprints of what its server reads: the public pool, the weights, the
rows of the head, the profiles, the modules of plugins. The images of a device are its own, and it compares them itself.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from tapfl.config import RunConfig, binding
from tapfl.data.contents import ACCEPTED, OPTIONS, changed, contents
from tapfl.errors import ConfigError
from tapfl.options import differences
from tapfl.run_folder import RunFolder
from tapfl.store import write_json

if TYPE_CHECKING:
    from tapfl.compute import Compute  # loads torch, which a bad option need not wait for

INPUTS, VERSIONS = "inputs.json", "versions.json"
PROCESSOR = "processor"  # entry of versions.json


def inputs_of(config: RunConfig, require: bool = True) -> dict[str, str]:
    """Returns the fingerprints of what the server of a run reads, as `tapfl.data.contents.contents`."""
    private = ("data.source",) if config.data.public else ()
    return contents(config, [option for option in OPTIONS if option not in private], require)


def write_begun(folder: RunFolder, config: RunConfig, inputs: Mapping[str, str]) -> None:
    """Writes down what binds a run: its options, and the fingerprints of its inputs, if it has any."""
    if inputs:
        write_json(folder.path / INPUTS, inputs)
    write_json(folder.path / "config.json", config.flat() | {"resume": False})  # last: with it the run has begun


def require_same_options(folder: RunFolder, config: RunConfig) -> None:
    """Raises ConfigError, naming what changed, unless `config` is that of the run in `folder`.

    Options that change no result may differ, and so may `train.rounds`: a run may be continued for longer.
    """
    if odd := differences(binding(folder.config()), binding(config.flat())):
        raise ConfigError(f"resume: the run in {folder.path} has other options: {'; '.join(odd)}")


def require_same_inputs(folder: RunFolder, inputs: Mapping[str, str]) -> None:
    """Raises ConfigError, naming what changed, unless `inputs` are those that the run in `folder` began with."""
    if odd := changed(_noted(folder, INPUTS), inputs):
        raise ConfigError(f"resume: {'; '.join(odd)}; {ACCEPTED}")


def require_same_processor(folder: RunFolder, compute: Compute) -> None:
    """Warns if the run in `folder` was computed on another kind of processor so far, which changes the last bits.

    Raises:
        ConfigError: instead, if it is to be deterministic.
    """
    before, now = _noted(folder, VERSIONS).get(PROCESSOR), compute.kind
    if before in (None, now):
        return
    if compute.deterministic:
        raise ConfigError(
            f"compute.deterministic = true: the run in {folder.path} was computed on {before}, and here is {now}; "
            "accepted: the same kind of processor"
        )
    from flwr.common.logger import log  # takes a while, which a bad option need not wait for

    log(logging.WARNING, "resume: computed on %s so far, now on %s: results differ in the last bits", before, now)


def _noted(folder: RunFolder, name: str) -> dict[str, Any]:
    """Returns what a file of the run's folder holds; nothing if it cannot be read."""
    try:
        found = json.loads((folder.path / name).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        found = None
    return found if isinstance(found, dict) else {}
