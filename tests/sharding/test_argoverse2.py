"""Argoverse 2: one sweep of two LiDARs, boxes and their velocities, cameras at their own time, the ego frame on the road."""

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import feather

from occstream.sharding.feather import TEXT, read_feather
from occstream.sharding.grid import get_grid
from occstream.sharding.labelconfig import LabelConfig
from occstream.sharding.labels import label_scene
from occstream.sharding.prepare import Images
from occstream.sharding.schema import OCC3D
from occstream.sharding.sources import open_source
from occstream.sharding.sources.argoverse2 import TO_OCC3D
from tests.sharding import layouts
from tests.sharding.test_kitti_object import occupied
from tests.sharding.test_sources import near_the_ground


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("argoverse")
    layouts.argoverse2(folder)
    return folder


@pytest.fixture(scope="module")
def scene(root):
    return open_source("argoverse2", {"root": str(root)}).load("log-a")


def raw(folder, name):
    return feather.read_table(folder / f"{name}.feather").to_pandas()


def ours(frame):
    """Points in each box of a frame."""
    points = frame.lidar.xyz.astype(float) + frame.lidar.sensor_to_ego[:3, 3]
    counts = []
    for x, y, z, length, width, height, yaw in frame.boxes.boxes.astype(float):
        turn = np.array([[np.cos(yaw), -np.sin(yaw), 0], [np.sin(yaw), np.cos(yaw), 0], [0, 0, 1]])
        local = (points - (x, y, z)) @ turn
        counts.append(int((np.abs(local) <= np.array([length, width, height]) / 2).all(1).sum()))
    return counts


def test_every_fifth_sweep_is_a_key_frame(root, scene):
    source = open_source("argoverse2", {"root": str(root)})
    assert source.scene_names() == ["log-a", "log-b"]
    start = layouts.AV2_START // 1000
    assert [f.timestamp for f in scene.frames] == [start, start + 500_000]
    assert [s.timestamp - start for s in scene.frames[1].sweeps] == [100_000, 200_000, 300_000, 400_000]
    assert scene.frames[0].sweeps == []
    assert scene.attributes["city"] == "PIT"
    all_keys = open_source("argoverse2", {"root": str(root / "sensor"), "stride": 1, "sweeps": False, "split": "val"})
    assert all_keys.scene_names() == ["log-a"]
    frames = all_keys.load("log-a").frames
    assert [len(f.sweeps) for f in frames] == [0] * 6
    assert open_source("argoverse2", {"root": str(root)}).load("log-b").frames[0].boxes is None


