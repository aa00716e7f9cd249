"""The lines of metrics.jsonl as points of curves over rounds: the same for every logger."""

from __future__ import annotations

from typing import NamedTuple

from strategies.records import DeviceLine, Line, RoundLine, TrafficLine

POSITION = ("kind", "round", "device")  # what says where a number belongs, and is none itself
DEVICE = "device-"


class Point(NamedTuple):
    """One number of one curve; the step is the round."""

    tag: str
    step: int
    value: float


def points_of(line: Line) -> list[Point]:
    """Returns the numbers of a line of metrics.jsonl.

    ```
    round    round/NAME                                          for every number of the line
    device   NAME/device-NN                                      the same
    traffic  seconds, up, down: simulated_seconds/device-NN, ...  of the rounds; round zero has several phases
    ```

    Lines of other kinds (failures, absences) hold no numbers and give none.
    """
    values = line.model_dump(exclude=set(POSITION), exclude_none=True)
    numbers = {name: value for name, value in values.items() if isinstance(value, int | float)}
    match line:
        case RoundLine():
            return [Point(f"round/{name}", line.round, value) for name, value in numbers.items()]
        case TrafficLine() if line.round:
            numbers |= {"bytes_up": sum(line.up.values()), "bytes_down": sum(line.down.values())}
        case DeviceLine():
            pass
        case _:
            return []
    return [Point(f"{name}/{DEVICE}{line.device:02d}", line.round, value) for name, value in numbers.items()]
