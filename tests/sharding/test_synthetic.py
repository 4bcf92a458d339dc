"""The synthetic source: pure scenes whose sensors and labels agree with each other."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import simplejpeg

from occstream.sharding.grid import get_grid
from occstream.sharding.schema import OCC3D, camera_to_key_ego, sweep_to_key_ego
from occstream.sharding.sources import open_source
from occstream.sharding.sources.synthetic_world import build_world

SMALL = {"frames": 2, "image_size": (64, 176)}


@pytest.fixture(scope="module")
def scenes():
    source = open_source("synthetic", {**SMALL, "scenes": 6})
    return [source.load(name) for name in source.scene_names()]


@pytest.mark.slow
def test_a_scene_is_a_function_of_seed_and_number(scenes):
    again = open_source("synthetic", {**SMALL, "scenes": 2, "first": 3})
    scene = again.load("synthetic-v2-s0-000003")
    for a, b in zip(scenes[3].frames, scene.frames, strict=True):
        assert [c.jpeg for c in a.cameras.values()] == [c.jpeg for c in b.cameras.values()]
        np.testing.assert_array_equal(a.lidar.xyz, b.lidar.xyz)
        np.testing.assert_array_equal(a.labels.semantic, b.labels.semantic)
        assert a.boxes.track_ids == b.boxes.track_ids
    other = open_source("synthetic", {**SMALL, "seed": 1, "first": 3, "scenes": 1})
    assert (
        other.load("synthetic-v2-s1-000003").frames[0].cameras["CAM_FRONT"].jpeg
        != scene.frames[0].cameras["CAM_FRONT"].jpeg
    )
    with pytest.raises(ValueError, match="no scene"):
        again.load("synthetic-v2-s0-000009")


# Every library that chooses its code by the CPU, made to choose as on others.
CPUS = [
    {},
    {"OPENBLAS_CORETYPE": "Haswell", "GLIBC_TUNABLES": "glibc.cpu.hwcaps=-FMA,-AVX,-AVX2,-AVX512F"},
    {"OPENBLAS_CORETYPE": "SkylakeX", "NPY_DISABLE_CPU_FEATURES": "X86_V3,X86_V4", "JSIMD_FORCENONE": "1"},
    {"OPENBLAS_CORETYPE": "Zen", "NUMBA_CPU_NAME": "generic"},
]


@pytest.mark.process
def test_every_cpu_makes_the_same_frames():
    script = Path(__file__).with_name("fingerprint.py")
    plain = {k: v for k, v in os.environ.items() if k not in {name for cpu in CPUS for name in cpu}}
    runs = [
        subprocess.Popen([sys.executable, "-W", "ignore", script], env=plain | cpu, stdout=subprocess.PIPE)
        for cpu in CPUS
    ]
    first, *others = [json.loads(run.communicate(timeout=300)[0]) for run in runs]
    assert list(first) == ["cameras", "lidar", "labels", "made"]
    for cpu, other in zip(CPUS[1:], others, strict=True):
        assert other == first, cpu


def test_lidar_returns_lie_in_occupied_voxels_of_their_class(scenes):
    grid, hits, agree = get_grid("occ3d"), [], []
    for frame in (f for s in scenes for f in s.frames):
        pose = sweep_to_key_ego(frame, frame.lidar)
        index, inside = grid.to_index(frame.lidar.xyz @ pose[:3, :3].T + pose[:3, 3])
        labels = frame.labels.semantic[tuple(index[inside].T)]
        hits.append((labels != OCC3D.free_id).mean())
        # A voxel that several classes touch takes the rarer one, so not all agree.
        agree.append((labels == frame.lidar.classes[inside]).mean())
        seen = frame.labels.mask_lidar[tuple(index[inside].T)]
        assert seen.mean() > 0.9  # noise carries some returns across a voxel's border
    assert np.mean(hits) > 0.96
    assert np.mean(agree) > 0.93
    assert min(*hits, *agree) > 0.85  # least where a level road lies in the border of two layers of voxels


def test_cameras_see_what_the_labels_say(scenes):
    """Pixels of sky look through free voxels, whatever the camera's own ego pose."""
    grid, rays, blocked = get_grid("occ3d"), 0, 0
    frame = next(s for s in scenes if s.attributes["weather"] == "clear").frames[1]
    for name, camera in frame.cameras.items():
        image = simplejpeg.decode_jpeg(camera.jpeg)
        assert image.shape == (64, 176, 3), name
        # Clear sky is the only blue and bright thing; stay away from JPEG's edges.
        sky = (image[..., 2] > 150) & (image[..., 2] > image[..., 0].astype(int) + 40)
        sky[1:-1, 1:-1] &= sky[:-2, 1:-1] & sky[2:, 1:-1] & sky[1:-1, :-2] & sky[1:-1, 2:]
        v, u = np.nonzero(sky)
        pose = camera_to_key_ego(frame, camera)
        directions = np.linalg.inv(camera.intrinsics) @ np.stack([u, v, np.ones_like(u)])
        directions = pose[:3, :3] @ (directions / np.linalg.norm(directions, axis=0))
        for distance in np.arange(2, 40, 0.5):
            index, inside = grid.to_index((pose[:3, 3:] + distance * directions).T)
            hit = frame.labels.binary[tuple(index[inside].T)]
            rays, blocked = rays + len(hit), blocked + hit.sum()
    assert rays > 10_000
    assert blocked / rays < 0.03


