"""Tensors come back from pickles bit by bit, and those that are more than their file holds are refused in one line."""

import collections
import pickle
import struct

import numpy as np
import pytest
import torch
from hostile_pickles import by_name, read, refusal, storage_bytes, tensor_pickle, with_identity

from hfkd.hub import restricted_pickle


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


# -- tensors that are none -------------------------------------------------------------------------


# Number k of the memo is a list of number k - 1, twice: written out, the last is 2^8 long.
DOUBLED = b"]q\x00" + b"".join(b"](h%ch%ceq%c" % (k, k, k + 1) for k in range(8))


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
        ({"extra": pickle.dumps({"conj": True}, protocol=2)[2:-1]}, "no plain view"),
        ({"extra": tensor_pickle()[2:-1]}, "no plain view"),  # whose truth would be ambiguous
        ({"size": (1,), "stride": (2**63,)}, "not natural numbers"),
        ({"size": (2,), "stride": (2**80_000,)}, "not natural numbers"),  # a product of such takes minutes
        ({"offset": 2**63}, "not natural numbers"),
        ({"size": (0, *[1000] * 7), "stride": (1,) * 8, "data": storage_bytes(1000)}, "beyond its 1000 values"),
        ({"data": storage_bytes(claimed=2**60)}, "1152921504606846976 values in 16 bytes"),
        ({"data": storage_bytes(claimed=3)}, "3 values in 16 bytes"),
        ({"data": storage_bytes(claimed=-1)}, "no whole storage"),
        ({"data": storage_bytes(claimed=2**2000)}, "no whole storage"),
        ({"data": storage_bytes(raw=b"")}, "4 values in 0 bytes"),
        ({"data": storage_bytes(view=b"K\x01")}, "no whole storage"),
        ({"data": storage_bytes(kind=b"UntypedStorage")}, "'torch.UntypedStorage'"),
        ({"data": storage_bytes().replace(b"ctorch\nFloatStorage\n", b"cos\nsystem\n")}, "'os.system'"),
        ({"data": b"PK\x03\x04"}, "damaged (ValueError"),
        ({"data": pickle.dumps(1) + pickle.dumps(2) + pickle.dumps({})}, "another format"),
        ({"data": storage_bytes()[:40]}, "damaged (ValueError"),
        ({"data": with_identity(b"K\x01K\x00\x86.")}, "without its type and number"),
        ({"data": with_identity(b"K\x01X\x02\x00\x00\x00a\n\x86.")}, "without its type and number"),
        ({"data": with_identity(DOUBLED + b"K\x01h\x08\x86.")}, "without its type and number"),
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


# -- more than the file holds ----------------------------------------------------------------------


STORAGE = storage_bytes(2500)
LATIN1 = b"X\x06\x00\x00\x00latin1"


@pytest.mark.parametrize(
    ("value", "call"),
    [
        (b"B" + struct.pack("<I", len(STORAGE)) + STORAGE, b"ctorch.storage\n_load_from_bytes\nh\x00\x85R"),
        (b"X" + struct.pack("<I", 10_000) + b"x" * 10_000, b"c_codecs\nencode\nh\x00" + LATIN1 + b"\x86R"),
    ],
    ids=["bytes", "text"],
)
def test_one_argument_cannot_be_copied_again_and_again(tmp_path, value, call):
    """The memo gives the same bytes or text to any number of calls, each of which makes a new thing of it."""
    once, often = (b"\x80\x04](" + value + b"q\x00" + call * times + b"e." for times in (1, 20))
    assert len(read(tmp_path, once)) == 2
    assert "its calls take more than it holds" in refusal(tmp_path, often)


def test_one_list_cannot_become_many_sets(tmp_path, monkeypatch):
    monkeypatch.setattr(restricted_pickle, "MOST_STEPS", 1000)
    items = b"".join(b"X\x02\x00\x00\x00%02d" % number for number in range(100))
    once, often = (
        b"\x80\x04](](" + items + b"eq\x00" + b"cbuiltins\nset\nh\x00\x85R" * times + b"e." for times in (1, 10)
    )
    assert len(read(tmp_path, once)[1]) == 100
    assert "more than 1000 steps" in refusal(tmp_path, often)


def test_the_head_of_a_storage_is_short(tmp_path):
    """Or it would have as many steps for itself in each storage."""
    head = b"](" + b"K\x01" * 5000 + b"e."
    assert "damaged" in refusal(tmp_path, tensor_pickle(data=with_identity(head)))
