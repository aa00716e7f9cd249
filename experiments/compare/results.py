"""What is to be made of a comparison's results: further measures, a line to compare with, devices to keep apart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydantic import Field

from tapfl.config import Section
from tapfl.errors import ConfigError

ALWAYS = (
    "macs_share",
    "params_share",
    "own_share",
    "classes_covered",
    "dense",
    "dense_own",
    "pruned",
    "pruned_own",
    "seconds",
)
RANK = ("rank_ffn", "rank_attention")


class ResultOptions(Section):
    """The table `[results]` of a comparison's TOML."""

    measures: tuple[Literal["rank"], ...] = Field(
        (), description="what costs extra: `rank`, the correlation of a criterion's scores with those of the oracle"
    )
    show: tuple[str, ...] = Field(("pruned_own",), min_length=1, description="measures with a table, the first drawn")
    reference: tuple[str, ...] = Field(
        (), description="values as axis=value: every line is compared with the one that has these instead of its own"
    )
    chosen_on: tuple[int, ...] = Field((), description="devices that a method was chosen on; the others come first")

    @property
    def columns(self) -> tuple[str, ...]:
        """The measures of every cell."""
        return ALWAYS + (RANK if "rank" in self.measures else ())

    def given(self, show: Sequence[str] | None, reference: Sequence[str] | None) -> ResultOptions:
        """Returns the options with what the command line says above them."""
        said = {name: tuple(value) for name, value in (("show", show), ("reference", reference)) if value}
        return self.model_copy(update=said)

    def check(self, axes: Mapping[str, Sequence[Any]]) -> None:
        """Raises ConfigError if something is asked for that a comparison of these axes does not have."""
        if odd := [name for name in self.show if name not in self.columns]:
            hint = "; results.measures = ['rank'] adds rank_ffn and rank_attention"
            raise ConfigError(
                f"--measure {odd[0]}: accepted are {', '.join(self.columns)}{'' if 'rank' in self.measures else hint}"
            )
        for axis, value in self.values.items():
            accepted = [str(each) for each in axes.get(axis, ())]
            if axis in ("device", "seed") or value not in accepted:
                named = f"values of {axis}: {', '.join(accepted)}" if accepted else f"axes: {', '.join(axes)}"
                raise ConfigError(f"--reference {axis}={value}: is no line of the table; {named}")
        if odd_devices := [str(each) for each in self.chosen_on if each not in axes["device"]]:
            raise ConfigError(
                f"results.chosen-on = {odd_devices[0]}: accepted are the devices of the comparison, "
                f"{', '.join(map(str, axes['device']))}"
            )

    @property
    def values(self) -> dict[str, str]:
        """`reference` as axis -> value."""
        found = {}
        for text in self.reference:
            axis, equals, value = text.partition("=")
            if not equals:
                raise ConfigError(f"--reference {text}: must have the form axis=value, such as criterion=tap")
            found[axis.strip()] = value.strip()
        return found
