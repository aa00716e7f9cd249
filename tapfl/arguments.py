"""Arguments of a library's constructors: read from one text, and checked against what the constructor says it takes."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterable, Mapping
from numbers import Integral, Number
from typing import Any, Literal, get_args, get_origin

from tapfl.options import Scalar

Argument = Scalar | tuple[int | float, ...]

# what a value may be, under the name that a user knows
KINDS: dict[type, str] = {bool: "True or False", int: "whole numbers", float: "numbers", str: "a name"}


def parse_args(text: str) -> dict[str, Argument]:
    """Returns constructor arguments of ``"img_size=8,class_token=False,depths=2/2"``; ``2/2`` is the tuple (2, 2).

    Raises:
        ValueError: if a part is not key=value, or a key is given twice.
    """
    arguments: dict[str, Argument] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        key, equals, value = (word.strip() for word in part.partition("="))
        if not (equals and key):
            raise ValueError(f"{text!r}: {part!r} must have the form key=value (a tuple: depths=2/2)")
        if key in arguments:
            raise ValueError(f"{text!r}: {key} is given twice; accepted: one value for each key")
        arguments[key] = _argument(value)
    return arguments


def _argument(value: str) -> Argument:
    numbers = tuple(_literal(part) for part in value.split("/") if part.strip())
    if "/" in value and numbers and all(type(number) in (int, float) for number in numbers):
        return numbers  # type: ignore[return-value]
    return _literal(value)


def _literal(text: str) -> Scalar:
    try:
        parsed = json.loads({"True": "true", "False": "false"}.get(text, text))
    except (ValueError, RecursionError):  # of thousands of digits or brackets too
        return text
    return parsed if isinstance(parsed, bool | int | float) else text


def written(args: Mapping[str, Argument]) -> str:
    """Returns arguments as the option has them, the inverse of `parse_args`."""
    return ",".join(f"{key}={_tuple(value) if isinstance(value, tuple) else value}" for key, value in args.items())


def _tuple(numbers: tuple[int | float, ...]) -> str:
    return f"{numbers[0]}/" if len(numbers) == 1 else "/".join(map(str, numbers))


def parameters(callables: Iterable[Callable[..., Any]], without: Iterable[str] = ()) -> dict[str, Any]:
    """Returns the annotations by name of the first callable, and of those that it passes the rest to, in turn.

    Args:
        without: parameters that are not the user's.
    """
    taken: dict[str, Any] = {}
    for call in callables:
        of_call = _signature(call).parameters.values()
        named = [each for each in of_call if each.kind in (each.POSITIONAL_OR_KEYWORD, each.KEYWORD_ONLY)]
        taken |= {each.name: each.annotation for each in named if each.name not in taken}
        if not any(each.kind is each.VAR_KEYWORD for each in of_call):
            break
    return {key: kind for key, kind in taken.items() if key not in ("self", *without)}


def _signature(call: Callable[..., Any]) -> inspect.Signature:
    try:
        return inspect.signature(call, eval_str=True)
    except Exception:  # an annotation names what is not there at run time
        return inspect.signature(call)


def require_taken(args: Mapping[str, Any], taken: Mapping[str, Any], name: str) -> None:
    """Refuses arguments that the constructor called `name` does not take.

    Args:
        taken: its `parameters`.

    Raises:
        ValueError: beginning with the refused argument as it is written.
    """
    for key, value in args.items():
        shown = repr(written({key: value}))[:200]
        if key not in taken:
            raise ValueError(f"{shown}: {name} has no argument {key}; accepted: {', '.join(sorted(taken)) or 'none'}")
        if (kinds := _kinds(taken[key])) and not _fits(value, kinds):
            accepted = " or ".join(dict.fromkeys(filter(None, map(_shown, kinds)))) or "none, as it takes a class"
            raise ValueError(f"{shown}: {name} does not take this value; accepted for {key}: {accepted}")


def _kinds(annotation: Any) -> list[Any]:
    """Returns the types and literal values in an annotation; none if it says nothing."""
    if annotation is inspect.Parameter.empty or isinstance(annotation, str):
        return []
    if get_origin(annotation) is Literal:
        return list(get_args(annotation))
    if inspect.isclass(annotation) and issubclass(annotation, Number) and annotation is not bool:  # numpy's as well
        return [int if issubclass(annotation, Integral) else float]
    parts = [part for part in get_args(annotation) if part is not Ellipsis]
    return [kind for part in parts for kind in _kinds(part)] if parts else [annotation]


def _fits(value: Any, kinds: list[Any]) -> bool:
    if isinstance(value, tuple):  # annotations of timm leave out that one number may be given for each side or stage
        return all(_fits(number, kinds) for number in value)
    return any(
        type(value) is kind or (kind is float and type(value) is int) if isinstance(kind, type) else value == kind
        for kind in kinds
    )


def _shown(kind: Any) -> str:
    """Returns what a user may write for it, if anything does what it says: '' and skip leave a part of a model out."""
    if isinstance(kind, type):
        return KINDS.get(kind, "")
    return kind if isinstance(kind, str) and kind != "skip" else ""


def is_list(annotation: Any) -> bool:
    """Whether it is a sequence of any length."""
    inside: tuple[Any, ...] = get_args(annotation)
    return Ellipsis in inside or (inspect.isclass(get_origin(annotation)) and len(inside) == 1)
