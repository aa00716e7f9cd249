"""Types, parsing and validation of options: the base class of all option tables, TOML files, and ``key=value``."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    ValidationError,
    ValidationInfo,
    field_validator,
)

from tapfl.errors import ConfigError

Scalar = bool | int | float | str
RATE = 1e30  # the largest learning rate; with larger ones, Adam's steps exceed float32
PLUGIN = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")  # module:name, see `tapfl.plugin`


def _kebab(name: str) -> str:
    return name.replace("_", "-")


def _split(value: object) -> object:
    """Returns the list in a text such as ``"0.3,0.5"``, because Flower's run-config has no lists."""
    if isinstance(value, str):
        return [part.strip() for part in value.split(",") if part.strip()]
    return [value] if isinstance(value, int | float) else value


def _join(values: tuple[object, ...]) -> str:
    return ",".join(str(value) for value in values)


def _three(value: object) -> object:
    values = _split(value)
    if isinstance(values, list | tuple) and len(values) != 3:
        raise ValueError("needs three numbers, with commas between them")
    return values


def _not_all_zero(weights: tuple[float, ...]) -> tuple[float, ...]:
    if not any(weights):
        raise ValueError("at least one weight must be above 0")
    return weights


def one_of(names: tuple[str, ...]) -> AfterValidator:
    """Returns a validator that accepts these names, and ``module:name`` of a plugin."""

    def check(value: str) -> str:
        if value not in names and not PLUGIN.fullmatch(value):
            raise ValueError(f"must be one of {', '.join(names)}, or module:name of a plugin")
        return value

    return AfterValidator(check)


Share = Annotated[float, Field(gt=0, le=1)]
Count = Annotated[int, Field(ge=1, le=10**9)]
Number = Annotated[int, Field(ge=0, le=10**9)]  # 0 usually stands for all, none or automatic
Weight = Annotated[float, Field(ge=0)]
AnyShares = Annotated[tuple[Share, ...], BeforeValidator(_split), PlainSerializer(_join)]
Shares = Annotated[AnyShares, Field(min_length=1)]
Level = Annotated[float, Field(ge=0, le=1)]
Levels = Annotated[tuple[Level, ...], BeforeValidator(_split), PlainSerializer(_join), Field(max_length=3)]
Words = Annotated[tuple[str, ...], BeforeValidator(_split), PlainSerializer(_join)]
Counts = Annotated[tuple[Count, ...], BeforeValidator(_split), PlainSerializer(_join), Field(min_length=1)]
TermWeights = Annotated[
    tuple[Weight, Weight, Weight],
    BeforeValidator(_three),
    PlainSerializer(_join),
    AfterValidator(_not_all_zero),
]


class Section(BaseModel):
    """A table of options: frozen, with kebab-case names. It refuses unknown options, infinities and invalid Unicode."""

    model_config = ConfigDict(
        alias_generator=_kebab, populate_by_name=True, extra="forbid", frozen=True, allow_inf_nan=False
    )

    @field_validator("*", mode="before")
    @classmethod
    def _as_written(cls, value: object, info: ValidationInfo) -> object:
        kind = cls.model_fields[info.field_name].annotation if info.field_name else None
        if isinstance(value, bool) and kind is not bool:
            raise ValueError("is not a boolean option; true and false are not accepted")
        if isinstance(value, str) and any("\ud800" <= letter <= "\udfff" for letter in value):
            # a shell passed the text in another encoding; options are stored and sent as UTF-8
            raise ValueError("is not UTF-8; accepted: another name, or, in the locale C, PYTHONUTF8=1")
        # a folder may be called 2024, which ``--set`` and TOML read as a number
        return str(value) if kind is str and type(value) is int else value


S = TypeVar("S", bound=Section)


def nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Returns dotted options such as ``{"pruning.tau": 5.82}`` as one table per section."""
    tables: dict[str, Any] = {}
    for key, value in flat.items():
        table, _, option = key.partition(".")
        section = tables.setdefault(table, {}) if option else tables
        if isinstance(section, dict):  # otherwise a value takes the place of the section, and validation refuses it
            section[option or table] = value
    return tables


def flatten(tables: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns nested tables as one table with dotted names; lists become comma-separated text."""
    flat: dict[str, Any] = {}
    for key, value in tables.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = _join(tuple(value)) if isinstance(value, list | tuple) else value
    return flat


