"""Labels from LiDAR: worked examples, and synthetic scenes whose truth is known."""

import dataclasses

import numpy as np
import pytest

from occstream.sharding.grid import VoxelGrid, get_grid
from occstream.sharding.labelconfig import LabelConfig
from occstream.sharding.labelquality import measure
from occstream.sharding.labels import Labeler, label_scene
from occstream.sharding.levelling import level
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
    config = LabelConfig(vehicle=(-1, -1, -1, 0, 0, 0), **{"supported": False, **settings})
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

    # Rear end seen in the first frame, front end in the second, two meters further.
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


@pytest.mark.slow
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


def test_moving_points_leave_no_trail_and_parked_cars_stay():
    """Where the data set says what moved, a parked car is gathered from all frames, and a moving one is not."""
    classes, moving = np.array([CAR, CAR], np.uint8), np.array([False, True])
    first, second = frame_of([[4.5, 0.5, 0.5], [4.5, 1.5, 0.5]], classes=classes), frame_of([[9.5, -1.5, 0.5]], 1)
    first.lidar.moving = moving
    second.lidar.classes = np.array([IGNORE], np.uint8)
    a, b = label([first, second])
    assert a.binary[4, 2, 2]
    assert a.binary[4, 3, 2]
    assert b.binary[4, 2, 2]
    assert not b.binary[4, 3, 2]


def test_minimum_points_range_and_dilation():
    points = [[5.5, 0.5, 0.5]] * 2 + [[8.5, 1.5, 0.5]]
    [few] = label([frame_of(points)], min_points=2)
    assert np.argwhere(few.binary).tolist() == [[5, 2, 2]]
    [near] = label([frame_of(points)], max_range=7.0)
    assert np.argwhere(near.binary).tolist() == [[5, 2, 2]]
    assert not near.mask_lidar[7, 3, 2]  # its ray is not used either
    classes = np.array([CAR, ROAD, ROAD], np.uint8)
    [grown] = label([frame_of(points, classes=classes)], dilation=1)
    assert grown.binary[6, 2, 2]
    assert grown.semantic[6, 2, 2] == min(CAR, ROAD)  # a draw of two points goes to the lower id
    assert grown.semantic[9, 3, 2] == ROAD
    assert not grown.binary[4, 2, 2]  # a ray passed it: free stays free
    with pytest.raises(ValueError, match="min_points is 0"):
        LabelConfig(min_points=0)


def test_flat_rays_do_not_free_the_ground():
    """A ray comes down over three columns before it hits the road: it passed the upper part of the road's own voxels."""
    frame = frame_of([[9.5, 0.5, -0.9], [5.5, 0.5, -1.5]])
    frame.lidar.sensor_to_ego[2, 3] = 0.3
    [plain], [supported] = label([frame]), label([frame], supported=True)
    ground = (slice(6, 10), 2, 1)
    assert plain.mask_lidar[ground].any()
    assert supported.mask_lidar[ground].tolist() == (supported.binary[ground]).tolist()
    free = supported.mask_lidar & ~supported.binary
    assert free.any()
    below = np.roll(plain.mask_lidar, 1, 2)
    assert below[free].all()


