"""Compiled kernels given what nobody should give them: NaN, infinity and places far away never become an index.

Without NUMBA_BOUNDSCHECK=1 a wrong index writes outside the array: the arrays here lie inside larger ones that must stay as
they are. ``make bounds`` runs these tests and all others of this folder with every index checked.
"""

import itertools

import numpy as np
import pytest

from occstream.sharding import voxelrays
from occstream.sharding.sources import synthetic_rays

ODD = (np.nan, np.inf, -np.inf, 1e300, -1e300, 1e9, -1e9)
SHAPE = (4, 5, 3)


class Inner:
    """An array within a larger one of another value."""

    def __init__(self, shape, dtype, edge):
        self.outer = np.full([n + 8 for n in shape], edge, dtype)
        inside = tuple(slice(4, -4) for _ in shape)
        self.array, self.edge, self.inside = self.outer[inside], edge, inside
        self.array[...] = 0

    def untouched(self):
        rim = np.ones(self.outer.shape, bool)
        rim[self.inside] = False
        return bool((self.outer[rim] == self.edge).all())


def odd_rows(columns, dtype):
    """Rows in which one or all numbers are odd."""
    rows = [
        [odd if c in where else 1.5 for c in range(columns)] for odd in ODD for where in ([0], [1], [2], range(columns))
    ]
    with np.errstate(over="ignore"):
        return np.array(rows).astype(dtype)


def odd_poses(rows=3):
    yield np.eye(4)[:rows].copy()
    for odd, (i, j) in itertools.product(ODD, ((0, 0), (1, 3), (2, 2), (2, 3))):
        pose = np.eye(4)[:rows]
        pose[i, j] = odd
        yield pose.copy()


def test_points_anywhere_are_counted_in_the_grid_or_not_at_all():
    counts, votes = Inner(SHAPE, np.uint16, 7), np.zeros((*SHAPE, 2), np.uint16)
    xyz = odd_rows(3, np.float32)
    xyz = np.concatenate([xyz, [[1.5, 1.5, 1.5]]]).astype(np.float32)
    classes = np.full(len(xyz), 255, np.uint8)
    for pose in odd_poses():
        voxelrays.count_points(xyz, classes, pose, np.zeros(3), np.ones(3), counts.array, votes)
    assert counts.untouched()
    assert counts.array[1, 1, 1] >= 1
    assert not votes.any()


def test_rays_from_anywhere_to_anywhere_end_and_stay_in_the_grid():
    solid = np.zeros(SHAPE, bool)
    solid[2, 2, 1] = True
    passed = Inner(SHAPE, np.bool_, True)
    ends, returns = odd_rows(3, np.float64), odd_rows(3, np.float32)
    for pose in odd_poses():
        voxelrays.mark_free(passed.array, returns, pose)
    assert passed.untouched()
    for origin in ends:
        voxel, _ = voxelrays.first_hit(solid, np.broadcast_to(origin, ends.shape).copy(), ends)
        assert voxel.min() >= -1
        assert voxel.max() < solid.size
        assert voxelrays.crossings(solid, origin, ends, 0.5).max() <= sum(SHAPE)


def test_a_camera_anywhere_marks_in_the_grid_only():
    solid, wanted, seen = np.zeros(SHAPE, bool), np.ones(SHAPE, bool), Inner(SHAPE, np.bool_, True)
    for pose in odd_poses():
        for odd in (1.0, *ODD):
            k = np.array([[odd, 0, 2], [0, 2, odd], [0, 0, 1.0]])
            voxelrays.mark_visible(solid, wanted, seen.array, pose[:, 3].copy(), pose, k, 4, 4)
    assert seen.untouched()


def test_returns_and_boxes_that_are_not_finite_hold_nothing():
    xyz = odd_rows(3, np.float32)
    for pose in odd_poses():
        out, keep = voxelrays.place_returns(xyz, pose, pose, -np.ones(3), np.ones(3), 50.0)
        assert len(out) == keep.sum()
        assert np.isfinite(xyz[keep]).all()
        box = voxelrays.first_box(xyz, pose[None], np.ones((1, 3)))
        assert not (box[np.isnan(xyz).any(1)] >= 0).any()


@pytest.mark.parametrize("odd", ODD)
def test_the_ground_is_asked_for_anywhere(odd):
    height = np.arange(20.0).reshape(4, 5)
    for x, y in ((odd, 1.0), (1.0, odd), (odd, odd)):
        assert 0 <= synthetic_rays.ground_height(height, 0.0, 0.0, 1.0, x, y) <= 19
    solids = np.full((1, 9), odd)
    starts, items = synthetic_rays.bin_solids(solids, 0.0, 0.0, 1.0, 4, 5)
    assert len(starts) == 21
    assert starts[-1] == len(items)
