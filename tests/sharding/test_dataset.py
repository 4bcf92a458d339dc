"""``occstream.open``: the same frames whoever shares them, wherever it continues."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

import occstream
from occstream.sharding.pack import pack
from tests.sharding.toy import GRID, ToySource


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    url = str(tmp_path_factory.mktemp("dataset"))
    pack(ToySource((4, 3, 5)), url, grid=GRID, scenes_per_shard=2)
    return url


def keys(data, batches):
    return [[frame.key for frame in got] for got in itertools.islice(data, batches)]


def test_ranks_share_batches_and_any_number_of_them_continues(url):
    whole = keys(occstream.open(url, ["labels"], batch=4, seed=1), 6)
    for world in (1, 2, 4):
        parts = [keys(occstream.open(url, ["labels"], batch=4, seed=1, rank=r, world=world), 6) for r in range(world)]
        assert [sorted(key for share in shares for key in share) for shares in zip(*parts)] == [
            sorted(b) for b in whole
        ]
    first = occstream.open(url, ["labels"], batch=4, seed=1)
    assert keys(first, 2) == whole[:2]
    for world in (1, 2):
        parts = []
        for rank in range(world):
            data = occstream.open(url, ["labels"], batch=4, seed=1, rank=rank, world=world, threads=0)
            data.load_state_dict(first.state_dict())
            parts.append(keys(data, 4))
        assert [sorted(key for share in shares for key in share) for shares in zip(*parts)] == [
            sorted(b) for b in whole[2:]
        ]


def test_in_order_every_frame_comes_once(url):
    data = occstream.open(url, ["labels"], batch=5, shuffle=False)
    assert [frame.key for got in data for frame in got] == [
        f"toy-{s}-{i:04d}" for s, n in enumerate((4, 3, 5)) for i in range(n)
    ]
    assert len(data) == 12
    with pytest.raises(ValueError, match="has no position"):
        data.load_state_dict({})


def test_windows_have_poses_and_absent_frames_are_absent(url):
    for [frame] in occstream.open(url, ["labels"], window=(-1, 2), shuffle=False, scenes=["toy-1"]):
        assert set(frame.window) == {o for o in (-1, 2) if 0 <= frame.index + o < 3}
        for offset, other in frame.window.items():
            assert other.index == frame.index + offset
            assert other.ego_to_global.shape == (4, 4)


def test_a_transform_takes_the_frames_place(url):
    got = next(
        iter(
            occstream.open(url, ["labels"], batch=3, transform=lambda frame, epoch: (frame.labels.binary.sum(), epoch))
        )
    )
    assert len(got) == 3
    assert all(isinstance(n, np.integer) and epoch == 0 for n, epoch in got)


def test_wrong_groups_and_scenes_are_named(url):
    with pytest.raises(ValueError, match="has no group 'lidra'"):
        next(iter(occstream.open(url, ["lidra"])))
    with pytest.raises(ValueError, match="toy-9"):
        occstream.open(url, scenes=["toy-9"])
