"""A run as it will be carried out: options, folder and paths, checked before torch is loaded. Writes nothing."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from strategies.records import require_same_options
from tapfl.config import RunConfig
from tapfl.errors import ConfigError
from tapfl.progress import stage
from tapfl.pruning.criteria.registry import require_criterion
from tapfl.store import RunFolder

DEFAULT_DEVICES = 10


def resolve_run(options: Mapping[str, Any], out: Path, resume: bool) -> RunConfig:
    """Returns a run as it will be carried out in the folder `out`, after its check; writes nothing.

    Args:
        options: dotted; above the defaults, and above those of the run that goes on.
        resume: the folder holds a run to go on with.

    Raises:
        TapflError: in one line, for whatever would keep the run from its end.
    """
    kept = RunFolder(out).config() if resume else {"devices.count": DEFAULT_DEVICES}
    config = absolute_paths(RunConfig.from_flat({**kept, **options, "out": str(out), "resume": resume}))
    if resume:
        require_same_options(RunFolder(out), config)
    elif Path(config.out).exists():
        raise ConfigError(
            f"out = {config.out!r}: exists already; give a folder that does not, or go on with --resume {config.out}"
        )
    require_criterion(config.pruning.criterion)
    with stage("checking"):
        from experiments.feasible import check

        check(config)
    return config


def absolute_paths(config: RunConfig) -> RunConfig:
    """Returns the configuration with every path made absolute: server and devices run in folders of their own."""
    absolute = {option: str(Path(value).expanduser().absolute()) for option, value in config.paths().items()}
    return RunConfig.from_flat(config.flat() | absolute)
