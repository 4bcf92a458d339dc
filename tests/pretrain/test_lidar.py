"""LiDAR samples: points, labels, boxes and classes go through the same map of the scene."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from occstream.pretrain.annotations import points_inside
from occstream.pretrain.lidar import (
    LidarConfig,
    LidarFiller,
    Targets,
    Turn,
    check_intensity,
    draw_turn,
    turn_of,
    turned,
)
from occstream.sharding.grid import VoxelGrid, get_grid
from occstream.sharding.manifest import Manifest
from occstream.sharding.order import generator
from occstream.sharding.pack import pack
from occstream.sharding.poses import apply
from occstream.sharding.schema import IGNORE, OCC3D, Boxes, Frame, Labels, LidarSweep
from occstream.sharding.sources import open_source

GRID = VoxelGrid("square", (-4, -4, -1), (4, 4, 1), (0.5, 0.5, 0.5))
XYZI = ("x", "y", "z", "intensity")


def frame(seed: int = 0, points: int = 400, **changes) -> Frame:
    """A frame whose every point lies in an occupied voxel of its point's class."""
    rng = np.random.default_rng(seed)
    xyz = rng.uniform((-4, -4, -1), (4, 4, 1), (points, 3)).astype(np.float32)
    index, _ = GRID.to_index(xyz)
    semantic = np.full(GRID.shape, OCC3D.free_id, np.uint8)
    semantic[tuple(index.T)] = rng.integers(0, 17, points)
    sensor_to_ego = np.eye(4)
    sensor_to_ego[:3, 3] = (0.9, 0, 1.8)
    sweep = LidarSweep(
        xyz - np.float32([0.9, 0, 1.8]),
        sensor_to_ego,
        np.eye(4),
        1_000_000,
        intensity=rng.uniform(0, 255, points).astype(np.float32),
        ring=rng.integers(0, 32, points).astype(np.uint8),
        classes=semantic[tuple(index.T)],
    )
    boxes = np.array([[1.0, 2, 0, 2.5, 1.5, 1.2, 0.3], [-2, -1, 0, 2.8, 1.7, 1.8, -2.0], [3, 3, 9, 1, 1, 1, 0]])
    known = Boxes(
        boxes.astype(np.float32),
        ["car", "pedestrian", "bus"],
        ["a", "b", "c"],
        np.array([[3, 1], [np.nan] * 2, [0, 0]]),
    )
    seen = rng.random(GRID.shape) < 0.8
    seen[tuple(index.T)] = True
    labels = Labels(semantic != OCC3D.free_id, semantic, mask_lidar=seen)
    out = Frame("scene", 0, "token", 1_000_000, np.eye(4), lidar=sweep, boxes=known, labels=labels)
    return dataclasses.replace(out, **changes)


def fill(filler: LidarFiller, of: Frame, epoch: int = 0) -> dict[str, np.ndarray]:
    views = {name: np.zeros(f.shape, f.dtype) for name, f in filler.fields().items() if not f.ragged}
    filler(of, epoch, views)
    for name, f in filler.fields().items():
        assert views[name].dtype == f.dtype, name
        assert views[name].shape[1:] == f.shape or not f.ragged, name
    return views


def filler(config: LidarConfig | None = None, features=XYZI, **changes) -> LidarFiller:
    settings = {"grid": GRID, "taxonomy": OCC3D, "targets": Targets("semantic"), "seed": 7} | changes
    return LidarFiller(config or LidarConfig(), features, **settings)


@pytest.mark.parametrize("turn", ["none", "quarters"])
def test_points_stay_in_the_voxels_of_their_class(turn):
    seen = set()
    made = filler(LidarConfig(turn=turn), targets=Targets("semantic", points=True))
    for epoch in range(24):
        views = fill(made, frame(epoch), epoch)
        index, inside = GRID.to_index(views["points.xyz"].astype(np.float64))
        # A point on a face may change sides by rounding to float32.
        right = views["occupancy.semantic"][tuple(index[inside].T)] == views["point_labels.classes"][inside]
        assert right.mean() > 0.99
        assert (views["occupancy.binary"] == (views["occupancy.semantic"] < OCC3D.free_id)).all()
        assert (views["occupancy.binary_valid"] == (views["occupancy.semantic"] != IGNORE)).all()
        seen.add(tuple(views["scene_aug"].ravel()))
    assert len(seen) == (4 if turn == "none" else 8)  # of 8 mirrors and turns there are 8 different ones