def test_boxes_hold_points_of_their_class_and_move_with_their_track(scenes):
    shares, moved = [], 0
    for scene in scenes:
        first, second = scene.frames
        for frame in scene.frames:
            pose = sweep_to_key_ego(frame, frame.lidar)
            points = frame.lidar.xyz @ pose[:3, :3].T + pose[:3, 3]
            for (x, y, z, *size, yaw), name in zip(frame.boxes.boxes, frame.boxes.names):
                c, s = np.cos(yaw), np.sin(yaw)
                local = (points - (x, y, z)) @ np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]])
                inside = (np.abs(local) < np.array(size) / 2 - 0.05).all(1)
                if inside.sum() >= 5:
                    shares.append((frame.lidar.classes[inside] == OCC3D.id(name)).mean())
        shift = np.linalg.inv(second.ego_to_global) @ first.ego_to_global
        for i, track in enumerate(first.boxes.track_ids):
            if track in second.boxes.track_ids:
                j = second.boxes.track_ids.index(track)
                expected = first.boxes.boxes[i, :3] + 0.5 * np.array([*first.boxes.velocity[i], 0])
                expected = shift[:3, :3] @ expected + shift[:3, 3]
                # Roads bend and slope between two key-frames.
                assert np.abs(expected - second.boxes.boxes[j, :3]).max() < 1.0
                moved += np.hypot(*first.boxes.velocity[i]) > 1
    assert len(shares) > 20
    assert np.mean(np.array(shares) > 0.6) > 0.95  # traffic that overtakes a parked vehicle may touch it
    assert moved > 5


def test_each_camera_has_its_own_ego_pose(scenes):
    frame = max(scenes, key=lambda s: s.attributes["speed_mps"]).frames[1]
    poses = {c.ego_to_global.tobytes() for c in frame.cameras.values()}
    assert len(poses) == 6
    assert frame.ego_to_global.tobytes() not in poses


def test_other_rig_grid_and_taxonomy():
    source = open_source(
        "synthetic",
        {
            "scenes": 8,
            "frames": 1,
            "rig": "nuplan",
            "image_size": [32, 88],
            "grid": "openscene",
            "taxonomy": "openscene",
        },
    )
    seen: set[int] = set()
    for name in source.scene_names():
        frame = source.load(name).frames[0]
        assert len(frame.cameras) == 8
        assert frame.labels.semantic.shape == (200, 200, 16)
        seen |= set(np.unique(frame.labels.semantic).tolist())
    assert seen == set(range(9)), "all eight classes and free occur in eight scenes"


@pytest.mark.slow
def test_every_class_of_occ3d_occurs(scenes):
    source = open_source("synthetic", {"scenes": 40, "frames": 1, "image_size": [16, 44], "lidar": False})
    found = set()
    for name in source.scene_names():
        found |= set(np.unique(source.load(name).frames[0].labels.semantic).tolist())
    assert found == set(range(18))


