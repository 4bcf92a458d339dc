"""Samples of several key-frames: images and geometry of each, where each was, and which there are."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from occstream.models.batch import Batch
from occstream.models.lift import project
from occstream.pretrain.augment import AugmentConfig
from occstream.pretrain.keyframes import KeyFrameFiller
from occstream.pretrain.samples import FrameFiller
from occstream.sharding.grid import get_grid
from occstream.sharding.poses import apply
from occstream.sharding.schema import OCC3D
from occstream.sharding.sources import open_source

CONFIG = AugmentConfig(image_size=(32, 88), resize=(-0.05, 0.1))
TINY = get_grid("tiny")


@pytest.fixture(scope="module")
def frames():
    """Of the scene whose vehicle drives farthest; images of one pixel's worth of work."""
    options = {"scenes": 3, "frames": 4, "image_size": [32, 88], "grid": "tiny"}
    source = open_source("synthetic", options)
    scenes = [source.load(name).frames for name in source.scene_names()]
    found = max(scenes, key=lambda f: np.ptp(f[0].ego_to_global[:2, 3] - f[-1].ego_to_global[:2, 3]))
    found[3].window = {-1: found[2], -2: found[1]}
    return found


def filler(frame, frames=3, **changes):
    choices = {"seed": 0, "train": True, "mask": "none", "grid": TINY, **changes}
    grid = choices.pop("grid")
    return KeyFrameFiller(CONFIG, tuple(frame.cameras), grid, OCC3D, frames=frames, **choices)


def filled(made, frame, epoch=1):
    views = {name: np.full(f.shape, 9, f.dtype) for name, f in made.fields().items()}
    returned = made(frame, epoch, views)
    return views, returned


def test_which_key_frames_are_read_beside_one(frames):
    made = filler(frames[3])
    offsets = made.window.offsets
    assert (list(offsets("k", 5, 9, 0)), list(offsets("k", 1, 9, 0)), list(offsets("k", 0, 9, 0))) == (
        [-1, -2],
        [-1],
        [],
    )
    assert list(filler(frames[3], interval=2).window.offsets("k", 3, 9, 0)) == [-2]
    assert made.window.groups == ("cameras",), "no labels of the past"
    at_lidar = filler(frames[3], grid=dataclasses.replace(TINY, frame="lidar"))
    assert at_lidar.window.groups == ("cameras", "lidar")
    assert filler(frames[3], frames=1).fields()["history.exists"].shape == (1,)


def test_each_key_frame_is_as_it_would_be_alone_and_augmented_as_the_first(frames):
    frame, count = frames[3], len(frames[3].cameras)
    together, _ = filled(filler(frame), frame)
    own, _ = filled(FrameFiller(CONFIG, tuple(frame.cameras), TINY, OCC3D, seed=0, train=True, mask="none"), frame)
    for name, value in own.items():
        shown = together[name][: len(value)] if name.startswith("cameras.") else together[name]
        np.testing.assert_array_equal(shown, value)
    for place, taken in enumerate((frames[3], frames[2], frames[1])):
        alone, _ = filled(filler(taken, frames=1, train=False), taken)
        views = slice(place * count, (place + 1) * count)
        np.testing.assert_array_equal(together["cameras.camera_to_ego"][views], alone["cameras.camera_to_ego"])
        for name in ("cameras.post_rot", "cameras.post_tran"):
            np.testing.assert_array_equal(together[name][views], own[name])
    assert together["history.exists"].all()


@pytest.mark.parametrize("where", ["ego", "lidar"])
def test_what_stands_still_is_where_the_poses_say(frames, where):
    """A point of now, carried to the past grid, is seen in the past images where the world's point is; also mirrored."""
    frame, grid = frames[3], dataclasses.replace(TINY, frame=where)
    seen = 0
    for epoch in range(4):  # all mirrors
        views, _ = filled(filler(frame, grid=grid), frame, epoch)
        batch = Batch.of({name: torch.from_numpy(v)[None] for name, v in views.items()})
        points = np.random.default_rng(0).uniform((-15, -15, 0), (15, 15, 3), (200, 3))
        to_grid = np.linalg.inv(frame.lidar.sensor_to_ego) if where == "lidar" else np.eye(4)
        mirror = views["scene_aug"].astype(np.float64)
        now = apply(to_grid, points) @ mirror.T
        for place, taken in enumerate((frames[3], frames[2], frames[1])):
            world = apply(frame.ego_to_global, points)
            then = apply(np.linalg.inv(views["history.past_to_current"][place].astype(np.float64)), now)
            [(pixels, depth)] = project([torch.from_numpy(then).float()], batch)
            for i, camera in enumerate(taken.cameras.values()):
                local = apply(np.linalg.inv(camera.ego_to_global @ camera.sensor_to_ego), world)
                front = (local[:, 2] > 1) & (np.abs(local[:, :2] / local[:, 2:]) < 1.5).all(1)
                view = place * len(taken.cameras) + i
                np.testing.assert_allclose(depth[view].numpy()[front], local[front, 2], atol=1e-3)
                image = local[front] @ camera.intrinsics.T
                wanted = np.c_[image[:, :2] / image[:, 2:], local[front, 2]] @ views["cameras.post_rot"][view].T
                np.testing.assert_allclose(
                    pixels[view].numpy()[front], (wanted + views["cameras.post_tran"][view])[:, :2], atol=0.02
                )
                seen += int(front.sum())
    assert seen > 1000


def test_what_a_scene_does_not_have_is_absent(frames):
    first = dataclasses.replace(frames[0], window={})
    views, _ = filled(filler(first), first)
    count = len(first.cameras)
    assert views["history.exists"].tolist() == [True, False, False]
    assert (views["history.past_to_current"] == np.eye(4)).all()
    assert views["cameras.images"][:count].std() > 1
    assert not views["cameras.images"][count:].any(), "black, not a repetition"
    assert all(np.isfinite(v).all() for v in views.values())
    _, returned = filled(filler(first, decode=False), first)
    assert len(returned) == 3 * count, "one for each view where a GPU decodes"
    gap = dataclasses.replace(frames[3], window={-2: frames[1]})
    assert filled(filler(gap), gap)[0]["history.exists"].tolist() == [True, False, True]
