"""PhysicalAI-AV: points on true surfaces, colors at projected points, tracks between their rows, videos by frame number."""

import importlib.util
import io
import json
import shutil
import zipfile

import numpy as np
import pyarrow as pa
import pytest
import simplejpeg
from pyarrow import parquet

from occstream.sharding import rawtree
from occstream.sharding.check import inspect
from occstream.sharding.grid import VoxelGrid
from occstream.sharding.labelconfig import LabelConfig
from occstream.sharding.labels import Labeler
from occstream.sharding.pack import pack
from occstream.sharding.poses import apply, compose, inverse
from occstream.sharding.prepare import Images
from occstream.sharding.sources import open_source, physicalai_clip
from tests.sharding import layouts

pytest.importorskip("DracoPy")
av = pytest.importorskip("av")
from tests.sharding import pai_clip as made  # noqa: E402

pytestmark = pytest.mark.slow
CLIP = "00000001-0000-4000-8000-000000000001"


@pytest.fixture(scope="module", params=["26.03", "25.10"])
def generation(request):
    return request.param


@pytest.fixture(scope="module")
def scene(generation):
    return open_source("physicalai", {"root": str(layouts.pai_tree(generation))}).load(CLIP)


@pytest.fixture
def root(tmp_path):
    shutil.copytree(layouts.pai_tree("26.03"), tmp_path / "raw")
    return tmp_path / "raw"


def edit_member(root, feature, directory, ending, change):
    """Rewrites one file of the first clip in the archive of its chunk."""
    path = root / directory / feature / f"{feature}.chunk_0007.zip"
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    name = f"{CLIP}.{ending}"
    rawtree.forget()
    members[name] = change(members[name])
    with zipfile.ZipFile(path, "w") as archive:
        for each, data in members.items():
            archive.writestr(each, data)


def edited(**columns):
    def change(data):
        table = parquet.read_table(pa.BufferReader(data))
        for name, edit in columns.items():
            values = edit(table[name].to_pylist())
            table = table.set_column(table.schema.get_field_index(name), name, pa.array(values))
        out = io.BytesIO()
        parquet.write_table(table, out)
        return out.getvalue()

    return change


def off_surface(sweep):
    """Distance of each return from the nearest surface that stands still; of those on the moving car NaN."""
    world = apply(compose(sweep.ego_to_global, sweep.sensor_to_ego), sweep.xyz.astype(float))
    gaps = [np.abs(world[:, 2])]
    for center, size, _ in made.BOXES:
        over = np.abs(world - center) - np.array(size) / 2
        gaps.append(np.where((over < 0.5).all(1), np.abs(over.max(1)), np.inf))
    center, size, _, velocity = made.CAR
    over = np.abs(world - (np.array(center) + np.array(velocity) * sweep.timestamp / 1e6)) - np.array(size) / 2
    return np.where((over < 0.5).all(1), np.nan, np.min(gaps, 0))


def test_points_lie_on_true_surfaces_once_they_are_deskewed(generation, scene, monkeypatch):
    """As sharp from a vehicle that drives and turns as from one at rest; with one pose a turn they are decimeters off."""
    assert [len(frame.sweeps) for frame in scene.frames] == [0, 4]
    sweeps = [sweep for frame in scene.frames for sweep in (frame.lidar, *frame.sweeps)]
    off = np.concatenate([off_surface(sweep) for sweep in sweeps])
    assert np.isnan(off).mean() < 0.2
    assert np.nanpercentile(off, 99) < 0.01
    monkeypatch.setattr(physicalai_clip, "deskew", lambda sweep, track: sweep)
    raw = open_source("physicalai", {"root": str(layouts.pai_tree(generation)), "cameras": False}).load(CLIP)
    off = np.concatenate([off_surface(sweep) for frame in raw.frames for sweep in (frame.lidar, *frame.sweeps)])
    assert np.nanpercentile(off, 99) > 0.1
    sweep = scene.frames[1].lidar
    assert sweep.timestamp == 20_000 + 5 * 100_000 + 50_000
    assert np.abs(sweep.time_lag).max() <= 0.0501
    assert (sweep.ring is None) == (generation == "25.10")


