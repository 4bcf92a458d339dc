"""KITTI object: boxes of the camera's frame in the ego frame, points of the image alone, rows of the scan."""

import numpy as np
import pytest

from occstream.sharding.grid import get_grid
from occstream.sharding.labelconfig import LabelConfig
from occstream.sharding.labels import label_scene
from occstream.sharding.schema import OCC3D
from occstream.sharding.sources import open_source
from tests.sharding import layouts
from tests.sharding.test_sources import near_the_ground


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kitti")
    layouts.kitti_object(folder)
    return str(folder)


def matrix(lines, key, rows):
    return np.array(lines[key].split(), float).reshape(rows, -1)


def counted(folder, name):
    """By the data set's own files alone, in the rectified camera's frame: points in each box, and whether a point is in the
    image, by the projection P2 R0_rect Tr_velo_to_cam of the data set's paper."""
    lines = dict(
        line.split(":") for line in (folder / "calib" / f"{name}.txt").read_text().splitlines() if line.strip()
    )
    points = np.fromfile(folder / "velodyne" / f"{name}.bin", np.float32).reshape(-1, 4)[:, :3].astype(float)
    rect = matrix(lines, "R0_rect", 3) @ matrix(lines, "Tr_velo_to_cam", 3) @ np.c_[points, np.ones(len(points))].T
    u, v, w = matrix(lines, "P2", 3) @ np.r_[rect, np.ones((1, len(points)))]
    width, height = layouts.IMAGE.shape[1::-1] if len(points) < 10_000 else (1224, 370)
    inside = {}
    for number, line in enumerate((folder / "label_2" / f"{name}.txt").read_text().splitlines()):
        words = line.split()
        if words[0] == "DontCare":
            continue
        h, wide, long, x, y, z, turn = map(float, words[8:15])
        dx, dz = rect[0] - x, rect[2] - z
        along, across = np.cos(turn) * dx - np.sin(turn) * dz, np.sin(turn) * dx + np.cos(turn) * dz
        below = y - rect[1]
        inside[number] = (abs(along) <= long / 2) & (abs(across) <= wide / 2) & (below >= 0) & (below <= h)
    seen = (w > 0) & (u / w >= -0.5) & (u / w < width - 0.5) & (v / w >= -0.5) & (v / w < height - 0.5)
    return inside, seen


def ours(frame):
    """(boxes, points) bool of a frame in its ego frame."""
    pose = frame.lidar.sensor_to_ego
    points = frame.lidar.xyz.astype(float) @ pose[:3, :3].T + pose[:3, 3]
    found = []
    for x, y, z, length, width, height, yaw in frame.boxes.boxes.astype(float):
        local = (points - (x, y, z)) @ np.array(
            [[np.cos(yaw), -np.sin(yaw), 0], [np.sin(yaw), np.cos(yaw), 0], [0, 0, 1]]
        )
        found.append((np.abs(local) <= np.array([length, width, height]) / 2).all(1))
    return np.array(found)


def test_boxes_hold_the_points_that_the_labels_say(root, tmp_path_factory):
    folder = tmp_path_factory.getbasetemp() / root / "training"
    whole = open_source("kitti_object", {"root": root, "crop": False}).load("000003").frames[0]
    assert whole.boxes.names == ["car", "bicycle"]
    assert whole.boxes.track_ids == ["000003-0", "000003-1"]
    for row, (center, size, turn) in zip(whole.boxes.boxes, layouts.KITTI_BOXES.values()):
        np.testing.assert_allclose(row[:3], np.array(center) + [0.76, 0, 1.73], atol=1e-5)
        np.testing.assert_allclose(row[3:6], size, rtol=1e-6)
        np.testing.assert_allclose(row[6], np.remainder(-turn - np.pi / 2 + np.pi, 2 * np.pi) - np.pi, atol=1e-5)
    inside, seen = counted(folder, "000003")
    counts = ours(whole).sum(1)
    assert counts.tolist() == [int(mask.sum()) for mask in inside.values()]
    assert counts.min() > 20
    frame = open_source("kitti_object", {"root": root}).load("000003").frames[0]
    np.testing.assert_array_equal(frame.lidar.xyz, whole.lidar.xyz[seen])
    np.testing.assert_array_equal(frame.lidar.ring, whole.lidar.ring[seen])
    assert 0 < seen.sum() < len(seen) / 4
    assert ours(frame).sum(1).tolist() == [int((mask & seen).sum()) for mask in inside.values()]


def test_rows_are_those_of_the_scan_also_where_points_are_cut_off(root):
    frame = open_source("kitti_object", {"root": root, "crop": False}).load("000003").frames[0]
    np.testing.assert_array_equal(frame.lidar.ring, np.repeat(np.arange(64), 120))
    np.testing.assert_array_equal(frame.lidar.intensity, np.float32(0.25))
    cut = open_source("kitti_object", {"root": root}).load("000003").frames[0].lidar
    up = np.degrees(np.arctan2(cut.xyz[:, 2], np.hypot(cut.xyz[:, 0], cut.xyz[:, 1])))
    np.testing.assert_allclose(up, np.linspace(2, -24.8, 64)[cut.ring], atol=1e-4)


def test_dont_care_is_no_box(root):
    source = open_source("kitti_object", {"root": root})
    assert source.scene_names() == ["000003", "000007"]
    for name, boxes in (("000003", 2), ("000007", 0)):
        scene = source.load(name)
        assert len(scene.frames[0].boxes.boxes) == boxes
        assert scene.attributes["dont_care"] == [[5.0, 10.0, 15.5, 20.0]]
    names = open_source("kitti_object", {"root": root, "taxonomy": "openscene"}).load("000003").frames[0].boxes.names
    assert names == ["vehicle", "bicycle"]
    assert open_source("kitti_object", {"root": root, "boxes": False}).load("000003").frames[0].boxes is None