def test_options_that_came_later_change_neither_scenes_nor_digests_of_sets_without_them():
    """Golden: made before there were ``cameras``, ``vfov``, ``mount_height`` and ``crowd``."""
    options = {"scenes": 1, "first": 3, "frames": 2, "image_size": (16, 44), "sweeps": 1, "grid": "tiny"}
    source = open_source("synthetic", options)
    assert repr(source) == (
        "Synthetic(scenes=1, seed=0, first=3, frames=2, rig='nuscenes', image_size=(16, 44), grid=VoxelGrid(name='tiny', "
        "lower=(-19.2, -19.2, -1.0), upper=(19.2, 19.2, 5.4), voxel=(0.8, 0.8, 0.8), frame='ego'), "
        "taxonomy=Taxonomy(name='occ3d'), beams=32, lidar=True, sweeps=1, weather='any', style='any')"
    )
    scene = source.load(source.scene_names()[0])
    bare = open_source("synthetic", {**options, "cameras": False}).load(scene.name)
    assert "cameras" not in scene.attributes
    assert bare.attributes.pop("cameras") is False
    for made in (scene, bare):
        found = hashlib.blake2b(digest_size=8)
        for frame in made.frames:
            arrays = [frame.lidar.xyz, frame.lidar.intensity, frame.lidar.classes, frame.sweeps[0].xyz]
            arrays += [frame.boxes.boxes, frame.labels.semantic, frame.labels.mask_lidar]
            found.update(b"".join(a.tobytes() for a in arrays))
            found.update(repr((frame.boxes.names, frame.boxes.track_ids)).encode())
        found.update(repr(sorted(made.attributes.items())).encode())
        assert found.hexdigest() == "c686da4941221721"
    assert all(not f.cameras and f.labels.mask_camera is None for f in bare.frames)


def test_lidar_of_another_sensor():
    options = {"scenes": 1, "frames": 1, "cameras": False, "beams": 7, "vfov": [-17.6, 2.4], "mount_height": 2.2}
    source = open_source("synthetic", {**options, "grid": "tiny"})
    scene = source.load(source.scene_names()[0])
    [frame] = scene.frames
    sweep, (x, y, z) = frame.lidar, frame.lidar.xyz.T.astype(np.float64)
    assert sweep.sensor_to_ego[2, 3] == 2.2
    assert sorted(set(sweep.ring.tolist())) == list(range(7))
    inclination = np.degrees(np.arctan2(z, np.hypot(x, y)))
    np.testing.assert_allclose(inclination, np.linspace(-17.6, 2.4, 7)[sweep.ring], atol=1e-4)
    assert scene.attributes["vfov"] == (-17.6, 2.4)
    assert scene.attributes["mount_height"] == 2.2
    assert "vfov=(-17.6, 2.4)" in repr(source)


def test_a_crowd_joins_or_leaves_and_nothing_else_changes():
    road_users = {"pedestrian", "bicycle", "motorcycle"}
    numbers, rest = {}, []
    for crowd in (0.0, 0.5, 1.0, 5.0):
        worlds = [build_world(0, n, 1.0, crowd=crowd) for n in range(2)]
        numbers[crowd] = [[a for a in w.actors if a.name in road_users and a.size] for w in worlds]
        others = [[(a.name, a.s, a.l, a.size) for a in w.actors if a.name not in road_users] for w in worlds]
        rest.append((others, [w.light.tolist() for w in worlds]))
    assert all(r == rest[0] for r in rest)
    counts = {crowd: sum(map(len, found)) for crowd, found in numbers.items()}
    assert counts[0.0] == 0 < counts[0.5] < counts[1.0]
    assert 3.5 * counts[1.0] < counts[5.0] < 6.5 * counts[1.0]
    for few, many in zip(numbers[1.0], numbers[5.0]):
        assert [(a.name, a.s, a.l) for a in many[: len(few)]] == [(a.name, a.s, a.l) for a in few]
        for i, new in enumerate(many[len(few) :], len(few)):
            assert not any(
                abs(new.s - a.s) < (new.size[0] + a.size[0]) / 2 and abs(new.l - a.l) < (new.size[1] + a.size[1]) / 2
                for a in many[:i]
            )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rigg": "nuplan"}, "did you mean 'rig'"),
        ({"beams": 1}, "beams is 1, must be 2 to 256"),
        ({"beams": 257}, "must be 2 to 256"),
        ({"vfov": [10, -30]}, "vfov is .*lowest and highest"),
        ({"vfov": [-30, 90]}, "-90 to 90 degrees"),
        ({"vfov": [-30]}, "vfov="),
        ({"mount_height": 0}, "mount_height is 0.0"),
        ({"mount_height": float("nan")}, "mount_height is nan"),
        ({"crowd": -1}, "crowd is -1.0"),
        ({"crowd": float("inf")}, "crowd is inf"),
        ({"sweeps": -1}, "sweeps is -1"),
        ({"lidar": False, "cameras": False}, "no sensor"),
        ({"scenes": 0}, "at least 1"),
        ({"grid": "semantickitti"}, "LiDAR frame"),
        ({"weather": "snow"}, "weather='snow'"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        open_source("synthetic", options)