def test_labels_of_a_rig_that_moves_are_as_sharp_as_the_surfaces(monkeypatch):
    """Occupied voxels of 10 cm above the road: once points are brought to one instant, all of them touch a surface."""
    grid = VoxelGrid("fine", (-12, -8, -0.4), (14, 10, 3), (0.1, 0.1, 0.1))

    def loose():
        source = open_source("physicalai", {"root": str(layouts.pai_tree("26.03")), "cameras": False})
        frame = Labeler(grid, "occ3d", LabelConfig(level=False))(source.load(CLIP)).frames[1]
        centers = grid.centers().reshape(*grid.shape, 3)[frame.labels.binary & frame.labels.known()]
        world = apply(frame.ego_to_global, centers.astype(float))
        # Nor the lane of the car, which moves while it is measured.
        world = world[(world[:, 2] > 0.25) & ((np.abs(world[:, 1] - made.CAR[0][1]) > 1.6) | (world[:, 0] < 2))]
        over = [np.abs(world - center) - np.array(size) / 2 for center, size, _ in made.BOXES]
        gaps = [np.where((o < 0).all(1), -o.max(1), np.linalg.norm(np.maximum(o, 0), axis=1)) for o in over]
        assert len(world) > 500
        return (np.min(gaps, 0) > 0.1).mean()  # a voxel's corner is 0.087 m from its center

    assert loose() == 0
    monkeypatch.setattr(physicalai_clip, "deskew", lambda sweep, track: sweep)
    assert loose() > 0.2


def test_colors_at_projected_points(generation, scene):
    """Returns from boxes, projected into the rectified views that see them, meet pixels of the box's color."""
    aimed = Images(quality=100).aim(scene)
    assert len(aimed.attributes["rectified"]) == 7
    assert max(aimed.attributes["rectified"].values()) < 0.02
    right = seen = 0
    for frame in aimed.frames:
        cameras = Images(quality=100)(frame).cameras
        sweep = frame.lidar
        world = apply(compose(sweep.ego_to_global, sweep.sensor_to_ego), sweep.xyz.astype(float))
        for camera in cameras.values():
            image = simplejpeg.decode_jpeg(camera.jpeg).astype(int)
            to_world = compose(camera.ego_to_global, camera.sensor_to_ego)
            eye = to_world[:3, 3]
            for number, (center, size, color) in enumerate(made.BOXES[:3], 1):
                over = np.abs(world - center) - np.array(size) / 2
                points = world[np.abs(over.max(1)) < 0.02]
                local = apply(inverse(to_world), points)
                before = local[:, 2] > 0.5
                exact = local[before] @ camera.intrinsics.T
                exact = exact[:, :2] / exact[:, 2:]
                inside = ((exact >= 0) & (exact <= [camera.width - 1, camera.height - 1])).all(1)
                exact = exact[inside]
                # Not at edges, where a pixel is half something else: its neighbors see the same thing.
                hit = np.full(len(exact), number)
                for shift in ((0, 0), (1.5, 1.5), (1.5, -1.5), (-1.5, 1.5), (-1.5, -1.5)):
                    rays = np.c_[exact + shift, np.ones(len(exact))] @ np.linalg.inv(camera.intrinsics).T
                    rays = rays @ to_world[:3, :3].T
                    seen_there = made.cast(np.tile(eye, (len(rays), 1)), rays, np.full(len(rays), camera.timestamp))[2]
                    hit = np.where(seen_there == number, hit, -1)
                pixel = np.rint(exact).astype(int)
                pixel = pixel[hit == number]
                found = image[pixel[:, 1], pixel[:, 0]]
                black = found.max(1) < 12  # the vehicle itself, masked
                seen += int((~black).sum())
                right += int((np.abs(found - color).max(1) < 60)[~black].sum())
    assert seen > 100
    assert right / seen >= 0.97, (right, seen)


