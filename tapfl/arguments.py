"""Arguments of a library's constructors: parsed from text, and checked against the constructor's annotations."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterable, Mapping
from numbers import Integral, Number
from typing import Any, Literal, get_args, get_origin

from tapfl.options import Scalar

Argument = Scalar | tuple[int | float, ...]

# names of types in messages
KINDS: dict[type, str] = {bool: "True or False", int: "whole numbers", float: "numbers", str: "a name"}


def parse_args(text: str) -> dict[str, Argument]:
    """Returns the constructor arguments in ``"img_size=8,class_token=False,depths=2/2"``; ``2/2`` is the tuple (2, 2).

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
    except (ValueError, RecursionError):  # also raised for thousands of digits or brackets
        return text
    return parsed if isinstance(parsed, bool | int | float) else text


def written(args: Mapping[str, Argument]) -> str:
    """Returns arguments as text; the inverse of `parse_args`."""
    return ",".join(f"{key}={_tuple(value) if isinstance(value, tuple) else value}" for key, value in args.items())


def _tuple(numbers: tuple[int | float, ...]) -> str:
    return f"{numbers[0]}/" if len(numbers) == 1 else "/".join(map(str, numbers))


def parameters(callables: Iterable[Callable[..., Any]], without: Iterable[str] = ()) -> dict[str, Any]:
    """Returns the parameters of a callable, name -> annotation.

    Args:
        callables: the callable, then the one that its ``**kwargs`` are passed to, and so on.
        without: parameters that a user cannot set.
    """
    taken: dict[str, Any] = {}
    for call in callables:
        own = _signature(call).parameters.values()
        named = [param for param in own if param.kind in (param.POSITIONAL_OR_KEYWORD, param.KEYWORD_ONLY)]
        taken |= {param.name: param.annotation for param in named if param.name not in taken}
        if not any(param.kind is param.VAR_KEYWORD for param in own):
            break
    return {key: kind for key, kind in taken.items() if key not in ("self", *without)}


def _signature(call: Callable[..., Any]) -> inspect.Signature:
    try:
        return inspect.signature(call, eval_str=True)
    except Exception:  # an annotation names something that does not exist at run time
        return inspect.signature(call)


def require_taken(args: Mapping[str, Any], taken: Mapping[str, Any], name: str) -> None:
    """Checks that a constructor takes the given arguments.

    Args:
        taken: the `parameters` of the constructor.
        name: name of the constructor, for messages.

    Raises:
        ValueError: if it does not take one of them. The message begins with this argument.
    """
    for key, value in args.items():
        shown = repr(written({key: value}))[:200]
        if key not in taken:
            raise ValueError(f"{shown}: {name} has no argument {key}; accepted: {', '.join(sorted(taken)) or 'none'}")
        if (kinds := _kinds(taken[key])) and not _fits(value, kinds):
            accepted = " or ".join(dict.fromkeys(filter(None, map(_shown, kinds)))) or "none, as it takes a class"
            raise ValueError(f"{shown}: {name} does not take this value; accepted for {key}: {accepted}")


def _kinds(annotation: Any) -> list[Any]:
    """Returns the types and literal values in an annotation; empty if there is no usable annotation."""
    if annotation is inspect.Parameter.empty or isinstance(annotation, str):
        return []
    if get_origin(annotation) is Literal:
        return list(get_args(annotation))
    if inspect.isclass(annotation) and issubclass(annotation, Number) and annotation is not bool:  # or a numpy type
        return [int if issubclass(annotation, Integral) else float]
    parts = [part for part in get_args(annotation) if part is not Ellipsis]
    return [kind for part in parts for kind in _kinds(part)] if parts else [annotation]


def _fits(value: Any, kinds: list[Any]) -> bool:
    if isinstance(value, tuple):  # timm also takes one number per side or stage, without saying so in annotations
        return all(_fits(number, kinds) for number in value)
    return any(
        type(value) is kind or (kind is float and type(value) is int) if isinstance(kind, type) else value == kind
        for kind in kinds
    )


def _shown(kind: Any) -> str:
    """Returns a type or literal as text for a message; empty for '' and skip, which leave a part of a model out."""
    if isinstance(kind, type):
        return KINDS.get(kind, "")
    return kind if isinstance(kind, str) and kind != "skip" else ""


def is_list(annotation: Any) -> bool:
    """Returns whether an annotation is a sequence of any length."""
    inside: tuple[Any, ...] = get_args(annotation)
    return Ellipsis in inside or (inspect.isclass(get_origin(annotation)) and len(inside) == 1)
