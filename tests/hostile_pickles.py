"""Pickles made by hand, with what a hostile file may alter, and the one line by which reading one must end."""

import pickle
import struct

import pytest
import torch

from hfkd.errors import InputError
from hfkd.hub.pickled_tensors import TENSOR_NAMES
from hfkd.hub.restricted_pickle import read_pickle


def write(tmp_path, data):
    path = tmp_path / "file.pkl"
    path.write_bytes(data)
    return path


def read(tmp_path, data, allowed=TENSOR_NAMES):
    return read_pickle(write(tmp_path, data), allowed)


def refusal(tmp_path, data, allowed=TENSOR_NAMES):
    with pytest.raises(InputError) as caught:
        read(tmp_path, data, allowed)
    message = str(caught.value)
    assert message.startswith(f"{tmp_path / 'file.pkl'}: ") and "\n" not in message and len(message) < 400
    return message


def by_name(module, name, *arguments, protocol=4):
    """A pickle that calls module.name, which need not exist here."""
    if protocol < 4:
        function = b"c" + module.encode() + b"\n" + name.encode() + b"\n"
    else:
        function = b"".join(b"\x8c" + bytes([len(part)]) + part.encode() for part in (module, name)) + b"\x93"
    packed = b"(" + b"".join(pickle.dumps(argument, protocol=2)[2:-1] for argument in arguments) + b"t"
    return b"\x80" + bytes([protocol]) + function + packed + b"R."


ORDERED = b"ccollections\nOrderedDict\n"
TEXT = b"X\x01\x00\x00\x00a"
STORAGE_HEAD = b"".join(
    pickle.dumps(part, protocol=2)
    for part in (0x1950A86A20F9469CFC6C, 1001, {"protocol_version": 1001, "little_endian": True})
)


def storage_bytes(count=4, claimed=None, raw=None, kind=b"FloatStorage", view=b"N"):
    """A storage of `count` floats as torch.save has it in a pickle, with what a hostile file may alter."""
    claimed = count if claimed is None else claimed
    number = pickle.encode_long(claimed)
    identity = b"\x80\x02(X\x07\x00\x00\x00storagectorch\n" + kind + b"\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpu"
    identity += b"\x8a" + bytes([len(number)])
    raw = torch.arange(count).float().numpy().tobytes() if raw is None else raw
    keys = pickle.dumps(["0"], protocol=2)
    return STORAGE_HEAD + identity + number + view + b"tQ." + keys + struct.pack("<q", claimed % 2**63) + raw


def with_identity(body):
    """A storage that says something else in the place of its type and number of values."""
    return STORAGE_HEAD + b"\x80\x02" + body + pickle.dumps(["0"], protocol=2) + bytes(8)


def tensor_pickle(offset=0, size=(4,), stride=(1,), data=None, extra=b""):
    """A tensor as `pickle` has it; `extra` are the opcodes of further arguments."""
    data = storage_bytes() if data is None else data
    storage = by_name("torch.storage", "_load_from_bytes", protocol=2)[2:-3]  # up to its arguments
    packed = b"B" + struct.pack("<I", len(data)) + data + b"tR"
    numbers = b"".join(pickle.dumps(part, protocol=2)[2:-1] for part in (offset, size, stride, False))
    hooks = ORDERED + b")R"
    return b"\x80\x03ctorch._utils\n_rebuild_tensor_v2\n(" + storage + packed + numbers + hooks + extra + b"tR."