def test_points_are_of_both_lidars_from_the_middle_between_them(root, scene):
    table = raw(root / "sensor/val/log-a/sensors/lidar", layouts.AV2_START + 500_000_000)
    sweep = scene.frames[1].lidar
    np.testing.assert_allclose(sweep.sensor_to_ego[:3, 3], [1.35, 0.005, 1.58 + 0.33])
    np.testing.assert_allclose(
        sweep.xyz + sweep.sensor_to_ego[:3, 3], table[["x", "y", "z"]].to_numpy(float) + [0, 0, 0.33], atol=1e-6
    )
    np.testing.assert_array_equal(sweep.ring, table["laser_number"])
    np.testing.assert_array_equal(sweep.intensity, table["intensity"])
    np.testing.assert_allclose(sweep.time_lag, -table["offset_ns"] * 1e-9, atol=1e-6)  # measured later: negative
    np.testing.assert_allclose(sweep.lidars, [[0, 0, -0.005, 0.06], [32, 0, 0.005, -0.06]], atol=1e-12)
    np.testing.assert_array_equal(sweep.lidar_of_points(), table["laser_number"] // 32)


def test_boxes_hold_the_points_that_the_data_set_counts(root, scene):
    table = raw(root / "sensor/val/log-a", "annotations")
    for frame in scene.frames:
        rows = table[table["timestamp_ns"] == frame.timestamp * 1000]
        assert frame.boxes.track_ids == rows["track_uuid"].tolist() == list(layouts.AV2_CARS)
        assert frame.boxes.names == ["car", "others"]
        assert ours(frame) == rows["num_interior_pts"].tolist()
        time = (frame.timestamp * 1000 - layouts.AV2_START) * 1e-9
        for box, (_, place, velocity, heading, size) in zip(frame.boxes.boxes, layouts.AV2_CARS.values()):
            center = frame.ego_to_global @ [*box[:3], 1]
            np.testing.assert_allclose(center[:3], np.array(place) + time * np.array(velocity), atol=1e-3)
            np.testing.assert_allclose(box[3:6], size, rtol=1e-6)
            ego = np.arctan2(frame.ego_to_global[1, 0], frame.ego_to_global[0, 0])
            np.testing.assert_allclose(box[6], heading - ego, atol=1e-5)
        moved = frame.boxes.velocity @ frame.ego_to_global[:2, :2].T
        np.testing.assert_allclose(moved, [v[:2] for _, _, v, _, _ in layouts.AV2_CARS.values()], atol=1e-3)


def test_a_track_that_is_seen_once_has_no_velocity(tmp_path):
    layouts.argoverse2(tmp_path, (("val", "log-a"),))
    path = tmp_path / "sensor/val/log-a/annotations.feather"
    table = feather.read_table(path)
    feather.write_feather(table.slice(0, 1), path)
    frames = open_source("argoverse2", {"root": str(tmp_path)}).load("log-a").frames
    assert np.isnan(frames[0].boxes.velocity).all()
    assert frames[1].boxes.boxes.shape == (0, 7)


def test_cameras_are_the_nearest_in_time_with_poses_of_their_own(root, scene):
    for i, frame in enumerate(scene.frames):
        # Those of the side end after 112 ms: the second key-frame has none within 50 ms.
        assert list(frame.cameras) == ["ring_front_center", *(["ring_side_left"] if i == 0 else [])]
        camera = frame.cameras["ring_front_center"]
        assert camera.timestamp == frame.timestamp + 12_000
        time = (camera.timestamp * 1000 - layouts.AV2_START) * 1e-9
        want = layouts.av2_ego(time)
        want[:3, 3] -= [0, 0, 0.33]
        np.testing.assert_allclose(camera.ego_to_global, want, atol=1e-4)  # between two poses, 5 ms apart
        np.testing.assert_allclose(camera.sensor_to_ego @ [0, 0, 1, 1], [2.5, 0.1, 1.73, 1], atol=1e-9)
        assert (camera.width, camera.height, camera.lens) == (48, 64, None), "images are pinholes already"
        assert camera.intrinsics.tolist() == [[50, 0, 30.5], [0, 51, 24.5], [0, 0, 1]]
    np.testing.assert_allclose(scene.frames[0].ego_to_global[:3, 3], [5000, 2400, 60 - 0.33])


def test_the_portrait_image_can_be_cut_to_the_others_format(root, scene):
    options = {"root": str(root), "cameras": ["ring_front_center"], "front_center": "crop", "split": "val"}
    [camera] = open_source("argoverse2", options).load("log-a").frames[0].cameras.values()
    assert (camera.width, camera.height) == (48, 36)
    assert camera.intrinsics[1, 2] == 24.5 - 14
    whole = Images()(scene.frames[0]).cameras["ring_front_center"]
    assert (whole.width, whole.height) == (48, 64)
    np.testing.assert_array_equal(
        camera.image, layouts.simplejpeg.decode_jpeg(whole.jpeg)[14:50], "the middle of the image"
    )
    assert open_source("argoverse2", {"root": str(root), "cameras": []}).load("log-a").frames[0].cameras == {}


def test_every_category_has_a_class():
    assert len(TO_OCC3D) == 30
    assert set(TO_OCC3D.values()) <= set(OCC3D.classes)


def test_labels_are_made_of_its_sweeps(scene):
    """Of the first key-frame alone, without the track's points of others: voxels that hold a point."""
    grid, settings = get_grid("tiny"), LabelConfig(level=False)
    alone = label_scene(replace(scene, frames=scene.frames[:1]), grid, OCC3D, settings).frames[0].labels
    sweep = scene.frames[0].lidar
    np.testing.assert_array_equal(alone.binary, occupied(sweep.xyz.astype(float) + sweep.sensor_to_ego[:3, 3], grid))
    labels = label_scene(scene, grid, OCC3D, settings).frames[0].labels
    assert labels.semantic is None
    assert labels.binary.sum() > alone.binary.sum(), "later sweeps see more"
    assert labels.known().sum() > labels.binary.sum()


SWEEP = f"sensors/lidar/{layouts.AV2_START}.feather"
POSES, LENSES = "city_SE3_egovehicle.feather", "calibration/intrinsics.feather"


def damage(path, change):
    table = feather.read_table(path).to_pydict()
    feather.write_feather(pa.table(change(table)), path)


@pytest.mark.parametrize(
    ("file", "change", "said"),
    [
        (
            "annotations.feather",
            lambda t: t | {"category": ["TANK", *t["category"][1:]]},
            "row 0 has the unknown category 'TANK'",
        ),
        (
            "annotations.feather",
            lambda t: t | {"width_m": [*t["width_m"][:-1], 0.0]},
            r"row 11 has length, width and height \[",
        ),
        ("annotations.feather", lambda t: t | {"qw": [None, *t["qw"][1:]]}, "row 0 has no qw"),
        (
            "annotations.feather",
            lambda t: t | {"tx_m": [float("nan"), *t["tx_m"][1:]]},
            "column tx_m is not finite in row 0",
        ),
        ("annotations.feather", lambda t: t | {"track_uuid": list(range(12))}, "column track_uuid is int64, not text"),
        ("annotations.feather", None, r"is missing \(its boxes; boxes=false does without\)"),
        (POSES, lambda t: {"timestamp_ns": t["timestamp_ns"]}, "has no column 'qw', only timestamp_ns"),
        (POSES, lambda t: {k: v[::-1] for k, v in t.items()}, "increasing time stamps"),
        (POSES, lambda t: {k: v[:3] for k, v in t.items()}, "no pose at .* µs, they reach from"),
        (POSES, lambda t: t | {"qw": [0.0] * len(t["qw"]), "qz": [0.0] * len(t["qz"])}, "row 0: rotation"),
        ("calibration/egovehicle_SE3_sensor.feather", lambda t: {k: v[:4] for k, v in t.items()}, "has no down_lidar"),
        (LENSES, lambda t: {k: v[1:] for k, v in t.items()}, "no calibration of camera ring_front_center"),
        (LENSES, lambda t: t | {"height_px": [99] * 3}, "has 48x64 pixels, its calibration 48x99"),
        (LENSES, lambda t: t | {"fx_px": [0.0] * 3}, "row 0: focal lengths of ring_front_center are 0.0"),
        (SWEEP, b"ARROW1 nonsense", "not readable as Feather"),
        (SWEEP, lambda t: t | {"laser_number": [300] * len(t["x"])}, "numbers beyond uint8"),
        (SWEEP, lambda t: t | {"intensity": [0.5] * len(t["x"])}, "intensity is double, not uint8"),
    ],
)
def test_damage_is_named_in_one_line(tmp_path, file, change, said):
    layouts.argoverse2(tmp_path, (("val", "log-a"),))
    path = tmp_path / "sensor/val/log-a" / file
    if change is None:
        path.unlink()
    elif isinstance(change, bytes):
        path.write_bytes(change)
    else:
        damage(path, change)
    with pytest.raises(ValueError, match=said) as error:
        open_source("argoverse2", {"root": str(tmp_path)}).load("log-a")
    assert str(path.name) in str(error.value) or "calibration" in str(error.value) or "log-a" in str(error.value)
    assert "\n" not in str(error.value)


def test_what_is_asked_for_and_not_there_is_named(root, tmp_path):
    for options, said in (
        ({"scenes": ["log-c"]}, "has no scene 'log-c'; did you mean"),
        ({"split": "train"}, "train: no such folder; give the one that holds one folder for each log"),
        ({"stride": 0}, "stride is 0"),
        ({"root": str(tmp_path)}, "has no logs"),
    ):
        with pytest.raises(ValueError, match=said):
            open_source("argoverse2", {"root": str(root), **options})
    with pytest.raises(ValueError, match="has no scene 'ring_up'"):
        open_source("argoverse2", {"root": str(root), "cameras": ["ring_up"]}).load("log-a")


def test_columns_come_as_they_are_asked_for(tmp_path):
    path = tmp_path / "t.feather"
    layouts.av2_table(path, a=np.array([1, 2], np.int64), b=np.array([0.5, 2], np.float16), c=["x", "y"])
    found = read_feather(path, {"a": "uint8", "b": "float32", "c": TEXT})
    assert {name: values.dtype.kind + str(values.dtype.itemsize) for name, values in found.items() if name != "c"} == {
        "a": "u1",
        "b": "f4",
    }
    assert found["c"].tolist() == ["x", "y"]
    assert read_feather(path, {"a": "float64"})["a"].tolist() == [1.0, 2.0]


def test_a_real_log(shared_data):
    folder = shared_data / "argoverse2"
    if not folder.is_dir():
        pytest.skip("no Argoverse 2 log")
    source = open_source("argoverse2", {"root": str(folder), "stride": 1})
    [name] = source.scene_names()
    scene = source.load(name)
    table = raw(folder / "sensor" / "val" / name, "annotations")
    assert len(scene.frames) == 2
    for frame in scene.frames:
        rows = table[table["timestamp_ns"] // 1000 == frame.timestamp]
        assert ours(frame) == rows["num_interior_pts"].tolist()
        assert len(frame.boxes.names) == 81
        ground, share = near_the_ground(frame)
        assert abs(np.median(ground)) < 0.05
        assert share > 0.3
        # Each laser keeps its inclination, seen from its own LiDAR.
        for number, (_, *origin) in enumerate(frame.lidar.lidars):
            own = frame.lidar.ring // 32 == number
            local = frame.lidar.xyz[own].astype(float) - origin
            up = np.degrees(np.arctan2(local[:, 2], np.hypot(local[:, 0], local[:, 1])))
            far = np.hypot(local[:, 0], local[:, 1]) > 5
            lasers = frame.lidar.ring[own]
            spread = [up[far & (lasers == n)].std() for n in np.unique(lasers) if (far & (lasers == n)).sum() > 50]
            assert np.median(spread) < 0.15
    assert 0 < np.nanmax(np.hypot(*scene.frames[0].boxes.velocity.T)) < 25
