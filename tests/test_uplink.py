"""The list of what leaves a device is made from the messages, so that nothing else can be sent."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any, ClassVar, get_type_hints

import numpy as np
import pytest
from typer.testing import CliRunner

from clients.device import Device
from experiments import cli
from experiments import uplink as reading
from experiments.uplink import uplink
from strategies.records import DeviceRecord, Summary, write_summary
from tapfl.errors import TapflError
from tapfl.profiles import DeviceProfile
from tapfl.wire_format import WireMessage


@dataclass(frozen=True)
class Base:
    """Stands in for a message; a subclass of WireMessage would be visible to all tests of this process."""

    when: ClassVar[str] = "never"
    kind: ClassVar[str] = "odd"


def listed(*replies: type) -> list[dict[str, str]]:
    return uplink(SimpleNamespace(**{reply.__name__: reply for reply in replies}))  # type: ignore[arg-type]


@pytest.fixture
def _stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "WireMessage", Base)


def test_every_answer_of_a_device_is_listed_with_every_field() -> None:
    answers = [
        get_type_hints(value).get("return")
        for name, value in vars(Device).items()
        if name[0] != "_" and callable(value)
    ]
    replies = [kind for kind in answers if isinstance(kind, type) and issubclass(kind, WireMessage)]
    assert len(replies) >= 5
    rows = uplink()
    for reply in replies:
        mine = [row["field"] for row in rows if f"{row['message']}reply" == reply.__name__.lower()]
        assert mine == [each.name for each in fields(reply)]
    assert len(rows) == sum(len(fields(reply)) for reply in replies)


def test_every_field_has_a_description_a_time_and_a_kind_of_bytes() -> None:
    rows = uplink()
    assert all(value.strip() for row in rows for value in row.values())
    by_field = {(row["message"], row["field"]): row for row in rows}
    assert by_field["summary", "means"]["type"] == "array (K, d)"
    assert by_field["train", "adapters"]["bytes"] == "adapters"
    assert by_field["hello", "holds_backbone"]["type"] == "bool"
    assert {row["bytes"] for row in rows} <= {"hello", "summary", "adapters"}


@pytest.mark.usefixtures("_stand_in")
def test_a_new_reply_is_listed_or_refused() -> None:
    @dataclass(frozen=True)
    class ReplyOfALaterDay(Base):
        images: Annotated[np.ndarray, "all of them", "n, h, w"]

    assert listed(ReplyOfALaterDay) == [
        {
            "message": "replyofalaterday",
            "when": "never",
            "field": "images",
            "type": "array (n, h, w)",
            "what": "all of them",
            "bytes": "odd",
        }
    ]

    @dataclass(frozen=True)
    class SilentReply(Base):
        images: int

    @dataclass(frozen=True)
    class ShapelessReply(Base):
        images: Annotated[np.ndarray, "all of them"]

    class NoMessageReply:
        pass

    for reply in (SilentReply, ShapelessReply, NoMessageReply):
        with pytest.raises(TypeError, match=reply.__name__):
            listed(reply)


def tapfl(*arguments: str) -> Any:
    return CliRunner().invoke(cli.app, ["inspect", *arguments])


def test_the_command_shows_the_list_and_what_a_run_sent(tmp_path: Path) -> None:
    profile = DeviceProfile(budget="0.5", rank=4)
    sent: list[dict[str, int]] = [{"hello": 40, "adapters": 1200}, {"hello": 41}]
    devices = [DeviceRecord(device=i, profile=profile, train_samples=9, bytes_up=up) for i, up in enumerate(sent)]
    numbers: dict[str, Any] = dict.fromkeys(Summary.model_fields.keys() - {"version"}, 0)
    empty: dict[str, Any] = {key: {} for key in ("time_to_accuracy", "bytes_to_accuracy", "seconds")}
    write_summary(
        tmp_path,
        Summary(**numbers | empty | {"curve": [], "epsilon": None, "reference_accuracies": None, "devices": devices}),
    )
    alone, with_run = tapfl("--uplink", "--json"), tapfl(str(tmp_path), "--uplink", "--json")
    assert json.loads(alone.output) == {"uplink": uplink()}
    assert json.loads(with_run.output)["sent"] == [
        {"device": 0, "hello": 40, "adapters": 1200},
        {"device": 1, "hello": 41},
    ]
    table = tapfl(str(tmp_path), "--uplink").output
    assert "personal_accuracy" in table and "1200" in table


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "give a pruned model's folder, or --uplink"),
        (("--uplink", "--picture", "a.png"), "--picture a.png"),
        (("/nowhere", "--uplink"), "/nowhere/summary.json: cannot be read"),
    ],
)
def test_an_invalid_combination_of_options_is_refused(arguments: tuple[str, ...], said: str) -> None:
    found = tapfl(*arguments)
    assert isinstance(found.exception, TapflError) and said in str(found.exception)
