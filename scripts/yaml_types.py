"""Values read from YAML as the types that a dataclass's fields ask for."""

import enum
import types
from typing import Any, Literal, Union, get_args, get_origin


_NAMES = {bool: "true or false", int: "a whole number", float: "a number", str: "a text", type(None): "null"}
_PLAIN = (bool, int, float, str, list, dict, type(None))


def expected(hint: Any) -> str:
    """What values the type hint takes, in words."""
    origin = get_origin(hint) or hint
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(expected(member) for member in get_args(hint)))
    if origin is Literal:
        return f"one of {', '.join(map(repr, get_args(hint)))}"
    if _is_enum(origin):
        return f"one of {', '.join(repr(member.value) for member in origin)}"
    if origin is list:
        return " of ".join(["a list ([a, b])", *map(expected, get_args(hint))])
    return _NAMES.get(origin, "a mapping" if origin is dict else str(hint))


def coerce(value: Any, hint: Any) -> Any:
    """`value` as the type `hint`; ValueError where it does not fit. A hint of an unknown kind takes anything.

    Members of an Enum stay plain values, as HfArgumentParser gives them to the dataclass.
    """
    origin = get_origin(hint) or hint
    if origin in (Union, types.UnionType):
        return _coerce_union(value, get_args(hint))
    if origin is Literal:
        return _coerce_choice(value, list(get_args(hint)))
    if _is_enum(origin):
        return _coerce_choice(value, [member.value for member in origin])
    if origin is list and isinstance(value, list):
        return [coerce(item, *get_args(hint)) for item in value] if get_args(hint) else value
    if origin is float and isinstance(value, int | float | str) and not isinstance(value, bool):
        return float(value)  # text too: YAML 1.1 reads 1e-4, which has no point, as text
    if origin in _PLAIN and type(value) is not origin:
        raise ValueError
    return value


def _is_enum(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, enum.Enum)


def _coerce_union(value: Any, members: tuple[Any, ...]) -> Any:
    for member in members:
        try:
            return coerce(value, member)
        except ValueError:
            continue
    raise ValueError


def _coerce_choice(value: Any, choices: list[Any]) -> Any:
    if value is False and "no" in choices:  # YAML 1.1 reads a bare `no` as false
        value = "no"
    if not any(type(choice) is type(value) and choice == value for choice in choices):  # True would equal 1
        raise ValueError
    return value
