"""The nuScenes layout: a folder written here, and the real samples where they are present."""

import json

import numpy as np
import pytest

from occstream.sharding.codec import CorruptSample, decode, encode
from occstream.sharding.grid import get_grid
from occstream.sharding.labels import Labeler
from occstream.sharding.schema import IGNORE, OCC3D, camera_to_key_ego, iter_scenes, sweep_to_key_ego
from occstream.sharding.sources import open_source
from tests.sharding import layouts, toy_nuscenes


@pytest.fixture
def toy(tmp_path):
    toy_nuscenes.write(tmp_path / "toy", scenes=2)
    return tmp_path / "toy"


def test_tables_become_frames_with_every_sensor_at_its_own_time(toy):
    source = open_source("nuscenes", {"root": str(toy), "sweeps": True})
    assert source.scene_names() == ["scene-0000", "scene-0001"]
    first, second = source.load("scene-0001").frames
    assert [s.timestamp for s in second.sweeps] == [second.timestamp - 250_000]
    assert first.sweeps == []
    assert second.boxes.names == ["car"]
    np.testing.assert_allclose(second.boxes.boxes[0], [10, 0, 0.8, 4.2, 1.8, 1.6, 0], atol=1e-5)
    np.testing.assert_allclose(second.boxes.velocity[0], [4, 0])
    camera = second.cameras["CAM_FRONT"]
    # The vehicle was 0.1 m further back when the picture was taken; the camera sits at x = 1 m.
    np.testing.assert_allclose(camera_to_key_ego(second, camera)[:3, 3], [0.9, 0, 1.5])
    np.testing.assert_allclose(sweep_to_key_ego(second, second.sweeps[0])[:3, 3], [-1, 0, 1.8])
    assert source.load("scene-0000").attributes["location"] == "toy-town"


def test_scenes_and_sweeps_can_be_chosen(toy):
    source = open_source("nuscenes", {"root": str(toy), "scenes": ["scene-0001"]})
    assert source.scene_names() == ["scene-0001"]
    assert source.load("scene-0001").frames[1].sweeps == []


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda r: (r / "v1.0-toy/ego_pose.json").unlink(), r"ego_pose\.json: table is missing"),
        (lambda r: (r / "v1.0-toy/sample.json").write_text("[{"), r"sample\.json: not readable as JSON"),
        (lambda r: (r / "v1.0-other").mkdir(), "choose one with version="),
        (lambda r: next((r / "samples/LIDAR_TOP").iterdir()).write_bytes(b"123"), "3 bytes are not a multiple"),
        (
            lambda r: [p.unlink() for p in (r / "samples/CAM_FRONT").iterdir()],
            "is missing .the tables name it.; complete the download",
        ),
    ],
)
def test_damage_is_named(toy, damage, message):
    damage(toy)
    with pytest.raises(ValueError, match=message):
        list(iter_scenes(open_source("nuscenes", {"root": str(toy)})))


def test_unknown_scene_names_the_nearest(toy):
    with pytest.raises(ValueError, match="did you mean 'scene-0001'"):
        open_source("nuscenes", {"root": str(toy), "scenes": ["scene-001"]})


def test_lidarseg_needs_the_indexed_categories(toy):
    (toy / "v1.0-toy/lidarseg.json").write_text(json.dumps([{"sample_data_token": "ls0-0", "filename": "x.bin"}]))
    with pytest.raises(ValueError, match="no 'index' values"):
        open_source("nuscenes", {"root": str(toy)})


def with_panoptic(root, labels):
    """Panoptic labels of the first scene's first sweep, and the categories that they need."""
    tables = root / "v1.0-toy"
    categories = json.loads((tables / "category.json").read_text())
    (tables / "category.json").write_text(json.dumps([c | {"index": i + 17} for i, c in enumerate(categories)]))
    np.savez_compressed(root / "x_panoptic.npz", data=labels)
    row = {"sample_data_token": "ls0-0", "filename": "x_panoptic.npz"}
    (tables / "panoptic.json").write_text(json.dumps([row]))
    return open_source("nuscenes", {"root": str(root), "scenes": ["scene-0000"]})


