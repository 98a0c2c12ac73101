"""Pickles are read and never run: what data needs comes back, and every known trick is refused in one line."""

import collections
import copyreg
import io
import os
import pickle
import struct
import sys
import zipfile

import numpy as np
import pytest
import torch

from hfkd.errors import InputError
from hfkd.hub.pickled_tensors import TENSOR_NAMES
from hfkd.hub.restricted_pickle import ForeignGlobalError, read_pickle


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


# -- what data needs -------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_plain_data_comes_back(tmp_path, protocol):
    shared = ["a", 2.5]
    data = {
        "numbers": [0, 1, 255, 256, -1, 70_000, 2**40, -(2**70), 1.5, float("inf")],
        "tuples": ((), (1,), (1, 2), (1, 2, 3), (1, 2, 3, (4, None, True, False))),
        "text": "\N{GREEK SMALL LETTER ALPHA}" * 300,
        "lists": [[], [[]], [0], shared, shared],
        "dict": {"one": {"two": {}}},
        "set": {"a", "b"},
        "empty": set(),
        "bytes": bytes(range(256)) * 3,
    }
    assert read(tmp_path, pickle.dumps(data, protocol=protocol)) == data


def test_large_data_in_several_frames_comes_back(tmp_path):
    data = {str(number): [number] * 5 for number in range(20_000)}
    assert read(tmp_path, pickle.dumps(data, protocol=4)) == data


@pytest.mark.parametrize("protocol", [2, 3, 4])
@pytest.mark.parametrize(
    "dtype", ["float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool"]
)
def test_tensors_of_every_type_come_back(tmp_path, protocol, dtype):
    values = (torch.randn(2, 3, 4, 5) * 3).to(getattr(torch, dtype))
    data = {
        "plain": values,
        "transposed": values.permute(3, 1, 0, 2),
        "channels_last": values.contiguous(memory_format=torch.channels_last),
        "slice": values[1, 1:, ::2, 3],
        "scalar": values[0, 0, 0, 0].clone(),
        "empty": values[:, :0],
    }
    found = read(tmp_path, pickle.dumps(data, protocol=protocol))
    for name, tensor in data.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


def test_what_modules_hold_comes_back(tmp_path):
    data = {
        "parameter": torch.nn.Parameter(torch.randn(3)),
        "ordered": collections.OrderedDict(b=1, a=2),
        "numbers": [np.float64(1.25), np.float32(0.5), np.int64(-7), np.bool_(True)],
    }
    found = read(tmp_path, pickle.dumps(data, protocol=3))
    assert torch.equal(found["parameter"], data["parameter"]) and list(found["ordered"]) == ["b", "a"]
    assert found["numbers"] == [1.25, 0.5, -7, True]
    assert [type(number) for number in found["numbers"]] == [float, float, int, bool]
    old = pickle.dumps(data["numbers"], protocol=3).replace(b"numpy._core", b"numpy.core")
    assert read(tmp_path, old) == [1.25, 0.5, -7, True]


# -- what is no data -------------------------------------------------------------------------------


