"""Arguments of timm's constructors: read from one text, and checked against what the constructor says it takes.

timm checks few of its arguments: ``class_token=no`` is true to it, as any text is, and ``kwargs_filter=depth`` or
``features_only=x`` never reach the model.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping
from typing import Any, Literal, get_args, get_origin

import timm

from tapfl.errors import ModelError
from tapfl.options import Scalar

Argument = Scalar | tuple[int | float, ...]

NOT_SHAPES = ("pretrained", "checkpoint_path", "device", "dtype", "num_classes")  # arguments that are not the user's
# what a value may be, under the name that a user knows
KINDS: dict[type, str] = {bool: "True or False", int: "whole numbers", float: "numbers", str: "a name"}


def parse_args(text: str) -> dict[str, Argument]:
    """Returns constructor arguments of ``"img_size=8,class_token=False,depths=2/2"``; ``2/2`` is the tuple (2, 2).

    Raises:
        ModelError: if a part is not key=value, or a key is given twice.
    """
    arguments: dict[str, Argument] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        key, equals, value = (word.strip() for word in part.partition("="))
        if not (equals and key):
            raise ModelError(f"model.args = {text!r}: {part!r} must have the form key=value (a tuple: depths=2/2)")
        if key in arguments:
            raise ModelError(f"model.args = {text!r}: {key} is given twice; accepted: one value for each key")
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


def check_arguments(args: Mapping[str, Argument], name: str, kind: type) -> None:
    """Refuses arguments by the annotations of timm's model `name`, which is a `kind`.

    Raises:
        ModelError: if the constructor lacks one, says another type for it, or takes lists of one length alone.
    """
    taken = _parameters(kind, timm.models.model_entrypoint(name))

    def refusal(refused: Mapping[str, Argument], why: str) -> ModelError:
        return ModelError(f"model.args = {written(refused)!r:.200}: {why}")

    for key, value in args.items():
        if key not in taken:
            raise refusal({key: value}, f"{name} has no argument {key}; accepted: {', '.join(sorted(taken))}")
        if (kinds := _kinds(taken[key])) and not _fits(value, kinds):
            accepted = " or ".join(dict.fromkeys(filter(None, map(_shown, kinds)))) or "none, as it takes a class"
            raise refusal({key: value}, f"is not what {name} takes; accepted for {key}: {accepted}")
    lists = {key: value for key, value in args.items() if isinstance(value, tuple) and _is_list(taken[key])}
    if len({len(value) for value in lists.values()}) > 1:
        raise refusal(lists, "differ in length; accepted: one value for each stage in all of them")


def _parameters(kind: type, entry_point: Callable[..., Any]) -> dict[str, Any]:
    """Returns annotations by name: of the constructor, of those that it passes the rest to, and of the entry point."""
    callables = [entry_point, *(owner.__init__ for owner in kind.__mro__ if "__init__" in vars(owner))]  # type: ignore[misc]
    taken: dict[str, Any] = {}
    for call in callables:
        parameters = _signature(call).parameters.values()
        named = [each for each in parameters if each.kind in (each.POSITIONAL_OR_KEYWORD, each.KEYWORD_ONLY)]
        taken |= {each.name: each.annotation for each in named if each.name not in taken}
        if not any(each.kind is each.VAR_KEYWORD for each in parameters):
            break
    return {key: kind for key, kind in taken.items() if key not in ("self", *NOT_SHAPES)}


def _signature(call: Callable[..., Any]) -> inspect.Signature:
    try:
        return inspect.signature(call, eval_str=True)
    except Exception:  # an annotation names what is not there at run time
        return inspect.signature(call)


def _kinds(annotation: Any) -> list[Any]:
    """Returns the types and literal values in an annotation; none if it says nothing."""
    if annotation is inspect.Parameter.empty or isinstance(annotation, str):
        return []
    if get_origin(annotation) is Literal:
        return list(get_args(annotation))
    parts = [part for part in get_args(annotation) if part is not Ellipsis]
    return [kind for part in parts for kind in _kinds(part)] if parts else [annotation]


def _fits(value: Argument, kinds: list[Any]) -> bool:
    if isinstance(value, tuple):  # timm's annotations leave out that one number may be given for each side or stage
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


def _is_list(annotation: Any) -> bool:
    """Whether it is a sequence of any length."""
    inside: tuple[Any, ...] = get_args(annotation)
    return Ellipsis in inside or (inspect.isclass(get_origin(annotation)) and len(inside) == 1)
