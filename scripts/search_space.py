"""What a search varies: ranges and choices of options, read from YAML and checked before the first trial."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hfkd.errors import InputError

from .methods import Method
from .options import build, check_values, read_yaml
from .suggest import nearest


# By option either {"choices": [...]}, or {"low": A, "high": B, "log": whether the logarithm is uniform}.
Space = dict[str, dict[str, Any]]
_KEYS = ("low", "high", "log", "choices")


def read_space(path: Path, method: Method, options: dict[str, Any]) -> Space:
    """The space in a YAML file. Its options take the place of those in `options`.

    Raises:
        InputError: an unknown option or key, an empty range, or an end of a range or a choice that, beside `options`,
            makes no configuration.
    """
    content = read_yaml(path)
    if not content:
        raise InputError(f"{path}: nothing to search: give lines such as learning_rate: {{low: 1.0e-4, high: 1.0e-2}}")
    space = {name: _read_one(one, name, method, path) for name, one in content.items()}
    middle = {name: _ends(one)[0] for name, one in space.items()}
    for name, one in space.items():
        for value in _ends(one):
            try:
                build(method.dataclasses(), {**options, **middle, name: value})
            except InputError as error:
                raise InputError(f"{path}: {error}") from error
    return space


def describe(parameters: Mapping[str, Any]) -> str:
    """`learning_rate=0.00123, stationarity_weight=3`"""
    shown = {name: f"{value:.3g}" if isinstance(value, float) else value for name, value in parameters.items()}
    return ", ".join(f"{name}={value}" for name, value in shown.items())


def _ends(one: dict[str, Any]) -> list[Any]:
    return one["choices"] if "choices" in one else [one["low"], one["high"]]


def _read_one(one: Any, name: str, method: Method, path: Path) -> dict[str, Any]:
    if not isinstance(one, dict) or not ({"choices"} == set(one) or {"low", "high"} <= set(one) <= {*_KEYS[:3]}):
        unknown = [key for key in one if key not in _KEYS] if isinstance(one, dict) else []
        hint = nearest(str(unknown[0]), _KEYS) if unknown else ""
        raise InputError(f"{path}: {name}: {one!r} needs low and high (and log), or choices{hint}")

    def typed(value: Any) -> Any:
        return check_values({name: value}, method.dataclasses(), str(path))[name]

    if "choices" in one:
        if not isinstance(one["choices"], list) or not one["choices"]:
            raise InputError(f"{path}: {name}: choices={one['choices']!r} is not a list ([a, b]) of values")
        return {"choices": [typed(value) for value in one["choices"]]}
    low, high, log = typed(one["low"]), typed(one["high"]), one.get("log", False)
    if isinstance(low, bool) or not isinstance(low, int | float) or not isinstance(log, bool):
        raise InputError(f"{path}: {name}: {one!r} is not a range of numbers (log: true or false): give choices")
    if not low < high or (log and low <= 0):
        raise InputError(f"{path}: {name}: low={low}, high={high} is no range{' of logarithms' if log else ''}")
    return {"low": low, "high": high, "log": log}
