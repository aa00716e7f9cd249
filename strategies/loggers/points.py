"""The lines of metrics.jsonl as points of curves over rounds: the same for every logger."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

POSITION = ("kind", "round", "device")  # what says where a number belongs, and is none itself
DEVICE = "device-"


class Point(NamedTuple):
    """One number of one curve; the step is the round."""

    tag: str
    step: int
    value: float


def points_of(line: Mapping[str, Any]) -> list[Point]:
    """Returns the numbers of a line of metrics.jsonl.

    ```
    round    round/NAME                                          for every number of the line
    device   NAME/device-NN                                      the same
    traffic  seconds, up, down: simulated_seconds/device-NN, ...  of the rounds; round zero has several phases
    ```

    Lines of other kinds (failures, absences) hold no numbers and give none.
    """
    numbers = {name: value for name, value in line.items() if name not in POSITION and _is_number(value)}
    if line["kind"] == "round":
        return [Point(f"round/{name}", line["round"], value) for name, value in numbers.items()]
    if line["kind"] == "traffic" and line["round"]:
        numbers |= {f"bytes_{side}": sum(line[side].values()) for side in ("up", "down")}
    elif line["kind"] != "device":
        return []
    return [Point(f"{name}/{DEVICE}{line['device']:02d}", line["round"], value) for name, value in numbers.items()]


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
