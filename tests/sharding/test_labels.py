"""Labels from LiDAR: worked examples, and synthetic scenes whose truth is known."""

import dataclasses

import numpy as np
import pytest

from occstream.sharding.grid import VoxelGrid, get_grid
from occstream.sharding.labels import LabelConfig, Labeler, label_scene
from occstream.sharding.schema import IGNORE, OCC3D, Boxes, Frame, LidarSweep, Scene
from occstream.sharding.sources import open_source

GRID = VoxelGrid("line", (0, -2, -2), (10, 2, 2), (1, 1, 1))
CAR, ROAD = OCC3D.id("car"), OCC3D.id("driveable_surface")


def frame_of(points, index=0, ego_x=0.0, classes=None, boxes=None):
    pose = np.eye(4)
    pose[0, 3] = ego_x
    sweep = LidarSweep(np.array(points, np.float32).reshape(-1, 3), np.eye(4), pose, index * 500_000, classes=classes)
    return Frame("s", index, str(index), index * 500_000, pose, lidar=sweep, boxes=boxes)


def label(frames, **settings):
    config = LabelConfig(vehicle=(-1, -1, -1, 0, 0, 0), **settings)
    return [f.labels for f in label_scene(Scene("s", frames), GRID, OCC3D, config).frames]


def test_one_ray_makes_free_occupied_and_unknown():
    [labels] = label([frame_of([[5.5, 0.5, 0.5]])])
    row = (slice(None), 2, 2)
    assert labels.binary[row].tolist() == [False] * 5 + [True] + [False] * 4
    assert labels.mask_lidar[row].tolist() == [True] * 6 + [False] * 4
    assert labels.binary.sum() == 1
    assert labels.semantic is None
    assert labels.mask_camera is None


def test_static_points_are_shared_by_all_frames_of_a_scene():
    first, second = label([frame_of([[8.5, 0.5, 0.5]]), frame_of([[1.5, 1.5, 0.5]], 1, ego_x=3.0)])
    assert np.argwhere(first.binary).tolist() == [[4, 3, 2], [8, 2, 2]]
    assert np.argwhere(second.binary).tolist() == [[1, 3, 2], [5, 2, 2]]


def test_a_mover_is_gathered_in_its_box_and_leaves_no_trail():
    def box(x):
        return Boxes(np.array([[x, 0.5, 0.5, 1.8, 0.9, 0.9, 0.0]], np.float32), ["car"], ["t"])

    # Rear end seen in the first frame, front end in the second, two metres further.
    frames = [frame_of([[3.7, 0.5, 0.5]], 0, boxes=box(4.5)), frame_of([[7.3, 0.5, 0.5]], 1, boxes=box(6.5))]
    first, second = label(frames)
    assert np.argwhere(first.binary).tolist() == [[3, 2, 2], [5, 2, 2]]
    assert np.argwhere(second.binary).tolist() == [[5, 2, 2], [7, 2, 2]]


def test_majority_of_known_classes_wins_and_movers_without_box_stay_in_their_frame():
    classes = np.array([ROAD, ROAD, CAR, IGNORE, IGNORE, IGNORE, CAR], np.uint8)
    points = [[4.2, 0.5, 0.5]] * 6 + [[6.5, 1.5, 0.5]]
    first, second = label(
        [frame_of(points, classes=classes), frame_of([[9.5, -1.5, 0.5]], 1, classes=np.array([IGNORE], np.uint8))]
    )
    assert first.semantic[4, 2, 2] == ROAD
    assert first.semantic[6, 3, 2] == CAR
    assert first.semantic[1, 2, 2] == OCC3D.free_id
    assert first.semantic[0, 0, 0] == IGNORE
    assert not second.binary[6, 3, 2]
    assert second.semantic[9, 0, 2] == IGNORE


def test_minimum_of_points():
    [labels] = label([frame_of([[5.5, 0.5, 0.5]] * 2 + [[7.5, 1.5, 0.5]])], min_points=2)
    assert np.argwhere(labels.binary).tolist() == [[5, 2, 2]]


def test_labels_of_synthetic_drives_agree_with_their_exact_occupancy():
    source = open_source("synthetic", {"scenes": 2, "frames": 3, "image_size": (32, 88), "sweeps": 2})
    made = Labeler(get_grid("occ3d"), "occ3d")
    for name in source.scene_names():
        scene = source.load(name)
        for exact, frame in zip([f.labels for f in scene.frames], made(scene).frames):
            labels = frame.labels
            near = exact.binary.copy()
            for axis in range(3):
                for shift in (-1, 1):
                    near |= np.roll(exact.binary, shift, axis)
            assert near[labels.binary].mean() > 0.98, "occupied voxels are at occupied ones"
            free = labels.mask_lidar & ~labels.binary
            # Exact labels call a voxel occupied that is touched at all; rays graze such voxels without a return in them.
            assert exact.binary[free].mean() < 0.1, "free voxels are free"
            both = labels.binary & exact.binary & (labels.semantic != IGNORE)
            assert (labels.semantic == exact.semantic)[both].mean() > 0.85
            [alone] = label_scene(Scene("one", [dataclasses.replace(frame, sweeps=[])]), made.grid, OCC3D).frames
            assert labels.binary.sum() > 1.5 * alone.labels.binary.sum(), "denser than one sweep"
            assert not (labels.mask_camera & ~labels.mask_lidar).any()


def test_version_follows_the_settings_and_missing_lidar_is_named():
    grid = get_grid("tiny")
    assert Labeler(grid, "occ3d").version != Labeler(grid, "occ3d", LabelConfig(min_points=2)).version
    scene = Scene("s", [Frame("s", 0, "t", 0, np.eye(4))])
    with pytest.raises(ValueError, match="s-0000 has no LiDAR"):
        Labeler(grid, "occ3d")(scene)