def test_panoptic_files_give_classes_and_instances_and_sweeps_their_tokens(toy):
    labels = np.zeros(200, np.uint16)
    labels[:3] = 17_005, 17_042, 18_001  # category 17 is a car, 18 a bicycle rack
    source = with_panoptic(toy, labels)
    assert source.findings.points == "panoptic"
    first, second = source.load("scene-0000").frames
    assert first.lidar.classes[:4].tolist() == [OCC3D.id("car"), OCC3D.id("car"), IGNORE, IGNORE]
    assert first.lidar.instances[:4].tolist() == [5, 42, 1, 0]
    assert first.lidar.instances.dtype == np.uint16
    assert (first.lidar.token, second.lidar.token) == ("ls0-0", "ls0-1")
    assert second.lidar.instances is None
    packed = decode([dict((n.split(".", 1)[1], d) for n, d in encode(first, "lidar"))]).lidar
    np.testing.assert_array_equal(packed.instances, first.lidar.instances)
    assert packed.token == "ls0-0"


@pytest.mark.parametrize("labels", [np.zeros(199, np.uint16), np.zeros(200, np.int32)])
def test_panoptic_files_of_other_points_are_named(toy, labels):
    source = with_panoptic(toy, labels)
    with pytest.raises(ValueError, match=r"x_panoptic\.npz: holds .* expected data, uint16 \(200,\)"):
        source.load("scene-0000")


def test_sweeps_of_earlier_shards_have_neither_token_nor_instances(toy):
    members = dict(encode(open_source("nuscenes", {"root": str(toy)}).load("scene-0000").frames[0], "lidar"))
    members = {name.split(".", 1)[1]: data for name, data in members.items()}
    head = json.loads(members["frame.json"])
    del head["lidar"]["token"]
    found = decode([members | {"frame.json": json.dumps(head).encode()}]).lidar
    assert found.token is None
    assert found.instances is None
    head["lidar"]["token"] = 5
    with pytest.raises(CorruptSample, match="token '5' of a sweep is not a text"):
        decode([members | {"frame.json": json.dumps(head).encode()}])


@pytest.fixture(scope="module")
def real(shared_data):
    return open_source("nuscenes", {"root": str(shared_data / "nuscenes")})


def test_real_points_in_boxes_carry_the_boxes_class(real):
    hits = points_in = 0
    for frame in real.load("scene-9001").frames:
        pose = sweep_to_key_ego(frame, frame.lidar)
        points = frame.lidar.xyz @ pose[:3, :3].T + pose[:3, 3]
        for (x, y, z, *size, yaw), name in zip(frame.boxes.boxes, frame.boxes.names):
            if name not in OCC3D.classes:
                continue
            c, s = np.cos(yaw), np.sin(yaw)
            local = (points - (x, y, z)) @ np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]])
            inside = (np.abs(local) < np.array(size) / 2).all(1) & (frame.lidar.classes != IGNORE)
            hits += (frame.lidar.classes[inside] == OCC3D.id(name)).sum()
            points_in += inside.sum()
    assert points_in > 5000
    assert hits / points_in > 0.9


def test_real_classes_are_those_of_the_reference_mapping(real, shared_data):
    for frame in real.load("scene-9001").frames:
        [row] = [s["lidar"] for s in real.records["scene-9001"]["samples"] if s["token"] == frame.token]
        token = row["lidarseg"].split("/")[-1].removesuffix("_lidarseg.bin")
        truth = np.fromfile(shared_data / "nuscenes" / "lidarseg16" / f"{token}_lidarseg16.bin", np.uint8)
        np.testing.assert_array_equal(frame.lidar.classes, np.where(truth == 0, IGNORE, truth))


def test_real_camera_frame_gives_labels_that_its_cameras_see(real):
    frame = Labeler(get_grid("occ3d"), "occ3d")(real.load("scene-0061")).frames[0]
    labels = frame.labels
    assert len(frame.cameras) == 6
    assert len({c.timestamp for c in frame.cameras.values()}) == 6
    assert labels.semantic is None
    assert 4_000 < labels.binary.sum() < 10_000
    assert 0.5 < labels.mask_camera[labels.binary].mean() < 1


