"""The names that pickles of PyTorch modules need, for `restricted_pickle`: containers, tensors and NumPy's scalars.

Sizes are checked against the bytes that the file holds before anything is built, and tensors are views of them: what
is made of text and bytes takes at most twice the memory of the file (see `restricted_pickle`).
"""

import io
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor

from hfkd.errors import InputError

from .restricted_pickle import Allowed, Global, Record, load, text


_MAGIC, _PROTOCOL = 0x1950A86A20F9469CFC6C, 1001  # of torch.save before it wrote zip archives
_HEAD = 4096  # bytes; what torch.save writes before a storage's values takes some 300
_MOST_DIMENSIONS = 8
_DTYPES: Mapping[str, torch.dtype] = {
    "torch.DoubleStorage": torch.float64,
    "torch.FloatStorage": torch.float32,
    "torch.HalfStorage": torch.float16,
    "torch.BFloat16Storage": torch.bfloat16,
    "torch.LongStorage": torch.int64,
    "torch.IntStorage": torch.int32,
    "torch.ShortStorage": torch.int16,
    "torch.CharStorage": torch.int8,
    "torch.ByteStorage": torch.uint8,
    "torch.BoolStorage": torch.bool,
}


@dataclass(frozen=True)
class _StorageKind:
    """What stands before a storage's values."""

    dtype: torch.dtype
    count: int


@dataclass(frozen=True)
class _Storage:
    values: Tensor  # (number of values,)


class _NumpyDtype(Record):
    """A NumPy type of one number, such as f8; its byte order comes as a state."""

    def __init__(self, code: Any, align: Any = False, copy: Any = True) -> None:
        if not re.fullmatch("[fiub][1248]", text(code)):
            raise InputError(f"it holds NumPy values of type {code[:20]!r}, not plain numbers")
        self.code: str = code

    def take(self, state: Any) -> None:
        if type(state) is not tuple or len(state) < 2 or text(state[1]) not in ("<", "|"):
            raise InputError("it holds NumPy values that are not little-endian numbers")


def _numpy_scalar(dtype: Any, raw: Any) -> Any:
    if not isinstance(dtype, _NumpyDtype) or type(raw) is not bytes:
        raise InputError("it holds a NumPy value without its type or bytes")
    return np.frombuffer(raw, f"<{dtype.code}", count=1).item()


def empty_dict() -> dict[str, Any]:
    """What a class of dictionaries makes of no arguments; keys and values come afterwards."""
    return {}


def _text_set(items: Any = None) -> set[str]:
    if items is not None and type(items) is not list:
        raise InputError(f"it makes a set of a {type(items).__name__}")
    return set(map(text, items or ()))


def _latin1_bytes(characters: Any, encoding: Any) -> bytes:
    """Bytes as protocol 2 has them: a call of `encode`, which here knows one encoding."""
    if text(encoding) != "latin1":
        raise InputError(f"it encodes text as {encoding[:20]!r}")
    return text(characters).encode("latin1")


def _load_storage(data: Any) -> _Storage:
    """The values of a storage, which lies in a pickle as the bytes that `torch.save` made of it."""
    if type(data) is not bytes:
        raise InputError(f"it holds a {type(data).__name__} in the place of a tensor's bytes")
    stream = io.BytesIO(data[:_HEAD])
    magic, protocol, system = (load(stream, {}) for _ in range(3))
    little_endian = type(system) is dict and system.get("little_endian") is True
    if magic != _MAGIC or protocol != _PROTOCOL or not little_endian:
        raise InputError("it holds tensors in another format than torch.save's for one storage")
    kind = load(stream, dict.fromkeys(_DTYPES, _refuse_call), _storage_kind)
    if type(kind) is not _StorageKind:
        raise InputError("it holds a tensor without its type and number of values")
    dtype, count = kind.dtype, kind.count
    load(stream, {})  # the storage's key again
    start = stream.tell() + 8  # after the number of values
    available = len(data) - start
    if int.from_bytes(data[start - 8 : start], "little") != count or available != count * dtype.itemsize:
        raise InputError(f"it holds a tensor of {count} values in {max(available, 0)} bytes")
    values = torch.frombuffer(bytearray(data[start:]), dtype=dtype) if count else torch.empty(0, dtype=dtype)
    return _Storage(values)


def _refuse_call(*arguments: Any) -> NoReturn:
    raise InputError("it makes a storage that has no bytes")


def _storage_kind(identity: Any) -> _StorageKind:
    """Type and number of values, of ('storage', type, key, device, number of values, None)."""
    if type(identity) is not tuple or len(identity) < 5 or type(identity[1]) is not Global:
        raise InputError("it refers to something that is no storage")
    count, views = identity[4], identity[5:]
    if identity[0] != "storage" or not _is_natural(count) or any(view is not None for view in views):
        raise InputError("it refers to something that is no whole storage")
    return _StorageKind(_DTYPES[identity[1].name], count)


def _is_natural(number: Any) -> bool:
    """Whether it is one that sizes can be: longer ones take long to multiply, and to write into a message."""
    return type(number) is int and 0 <= number < 2**63


def _rebuild_tensor(
    storage: Any, offset: Any, size: Any, stride: Any, requires_grad: Any, hooks: Any, metadata: Any = None
) -> Tensor:
    """A view of a storage, checked to lie within it and not to repeat its values."""
    if not isinstance(storage, _Storage) or not (type(size) is type(stride) is tuple) or metadata is not None:
        raise InputError("it holds a tensor that is no plain view of a storage")
    if len(size) != len(stride) or len(size) > _MOST_DIMENSIONS or not all(map(_is_natural, (offset, *size, *stride))):
        raise InputError("it holds a tensor whose sizes and strides are not natural numbers")
    available = len(storage.values)
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True) if n)
    if math.prod(n for n in size if n) > max(available, 1) or (all(size) and last >= available):
        raise InputError(f"it holds a tensor of sizes that reach beyond its {available} values")
    return storage.values.as_strided(size, stride, offset) if all(size) else storage.values.new_empty(size)


def _rebuild_parameter(data: Any, requires_grad: Any, hooks: Any) -> Tensor:
    if not isinstance(data, Tensor):
        raise InputError(f"it makes a parameter of a {type(data).__name__}")
    return data


TENSOR_NAMES: Allowed = {
    "collections.OrderedDict": empty_dict,
    "builtins.set": _text_set,
    "__builtin__.set": _text_set,  # protocol 2
    "_codecs.encode": _latin1_bytes,
    "numpy.dtype": _NumpyDtype,
    "numpy.core.multiarray.scalar": _numpy_scalar,
    "numpy._core.multiarray.scalar": _numpy_scalar,
    "torch.storage._load_from_bytes": _load_storage,
    "torch._utils._rebuild_tensor_v2": _rebuild_tensor,
    "torch._utils._rebuild_parameter": _rebuild_parameter,
}