def test_an_image_set_chooses_frames(root):
    source = open_source("kitti_object", {"root": root, "image_set": "val"})
    assert source.scene_names() == ["000007"]
    assert source.findings.left_out == ("1 frame (000009) of val.txt without a scan",)
    for options, said in (
        ({"image_set": "val", "scenes": ["000003"]}, "val.txt: lists none of the frames"),
        ({"image_set": "train"}, "train.txt: is missing"),
        ({"scenes": ["000004"]}, "has no scene '000004'; did you mean"),
        ({"split": "testing"}, "testing: no such folder"),
        ({"split": "test"}, "split="),
    ):
        with pytest.raises(ValueError, match=said):
            open_source("kitti_object", {"root": root, **options})


@pytest.mark.parametrize(
    ("file", "change", "said"),
    [
        (
            "label_2/000003.txt",
            lambda t: t.replace("Car 0.00", "Cat 0.00"),
            r"line 2: unknown type 'Cat'; known: Car, Van",
        ),
        (
            "label_2/000003.txt",
            lambda t: t.replace("Car 0.00", "Car"),
            r"line 2: has 14 columns, labels of KITTI have 15",
        ),
        (
            "label_2/000003.txt",
            lambda t: t.replace("1.66 1.8 4.2", "1.66 0 4.2"),
            r"line 2: height, width and length are \[1.66, 0",
        ),
        ("label_2/000003.txt", lambda t: t.replace("-1.5", "nan"), r"line 2: a number is not finite"),
        ("label_2/000003.txt", None, r"000003.txt: is missing"),
        ("calib/000003.txt", lambda t: t.replace("R0_rect", "R1_rect"), r"needs a line 'R0_rect:' with 9 numbers"),
        ("calib/000003.txt", lambda t: t.replace("P2: 50.0", "P2: -50.0"), r"P2 is not the projection of a camera"),
        (
            "calib/000003.txt",
            lambda t: t.replace("Tr_velo_to_cam: 0.0", "Tr_velo_to_cam: 3.0"),
            r"Tr_velo_to_cam: is not a rigid",
        ),
        ("velodyne/000003.bin", lambda t: t[:-3], r"000003.bin: \d+ bytes are not a multiple of 4 x float32 points"),
        (
            "image_2/000003.png",
            None,
            r"000003.png: is missing \(its size says which points have boxes; or say crop=false\)",
        ),
        ("image_2/000003.png", lambda t: "text", r"000003.png: not a readable image"),
    ],
)
def test_damage_is_named_in_one_line(tmp_path, file, change, said):
    layouts.kitti_object(tmp_path)
    path = tmp_path / "training" / file
    if change is None:
        path.unlink()
    else:
        path.write_text(change(path.read_text("latin1")), "latin1")
    with pytest.raises(ValueError, match=said) as error:
        open_source("kitti_object", {"root": str(tmp_path)}).load("000003")
    assert "\n" not in str(error.value)


def occupied(points, grid):
    """Voxels of the grid that hold a point in the ego frame, except for the vehicle itself."""
    low, high = np.reshape(LabelConfig().vehicle, (2, 3))
    points = points[~((points >= low) & (points <= high)).all(1)]
    index = np.floor((points - grid.lower) / grid.voxel).astype(int)
    found = np.zeros(grid.shape, bool)
    found[tuple(index[((index >= 0) & (index < grid.shape)).all(1)].T)] = True
    return found


def test_labels_are_made_of_what_the_image_shows(root):
    scene = open_source("kitti_object", {"root": root}).load("000003")
    grid = get_grid("tiny")
    labels = label_scene(scene, grid, OCC3D, LabelConfig(level=False)).frames[0].labels
    assert labels.semantic is None
    sweep = scene.frames[0].lidar
    np.testing.assert_array_equal(labels.binary, occupied(sweep.xyz.astype(float) + [0.76, 0, 1.73], grid))
    assert labels.binary.sum() > 100
    behind = labels.known()[: labels.binary.shape[0] // 2]
    assert not behind.any(), "nothing behind the car is known"


def test_real_frames(shared_data):
    root = shared_data / "kitti_object"
    if not root.is_dir():
        pytest.skip("no KITTI frames")
    source = open_source("kitti_object", {"root": str(root), "crop": False})
    totals = {}
    for name in source.scene_names():
        scene = source.load(name)
        [frame] = scene.frames
        inside, seen = counted(root / "training", name)
        got, want = ours(frame), np.array(list(inside.values()))
        totals[name] = (got.sum(1).tolist(), want.sum(1).tolist())
        # Ours stand upright in the vehicle's axes, theirs in the camera's, 0.5 degrees off.
        assert (np.abs(got.sum(1) - want.sum(1)) <= np.maximum(2, 0.02 * want.sum(1))).all(), totals
        assert (got & want).sum() >= 0.97 * want.sum()
        assert set(np.unique(frame.lidar.ring)) == set(range(64))
        ground, share = near_the_ground(frame)
        assert abs(np.median(ground)) < 0.15
        assert share > 0.3
        if name == "000000":
            cut = open_source("kitti_object", {"root": str(root)}).load(name).frames[0]
            assert len(cut.lidar.xyz) == seen.sum()
    assert totals["000000"][1][0] > 300
