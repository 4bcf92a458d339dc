"""Tables of other people: whatever a field holds, a scene is as it should be or one line names table, row and field."""

import json

import numpy as np
import pytest

from occstream.sharding.contract import DROPPED, admit
from occstream.sharding.schema import Boxes, Frame, LidarSweep, Scene
from occstream.sharding.sources import open_source
from tests.sharding import toy_nuscenes

NAN = float("nan")
FAULTS = [
    None, "", "no-such-token", "../../../etc/passwd", 5, -1, 1.5, NAN, float("inf"), 10**30, True, [], {}, [NAN, 0, 0],
    [NAN, 0, 0, 1], [1, 2, 3], [0, 0, 0, 0], ["1", "2", "3"], [[1, 0, 0], [0, NAN, 0], [0, 0, 1]], [[[]]], [1, [2], 3],
    [1e300, 0, 0], [10**400, 0, 0],
]  # fmt: skip
MISSING = object()
# Fields that are read; what they hold must be right, and it must be there.
READ = {
    "scene": ("token", "name", "first_sample_token"),
    "sample": ("token", "timestamp", "scene_token", "next"),
    "sample_data": (
        "token", "sample_token", "ego_pose_token", "calibrated_sensor_token", "timestamp", "is_key_frame", "filename",
    ),
    "ego_pose": ("token", "translation", "rotation"),
    "calibrated_sensor": ("token", "sensor_token", "translation", "rotation"),
    "sensor": ("token", "channel"),
    "sample_annotation": (
        "token", "sample_token", "instance_token", "translation", "rotation", "size", "prev", "next",
    ),
    "instance": ("token", "category_token"),
    "category": ("token", "name"),
    "log": ("token",),
}  # fmt: skip


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    root = tmp_path_factory.mktemp("rows") / "toy"
    toy_nuscenes.write(root)
    return root


def outcome(root):
    """The error of reading a set, or None."""
    try:
        source = open_source("nuscenes", {"root": str(root), "sweeps": True})
        for name in source.scene_names():
            for frame in admit(source.load(name)).frames:
                assert np.isfinite(frame.boxes.boxes).all()
        return None
    except ValueError as error:
        return str(error)


@pytest.mark.parametrize("table", READ)
def test_a_fault_in_any_field_of_any_table_is_one_line_that_names_it(toy, table):
    path = toy / "v1.0-toy" / f"{table}.json"
    good = path.read_bytes()
    rows = json.loads(good)
    try:
        for field in rows[0]:
            for fault in [MISSING, *FAULTS]:
                changed = [dict(row) for row in rows]
                if fault is MISSING:
                    del changed[0][field]
                else:
                    changed[0][field] = fault
                path.write_text(json.dumps(changed))
                said = outcome(toy)
                if fault is MISSING and field in READ[table]:
                    assert said
                    assert f"{table}.json" in said
                    assert field in said
                assert not said or ("\n" not in said and len(said) < 600 and ("/" in said or "scene" in said)), said
        for fault in (None, 5, "row", [], {}, [[]]):
            path.write_text(json.dumps([*rows, fault]))
            assert f"{table}.json" in outcome(toy)
            path.write_text(json.dumps(fault))
            assert fault == [] or f"{table}.json" in outcome(toy)
        path.write_text(json.dumps([*rows, rows[0]]))
        assert f"{table}.json: has two rows with token {rows[0]['token']!r}" in outcome(toy)
    finally:
        path.write_bytes(good)
    assert outcome(toy) is None


def changed(toy, **tables):
    """What is said after ``change(rows)`` of some tables; the tables are restored."""
    before = {}
    try:
        for name, change in tables.items():
            path = toy / "v1.0-toy" / f"{name}.json"
            before[path] = path.read_bytes()
            rows = json.loads(before[path])
            change(rows)
            path.write_text(json.dumps(rows))
        return outcome(toy)
    finally:
        for path, data in before.items():
            path.write_bytes(data)


def test_what_is_not_finite_or_not_there_names_table_row_and_field(toy):
    said = changed(toy, sample_annotation=lambda rows: rows[0].update(translation=[NAN, 0, 0]))
    assert "sample_annotation.json: row as0-0: translation is not finite" in said
    said = changed(toy, ego_pose=lambda rows: rows.pop(0))
    assert "sample_data.json: row cs0-0: ego_pose_token is 'ecs0-0', which ego_pose.json does not have" in said
    said = changed(toy, instance=lambda rows: rows.pop(0))
    assert "sample_annotation.json: row as0-0: instance_token is 'i0', which instance.json does not have" in said


