"""Pickles of other people: plain values and arrays come out, everything else is one line, and nothing runs or crashes."""

import pickle
import random
import struct
from collections import OrderedDict, defaultdict

import numpy as np
import pytest

from occstream.sharding import pickles

ARRAYS = [
    np.arange(6.0).reshape(2, 3),
    np.asfortranarray(np.arange(6, dtype=np.float32).reshape(2, 3)),
    np.arange(4, dtype=">i2"),
    np.array(["vehicle", "b"]),
    np.array([True, False]),
    np.zeros((0, 7)),
    np.array(3.5),
    np.arange(10)[::3],
]


@pytest.mark.parametrize("protocol", range(6))
def test_plain_values_and_arrays_come_out_as_they_went_in(protocol):
    shared = np.arange(3)
    value = {
        "list": [*ARRAYS, None, True, 1, -(2**70), 1.5, "ä", b"\xff", (1, (2, shared)), {3}, frozenset({4}), 1j],
        "scalars": [np.float64(1.5), np.int32(-3), np.bool_(True), np.str_("x")],
        "dict": OrderedDict(a={"b": shared}),
        "default": defaultdict(list),
        "bytes": bytearray(b"abc"),
    }
    found = pickles.loads(pickle.dumps(value, protocol))
    for have, want in zip(found["list"], value["list"], strict=True):
        if isinstance(want, np.ndarray):
            np.testing.assert_array_equal(have, want)
            assert have.dtype == want.dtype
        elif not isinstance(want, tuple):
            assert have == want
    assert found["scalars"] == value["scalars"]
    np.testing.assert_array_equal(found["list"][len(ARRAYS) + 7][1][1], shared)
    np.testing.assert_array_equal(found["dict"]["a"]["b"], shared)
    assert found["default"] == {}
    assert found["bytes"] == b"abc"


class Forged:
    """Pickles as what a call of ``function`` gives, with a state."""

    def __init__(self, function, args, *state):
        self.parts = (function, args, *state)

    def __reduce__(self):
        return self.parts


RECONSTRUCT, (NDARRAY, *_), _ = np.zeros(1).__reduce__()
SCALAR = np.float64(1).__reduce__()[0]
RAW = struct.pack("<Q", 0x4141414141414141)


def flagless_objects():
    """A dtype of objects that says that it holds none."""
    dtype, args, state = np.dtype([("a", "O")]).__reduce__()
    return Forged(dtype, args, (*state[:-1], 0))


def array(dtype, shape=(1,), data=RAW, fortran=False):
    return Forged(RECONSTRUCT, (np.ndarray, (0,), b"b"), (1, shape, dtype, fortran, data))


def circle():
    out = [1]
    out.append(out)
    return out


def nested(depth):
    out = []
    for _ in range(depth):
        out = [out]
    return out


HOSTILE = {
    "objects without flag": array(flagless_objects()),
    "objects": np.array([1, None], object),
    "a record": np.zeros(1, "f4,i4"),
    "bytes for objects": array(np.dtype("O")),
    "more shape than bytes": array(np.dtype("f8"), (1000,)),
    "negative shape": array(np.dtype("f8"), (-1,)),
    "overflowing shape": array(np.dtype("f8"), (2**32, 2**32)),
    "shape of text": array(np.dtype("f8"), ("1",)),
    "list for bytes": array(np.dtype("f8"), (1,), [1]),
    "no state": Forged(RECONSTRUCT, (np.ndarray, (10**12,), b"b")),
    "array by class": Forged(np.ndarray, ((10**12,),)),
    "an array from an address": Forged(np.ndarray, ((8,), np.dtype("f8"), b"x", 10**9)),
    "scalar of objects": Forged(SCALAR, (np.dtype("O"), RAW)),
    "short scalar": Forged(SCALAR, (np.dtype("f8"), b"1")),
    "code": Forged(eval, ("1",)),
    "a file": Forged(open, ("/etc/passwd",)),
    "many bytes": Forged(bytearray, (10**13,)),
    "a dtype": np.dtype("f8"),
    "a type": np.ndarray,
    "very deep": nested(300),
    "datetime": np.array(["2020-01-01"], "M8[D]"),
}


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("protocol", [2, 4])
def test_what_is_not_plain_is_refused(name, protocol):
    with pytest.raises(ValueError, match="only plain values and numpy arrays are accepted"):
        pickles.loads(pickle.dumps(HOSTILE[name], protocol))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x80\x04",
        b"N.N",
        b"(" * 10**5,
        b"\x80\x04]" + b"\x94" * 10,
        b"N" + b"r\xff\xff\xff\xff" + b".",  # memory for four thousand million memos
        b"\x80\x05\x8e" + struct.pack("<Q", 2**40) + b".",
        b"\x80\x05\x96" + struct.pack("<Q", 2**40) + b".",
        b"cnumpy\ndtype\n(N}X\x05\x00\x00\x00_callNst\x86b.",  # a state for a function
        b"cnumpy\ndtype\n.",
        b"\x80\x02\x82\x01.",
        b"P1\n.",
    ],
)
def test_damaged_pickles_are_one_line(data):
    if data == b"N.N":
        assert pickles.loads(data) is None
        return
    with pytest.raises(ValueError, match="only plain values and numpy arrays are accepted") as caught:
        pickles.loads(data)
    assert "\n" not in str(caught.value)


def test_a_list_in_itself_comes_to_an_end():
    found = pickles.loads(pickle.dumps(circle()))
    assert found[1] is found


@pytest.mark.slow
def test_changed_bytes_never_raise_anything_else():
    rng = random.Random(0)
    seeds = [pickle.dumps({"a": ARRAYS, "b": [np.float64(1), "x"]}, protocol) for protocol in range(6)]
    seeds += [pickle.dumps(value, 4) for value in HOSTILE.values()]
    refused = 0
    for _ in range(3000):
        data = bytearray(rng.choice(seeds))
        for _ in range(rng.choice((1, 1, 2, 4))):
            at = rng.randrange(len(data))
            data[at : at + rng.choice((0, 1, 1, 3))] = rng.randbytes(rng.choice((0, 1, 1, 4)))
        try:
            pickles.loads(bytes(data))
        except ValueError:
            refused += 1
    assert refused > 1000
