"""What the cells in a comparison's folder belong to: written down beside them, and compared at the next start.

`results.csv` knows a cell by its values along the axes. All else that its numbers depend on stands in
`comparison.json`: the options that all cells share, what lies behind those that name images or files, and the versions
of the packages. Cells may be added along an axis; nothing else may change.
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
    """What the cells of a folder have in common.

    Attributes:
        options: what all cells share, but for the options that change no result; paths are absolute.
        contents: ``option = 'value'`` -> fingerprint, of every value along an axis too.
        versions: package -> the versions with which cells were measured.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    options: dict[str, Scalar]
    contents: dict[str, str]
    versions: dict[str, tuple[str, ...]]

    def measured_now(self) -> Origin:
        """Returns it with the versions that are installed: those of the cells that are measured next."""
        now = {name: (version,) for name, version in installed().items()}
        then = {name: versions for name, versions in self.versions.items() if name in now}
        merged = {name: tuple(dict.fromkeys((*then.get(name, ()), *versions))) for name, versions in now.items()}
        return self.model_copy(update={"versions": merged})


def origin_of(comparison: Comparison, require: bool = True) -> Origin:
    """Returns what cells that are measured now would have in common.

    Args:
        require: whether all inputs must be there; if not, those that cannot be read are left out.

    Raises:
        TapflError: if an input that must be there cannot be read.
    """
    flat = absolute_paths(next(comparison.cells()).config).flat()
    axes = {option_of(axis): values for axis, values in comparison.axes.items()}
    named = [(option, value) for option in OPTIONS for value in axes.get(option, [flat[option]])]
    shared = {option: value for option, value in binding(flat).items() if option not in axes}
    return Origin(options=shared, contents=fingerprints(named, require), versions={})


def require_same(before: Origin | None, now: Origin, out: Path) -> Origin:
    """Returns `before` with what was added along the axes.

    Args:
        before: that of the finished cells in `out`; None: it is not known.

    Raises:
        ConfigError: naming all in which `now` is another one.
    """
    if before is None:
        raise ConfigError(f"--out {out}: lacks {FILE}, which says what its cells belong to; give another --out")
    both = {name: fingerprint for name, fingerprint in now.contents.items() if name in before.contents}
    odd = differences(before.options, now.options) + changed(before.contents, both, "its cells were measured")
    if odd:
        raise ConfigError(f"--out {out}: has the cells of another comparison: {'; '.join(odd)}; give another --out")
    return before.model_copy(update={"contents": before.contents | now.contents})


def read_origin(out: Path) -> Origin | None:
    """Returns what the cells in a comparison's folder have in common; None if it is missing or damaged."""
    try:
        return Origin.model_validate_json((out / FILE).read_bytes())
    except (OSError, ValidationError):
        return None


def write_origin(out: Path, origin: Origin) -> None:
    write_json(out / FILE, origin.model_dump())


def inputs_in_words(origin: Origin, comparison: Comparison) -> Iterator[str]:
    """Yields images and weights with their fingerprints, for a caption: ``images …/val (1f3a5b7c)``."""
    axes = {option_of(axis): values for axis, values in comparison.axes.items()}
    for option, word in INPUTS.items():
        named = []
        for value in axes.get(option, [origin.options.get(option, "")]):
            fingerprint = origin.contents.get(f"{option} = {value!r}", "")
            path = Path(str(value))
            short = f"…/{path.name}" if path.is_absolute() else str(value)
            named.append(f"{short} ({fingerprint[:SHOWN]})" if fingerprint else short)
        if any(named):
            yield f"{word} {', '.join(each or 'none' for each in named)}"
