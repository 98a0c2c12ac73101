"""Reading a pickle without running it.

`pickle` calls whatever a file names. Here the file is only taken apart into opcodes, and the few that data needs are
carried out by a stack machine of our own: it builds tuples, lists, sets, dictionaries with text as keys, and what a
fixed list of our own functions makes of them. Nothing is imported, no attribute is looked up or set on any object, and
everything else, the first foreign name included, is refused.
"""

import io
import pickletools
import stat
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hfkd.errors import InputError


# What a name in a pickle stands for. The functions get whatever the file gives them: they check it, and raise
# `InputError` or `TypeError`. Of their arguments they may copy text, bytes and lists, which are counted, and no more.
Allowed = Mapping[str, Callable[..., Any]]

_LITERALS = frozenset(
    ("BININT", "BININT1", "BININT2", "LONG1", "LONG4", "BINFLOAT", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8")
    + ("SHORT_BINBYTES", "BINBYTES", "BINBYTES8")
)
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_EMPTY: Mapping[str, Callable[[], Any]] = {
    "EMPTY_TUPLE": tuple,
    "EMPTY_LIST": list,
    "EMPTY_DICT": dict,
    "EMPTY_SET": set,
}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_KEEP = {"BINPUT", "LONG_BINPUT", "MEMOIZE"}
MOST_STEPS = 1_000_000  # each of which can take 200 bytes of memory; StyleGAN2 takes some 25,000


class ForeignGlobalError(InputError):
    """The pickle names a function or class that is not on the list; `name` is it, as module.name."""

    def __init__(self, name: str) -> None:
        super().__init__(
            f"it names {name[:80]!r}, which is no data; nothing in it was executed: use a file of tensors alone, from "
            "a source you trust"
        )
        self.name = name


@dataclass(frozen=True)
class Global:
    """A name on the list, as it lies on the stack until it is called."""

    name: str


class Record:
    """What a function on the list may return to take a state afterwards, as pickles give to some objects."""

    def take(self, state: Any) -> None:
        raise NotImplementedError


def read_pickle(path: Path, allowed: Allowed) -> Any:
    """What the pickle in this file holds.

    Args:
        path: the file; it is read as a whole, if it begins as a pickle.
        allowed: by module.name, the function that stands for each name that the pickle may call.

    Raises:
        InputError: no file, no pickle, one that breaks off, or one that holds more than data: a `ForeignGlobalError`
            where that is a name. One line, which begins with the path.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise InputError(f"{path}: cannot be read (it is no regular file): give a file")
        with path.open("rb") as file:
            _check_start(path, file.read(4))
            file.seek(0)
            data = file.read()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error}): give a file") from error
    try:
        return load(io.BytesIO(data), allowed)
    except ForeignGlobalError as error:
        error.args = (f"{path}: {error}",)
        raise
    except InputError as error:
        raise InputError(f"{path}: {error}; nothing in it was executed") from error


def _check_start(path: Path, start: bytes) -> None:
    if start == b"PK\x03\x04":
        raise InputError(f"{path}: is a zip archive and no pickle: unpack it, or give the .pkl file")
    if not start.startswith(b"\x80"):
        raise InputError(f"{path}: is no pickle (of protocol 2 or later): give the .pkl file")


def load(stream: io.BytesIO, allowed: Allowed, persistent: Callable[[Any], Any] | None = None) -> Any:
    """One pickle from `stream`, which is left after it.

    Args:
        stream: of bytes that are in memory: a file would make room for as many as an opcode claims to follow.
        allowed: see `read_pickle`.
        persistent: what a persistent id stands for; without it, such ids are refused.

    Raises:
        InputError: see `read_pickle`; without the path.
    """
    start = stream.tell()
    machine = _Machine(allowed, persistent, size=stream.seek(0, io.SEEK_END) - start)
    stream.seek(start)
    try:
        for opcode, argument, _ in pickletools.genops(stream):
            machine.step(opcode.name, argument)
        return machine.result()
    except InputError:
        raise
    except (ValueError, TypeError, IndexError, KeyError, OverflowError) as error:
        cause = " ".join(str(error).split())[:100]
        raise InputError(f"it breaks off or is damaged ({type(error).__name__}: {cause})") from error


class _Machine:
    """The state that opcodes act on, for a pickle of `size` bytes."""

    def __init__(self, allowed: Allowed, persistent: Callable[[Any], Any] | None, size: int) -> None:
        self._allowed = allowed
        self._persistent = persistent
        self._steps = 0
        # Characters and bytes that calls may still take, as the memo could give the same to each of many. Twice the
        # size, because protocol 2 has bytes as text: they are taken as text first, and then as bytes.
        self._left = 2 * size
        self._stack: list[Any] = []
        self._outer: list[list[Any]] = []  # stacks below a mark
        self._memo: dict[int, Any] = {}

    def result(self) -> Any:
        return self._stack[-1]

    def step(self, name: str, argument: Any) -> None:
        """Carry out one opcode."""
        self._count(1)
        stack = self._stack
        if name in _LITERALS:
            stack.append(argument)
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name in _EMPTY:
            stack.append(_EMPTY[name]())
        elif name in _KEEP:
            self._memo[len(self._memo) if name == "MEMOIZE" else argument] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(self._memo[argument])
        elif name in _TUPLES:
            items = [stack.pop() for _ in range(_TUPLES[name])]
            stack.append(tuple(reversed(items)))
        elif name == "MARK":
            self._outer.append(stack)
            self._stack = []
        elif name in ("TUPLE", "APPENDS", "SETITEMS", "ADDITEMS"):
            self._stack = self._outer.pop()
            self._collect(name, stack)
        elif name == "APPEND":
            self._collect("APPENDS", [stack.pop()])
        elif name == "SETITEM":
            value, key = stack.pop(), stack.pop()
            self._collect("SETITEMS", [key, value])
        elif name not in ("PROTO", "FRAME", "STOP"):
            self._act(name, argument)

    def _collect(self, name: str, items: list[Any]) -> None:
        """Put items into the container on the top, or make a tuple of them."""
        if name == "TUPLE":
            self._stack.append(tuple(items))
            return
        target = self._stack[-1]
        if name == "APPENDS" and type(target) is list:
            target.extend(items)
        elif name == "SETITEMS" and type(target) is dict:
            target.update(zip(map(text, items[::2]), items[1::2], strict=True))
        elif name == "ADDITEMS" and type(target) is set:
            target.update(map(text, items))
        else:
            raise InputError(f"it fills a {type(target).__name__} by {name}")

    def _act(self, name: str, argument: Any) -> None:
        """The opcodes by which `pickle` runs code."""
        stack = self._stack
        if name == "GLOBAL":
            stack.append(self._named(argument.replace(" ", ".", 1)))
        elif name == "STACK_GLOBAL":
            last, module = text(stack.pop()), text(stack.pop())
            stack.append(self._named(f"{module}.{last}"))
        elif name in ("REDUCE", "NEWOBJ"):
            arguments, function = stack.pop(), stack.pop()
            if type(function) is not Global or type(arguments) is not tuple:
                raise InputError(f"it calls a {type(function).__name__} by {name}")
            self._charge(arguments)
            stack.append(self._allowed[function.name](*arguments))
        elif name == "BUILD":
            state, target = stack.pop(), stack[-1]
            if isinstance(target, Record):
                target.take(state)
            elif state is not None and not (type(state) is dict and not state):
                raise InputError(f"it sets the state of a {type(target).__name__}")
        elif name == "BINPERSID" and self._persistent is not None:
            stack.append(self._persistent(stack.pop()))
        else:
            raise InputError(f"it uses the opcode {name}, which data does not need")

    def _charge(self, arguments: tuple[Any, ...]) -> None:
        """Count what a function may copy: as a step each item of a list, which took one to get there."""
        self._count(sum(len(argument) for argument in arguments if type(argument) is list))
        self._left -= sum(len(argument) for argument in arguments if type(argument) in (str, bytes))
        if self._left < 0:
            raise InputError("its calls take more than it holds")

    def _count(self, steps: int) -> None:
        self._steps += steps
        if self._steps > MOST_STEPS:
            raise InputError(f"it takes more than {MOST_STEPS} steps, which data of a network does not")

    def _named(self, name: str) -> Global:
        if name not in self._allowed:
            raise ForeignGlobalError(name)
        return Global(name)


def text(value: Any) -> str:
    """`value`, which must be text: keys of other types could be made to collide. Raises `InputError`."""
    if type(value) is not str:
        raise InputError(f"it has a {type(value).__name__} where text is expected")
    return value