def validated(model: type[S], tables: Mapping[str, Any]) -> S:
    """Returns nested tables as a `model`. Raises ConfigError with one line for each option that is not valid."""
    try:
        return model.model_validate(tables)
    except ValidationError as error:
        raise ConfigError("\n".join(_explained([dict(fault) for fault in error.errors()], model))) from None


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Returns a line for each option that differs, sorted: ``seed: 0 then, 1 now``."""
    then, new = ({key: repr(value) for key, value in values.items()} for values in (before, now))
    return [
        f"{key}: {then.get(key, '(not there then)')} then, {new.get(key, '(not there now)')} now"
        for key in sorted(then.keys() | new.keys())
        if (key in then) != (key in new) or before.get(key) != now.get(key)
    ]


def expanded(option: str, value: str) -> Path:
    """Returns the path of an option with ``~`` replaced by a home folder. Raises ConfigError if there is none."""
    try:
        return Path(value).expanduser()
    except RuntimeError:
        accepted = "accepted: a path without ~, or with that of a user who has one"
        raise ConfigError(f"{option} = {value!r}: there is no such home folder; {accepted}") from None


def read_toml(path: Path) -> dict[str, Any]:
    """Returns the options of a TOML file with dotted names. Raises ConfigError if it is missing or not TOML."""
    return flatten(read_toml_tables(path))


def read_toml_tables(path: Path, option: str = "--config") -> dict[str, Any]:
    """Returns the tables of a TOML file unchanged. Raises ConfigError as `read_toml`, naming `option`."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{option} {path}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:  # also raised for thousands of digits or brackets
        raise ConfigError(f"{option} {path}: is not TOML ({error})") from None


def parse_assignment(text: str) -> tuple[str, Scalar]:
    """Returns (key, value) of ``key=value``. Numbers and booleans are parsed as JSON; all other values are text.

    Raises:
        ConfigError: if there is no ``=``.
    """
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"--set {text}: must have the form key=value, such as train.rounds=5")
    try:
        parsed = json.loads(value)
    except (ValueError, RecursionError):  # also raised for thousands of digits or brackets
        parsed = value
    return key.strip(), parsed if isinstance(parsed, bool | int | float) else value


def _explained(errors: list[dict[str, Any]], root: type[BaseModel]) -> list[str]:
    """Returns a line for each option that pydantic refuses: its name, its value, and what is accepted.

    For a list, the line is about the first wrong item. For an option of several types, it says what each accepts.
    """
    lines: dict[str, tuple[object, str]] = {}
    for error in errors:
        path, value = _path(error["loc"], root), error["input"]
        option, message = ".".join(map(_kebab, path)) or "configuration", _message(error, path, root)
        first_value, earlier = lines.get(option, (value, ""))
        if first_value is value:
            lines[option] = value, f"{earlier}, or {message}" if earlier else message
    return [
        f"{option if option.isprintable() else repr(option)}: {message}"
        if isinstance(value, dict | Section) or "is not an option" in message
        else f"{option} = {value!r:.200}: {message}"
        for option, (value, message) in lines.items()
    ]


def _message(error: dict[str, Any], path: list[str], root: type[BaseModel]) -> str:
    if error["type"] == "extra_forbidden":
        fields = _type_of(path[:-1], root).model_fields.items()
        return f"is not an option; accepted here: {', '.join(field.alias or name for name, field in fields)}"
    if error["type"] == "model_type":
        return "is a table of options"
    message: str = error["msg"].removeprefix("Value error, ")
    return message[0].lower() + message[1:]


def _path(loc: tuple[int | str, ...], root: type[BaseModel]) -> list[str]:
    """Returns the names of the tables and the option, without pydantic's list positions and alternative types."""
    path: list[str] = []
    for part in loc:
        if isinstance(part, str):
            path.append(part)
            if get_origin(_type_of(path, root)) in (Union, UnionType):
                break
    return path


def _type_of(path: list[str], root: type[BaseModel]) -> Any:
    """Returns the type of a table or option, for a list that of its items; None if there is no such name."""
    kind: Any = root
    for part in path:
        fields = {field.alias: field.annotation for field in getattr(kind, "model_fields", {}).values()}
        kind = fields.get(_kebab(part))
        kind = get_args(kind)[0] if get_origin(kind) is tuple else kind
    return kind
