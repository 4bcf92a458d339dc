"""Boxes and points in samples of cameras: in the scene that is mirrored, in either frame, and labels made of points."""

import dataclasses
import math

import numpy as np
import pytest

from occstream.evaluation.detection import rules_of
from occstream.pretrain.annotations import Annotations, points_inside
from occstream.pretrain.augment import AugmentConfig
from occstream.pretrain.samples import FrameFiller
from occstream.sharding.grid import VoxelGrid
from occstream.sharding.poses import apply
from occstream.sharding.schema import IGNORE, OCC3D, sweep_to_key_ego
from occstream.sharding.sources import synthetic

CLASSES = rules_of(OCC3D).classes
IMAGES = AugmentConfig(image_size=(16, 16), resize=(0.0, 0.0), rotate=0.0, flip=False)


@pytest.fixture(scope="module")
def street():
    source = synthetic.open_source(scenes=1, frames=1, grid="tiny", image_size=(16, 16), beams=8, style="urban", seed=4)
    return source.load(source.scene_names()[0]).frames[0], source.grid


def sample(frame, grid, annotations, *, train=False, seed=0, **choices):
    filler = FrameFiller(
        IMAGES, ("CAM_FRONT",), grid, OCC3D, seed=seed, train=train, annotations=annotations, **choices
    )
    views = {n: np.zeros(f.shape, f.dtype) for n, f in filler.fields().items() if not f.ragged}
    filler(frame, 0, views)
    ragged = {n for n, f in filler.fields().items() if f.ragged}
    assert ragged <= views.keys()
    for name in ragged:
        field = filler.fields()[name]
        assert (views[name].dtype, views[name].shape[1:]) == (np.dtype(field.dtype), field.shape)
    return filler, views


ALL = Annotations(CLASSES, points=True, labels=True)


def test_boxes_and_points_are_those_of_the_frame(street):
    frame, grid = street
    filler, views = sample(frame, grid, ALL)
    assert filler.groups == ("cameras", "labels", "lidar")
    np.testing.assert_allclose(views["boxes.boxes"], frame.boxes.boxes, atol=1e-5)
    np.testing.assert_allclose(views["boxes.velocity"], frame.boxes.velocity, atol=1e-5)
    assert [CLASSES[c] for c in views["boxes.classes"]] == frame.boxes.names
    ego = apply(sweep_to_key_ego(frame, frame.lidar), frame.lidar.xyz)
    np.testing.assert_allclose(views["points.xyz"], ego, atol=1e-4)
    assert views["boxes.points"].tolist() == points_inside(views["points.xyz"], views["boxes.boxes"]).tolist()
    assert (views["point_labels.classes"] == frame.lidar.classes).all()
    assert (views["point_labels.instances"] == -1).all()
    own = dataclasses.replace(frame.lidar, instances=np.arange(len(ego), dtype=np.uint16))
    _, views = sample(dataclasses.replace(frame, lidar=own), grid, ALL)
    assert (views["point_labels.instances"] == own.instances).all()


def test_training_mirrors_boxes_with_the_scene_and_leaves_out_unseen_ones(street):
    frame, grid = street
    mirrors = set()
    for seed in range(12):
        _, views = sample(frame, grid, ALL, train=True, seed=seed)
        mirror = views["scene_aug"].diagonal()
        mirrors.add(tuple(mirror.tolist()))
        _, plain = sample(frame, grid, ALL)
        seen = plain["boxes.points"] > 0
        assert 0 < seen.sum() < len(seen)
        np.testing.assert_allclose(views["boxes.boxes"][:, :3], plain["boxes.boxes"][seen, :3] * mirror, atol=1e-4)
        heading = np.stack([np.cos(views["boxes.boxes"][:, 6]), np.sin(views["boxes.boxes"][:, 6])], 1)
        before = plain["boxes.boxes"][seen, 6]
        np.testing.assert_allclose(heading, np.stack([np.cos(before), np.sin(before)], 1) * mirror[:2], atol=1e-5)
        np.testing.assert_allclose(views["boxes.velocity"], plain["boxes.velocity"][seen] * mirror[:2], atol=1e-5)
        np.testing.assert_allclose(views["points.xyz"], plain["points.xyz"] * mirror, atol=1e-4)
    assert len(mirrors) > 2
    unread = Annotations(CLASSES, seen=False)
    filler, views = sample(frame, grid, unread, train=True)
    assert filler.groups == ("cameras", "labels")
    assert len(views["boxes.boxes"]) == len(frame.boxes.names)
    assert (views["boxes.points"] == 1).all()


def test_a_grid_in_the_lidar_frame_has_its_boxes_there(street):
    frame, grid = street
    lidar = VoxelGrid("lidar", (-19.2, -19.2, -3), (19.2, 19.2, 3.4), grid.voxel, "lidar")
    turned = np.eye(4)
    turned[:2, :2] = [[0, -1], [1, 0]]  # the LiDAR looks to the left
    turned[:3, 3] = 1, 2, 3
    sweep = dataclasses.replace(frame.lidar, sensor_to_ego=turned)
    _, views = sample(dataclasses.replace(frame, lidar=sweep), lidar, ALL)
    np.testing.assert_allclose(views["points.xyz"], sweep.xyz, atol=1e-4)
    x, y, z, yaw = frame.boxes.boxes[0, [0, 1, 2, 6]]
    found = views["boxes.boxes"][0]
    np.testing.assert_allclose(found[:3], [y - 2, 1 - x, z - 3], atol=1e-4)
    assert math.remainder(found[6] - (yaw - math.pi / 2), 2 * math.pi) == pytest.approx(0, abs=1e-5)


def test_voxels_of_the_sweeps_own_points(street):
    frame, grid = street
    filler, views = sample(frame, grid, None, voxels_from="points")
    assert filler.groups == ("cameras", "lidar")
    semantic = views["occupancy.semantic"]
    assert set(np.unique(semantic)) <= {*range(17), 17, IGNORE}
    assert (views["occupancy.binary_valid"] == (semantic != IGNORE)).all()
    assert (views["occupancy.binary"] == (semantic < 17)).all()
    assert 0.3 < (semantic != frame.labels.semantic).mean() < 1  # mostly what no ray reached
    known = semantic < 17
    assert (semantic[known] == frame.labels.semantic[known]).mean() > 0.6


def test_what_is_missing_is_named(street):
    frame, grid = street
    for part, said in (
        (dataclasses.replace(frame, boxes=None), "has no boxes; pack the labels group"),
        (dataclasses.replace(frame, lidar=None), "has no LiDAR sweep; pack the lidar group"),
        (dataclasses.replace(frame, lidar=dataclasses.replace(frame.lidar, classes=None)), "points have no classes"),
    ):
        with pytest.raises(ValueError, match=said):
            sample(part, grid, ALL)


def test_frames_that_stand_in_have_no_valid_point():
    arrays = {"point_labels.classes": np.arange(6, dtype=np.uint8), "point_labels.counts": np.array([2, 3, 1])}
    ALL.invalidate(arrays, 1)
    assert arrays["point_labels.classes"].tolist() == [0, 1, IGNORE, IGNORE, IGNORE, 5]
    Annotations(CLASSES).invalidate({}, 0)
