"""Compressed PCD files: the same points as uncompressed, and nothing that leads out of the file."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from occstream.sharding.lzf import unpack
from occstream.sharding.rawfiles import read_pcd
from tests.sharding import layouts


def test_runs_and_repetitions():
    assert unpack(b"\x02abc", 3) == b"abc"
    assert unpack(b"\x00a\x40\x00", 5) == b"aaaaa"  # a run of 2 + 2 that overlaps itself
    assert unpack(b"\x01ab\xe0\x05\x01", 16) == b"ab" * 8  # 7 + 5 + 2 bytes from 2 before
    assert unpack(b"", 0) == b""


@given(st.binary(max_size=60), st.integers(1, 40), st.binary(max_size=60))
@settings(deadline=None, max_examples=50)
def test_what_was_packed_is_unpacked(head, times, tail):
    raw = head * times + tail + head
    assert unpack(layouts.lzf_packed(raw), len(raw)) == raw


@pytest.mark.parametrize(
    "data", [b"\x02ab", b"\x00a\x40", b"\x00a\xe0", b"\x40\x00", b"\x00a\x41\x00", b"\x02abcd", b"\x01ab"]
)
def test_damaged_data_are_refused(data):
    with pytest.raises(ValueError, match="do not unpack to the 3 bytes"):
        unpack(data, 3)


def test_a_compressed_point_cloud(tmp_path):
    points = np.random.default_rng(0).integers(-50, 50, (500, 4)) / 4
    for coding in ("binary", "binary_compressed"):
        (tmp_path / f"{coding}.pcd").write_bytes(layouts.pcd(points, coding))
    plain, packed = (read_pcd(tmp_path / f"{coding}.pcd") for coding in ("binary", "binary_compressed"))
    assert list(plain) == list(packed)
    for name, values in plain.items():
        np.testing.assert_array_equal(values, packed[name])
        assert values.dtype == packed[name].dtype
    data = bytearray(layouts.pcd(points, "binary_compressed"))
    for end in (-1, -len(data) + data.index(b"DATA") + 26):
        (tmp_path / "short.pcd").write_bytes(data[:end])
        with pytest.raises(ValueError, match=r"short\.pcd: broken PCD"):
            read_pcd(tmp_path / "short.pcd")