def test_boxes_are_between_the_rows_of_their_tracks(generation, scene):
    if generation == "25.10":
        assert [frame.boxes for frame in scene.frames] == [None, None]
        return
    assert [frame.boxes.names for frame in scene.frames] == [["car", "truck"], ["car"]], (
        "no row after: not extrapolated"
    )
    assert scene.frames[0].boxes.track_ids == ["11", "12"]
    for frame in scene.frames:
        boxes, things = frame.boxes, [(*made.CAR[:2], made.CAR[3]), (*made.BOXES[0][:2], (0, 0, 0))]
        for row, (center, size, speed) in enumerate(things[: len(boxes.names)]):
            now = np.array(center) + np.array(speed) * frame.timestamp / 1e6
            np.testing.assert_allclose(boxes.boxes[row, :3], apply(inverse(frame.ego_to_global), now), atol=0.01)
            np.testing.assert_allclose(boxes.boxes[row, 3:6], size, rtol=1e-6)
            heading = frame.ego_to_global[:2, :2].T @ [1, 0]
            np.testing.assert_allclose([np.cos(boxes.boxes[row, 6]), np.sin(boxes.boxes[row, 6])], heading, atol=1e-3)
            np.testing.assert_allclose(boxes.velocity[row], frame.ego_to_global[:2, :2].T @ speed[:2], atol=0.05)


def test_cameras_have_the_time_of_their_middle_row_and_no_vehicle(generation, scene):
    frame = scene.frames[1]
    for number, (name, camera) in enumerate((n, frame.cameras[n]) for n in made.CAMERAS if "tele" not in n):
        first = 33_333 + 3_000 * list(made.CAMERAS).index(name) - 15_000
        step = (camera.timestamp - first) % 33_333.33
        assert min(step, 33_333.33 - step) < 2, (number, name)
        assert abs(camera.timestamp - frame.timestamp) <= 17_000
    cross = frame.cameras["camera_cross_left_120fov"].image
    assert (cross[-6:].max() == 0) == (generation == "26.03")
    assert frame.cameras["camera_front_wide_120fov"].image[-6:].max() > 30


def test_options(generation):
    where = {"root": str(layouts.pai_tree(generation)), "scenes": 1}
    whole = open_source("physicalai", where | {"cameras": False}).load(CLIP)
    thin = open_source("physicalai", where | {"cameras": False, "max_points": 1000, "rate": 5.0}).load(CLIP)
    assert [len(f.sweeps) for f in thin.frames] == [0, 1, 1]
    assert len(thin.frames[0].lidar.xyz) == len(whole.frames[0].lidar.xyz) > 3000
    assert 500 < len(thin.frames[1].sweeps[0].xyz) < 1200
    single = open_source("physicalai", where | {"views": "single100", "tele": True})
    rig = Images(max_black=0.2)(single.load(CLIP).frames[0]).cameras
    assert sorted(rig) == sorted(made.CAMERAS)
    assert single.scene_names() == [CLIP]
    assert open_source("physicalai", {**where, "scenes": None, "split": "val", "cameras": False}).scene_names() == [
        "00000002-0000-4000-8000-000000000002"
    ]
    with pytest.raises(ValueError, match="has no clip with LiDAR"):
        open_source("physicalai", where | {"countries": ["France"]})


def test_a_chunk_that_is_not_there_and_a_clip_without_lidar_are_left_out(root):
    (root / "lidar" / "lidar_top_360fov" / "lidar_top_360fov.chunk_0007.zip").rename(root / "elsewhere.zip")
    with pytest.raises(ValueError, match="has no clip with LiDAR, poses and cameras whose files are there"):
        open_source("physicalai", {"root": str(root)})
    (root / "elsewhere.zip").rename(root / "lidar" / "lidar_top_360fov" / "lidar_top_360fov.chunk_0007.zip")
    path = root / "metadata" / "feature_presence.parquet"
    path.write_bytes(edited(lidar_top_360fov=lambda values: [False, True])(path.read_bytes()))
    assert open_source("physicalai", {"root": str(root)}).scene_names() == ["00000002-0000-4000-8000-000000000002"]


