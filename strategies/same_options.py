"""The check that a run goes on as it began."""

from __future__ import annotations

from tapfl.config import RunConfig, binding
from tapfl.errors import ConfigError
from tapfl.store import RunFolder


def require_same_options(folder: RunFolder, config: RunConfig) -> None:
    """Raises ConfigError, naming what changed, unless `config` is that of the run in `folder`.

    What changes no result may differ, and `train.rounds` too: a run may go on for longer.
    """
    before, now = folder.config(), config.flat()
    changed = [
        f"{option}: {before.get(option, '(not an option then)')!r} then, {now.get(option, '(not an option now)')!r} now"
        for option in sorted(binding(before).keys() | binding(now).keys())
        if before.get(option) != now.get(option)
    ]
    if changed:
        raise ConfigError(f"resume: the run in {folder.path} has other options: {'; '.join(changed)}")
