"""Options from dataclasses: the command line goes over the YAML file, and the YAML file over the defaults."""

import argparse
import dataclasses
import enum
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_type_hints

import yaml
from transformers import HfArgumentParser, TrainingArguments

from hfkd.errors import InputError

from .parser import OneLineErrors
from .suggest import nearest
from .yaml_types import coerce, expected


RUN_FILE = "run.yaml"
# Where a run lies and who it is shared with is not part of what it computes, and a token is nobody's business.
NOT_IN_RUN_FILE = {"output_dir", "resume_from_checkpoint", "run_name", "push_to_hub"}
_UNSET = object()


class _Parser(OneLineErrors, HfArgumentParser):
    pass


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file (safe load). Raises `InputError` that names the file and what is wrong with it."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}).") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not valid YAML ({' '.join(str(error).split())}).") from error
    if content is None:
        return {}
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise InputError(f"{path}: needs lines of the form `option: value` at its top level.")
    return content


def check_values(values: dict[str, Any], dataclass_types: Sequence[type], source: str) -> dict[str, Any]:
    """`values` with the types that the dataclasses' fields ask for.

    Raises:
        InputError: an unknown option (the nearest is suggested) or a value of another type, naming `source`.
    """
    hints: dict[str, Any] = {}
    for kind in dataclass_types:
        of_kind = get_type_hints(kind)
        hints |= {field.name: of_kind[field.name] for field in dataclasses.fields(kind) if field.init}
    checked = {}
    for name, value in values.items():
        if name not in hints:
            raise InputError(f"{source}: unknown option {name!r}{nearest(name, hints)}.")
        try:
            checked[name] = coerce(value, hints[name])
        except ValueError:
            quotes = " (YAML reads yes, no, on and off as true and false: put the word in quotes)"
            raise InputError(
                f"{source}: {name}: {value!r} is not {expected(hints[name])}"
                f"{quotes if isinstance(value, bool) else ''}."
            ) from None
    return checked


def _make_parser(dataclass_types: Sequence[type], prog: str) -> _Parser:
    parser = _Parser(dataclass_types, prog=prog, allow_abbrev=False)
    parser.add_argument("--config", metavar="FILE", help="YAML file of options, or the name of a shipped recipe")
    return parser


def _parse_command_line(dataclass_types: Sequence[type], argv: Sequence[str], prog: str) -> dict[str, Any]:
    """Only the options that `argv` names."""
    parser = _make_parser(dataclass_types, prog)
    unset = argparse.Namespace(**{action.dest: _UNSET for action in parser._actions if action.dest != "help"})
    namespace, unknown = parser.parse_known_args(list(argv), unset)
    if unknown:
        name = unknown[0].split("=")[0]
        if not name.startswith("-"):
            raise InputError(f"unexpected argument {name!r}: options are written --name value.")
        raise InputError(f"unknown option {name!r}{nearest(name, parser._option_string_actions)}.")
    return {name: value for name, value in vars(namespace).items() if value is not _UNSET}


def find_config(name: str, recipes: Path | None) -> Path:
    """The file `name`, or the shipped recipe of that name."""
    path = Path(name)
    if path.is_file() or recipes is None:
        return path
    shipped = {recipe.stem: recipe for recipe in sorted(recipes.glob("*.yaml"))}
    if name in shipped:
        return shipped[name]
    raise InputError(
        f"--config {name}: neither a file nor a shipped recipe{nearest(name, shipped)}; "
        f"shipped recipes: {', '.join(shipped) or 'none'}."
    )


def read_options(
    dataclass_types: Sequence[type], argv: Sequence[str], prog: str, recipes: Path | None = None
) -> dict[str, Any]:
    """The options that a command line and its `--config` file name, checked against the dataclasses' fields.

    `recipes` is the folder whose YAML files `--config` also finds by their bare name.
    """
    given = _parse_command_line(dataclass_types, argv, prog)
    config = given.pop("config", None)
    if config is None:
        return given
    path = find_config(config, recipes)
    return {**check_values(read_yaml(path), dataclass_types, str(path)), **given}


def build(dataclass_types: Sequence[type], values: dict[str, Any]) -> list[Any]:
    """One instance per dataclass from the flat `values`; what a dataclass refuses becomes a one-line `InputError`."""
    instances = []
    for dataclass_type in dataclass_types:
        names = {field.name for field in dataclasses.fields(dataclass_type) if field.init}
        try:
            instances.append(dataclass_type(**{name: values[name] for name in names & values.keys()}))
        except InputError:
            raise
        except ValueError as error:
            raise InputError(" ".join(str(error).split())) from error
    return instances


def resolved(dataclass_types: Sequence[type], values: dict[str, Any]) -> dict[str, Any]:
    """Every option that decides what a run computes: all but transformers' own unchanged defaults, never a token."""
    inherited = {field.name: _default(field) for field in dataclasses.fields(TrainingArguments)}
    options = {}
    for field in (field for kind in dataclass_types for field in dataclasses.fields(kind) if field.init):
        default = _default(field)
        value = values.get(field.name, default)
        unchanged = field.name in inherited and value == default == inherited[field.name]
        private = field.name in NOT_IN_RUN_FILE or field.name.startswith("hub_") or field.name.endswith("token")
        if not unchanged and not private:
            options[field.name] = value.value if isinstance(value, enum.Enum) else value
    return options


def _default(field: dataclasses.Field) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return None if field.default is dataclasses.MISSING else field.default


def write_run_file(folder: Path, method: str, options: dict[str, Any]) -> None:
    """Write `run.yaml`, with which `hfkd train METHOD --config FOLDER/run.yaml --output_dir NEW` repeats the run."""
    folder.mkdir(parents=True, exist_ok=True)
    header = f"# hfkd train {method} --config {RUN_FILE} --output_dir FOLDER\n"
    body = yaml.safe_dump(options, sort_keys=False, allow_unicode=True)
    (folder / RUN_FILE).write_text(header + body, encoding="utf-8")
