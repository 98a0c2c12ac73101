"""What a chain file says: named steps, each a training or an evaluation, that may build on earlier ones."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from hfkd.errors import InputError

from .evaluate import KINDS
from .methods import Method, find_method
from .options import build, check_values, find_config, read_yaml
from .suggest import nearest


CHAINS = Path(__file__).parent / "chains"
KEYS = ("name", "train", "evaluate", "config", "options")
SET_BY_CHAIN = {"train": ("output_dir", "resume_from_checkpoint", "push_to_hub"), "evaluate": ("output",)}
_REFERENCE = re.compile(r"\$\{([^{}]*)\}")
_NAME = re.compile(r"\w[\w.+-]*")


@dataclass(frozen=True)
class Step:
    """One `hfkd train` or `hfkd evaluate`. In `target` and `options`, `${name}` is the folder of a step.

    Attributes:
        name: of the step, and of its folder.
        command: `train` or `evaluate`.
        target: the method, or the checkpoint.
        options: all that the command line would name, those of a recipe among them.
    """

    name: str
    command: str
    target: str
    options: dict[str, Any]

    def references(self) -> list[str]:
        """The steps whose folders it names."""
        return [name for text in _texts([self.target, self.options]) for name in _REFERENCE.findall(text)]

    def located(self, folder: Path) -> "Step":
        """The same with the folders that the names stand for when the chain's is `folder`."""
        target, options = (_with_folders(part, folder) for part in (self.target, self.options))
        return Step(self.name, self.command, target, options)

    def describe(self) -> str:
        """As the file that the step's options are kept in, which `--config` takes."""
        return f"# hfkd {self.command} {self.target}\n" + yaml.safe_dump(self.options, sort_keys=False)


def find_chain(name: str) -> Path:
    """The file `name`, or the shipped chain of that name. Raises `InputError` where there is neither."""
    path = Path(name)
    if path.is_file():
        return path
    shipped = {chain.stem: chain for chain in sorted(CHAINS.glob("*.yaml"))}
    if name in shipped:
        return shipped[name]
    raise InputError(
        f"chain {name!r} is neither a file nor shipped{nearest(name, shipped)}; shipped: {', '.join(shipped)}."
    )


def read_chain(path: Path) -> list[Step]:
    """Read and check a chain file: every step is known to make valid options before the first one runs.

    Its one key is `steps`, a list. A step has a `name`; `train: METHOD` or `evaluate: CHECKPOINT`; and optionally
    `config` (a recipe of the method, or a YAML file beside the chain) and `options` that go over it. `${name}` in a
    checkpoint or an option is the folder of the step `name`, an earlier one or the step's own.

    Raises:
        InputError: a step without what it needs, an unknown key, method, option or name, or options that are refused.
    """
    content = read_yaml(path)
    listed = content.get("steps")
    if set(content) != {"steps"} or not isinstance(listed, list) or not listed:
        raise InputError(f"{path}: has the keys {list(content)}: a chain has one, steps, with a list of steps.")
    steps: list[Step] = []
    for number, entry in enumerate(listed, start=1):
        try:
            step = _read_step(entry, path.parent)
            _check_names(step, [earlier.name for earlier in steps])
        except InputError as error:
            name = f" ({entry['name']})" if isinstance(entry, dict) and "name" in entry else ""
            raise InputError(f"{path}: step {number}{name}: {error}") from error
        steps.append(step)
    return steps


def _read_step(entry: Any, beside: Path) -> Step:
    if not isinstance(entry, dict):
        raise InputError(f"{entry!r} is not a mapping with the keys {', '.join(KEYS)}.")
    for key in entry:
        if key not in KEYS:
            raise InputError(f"unknown key {key!r}{nearest(str(key), KEYS)}; keys: {', '.join(KEYS)}.")
    name = entry.get("name")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise InputError(f"name: {name!r} names a folder: use letters, digits, '-', '_', '+' and '.'.")
    commands = [command for command in SET_BY_CHAIN if command in entry]
    if len(commands) != 1 or not isinstance(entry[commands[0]], str):
        raise InputError("needs either train: METHOD or evaluate: CHECKPOINT.")
    (command,) = commands
    method = find_method(entry[command]) if command == "train" else None
    own = entry.get("options") or {}
    if not isinstance(own, dict) or not all(isinstance(option, str) for option in own):
        raise InputError(f"options: {own!r} is not a mapping of names to values.")
    options = {**_read_config(entry.get("config"), method, beside), **own}
    for option in SET_BY_CHAIN[command]:
        if option in options:
            raise InputError(f"{option} is set by the chain itself; leave it out.")
    kinds = KINDS if method is None else method.dataclasses()
    checked = check_values(options, kinds, "options")
    build(kinds, checked)
    return Step(name, command, entry[command] if method is None else method.name, checked)


def _read_config(name: Any, method: Method | None, beside: Path) -> dict[str, Any]:
    if name is None:
        return {}
    own = beside / str(name)
    return read_yaml(own if own.is_file() else find_config(str(name), method.recipes if method is not None else None))


def _check_names(step: Step, earlier: list[str]) -> None:
    if step.name in earlier:
        raise InputError(f"an earlier step is called {step.name!r} too: give each a name of its own.")
    known = [*earlier, step.name]
    for name in step.references():
        if name not in known:
            raise InputError(f"${{{name}}} is no step up to here{nearest(name, known)}; known: {', '.join(known)}.")


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, list | dict):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _texts(part)


def _with_folders(value: Any, folder: Path) -> Any:
    if isinstance(value, str):
        return _REFERENCE.sub(lambda match: str(folder / match[1]), value)
    if isinstance(value, list):
        return [_with_folders(part, folder) for part in value]
    if isinstance(value, dict):
        return {name: _with_folders(part, folder) for name, part in value.items()}
    return value