def rows_of(name, change):
    """An edit of the calibration that changes the parameters of one camera's lens."""

    def edit(values):
        return [
            json.dumps(json.loads(v) | change) if i % 7 == list(made.CAMERAS).index(name) else v
            for i, v in enumerate(values)
        ]

    return edit


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"external_distortion_parameters": {"a": 1}}, "behind a windshield"),
        ({"max_angle": 9}, "camera_front_wide_120fov of clip .*largest angle"),
        ({"resolution": None}, "lens not readable"),
        ({"principal_point": [1]}, "lens not readable"),
        ({"resolution": [10, 10]}, "its calibration 10x10"),
    ],
)
def test_a_lens_that_cannot_be_taken_out_is_named(root, change, message):
    path = root / "calibration" / "camera_intrinsics.offline" / "camera_intrinsics.offline.chunk_0007.parquet"
    path.write_bytes(edited(model_parameters=rows_of("camera_front_wide_120fov", change))(path.read_bytes()))
    with pytest.raises(ValueError, match=message):
        open_source("physicalai", {"root": str(root)}).load(CLIP)
    if "windshield" in message:
        assert open_source("physicalai", {"root": str(root), "windshield": "ignore"}).load(CLIP).frames


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"reference_frame": lambda v: ["world", *v[1:]]}, "not in the rig's frame at their own time"),
        ({"reference_frame_timestamp_us": lambda v: [v[0] + 1, *v[1:]]}, "not in the rig's frame at their own time"),
        ({"label_class": lambda v: ["unicorn", *v[1:]]}, "unknown class 'unicorn'"),
        ({"size_x": lambda v: [0.0, *v[1:]]}, "row 0 has a size"),
        ({"center_z": lambda v: [float("nan"), *v[1:]]}, "center_z is not finite in row 0"),
    ],
)
def test_boxes_that_cannot_be_are_named(root, columns, message):
    edit_member(root, "obstacle.offline", "labels", "obstacle.offline.parquet", edited(**columns))
    with pytest.raises(ValueError, match=message):
        open_source("physicalai", {"root": str(root), "cameras": False}).load(CLIP)
    assert open_source("physicalai", {"root": str(root), "cameras": False, "boxes": False}).load(CLIP).frames


def test_damaged_files_are_named(root):
    name = "camera_rear_left_70fov"
    edit_member(root, name, "camera", f"{name}.timestamps.parquet", shortened)
    with pytest.raises(ValueError, match=rf"{name}.mp4: not usable as a video \(has 18 frames, but 17 time stamps\)"):
        open_source("physicalai", {"root": str(root)}).load(CLIP)
    cloud = {"draco_encoded_pointcloud": lambda values: [b"nothing", *values[1:]]}
    edit_member(root, "lidar_top_360fov", "lidar", "lidar_top_360fov.parquet", edited(**cloud))
    with pytest.raises(ValueError, match="turn 0 of the LiDAR is not readable as Draco"):
        open_source("physicalai", {"root": str(root), "cameras": False}).load(CLIP)


def shortened(data):
    table = parquet.read_table(pa.BufferReader(data))
    out = io.BytesIO()
    parquet.write_table(table.slice(0, len(table) - 1), out)
    return out.getvalue()


def test_frames_of_a_video_by_number(tmp_path):
    movie = (
        layouts.pai_tree("26.03") / "camera" / "camera_front_wide_120fov" / "camera_front_wide_120fov.chunk_0007.zip"
    )
    with zipfile.ZipFile(movie) as archive:
        (tmp_path / "a.mp4").write_bytes(archive.read(f"{CLIP}.camera_front_wide_120fov.mp4"))
    with av.open(str(tmp_path / "a.mp4")) as container:
        every = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    for wanted in ([0], [4, 5], [17], [1, 3, 9, 16], list(range(18)), []):
        found = physicalai_clip.decoded(tmp_path / "a.mp4", wanted, 18)
        assert list(found) == wanted
        assert all((found[n] == every[n]).all() for n in wanted)


def test_a_package_that_is_missing_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"needs the package av: pip install 'occstream\[physicalai\]'"):
        open_source("physicalai", {"root": str(layouts.pai_tree("26.03"))})


def test_inspect_says_the_license(tmp_path):
    source = open_source("physicalai", {"root": str(layouts.pai_tree("26.03")), "scenes": 1, "cameras": False})
    pack(source, str(tmp_path), groups=("lidar",))
    assert "license      NVIDIA Autonomous Vehicle Dataset License" in inspect(str(tmp_path))
