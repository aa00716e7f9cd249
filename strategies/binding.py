"""What must not change when a run is resumed: its options, and the content of the images and files that they name.

``inputs.json`` in the run's folder has the fingerprints of everything that the server reads: the public pool, the
weights, the rows of the head, the profiles, and the modules of plugins. A device checks its own images itself.
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
    from tapfl.compute import Compute  # loads torch; without it a bad option is refused sooner

INPUTS, VERSIONS = "inputs.json", "versions.json"
PROCESSOR = "processor"  # entry of versions.json


def inputs_of(config: RunConfig, require: bool = True) -> dict[str, str]:
    """Returns the fingerprints of the inputs of a run's server; for `require` see `tapfl.data.contents.contents`."""
    private = ("data.source",) if config.data.public else ()
    return contents(config, [option for option in OPTIONS if option not in private], require)


def write_begun(folder: RunFolder, config: RunConfig, inputs: Mapping[str, str]) -> None:
    """Records what must not change later: the options, and the fingerprints of the inputs, if there are any."""
    if inputs:
        write_json(folder.path / INPUTS, inputs)
    write_json(folder.path / "config.json", config.flat() | {"resume": False})  # last: it marks the run as begun


def require_same_options(folder: RunFolder, config: RunConfig) -> None:
    """Raises ConfigError, naming what changed, unless `config` has the options of the run in `folder`.

    Options that change no result may differ. So may `train.rounds`, because a run may be continued for more rounds.
    """
    if changes := differences(binding(folder.config()), binding(config.flat())):
        raise ConfigError(f"resume: the run in {folder.path} has other options: {'; '.join(changes)}")


def require_same_inputs(folder: RunFolder, inputs: Mapping[str, str]) -> None:
    """Raises ConfigError, naming what changed, unless the run in `folder` began with the same `inputs`."""
    if changes := changed(_noted(folder, INPUTS), inputs):
        raise ConfigError(f"resume: {'; '.join(changes)}; {ACCEPTED}")


def require_same_processor(folder: RunFolder, compute: Compute) -> None:
    """Warns if the run in `folder` was computed on another kind of processor, because results differ in the last bits.

    Raises:
        ConfigError: instead of the warning, if `compute.deterministic` is set.
    """
    before, now = _noted(folder, VERSIONS).get(PROCESSOR), compute.kind
    if before in (None, now):
        return
    if compute.deterministic:
        raise ConfigError(
            f"compute.deterministic = true: the run in {folder.path} was computed on {before}, but this is {now}; "
            "accepted: the same kind of processor"
        )
    from flwr.common.logger import log  # slow to import; without it a bad option is refused sooner

    log(logging.WARNING, "resume: computed on %s so far, now on %s: results differ in the last bits", before, now)


def _noted(folder: RunFolder, name: str) -> dict[str, Any]:
    """Returns the JSON object in a file of the run's folder; an empty one if the file cannot be read."""
    try:
        found = json.loads((folder.path / name).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        found = None
    return found if isinstance(found, dict) else {}