def test_links_in_a_circle_end(toy):
    said = changed(toy, sample=lambda rows: rows[-1].update(next=rows[0]["token"]))
    assert "sample.json: row s0-1: next leads back to 's0-0'" in said
    said = changed(toy, sample=lambda rows: rows[0].update(next=""))
    assert "sample.json: row s0-1: scene_token is 'scene0', but no 'next'" in said

    def circle(rows):
        between = next(row for row in rows if not row["is_key_frame"])
        between["prev"] = between["token"]

    assert changed(toy, sample_data=circle) is None


def test_a_scene_named_by_a_path_is_not_packed(toy):
    said = changed(toy, scene=lambda rows: rows[0].update(name="../../pwned"))
    assert "scene name '../../pwned'" in said
    said = changed(toy, sample_data=lambda rows: rows[0].update(filename="../../../etc/passwd"))
    assert "sample_data.json: row cs0-0: filename" in said
    assert "must be below" in said


def test_points_with_four_columns_are_named_as_that(tmp_path):
    toy_nuscenes.write(tmp_path / "toy")
    points = np.zeros((200, 4), np.float32)
    points[:, 0], points[:, 3] = np.linspace(3, 30, 200), np.arange(200) / 7
    for path in (tmp_path / "toy/samples/LIDAR_TOP").iterdir():
        path.write_bytes(points.tobytes())
    said = outcome(tmp_path / "toy")
    assert "samples/LIDAR_TOP/ls0-0.bin" in said
    assert "looks like 4 columns" in said
    next((tmp_path / "toy/samples/LIDAR_TOP").glob("ls0-0*")).write_bytes(points[:199].tobytes())
    assert "looks like 4 columns" in outcome(tmp_path / "toy")


def sweep(xyz, **arrays):
    return LidarSweep(np.array(xyz, np.float32), np.eye(4), np.eye(4), 0, **arrays)


def scene(**parts):
    return Scene("s", [Frame("s", 0, "t", 0, np.eye(4), **parts)])


def test_returns_that_are_not_finite_are_dropped_with_all_that_belongs_to_them_and_counted():
    lidar = sweep([[1, 2, 3], [NAN, 0, 0], [4, 5, 6]], intensity=np.array([1, NAN, 3], np.float32), ring=np.arange(3))
    found = admit(scene(lidar=lidar, sweeps=[sweep([[0, 0, np.inf], [1, 1, 1]])]))
    assert found.attributes == {DROPPED: 2}
    [frame] = found.frames
    assert frame.lidar.xyz.tolist() == [[1, 2, 3], [4, 5, 6]]
    assert frame.lidar.ring.tolist() == [0, 2]
    assert frame.lidar.intensity.tolist() == [1, 3]
    assert len(frame.sweeps[0].xyz) == 1
    whole = scene(lidar=sweep([[1, 2, 3]]))
    assert admit(whole) is whole


BOX = [0, 0, 0, 4, 2, 1, 0]


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"lidar": sweep([[NAN, 0, 0]])}, "LiDAR: none of its 1 returns"),
        ({"lidar": sweep([[0, 0, 0]], intensity=np.array([NAN]))}, "intensity of a return is not finite"),
        ({"lidar": sweep([[0, 0, 0]], classes=np.zeros(2, np.uint8))}, r"classes has shape \(2,\) for 1 points"),
        ({"lidar": sweep([[0, 0]])}, "expected .N, 3."),
        ({"boxes": Boxes(np.array([[NAN, *BOX[1:]]]), ["car"], ["a"])}, "box 0 .car. is not finite"),
        ({"boxes": Boxes(np.array([BOX]), ["car"], [])}, "0 tracks"),
        ({"boxes": Boxes(np.array([BOX]), ["car"], ["a"], np.array([[np.inf, 0]]))}, "velocities"),
        (
            {"sweeps": [LidarSweep(np.zeros((1, 3)), np.eye(4), np.eye(4) * NAN, 7)]},
            "sweep 7: ego_to_global is not a rigid",
        ),
    ],
)
def test_what_no_source_may_bring_is_refused(parts, message):
    with pytest.raises(ValueError, match=f"frame s-0000.*{message}"):
        admit(scene(**parts))


def test_frames_must_follow_each_other_in_time():
    frames = [Frame("s", i, "t", 5, np.eye(4)) for i in range(2)]
    with pytest.raises(ValueError, match="frame s-0001: time stamp 5 is not after"):
        admit(Scene("s", frames))
