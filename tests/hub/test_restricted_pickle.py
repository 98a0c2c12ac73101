"""Pickles are read and never run: what data needs comes back, and every known trick is refused in one line."""

import copyreg
import io
import os
import pickle
import pickletools
import random
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hostile_pickles import ORDERED, TEXT, by_name, read, refusal

from hfkd.errors import InputError
from hfkd.hub import restricted_pickle
from hfkd.hub.pickled_tensors import TENSOR_NAMES
from hfkd.hub.restricted_pickle import ForeignGlobalError, load, read_pickle


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


# -- what is no data -------------------------------------------------------------------------------


class Call:
    """Pickles as a call of a function with arguments."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


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


def test_small_opcodes_cannot_stand_for_much(tmp_path, monkeypatch):
    """An empty set is one byte of a pickle, and 216 of memory."""
    monkeypatch.setattr(restricted_pickle, "MOST_STEPS", 1000)
    assert len(read(tmp_path, b"\x80\x04](" + b"\x8f" * 990 + b"e.")) == 990
    assert "more than 1000 steps" in refusal(tmp_path, b"\x80\x04](" + b"\x8f" * 1000 + b"e.")


OPCODES = [ord(opcode.code) for opcode in pickletools.opcodes]


def test_damaged_pickles_are_refused_whatever_the_damage(tmp_path):
    """Each in one line, and none by another exception."""
    draws = random.Random(0)
    data = pickle.dumps({"a": [torch.randn(3), np.float64(1.5)], "b": {"text", "c"}, "d": b"x"}, protocol=2)
    refused = 0
    for _ in range(1500):
        broken = bytearray(data)
        for _ in range(draws.randint(1, 4)):
            broken[draws.randrange(2, len(data))] = draws.choice((draws.randrange(256), *OPCODES))
        try:
            load(io.BytesIO(broken), TENSOR_NAMES)
        except InputError as error:
            refused += 1
            assert "\n" not in str(error) and len(str(error)) < 400
    assert refused > 500


# -- files that are no pickles ---------------------------------------------------------------------


def test_every_cut_of_a_pickle_is_refused(tmp_path):
    data = pickle.dumps({"a": torch.randn(3), "b": [1.0, "text", (1, 2)]}, protocol=4)
    for length in range(1, len(data), 7):
        assert "damaged" in refusal(tmp_path, data[:length])


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


def test_other_large_files_are_not_read(tmp_path):
    """Of this one nothing is on the disk, but all of it would be in memory."""
    with (tmp_path / "large.tar").open("wb") as file:
        file.truncate(2**42)
    with pytest.raises(InputError, match="is no pickle"):
        read_pickle(tmp_path / "large.tar", {})


def test_what_is_no_file_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.pkl")
    for place in (tmp_path / "pipe.pkl", Path("/dev/zero")):  # neither has an end
        with pytest.raises(InputError, match="no regular file"):
            read_pickle(place, {})
