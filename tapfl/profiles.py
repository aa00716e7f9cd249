"""Device profiles: budget and rank, speed of computation and transfer, and availability.

A set of profiles is a TOML file. The first `count` devices have the first profile, the next ones the second, and so on,
cyclically:

```toml
[[device]]
name = "phone"
count = 3                        # default: 1
budget = "macs<=0.5,params<=4e6" # or a share of the MACs
rank = 4
compute = 5e9                    # MAC/s
upload = 1e6                     # bytes/s
download = 5e6                   # bytes/s
availability = 0.8               # probability of being available when a round begins
```
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, field_validator

from tapfl.config import PROFILE_SETS, DeviceOptions
from tapfl.errors import ConfigError
from tapfl.options import Count, Section, Share, expanded, read_toml_tables, validated
from tapfl.pruning.budget import Budget

Speed = Annotated[float, Field(ge=1e-6)]  # otherwise simulated times would be unbounded
FOLDER = Path(__file__).parent / "profile_sets"


class DeviceProfile(Section):
    """One device's abilities.

    Attributes:
        name: shown in tables.
        budget: text for `Budget.parse`: a share of the dense MACs, or limits on MACs, block MACs and parameters.
        rank: LoRA rank.
        compute: MAC/s in training, for the simulated time.
        upload, download: bytes/s, for the simulated time.
        availability: probability in (0, 1] that the device is available when a round begins.
    """

    name: str = ""
    budget: str
    rank: Count
    compute: Speed = 5e9
    upload: Speed = 1e6
    download: Speed = 5e6
    availability: Share = 1.0

    @field_validator("budget", mode="before")
    @classmethod
    def _feasible(cls, value: Any) -> str:
        try:
            budget = Budget.parse(value)
        except ConfigError as error:
            raise ValueError(str(error).removeprefix(f"budget = {value!r}: ")) from None
        if budget.measured:
            raise ValueError(
                "latency is measured on the server and cannot limit a device; accepted: macs, block-macs, params"
            )
        return str(value)


@lru_cache(maxsize=16)
def profiles_of(options: DeviceOptions) -> tuple[DeviceProfile, ...]:
    """Returns the profiles, which are assigned cyclically: device i has profile i modulo their number.

    Raises:
        ConfigError: if the set is neither built in nor a readable file, or a profile in it is not valid.
    """
    if not options.profiles:
        pairs = zip(options.budgets, options.ranks, strict=True)
        return tuple(DeviceProfile(budget=repr(budget), rank=rank) for budget, rank in pairs)
    if options.profiles in PROFILE_SETS:
        return _read(FOLDER / f"{options.profiles}.toml")
    if not (file := expanded("devices.profiles", options.profiles)).exists():
        accepted = f"a TOML file, or {', '.join(PROFILE_SETS)}"
        raise ConfigError(f"devices.profiles = {options.profiles!r}: there is no such file; accepted: {accepted}")
    return _read(file)


def _read(file: Path) -> tuple[DeviceProfile, ...]:
    tables = read_toml_tables(file, "devices.profiles")
    devices = tables.pop("device", None)
    if tables or not isinstance(devices, list) or not devices:
        raise ConfigError(f"devices.profiles {file}: must hold tables [[device]] and nothing else")
    profiles: list[DeviceProfile] = []
    for number, table in enumerate(devices, start=1):
        count = table.pop("count", 1)
        if not isinstance(count, int) or isinstance(count, bool) or count < 1:
            raise ConfigError(f"devices.profiles {file}: device {number}: count = {count!r}: must be at least 1")
        try:
            profiles += [validated(DeviceProfile, table)] * count
        except ConfigError as error:
            raise ConfigError(f"devices.profiles {file}: device {number}: {error}") from None
    return tuple(profiles)


def max_rank(options: DeviceOptions) -> int:
    """Returns the largest rank among the profiles: the rank of the global adapters."""
    return max(profile.rank for profile in profiles_of(options))