def test_real_scene_labels_predict_the_sweep_that_was_left_out(real):
    """Labels from seven key-frames hold the static returns of the eighth, and are denser than any one of them."""
    scene = real.load("scene-9001")
    grid, labeler = get_grid("occ3d"), Labeler(get_grid("occ3d"), "occ3d")
    left_out = scene.frames[4]
    scene.frames = [f for f in scene.frames if f is not left_out]
    labels = labeler(scene).frames[3].labels
    before = scene.frames[3]
    to_before = np.linalg.inv(before.ego_to_global) @ left_out.ego_to_global @ left_out.lidar.sensor_to_ego
    static = ~np.isin(left_out.lidar.classes, [OCC3D.id(c) for c in OCC3D.things] + [IGNORE])
    points = left_out.lidar.xyz[static] @ to_before[:3, :3].T + to_before[:3, 3]
    index, inside = grid.to_index(points)
    near = np.linalg.norm(points[inside][:, :2], axis=1) < 20
    occupied = labels.binary[tuple(index[inside][near].T)]
    classes = labels.semantic[tuple(index[inside][near].T)]
    alone = labeler(type(scene)("alone", [before])).frames[0].labels
    assert occupied.mean() > 0.65
    assert occupied.mean() > alone.binary[tuple(index[inside][near].T)].mean() + 0.1
    same = classes == left_out.lidar.classes[static][inside][near]
    assert same[occupied & (classes != IGNORE)].mean() > 0.85


@pytest.mark.parametrize("coding", ["binary", "binary_compressed"])
def test_further_lidars_are_sweeps_of_the_key_frame_also_from_pcd_files(toy, coding):
    """As in folders of trucks, with several LiDARs around the vehicle whose turns are PCD files."""
    before = open_source("nuscenes", {"root": str(toy)}).load("scene-0000")
    tables = {path.stem: json.loads(path.read_text()) for path in (toy / "v1.0-toy").glob("*.json")}
    [top] = [row for row in tables["sensor"] if row["channel"] == "LIDAR_TOP"]
    tops = [row for row in tables["calibrated_sensor"] if row["sensor_token"] == top["token"]]
    points = np.random.default_rng(0).integers(-40, 40, (30, 4)) / 2
    for side, shift in (("LEFT", 1.0), ("RIGHT", -1.0)):
        tables["sensor"].append({**top, "token": f"s{side}", "channel": f"LIDAR_{side}"})
        place = [0.0, shift, 1.0]
        tables["calibrated_sensor"].append(
            {**tops[0], "token": f"c{side}", "sensor_token": f"s{side}", "translation": place}
        )
        keys = [r for r in tables["sample_data"] if r["is_key_frame"] and "LIDAR_TOP" in r["filename"]]
        for row in keys:
            name = f"samples/LIDAR_{side}/{row['token']}.pcd"
            (toy / name).parent.mkdir(exist_ok=True)
            (toy / name).write_bytes(layouts.pcd(points + shift, coding))
            new = {"token": f"{side}-{row['token']}", "calibrated_sensor_token": f"c{side}", "filename": name}
            tables["sample_data"].append({**row, **new, "prev": "", "next": ""})
    for name in ("sensor", "calibrated_sensor", "sample_data"):
        (toy / "v1.0-toy" / f"{name}.json").write_text(json.dumps(tables[name]))
    source = open_source("nuscenes", {"root": str(toy), "further": ["LIDAR_*"]})
    frames = source.load("scene-0000").frames
    for frame, plain in zip(frames, before.frames, strict=True):
        np.testing.assert_array_equal(frame.lidar.xyz, plain.lidar.xyz)
        left, right = frame.sweeps
        np.testing.assert_array_equal(left.xyz, (points[:, :3] + 1).astype(np.float32))
        np.testing.assert_array_equal(right.intensity, (points[:, 3] - 1).astype(np.float32))
        np.testing.assert_allclose([s.sensor_to_ego[1, 3] for s in (left, right)], [1, -1])
        assert left.timestamp == frame.timestamp
        assert left.ring.tolist() == [i % 40 for i in range(30)]
    plain = open_source("nuscenes", {"root": str(toy)})
    assert plain.load("scene-0000").frames[0].sweeps == []
    assert repr(source) != repr(plain)
    assert "further" not in repr(plain)
    with pytest.raises(
        ValueError, match=r"no further LiDAR is named like RADAR_\*; its LiDARs are LIDAR_LEFT, LIDAR_RIGHT"
    ):
        open_source("nuscenes", {"root": str(toy), "further": ["RADAR_*"]})