class Call:
    """Pickles as a call of a function with arguments."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def by_name(module, name, *arguments, protocol=4):
    """A pickle that calls module.name, which need not exist here."""
    if protocol < 4:
        function = b"c" + module.encode() + b"\n" + name.encode() + b"\n"
    else:
        function = b"".join(b"\x8c" + bytes([len(part)]) + part.encode() for part in (module, name)) + b"\x93"
    packed = b"(" + b"".join(pickle.dumps(argument, protocol=2)[2:-1] for argument in arguments) + b"t"
    return b"\x80" + bytes([protocol]) + function + packed + b"R."


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("os", "system"),
        ("posix", "system"),
        ("builtins", "eval"),
        ("builtins", "exec"),
        ("builtins", "getattr"),
        ("builtins", "__import__"),
        ("__builtin__", "eval"),
        ("subprocess", "Popen"),
        ("functools", "partial"),
        ("operator", "attrgetter"),
        ("pickle", "loads"),
        ("torch", "load"),
        ("torch", "serialization.os.system"),
        ("torch.serialization", "os.system"),
        ("torch.storage", "torch.load"),
        ("torch.storage", "_load_from_bytes.__globals__"),
        ("collections", "OrderedDict.__init__.__globals__"),
        ("numpy", "load"),
        ("copyreg", "_reconstructor"),
        ("torch.nn.modules.linear", "Linear"),
        ("this", "s"),
    ],
)
def test_foreign_names_are_refused_by_name(tmp_path, protocol, module, name):
    marker = tmp_path / "ran"
    message = refusal(tmp_path, by_name(module, name, f"touch {marker}", protocol=protocol))
    assert f"'{module}.{name}'" in message and "nothing in it was executed" in message
    assert not marker.exists() and "this" not in sys.modules


def test_pickles_own_work_is_refused_too(tmp_path):
    marker = tmp_path / "ran"
    data = pickle.dumps({"weights": [1.0], "x": Call(os.system, f"touch {marker}")})
    with pytest.raises(ForeignGlobalError) as caught:
        read(tmp_path, data)
    assert caught.value.name == "posix.system" and not marker.exists()
    pickle.loads(data)
    assert marker.exists()  # so the pickle would have worked


def test_a_name_need_not_be_called_to_be_refused(tmp_path):
    assert "'os.system'" in refusal(tmp_path, b"\x80\x02cos\nsystem\n.")


ORDERED = b"ccollections\nOrderedDict\n"
TEXT = b"X\x01\x00\x00\x00a"


@pytest.mark.parametrize(
    ("body", "part"),
    [
        (b"K\x01)R.", "it calls a int by REDUCE"),
        (b"](K\x01tR.", "it calls a list by REDUCE"),
        (ORDERED + b"]R.", "it calls a Global by REDUCE"),
        (ORDERED + b")" + ORDERED + b")R\x92.", "opcode NEWOBJ_EX"),
        (ORDERED + b"}" + TEXT + b"K\x01sb.", "it sets the state of a Global"),  # attributes of the name itself
        (ORDERED + b"N}" + TEXT + b"K\x01s\x86b.", "it sets the state of a Global"),
        (ORDERED + b")R}" + TEXT + b"K\x01sb.", "it sets the state of a dict"),
        (b"]}" + TEXT + b"K\x01sb.", "it sets the state of a list"),
        (TEXT + TEXT + b"a.", "it fills a str by APPENDS"),
        (ORDERED + TEXT + b"K\x01s.", "it fills a Global by SETITEMS"),
        (b"}K\x01K\x02s.", "a int where text is expected"),
        (b"}(K\x01K\x02u.", "a int where text is expected"),
        (b"})K\x02s.", "a tuple where text is expected"),
        (b"\x8f(K\x01\x90.", "a int where text is expected"),
        (b"(ios\nsystem\n.", "opcode INST"),
        (b"(" + ORDERED + b"o.", "opcode OBJ"),
        (b"\x82\x07.", "opcode EXT1"),
        (b"\x83\x07\x00.", "opcode EXT2"),
        (b"P17\n.", "opcode PERSID"),
        (b"K\x01Q.", "opcode BINPERSID"),
        (b"K\x0120.", "opcode DUP"),
        (b"\x96\x00\x00\x00\x00\x00\x00\x00\x00.", "opcode BYTEARRAY8"),
        (b"\x97.", "opcode NEXT_BUFFER"),
        (b"cbuiltins\nset\n](K\x01e\x85R.", "a int where text is expected"),
        (b"cbuiltins\nset\nK\x05\x85R.", "makes a set of a int"),
        (b"h\x07.", "damaged (KeyError"),
        (b"R.", "damaged (IndexError"),
        (b".", "damaged (IndexError"),
        (b"K\x01\x86.", "damaged (IndexError"),
        (b"u.", "damaged (IndexError"),
        (b"}(" + TEXT + b"u.", "damaged (ValueError"),
        (b"K\x01K\x02\x93.", "a int where text is expected"),
        (b"\xff.", "damaged (ValueError"),
        (b"I12", "damaged (ValueError"),
        (b"L" + b"9" * 10_000 + b"L\n.", "damaged (ValueError"),
        (ORDERED + b"K\x01\x85R.", "damaged (TypeError"),
    ],
)
def test_tricks_with_opcodes_are_refused(tmp_path, body, part):
    message = refusal(tmp_path, b"\x80\x04" + body)
    assert part in message and message.endswith("nothing in it was executed")


def test_registered_extensions_are_refused(tmp_path):
    """`pickle` remembers what an extension code stood for, and would not ask again."""
    copyreg.add_extension("os", "system", 0x77)
    try:
        data = b"\x80\x02\x82\x77."
        assert pickle.loads(data) is os.system
        assert "opcode EXT1" in refusal(tmp_path, data)
    finally:
        copyreg.remove_extension("os", "system", 0x77)


def test_deep_nesting_needs_no_recursion(tmp_path):
    depth = 50_000
    found = read(tmp_path, b"\x80\x02)" + b"\x85" * depth + b".")
    for _ in range(depth):
        (found,) = found
    assert found == ()


# -- tensors that are none -------------------------------------------------------------------------


def storage_bytes(count=4, claimed=None, raw=None, kind=b"FloatStorage", view=b"N"):
    """A storage of `count` floats as torch.save has it in a pickle, with what a hostile file may alter."""
    buffer = io.BytesIO()
    torch.save(torch.arange(count).float().untyped_storage(), buffer, _use_new_zipfile_serialization=False)
    head = b"".join(
        pickle.dumps(part, protocol=2)
        for part in (0x1950A86A20F9469CFC6C, 1001, {"protocol_version": 1001, "little_endian": True})
    )
    claimed = count if claimed is None else claimed
    number = b"\x8a\x08" + struct.pack("<q", claimed)
    identity = b"\x80\x02(X\x07\x00\x00\x00storagectorch\n" + kind + b"\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpu"
    raw = torch.arange(count).float().numpy().tobytes() if raw is None else raw
    keys = pickle.dumps(["0"], protocol=2)
    return head + identity + number + view + b"tQ." + keys + struct.pack("<q", claimed) + raw


def tensor_pickle(offset=0, size=(4,), stride=(1,), data=None, extra=()):
    return by_name_nested(storage_bytes() if data is None else data, offset, size, stride, extra)


def by_name_nested(data, offset, size, stride, extra):
    storage = by_name("torch.storage", "_load_from_bytes", protocol=2)[2:-3]  # up to its arguments
    packed = b"B" + struct.pack("<I", len(data)) + data + b"tR"
    numbers = b"".join(pickle.dumps(part, protocol=2)[2:-1] for part in (offset, size, stride, False))
    hooks = ORDERED + b")R"
    more = b"".join(pickle.dumps(part, protocol=2)[2:-1] for part in extra)
    return b"\x80\x03ctorch._utils\n_rebuild_tensor_v2\n(" + storage + packed + numbers + hooks + more + b"tR."


def test_the_hand_made_tensor_is_as_torchs(tmp_path):
    assert read(tmp_path, tensor_pickle()).tolist() == [0, 1, 2, 3]
    assert read(tmp_path, tensor_pickle(1, (2,), (2,))).tolist() == [1, 3]
    assert pickle.loads(tensor_pickle(size=(2, 2), stride=(2, 1))).tolist() == [[0, 1], [2, 3]]


@pytest.mark.parametrize(
    ("altered", "part"),
    [
        ({"size": (5,)}, "beyond its 4 values"),
        ({"offset": 1}, "beyond its 4 values"),
        ({"size": (2,), "stride": (4,)}, "beyond its 4 values"),
        ({"size": (2**40,), "stride": (0,)}, "beyond its 4 values"),  # would grow to 4 TiB when copied
        ({"size": (2, 4), "stride": (0, 1)}, "beyond its 4 values"),
        ({"size": (0, 2**62), "stride": (1, 1)}, "beyond its 4 values"),
        ({"offset": -1}, "not natural numbers"),
        ({"stride": (-1,)}, "not natural numbers"),
        ({"size": (2.0,)}, "not natural numbers"),
        ({"size": (True,)}, "not natural numbers"),
        ({"size": (4, 1)}, "not natural numbers"),
        ({"size": (1,) * 9, "stride": (1,) * 9}, "not natural numbers"),
        ({"size": [4]}, "no plain view"),
        ({"extra": ({"conj": True},)}, "no plain view"),
        ({"data": storage_bytes(claimed=2**60)}, "1152921504606846976 values in 16 bytes"),
        ({"data": storage_bytes(claimed=3)}, "3 values in 16 bytes"),
        ({"data": storage_bytes(claimed=-1)}, "no whole storage"),
        ({"data": storage_bytes(raw=b"")}, "4 values in 0 bytes"),
        ({"data": storage_bytes(view=b"K\x01")}, "no whole storage"),
        ({"data": storage_bytes(kind=b"UntypedStorage")}, "'torch.UntypedStorage'"),
        ({"data": storage_bytes().replace(b"ctorch\nFloatStorage\n", b"cos\nsystem\n")}, "'os.system'"),
        ({"data": b"PK\x03\x04"}, "damaged (ValueError"),
        ({"data": pickle.dumps(1) + pickle.dumps(2) + pickle.dumps({})}, "another format"),
        ({"data": storage_bytes()[:40]}, "damaged (ValueError"),
    ],
)
def test_tensors_beyond_their_bytes_are_refused(tmp_path, altered, part):
    assert part in refusal(tmp_path, tensor_pickle(**altered))


@pytest.mark.parametrize(
    ("data", "part"),
    [
        (by_name("torch.storage", "_load_from_bytes", "text"), "a str in the place of a tensor's bytes"),
        (by_name("torch._utils", "_rebuild_parameter", 1, True, None), "a parameter of a int"),
        (by_name("torch._utils", "_rebuild_tensor_v2", 1, 0, (1,), (1,), False, None), "no plain view"),
        (by_name("torch._utils", "_rebuild_tensor_v2", 1), "damaged (TypeError"),
        (by_name("_codecs", "encode", "x", "rot13"), "encodes text as 'rot13'"),
        (by_name("_codecs", "encode", "\u0100", "latin1"), "damaged (UnicodeEncodeError"),
        (by_name("numpy", "dtype", "O8"), "of type 'O8'"),
        (by_name("numpy", "dtype", ["f8"]), "a list where text is expected"),
        (by_name("numpy.core.multiarray", "scalar", "f8", "x"), "without its type or bytes"),
        (by_name("numpy", "dtype", "f8", False, True)[:-1] + b"K\x01b.", "not little-endian"),
    ],
)
def test_unfit_arguments_of_allowed_names_are_refused(tmp_path, data, part):
    assert part in refusal(tmp_path, data)


# -- files that are no pickles ---------------------------------------------------------------------


def test_every_cut_of_a_pickle_is_refused(tmp_path):
    data = pickle.dumps({"a": torch.randn(3), "b": [1.0, "text", (1, 2)]}, protocol=4)
    for length in range(1, len(data), 7):
        assert "damaged" in refusal(tmp_path, data[:length]) or length < 2


def test_other_files_are_refused(tmp_path):
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("data.pkl", b"x")
    assert "is a zip archive and no pickle" in refusal(tmp_path, archive.getvalue())
    for other in (b"", b"text\n", b"\x1f\x8b\x08", b"(lp0\n.", b"\x89PNG"):
        assert "is no pickle" in refusal(tmp_path, other)
    for place in (tmp_path / "none.pkl", tmp_path):
        with pytest.raises(InputError, match="cannot be read"):
            read_pickle(place, {})