@given(st.integers(0, 10_000), st.floats(-180, 180), st.floats(0.8, 1.25))
def test_each_voxel_has_the_label_of_where_its_center_came_from(seed, degrees, scale):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 18, GRID.shape).astype(np.uint8)
    angle = math.radians(degrees)
    turn = turn_of((bool(seed & 1), bool(seed & 2)), math.cos(angle), math.sin(angle), scale)
    np.testing.assert_allclose(turn.forward @ turn.backward, np.eye(4), atol=1e-12)
    found = turned(labels, GRID, turn, IGNORE)
    for x, y, z in rng.integers(0, GRID.shape, (20, 3)):
        source = apply(np.linalg.inv(turn.forward), GRID.centers(np.array([[x, y, z]])))
        near = np.abs((source - GRID.lower) / GRID.voxel - np.round((source - GRID.lower) / GRID.voxel)).min()
        [index], [inside] = GRID.to_index(source)
        if near > 1e-9:
            assert found[x, y, z] == (labels[tuple(index)] if inside else IGNORE)


def test_boxes_go_with_their_points():
    made = filler(LidarConfig(turn="free", scaling=(0.9, 1.1)), targets=Targets(boxes=("car", "pedestrian", "bus")))
    for epoch in range(12):
        views, of = fill(made, frame(epoch), epoch), frame(epoch)
        assert views["boxes.classes"].tolist() == [0, 1]  # no point lies on the bus
        before = of.boxes.boxes[:2].astype(np.float64)
        ego = of.lidar.xyz.astype(np.float64) + (0.9, 0, 1.8)
        # Within a millimeter of a face rounding may decide.
        assert np.abs(views["boxes.points"] - points_inside(ego, before)).max() <= 1
        matrix = views["scene_aug"].astype(np.float64)
        scale = np.cbrt(abs(np.linalg.det(matrix)))
        np.testing.assert_allclose(views["boxes.boxes"][:, :3], before[:, :3] @ matrix.T, atol=1e-5)
        np.testing.assert_allclose(views["boxes.boxes"][:, 3:6], before[:, 3:6] * scale, atol=1e-5)
        heading = np.stack([np.cos(before[:, 6]), np.sin(before[:, 6]), np.zeros(2)], 1) @ matrix.T / scale
        yaw = views["boxes.boxes"][:, 6]
        np.testing.assert_allclose(np.stack([np.cos(yaw), np.sin(yaw)], 1), heading[:, :2], atol=1e-5)
        np.testing.assert_allclose(views["boxes.velocity"][0], matrix[:2, :2] @ (3, 1), atol=1e-5)
        assert np.isnan(views["boxes.velocity"][1]).all()


def test_points_inside_boxes():
    rng = np.random.default_rng(0)
    points, boxes = (
        rng.uniform(-5, 5, (3000, 3)),
        np.column_stack([rng.uniform(-4, 4, (20, 3)), rng.uniform(0.3, 4, (20, 3)), rng.uniform(-4, 4, 20)]),
    )
    expected = []
    for x, y, z, length, width, height, yaw in boxes:
        turn = np.array([[math.cos(yaw), math.sin(yaw), 0], [-math.sin(yaw), math.cos(yaw), 0], [0, 0, 1]])
        local = (points - (x, y, z)) @ turn.T
        expected.append(int((np.abs(local) <= np.array([length, width, height]) / 2).all(1).sum()))
    assert points_inside(points, boxes).tolist() == expected
    assert points_inside(points, boxes[:0]).shape == (0,)


def test_evaluation_keeps_boxes_without_points_and_does_not_augment():
    made = filler(seed=None, targets=Targets(boxes=("car", "pedestrian", "bus")))
    views = fill(made, frame())
    assert views["boxes.classes"].tolist() == [0, 1, 2]
    assert (views["scene_aug"] == np.eye(3)).all()
    np.testing.assert_allclose(views["points.xyz"], frame().lidar.xyz + np.float32([0.9, 0, 1.8]), atol=1e-6)
    np.testing.assert_allclose(views["points.features"][:, 0], frame().lidar.intensity / 255, atol=1e-6)


