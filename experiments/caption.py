"""What stands under a table or a figure: the command that makes it, the seeds, the versions.

No date: a figure that is made again is the same.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from importlib import metadata

PACKAGES = ("tapfl", "torch", "timm", "numpy", "scikit-learn")


def command(*parts: str) -> str:
    """Returns a `tapfl` command as a reader types it; of absolute paths the last name alone: the rest is a machine's.

    >>> command("sweep", "--config", "rules.toml", "--set", "data.source=/home/me/val")
    'tapfl sweep --config rules.toml --set data.source=…/val'
    """
    return " ".join(["tapfl", *(_quoted(re.sub(r"(^|=)/(?:[^/]*/)*(?=[^/])", r"\1…/", part)) for part in parts)])


def flags(**repeated: Sequence[str] | None) -> list[str]:
    """Returns options that may be given several times as they are typed.

    >>> flags(set=["seed=1"], reference=None)
    ['--set', 'seed=1']
    """
    return [part for name, values in repeated.items() for value in values or () for part in (f"--{name}", value)]


def _quoted(part: str) -> str:
    return part if re.fullmatch(r"[\w@%+=:,./…-]+", part) else shlex.quote(part)


def installed(packages: Iterable[str] = PACKAGES) -> dict[str, str]:
    """Returns the installed version of each package."""
    return {name: metadata.version(name) for name in packages}


def named(versions: Mapping[str, str]) -> str:
    """Returns versions in words."""
    return ", ".join(f"{name} {version}" for name, version in versions.items())


def caption(made_by: str, seeds: Iterable[int], versions: Mapping[str, str], about: Iterable[str] = ()) -> str:
    """Returns one line of Markdown.

    Args:
        made_by: the command, of `command`.
        versions: package -> version.
        about: what else, one part each, such as the backbone and what ± stands for.
    """
    numbers = sorted(set(seeds))
    parts = [
        f"made by `{made_by}`",
        f"{'seed' if len(numbers) == 1 else 'seeds'} {', '.join(map(str, numbers))}",
        *about,
        named(versions),
    ]
    return "; ".join(filter(None, parts)) + "."
