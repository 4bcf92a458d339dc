"""Voxel labels of one sweep's points: majorities, what is free, and what nobody knows."""

import numpy as np
import pytest

from occstream.sharding.grid import VoxelGrid
from occstream.sharding.pointlabels import majority, point_labels
from occstream.sharding.schema import IGNORE, OCC3D, Frame, LidarSweep

GRID = VoxelGrid("row", (0, -1, 0), (8, 1, 2), (1, 1, 1))
CAR, BUS, FREE = OCC3D.id("car"), OCC3D.id("bus"), OCC3D.free_id


def frame(points, classes=None, to_ego=None, ego=None):
    ego = np.eye(4) if ego is None else ego
    sweep = LidarSweep(
        np.array(points, np.float32).reshape(-1, 3),
        np.eye(4) if to_ego is None else to_ego,
        ego,
        0,
        classes=None if classes is None else np.array(classes, np.uint8),
    )
    return Frame("s", 0, "t", 0, ego, lidar=sweep)


def test_most_points_decide_and_of_as_many_the_lowest_class():
    places = np.array([7, 7, 7, 3, 3, 9, 3, 3])
    classes = np.array([CAR, BUS, CAR, CAR, BUS, BUS, BUS, CAR])
    found, winners = majority(places, classes)
    assert found.tolist() == [3, 7, 9]
    assert winners.tolist() == [BUS, CAR, BUS]  # 3 is the id of a bus, 4 of a car
    for seed in range(3):
        order = np.random.default_rng(seed).permutation(8)
        assert majority(places[order], classes[order])[1].tolist() == [BUS, CAR, BUS]


def test_points_without_class_do_not_vote_and_rays_tell_what_is_free():
    shift = np.eye(4)
    shift[:3, 3] = 0.5, 0.5, 0.5  # the LiDAR is in voxel (0, 1, 0)
    points = [[5, 0, 0], [5.2, 0, 0], [5.1, 0, 0], [3, -1, 0], [100, 0, 0], [np.nan, 0, 0]]
    labels = point_labels(frame(points, [IGNORE, IGNORE, CAR, IGNORE, BUS, BUS], shift), GRID, OCC3D)
    row = labels.semantic[:, 1, 0]
    assert row[5] == CAR
    assert row[:5].tolist() == [FREE] * 5
    assert row[6:].tolist() == [FREE] * 2  # the ray that leaves the grid passes them, and only it
    assert (labels.binary[3, 0, 0], labels.semantic[3, 0, 0]) == (True, IGNORE)
    assert labels.mask_lidar[3, 0, 0]
    assert labels.binary.sum() == 2
    assert (labels.semantic[:, :, 1] == IGNORE).all()
    assert not labels.mask_lidar[:, :, 1].any()


@pytest.mark.parametrize(("empty", "free"), [("rest", 15 * 2), ("none", 0)])
def test_what_has_no_point_is_free_or_unknown(empty, free):
    labels = point_labels(frame([[5, 0.5, 0.5], [3, -0.5, 0.5]], [CAR, IGNORE]), GRID, OCC3D, empty=empty)
    assert (labels.semantic == FREE).sum() == free
    assert labels.mask_lidar.sum() == free + 2


def test_grids_in_the_lidar_frame_and_moved_sweeps():
    shift, ego = np.eye(4), np.eye(4)
    shift[0, 3], ego[0, 3] = 2.0, 100.0
    grid = VoxelGrid("lidar row", GRID.lower, GRID.upper, GRID.voxel, "lidar")
    there = frame([[5, 0.5, 0.5]], [CAR], shift, ego)
    assert np.argwhere(point_labels(there, grid, OCC3D).binary).tolist() == [[5, 1, 0]]
    assert np.argwhere(point_labels(there, GRID, OCC3D).binary).tolist() == [[7, 1, 0]]


def test_points_need_classes():
    with pytest.raises(ValueError, match="frame s-0000: its LiDAR points have no classes"):
        point_labels(frame([[5, 0, 0]]), GRID, OCC3D)
    with pytest.raises(ValueError, match="frame s-0000 has no LiDAR sweep"):
        point_labels(Frame("s", 0, "t", 0, np.eye(4)), GRID, OCC3D)


def test_the_papers_grid_on_a_real_sweep(shared_data):
    """At 400 x 400 x 64 about one voxel in two hundred of the coarser 200 x 200 x 32 holds points."""
    from occstream.sharding.sources import open_source

    real = open_source("nuscenes", {"root": str(shared_data / "nuscenes"), "scenes": ["scene-9001"]})
    frame = real.load("scene-9001").frames[0]
    grid = VoxelGrid("lidarseg", (-51.2, -51.2, -5), (51.2, 51.2, 3), (0.256, 0.256, 0.125), "lidar")
    assert grid.shape == (400, 400, 64)
    labels = point_labels(frame, grid, OCC3D)
    known = labels.semantic[labels.binary]
    assert set(np.unique(known)) <= {*range(1, 17), IGNORE}
    coarse = labels.binary.reshape(200, 2, 200, 2, 32, 2).any((1, 3, 5))
    assert 0.003 < coarse.mean() < 0.007
    assert (labels.semantic == FREE).sum() > 10 * labels.binary.sum()
    assert not ((labels.semantic == FREE) & labels.binary).any()