def test_thinned_sweeps_keep_a_share_of_the_beams():
    config = LidarConfig(beams=(0.25, 0.5), beams_probability=0.5)
    rows = []
    for epoch in range(200):
        of = frame(epoch, 64)
        of.lidar.ring[:] = np.arange(64) % 32
        of.lidar.xyz[:] = [[10, 0, ring] for ring in of.lidar.ring]
        rows.append(len(fill(filler(config), of, epoch)["points.xyz"]) // 2)
    assert set(rows) == {8, 16, 32}
    assert rows.count(32) == pytest.approx(100, abs=25)
    assert rows.count(8) == pytest.approx(50, abs=20)


def test_each_of_several_lidars_is_thinned_by_itself():
    """Every fourth row of either stays. The second one's are twice as far apart, so of all rows together others would."""
    of = frame(0, 640)
    of.lidar.ring[:] = np.arange(640) % 64
    of.lidar.lidars = np.array([[0, 0.0, 0, 0], [32, 0, 0, 0]])
    up = np.where(of.lidar.ring < 32, of.lidar.ring * 3 % 32, 2 * (of.lidar.ring % 32) + 0.5)
    of.lidar.xyz[:] = [[50, 0, height] for height in up]
    config = LidarConfig(beams=(0.25,), beams_probability=1.0, turn="none", flip_x=False, flip_y=False)
    kept = fill(filler(config), of)["points.xyz"][:, 2] - 1.8
    rows = {round(2 * float(height)) for height in kept}
    assert len(kept) == 10 * len(rows) == 160
    for second, apart in ((0, 8), (1, 16)):  # half meters
        own = sorted(row for row in rows if row % 2 == second)
        assert set(np.diff(own).tolist()) == {apart}
        assert len(own) == 8


def test_draws_are_a_function_of_seed_epoch_and_key():
    first, again = (fill(filler(LidarConfig(turn="free")), frame(), 3) for _ in range(2))
    assert all((first[name] == again[name]).all() for name in first if name.startswith(("points", "occupancy")))
    other = fill(filler(LidarConfig(turn="free")), frame(), 4)
    assert (first["scene_aug"] != other["scene_aug"]).any()
    config = LidarConfig(turn="free", scaling=(0.9, 1.1))
    assert isinstance(draw_turn(generator(1), config), Turn)


def test_columns_have_one_class():
    """Pedestrian before road before free, by the priority."""
    priority = tuple(2 if name == "pedestrian" else 1 for name in OCC3D.classes) + (0,)
    views = fill(
        filler(LidarConfig(turn="none", flip_x=False, flip_y=False), targets=Targets("semantic", priority)), frame()
    )
    assert views["occupancy.semantic"].shape == (16, 16, 1)
    labels = frame().labels
    for x in range(16):
        for y in range(16):
            known = labels.semantic[x, y][labels.mask_lidar[x, y]]
            best = sorted(known, key=lambda c: (-priority[c], c))
            assert views["occupancy.semantic"][x, y, 0] == (best[0] if len(best) else IGNORE)


def test_binary_targets_need_no_classes():
    labels = dataclasses.replace(frame().labels, semantic=None)
    views = fill(
        filler(LidarConfig(turn="none", flip_x=False, flip_y=False), targets=Targets("binary")), frame(labels=labels)
    )
    assert (views["occupancy.binary_valid"] == labels.mask_lidar).all()
    assert (views["occupancy.binary"] == labels.binary & labels.mask_lidar).all()


def test_earlier_sweeps_fall_into_place():
    """Points of the same places, taken from where the vehicle was half a second before, land on those of the key sweep."""
    now, before = frame(), frame()
    now.ego_to_global, before.ego_to_global = np.eye(4), np.eye(4)
    before.ego_to_global[:2, :2] = [[math.cos(0.1), -math.sin(0.1)], [math.sin(0.1), math.cos(0.1)]]
    before.ego_to_global[:3, 3] = (-3, 0.5, 0.1)
    places = now.lidar.xyz.astype(np.float64) + (0.9, 0, 1.8)
    seen = apply(np.linalg.inv(before.ego_to_global), places) - (0.9, 0, 1.8)
    before.lidar = dataclasses.replace(
        before.lidar, xyz=seen.astype(np.float32), ego_to_global=before.ego_to_global, timestamp=500_000
    )
    now.window = {-1: before}
    made = filler(LidarConfig(sweeps=3, turn="free"), ("x", "y", "z", "time"), targets=Targets("semantic", points=True))
    assert made.window == (-1, -2)
    views = fill(made, now)
    now_points, before_points = np.split(views["points.xyz"], 2)
    np.testing.assert_allclose(before_points, now_points, atol=1e-5)
    assert views["points.features"][:, 0].tolist() == [0.0] * 400 + [0.5] * 400
    assert (views["point_labels.classes"][:400] == now.lidar.classes).all()
    assert (views["point_labels.classes"][400:] == IGNORE).all()  # only points of the key sweep are scored


def test_a_sample_that_stands_in_for_another_counts_for_nothing():
    made = filler(targets=Targets("semantic", points=True))
    arrays = {
        "occupancy.binary_valid": np.ones((3, *GRID.shape), bool),
        "occupancy.semantic": np.zeros((3, *GRID.shape), np.uint8),
        "point_labels.classes": np.zeros(9, np.uint8),
        "point_labels.counts": np.array([4, 3, 2]),
    }
    made.invalidate(arrays, 1)
    assert arrays["occupancy.binary_valid"].reshape(3, -1).all(1).tolist() == [True, False, True]
    assert (arrays["occupancy.semantic"][1] == IGNORE).all()
    assert arrays["point_labels.classes"].tolist() == [0] * 4 + [IGNORE] * 3 + [0] * 2


def test_returns_that_are_not_numbers_and_empty_sweeps():
    of = frame()
    of.lidar.xyz[::2] = np.nan
    everything = Targets("semantic", boxes=("car",), points=True)
    views = fill(filler(targets=everything), of)
    assert len(views["points.xyz"]) == len(views["points.features"]) == len(views["point_labels.classes"]) == 200
    assert np.isfinite(views["points.xyz"]).all()
    empty = fill(filler(targets=everything), frame(points=0))
    assert len(empty["points.xyz"]) == len(empty["boxes.boxes"]) == 0


@pytest.mark.parametrize(
    ("changes", "config", "message"),
    [
        ({"lidar": None}, {}, "frame scene-000000 has no LiDAR sweep; pack the lidar group"),
        ({"labels": None}, {}, "has no labels; pack the labels group"),
        ({"boxes": None}, {}, "has no boxes; pack the labels group of a source that has them"),
        (
            {"lidar.ring": None},
            {"beams": (0.5,), "beams_probability": 1.0},
            r"have no beam numbers; .*lidar.beams=\[\]",
        ),
        ({"lidar.intensity": None}, {}, r"have no intensity; set model.in_features=\[x,y,z\]"),
        ({"lidar.classes": None}, {}, "have no classes"),
        ({"ego_to_global": None}, {"sweeps": 2}, "has no ego pose"),
    ],
)
def test_what_a_frame_lacks_is_named(changes, config, message):
    of = frame()
    for name, value in changes.items():
        owner, _, name = name.rpartition(".")
        setattr(of.lidar if owner else of, name, value)
    of.window = {-1: frame(1)}
    made = filler(LidarConfig(**config), targets=Targets("semantic", boxes=("car",), points=True))
    with pytest.raises(ValueError, match=message.replace("000000", r"\d+")):
        fill(made, of)


@pytest.mark.parametrize(
    ("grid", "config", "message"),
    [
        ("semantickitti", {"flip_x": True}, "not symmetric in x, .* set lidar.flip_x=false"),
        ("semantickitti", {"flip_x": False, "turn": "quarters"}, "cannot be turned by quarters; set lidar.turn"),
    ],
)
def test_grids_that_cannot_be_mirrored_or_turned(grid, config, message):
    with pytest.raises(ValueError, match=message):
        filler(LidarConfig(**config), grid=get_grid(grid))
    filler(LidarConfig(enabled=False, **config), grid=get_grid(grid))
    filler(LidarConfig(flip_x=False, turn="free"), grid=get_grid(grid))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"sweeps": 0}, "sweeps is 0"),
        ({"scaling": (1.1, 0.9)}, "the low end first"),
        ({"beams": (1.5,)}, "at most 1"),
        ({"beams_probability": 2.0}, "at most 1"),
        ({"max_angle": 200.0}, "at most 180"),
    ],
)
def test_settings_out_of_range(config, message):
    with pytest.raises(ValueError, match=message):
        LidarConfig(**config)


def test_unknown_features_are_named():
    with pytest.raises(
        ValueError, match=r"model\.in_features has 'elongation'; sweeps give x, y, z and of intensity, time"
    ):
        filler(features=(*XYZI, "elongation"))


def test_intensities_of_another_range_are_found_before_training(tmp_path):
    options = {"scenes": 1, "frames": 1, "image_size": (32, 88), "grid": "tiny"}
    pack(open_source("synthetic", options), str(tmp_path), groups=("lidar", "labels"), grid=get_grid("tiny"))
    manifest = Manifest.load(str(tmp_path))
    check_intensity(manifest, 0, "byte")
    with pytest.raises(ValueError, match=r"but lidar\.intensity is 'unit': set lidar.intensity=byte"):
        check_intensity(manifest, 0, "unit")