def road_scene(frames: int, drift: float, tilt: float) -> Scene:
    """Frames that drive along a rough flat road with poles; poses whose height and pitch are wrong by a random walk."""
    rng = np.random.default_rng(3)
    ground = np.stack([rng.uniform(-40, 60, 60_000), rng.uniform(-30, 30, 60_000), rng.normal(0, 0.02, 60_000)], 1)
    poles = np.stack([np.repeat(rng.uniform(-40, 60, 20), 50), np.repeat(rng.uniform(-30, 30, 20), 50)], 1)
    world = np.concatenate([ground, np.column_stack([poles, np.tile(np.linspace(0, 4, 50), 20)])])
    out, height, pitch = [], 0.0, 0.0
    for i in range(frames):
        true = np.eye(4)
        true[0, 3] = 3.0 * i
        seen = world[np.hypot(world[:, 0] - 3 * i, world[:, 1]) < 30]
        sensor = np.eye(4)
        sensor[2, 3] = 1.8
        points = (seen - true[:3, 3] - sensor[:3, 3]).astype(np.float32)
        wrong = true.copy()
        wrong[2, 3] = height
        wrong[0, 0], wrong[0, 2], wrong[2, 0], wrong[2, 2] = np.cos(pitch), np.sin(pitch), -np.sin(pitch), np.cos(pitch)
        out.append(Frame("s", i, str(i), i * 500_000, wrong, lidar=LidarSweep(points, sensor, wrong, i * 500_000)))
        height, pitch = height + drift * rng.normal(), pitch + tilt * rng.normal()
    return Scene("s", out)


@pytest.mark.parametrize(("drift", "tilt"), [(0.25, 0.0), (0.15, 0.01)])
def test_levelling_lays_the_road_of_all_frames_onto_the_first(drift, tilt):
    def thickness(scene):
        tops = []
        for f in scene.frames:
            points = f.lidar.xyz[::50].astype(float) @ f.lidar.sensor_to_ego[:3, :3].T + f.lidar.sensor_to_ego[:3, 3]
            points = points[np.abs(points[:, 2]) < 0.2]
            points = points @ f.ego_to_global[:3, :3].T + f.ego_to_global[:3, 3]
            tops.append(points[np.abs(points[:, 0] - 15) < 10, 2].mean())
        return np.ptp(tops)

    scene = road_scene(8, drift, tilt)
    assert thickness(scene) > 0.2
    assert thickness(level(scene)) < 0.02


def test_levelling_leaves_right_poses_alone():
    scene = road_scene(6, 0.0, 0.0)
    for before, after in zip(scene.frames, level(scene).frames):
        np.testing.assert_allclose(after.ego_to_global, before.ego_to_global, atol=3e-3)
    flat = label_scene(scene, get_grid("occ3d"), OCC3D, LabelConfig(level=False)).frames
    assert flat[0].ego_to_global is scene.frames[0].ego_to_global  # labels change nothing but labels


@pytest.mark.slow
def test_left_out_sweeps_tell_good_labels_from_bad_ones():
    """Aggregation hits more than one sweep; wrong poses show as rays that cross occupied voxels."""
    right, wrong = road_scene(8, 0.0, 0.0), road_scene(8, 0.4, 0.0)
    grid = VoxelGrid("small", (-20, -20, -2.25), (20, 20, 3.75), (0.5, 0.5, 0.5))
    good, bad, repaired = (
        measure(scene, grid, OCC3D, LabelConfig(level=fix))
        for scene, fix in ((right, False), (wrong, False), (wrong, True))
    )
    assert good.sweeps == 8
    assert good.labels.hit_share > 0.98
    assert bad.labels.wrong_share > 3 * good.labels.wrong_share
    assert repaired.labels.wrong_share < 1.2 * good.labels.wrong_share
    assert repaired.labels.hit_share > 0.98
    with pytest.raises(ValueError, match="needs at least 2 frames"):
        measure(road_scene(1, 0, 0), grid, OCC3D, LabelConfig())


@pytest.mark.slow
def test_real_labels_predict_sweeps_that_took_no_part(shared_data):
    scene = open_source("nuscenes", {"root": str(shared_data / "nuscenes"), "scenes": ["scene-9001"]}).load(
        "scene-9001"
    )
    grid = get_grid("occ3d")
    levelled, plain = (measure(scene, grid, OCC3D, LabelConfig(level=fix)) for fix in (True, False))
    assert levelled.labels.hit_share > 0.82
    assert levelled.labels.hit_share > 1.3 * levelled.single.hit_share
    assert levelled.labels.wrong_share < 0.5 * plain.labels.wrong_share
