"""The origin of the cells in a comparison's folder, which is stored with them and checked when it is continued.

`results.csv` identifies a cell by its values along the axes. Everything else that its numbers depend on is in
`comparison.json`: the options that all cells share, fingerprints of the images and files that options name, and the
versions of the packages. Cells may be added along an axis; nothing else may change.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from experiments.compare.grid import Comparison, option_of
from experiments.output import installed
from experiments.preflight import absolute_paths
from tapfl.config import binding
from tapfl.data.contents import OPTIONS, changed, fingerprints
from tapfl.errors import ConfigError
from tapfl.options import Scalar, differences
from tapfl.store import write_json

FILE = "comparison.json"
INPUTS = {
    "data.source": "images",
    "data.public": "public pool",
    "model.weights": "weights",
    "model.head-rows": "rows of the head",
}
SHOWN = 8  # digits of a fingerprint in a caption


class Origin(BaseModel):
    """What the cells in a folder have in common.

    Attributes:
        options: the options that all cells share, except those that change no result; paths are absolute.
        contents: ``option = 'value'`` -> fingerprint; of an axis, an entry for each value.
        versions: package -> the versions with which cells were measured.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    options: dict[str, Scalar]
    contents: dict[str, str]
    versions: dict[str, tuple[str, ...]]

    def measured_now(self) -> Origin:
        """Returns the origin with the installed versions added, because the next cells are measured with them."""
        now = {name: (version,) for name, version in installed().items()}
        then = {name: versions for name, versions in self.versions.items() if name in now}
        merged = {name: tuple(dict.fromkeys((*then.get(name, ()), *versions))) for name, versions in now.items()}
        return self.model_copy(update={"versions": merged})


def origin_of(comparison: Comparison, require: bool = True) -> Origin:
    """Returns the origin of cells that would be measured now.

    Args:
        require: whether all inputs must exist; if False, those that cannot be read are left out.

    Raises:
        TapflError: if a required input cannot be read.
    """
    flat = absolute_paths(next(comparison.cells()).config).flat()
    axes = {option_of(axis): values for axis, values in comparison.axes.items()}
    named = [(option, value) for option in OPTIONS for value in axes.get(option, [flat[option]])]
    shared = {option: value for option, value in binding(flat).items() if option not in axes}
    return Origin(options=shared, contents=fingerprints(named, require), versions={})


def require_same(before: Origin | None, now: Origin, out: Path) -> Origin:
    """Returns `before` with the inputs that were added along the axes.

    Args:
        before: the origin of the finished cells in `out`; None: not known.

    Raises:
        ConfigError: naming every difference of `now`.
    """
    if before is None:
        raise ConfigError(f"--out {out}: {FILE}, the origin of its cells, is missing or damaged; give another --out")
    both = {name: fingerprint for name, fingerprint in now.contents.items() if name in before.contents}
    odd = differences(before.options, now.options) + changed(before.contents, both, "its cells were measured")
    if odd:
        raise ConfigError(f"--out {out}: has the cells of another comparison: {'; '.join(odd)}; give another --out")
    return before.model_copy(update={"contents": before.contents | now.contents})


def read_origin(out: Path) -> Origin | None:
    """Returns the origin of the cells in a comparison's folder; None if the file is missing or damaged."""
    try:
        return Origin.model_validate_json((out / FILE).read_bytes())
    except (OSError, ValidationError):
        return None


def write_origin(out: Path, origin: Origin) -> None:
    write_json(out / FILE, origin.model_dump())


def inputs_in_words(origin: Origin, comparison: Comparison) -> Iterator[str]:
    """Yields the inputs with their fingerprints, for a caption: ``images …/val (1f3a5b7c)``."""
    axes = {option_of(axis): values for axis, values in comparison.axes.items()}
    for option, word in INPUTS.items():
        named = []
        for value in axes.get(option, [origin.options.get(option, "")]):
            fingerprint = origin.contents.get(f"{option} = {value!r}", "")
            path = Path(str(value))
            short = f"…/{path.name}" if path.is_absolute() else str(value)
            named.append(f"{short} ({fingerprint[:SHOWN]})" if fingerprint else short)
        if any(named):
            yield f"{word} {', '.join(name or 'none' for name in named)}"
