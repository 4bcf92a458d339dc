"""Every source: the contract that holds for all, and the traps of each format."""

import copy
import pickle

import numpy as np
import pytest
import simplejpeg
from scipy.spatial.transform import Rotation

from occstream.sharding import rawfiles
from occstream.sharding.check import verify
from occstream.sharding.codec import GROUPS, decode, encode
from occstream.sharding.contract import admit
from occstream.sharding.grid import get_grid
from occstream.sharding.labels import label_scene, sweep_to_grid
from occstream.sharding.pack import pack
from occstream.sharding.prepare import Images
from occstream.sharding.schema import IGNORE, TAXONOMIES, iter_scenes
from occstream.sharding.sources import open_source, source_names
from tests.sharding import layouts
from tests.sharding.test_shards import same

CASES = [(name, i) for name, writers in layouts.LAYOUTS.items() for i in range(len(writers))]


def test_every_source_is_in_the_contract_test():
    assert sorted(layouts.LAYOUTS) == source_names(), "a new source needs a layout in tests/sharding/layouts.py"


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    cache = {}

    def get(name, number=0):
        if (name, number) not in cache:
            folder = tmp_path_factory.mktemp(name)
            cache[name, number] = open_source(name, layouts.LAYOUTS[name][number](folder))
        return cache[name, number]

    return get


@pytest.mark.parametrize(("name", "number"), CASES)
def test_contract(opened, name, number, tmp_path):
    """What every source promises; a new data set gets these checks by its line in ``layouts``."""
    source = opened(name, number)
    assert source.name.startswith(name)
    assert TAXONOMIES[source.taxonomy.name] is source.taxonomy
    names = source.scene_names()
    assert names
    assert len(set(names)) == len(names)
    again = pickle.loads(pickle.dumps(source))  # worker processes get it so
    assert (again.scene_names(), repr(again)) == (names, repr(source))
    assert str(tmp_path.parent) not in repr(source), "repr goes into digests: it must not depend on where the data lies"
    for scene_name in names:
        scene = source.load(scene_name)
        assert same(scene, again.load(scene_name)), "loading twice must give the same"
        assert scene.name == scene_name
        assert [f.index for f in scene.frames] == list(range(len(scene.frames)))
        assert all(f.scene == scene_name for f in scene.frames)
        times = [f.timestamp for f in scene.frames]
        assert times == sorted(times) if None not in times else set(times) == {None}
        for frame in scene.frames:
            _check_frame(frame, source)
            frame = Images()(frame)  # where the data set's lens is not a pinhole, the image is resampled
            groups = [g for g in GROUPS if g != "labels" or frame.labels]
            members = [{n[len(frame.key) + 1 :]: d for n, d in encode(frame, g)} for g in groups]
            decoded = decode(members)
            frame.sweeps, frame.cameras = [], dict(sorted(frame.cameras.items()))
            if frame.labels is None:
                frame.boxes = None  # they travel with the labels
            assert same(decoded, frame)
    if source.grid:
        pack(source, str(tmp_path / "shards"))
        assert verify(str(tmp_path / "shards")) == []


def _check_frame(frame, source):
    def rigid(pose):
        assert pose.dtype == np.float64
        np.testing.assert_allclose(pose[:3, :3] @ pose[:3, :3].T, np.eye(3), atol=1e-6)
        assert np.linalg.det(pose[:3, :3]) > 0
        np.testing.assert_array_equal(pose[3], [0, 0, 0, 1])

    if frame.ego_to_global is not None:
        rigid(frame.ego_to_global)
    for camera in frame.cameras.values():
        if camera.image is not None:
            assert (camera.jpeg, camera.image.dtype) == (b"", np.uint8)
            height, width, _ = camera.image.shape
        else:
            height, width, *_ = simplejpeg.decode_jpeg_header(camera.jpeg)
        assert (camera.width, camera.height) == (width, height)
        assert camera.distortion is None, "a lens that is not a pinhole belongs into Camera.lens"
        assert camera.lens is None or (camera.lens.width, camera.lens.height) == (width, height)
        assert camera.intrinsics.shape == (3, 3)
        assert camera.intrinsics[2].tolist() == [0, 0, 1]
        rigid(camera.sensor_to_ego)
        rigid(camera.ego_to_global)
    for sweep in [*frame.sweeps, *([frame.lidar] if frame.lidar else [])]:
        rigid(sweep.sensor_to_ego)
        rigid(sweep.ego_to_global)
        assert (sweep.xyz.dtype, sweep.xyz.shape[1]) == (np.float32, 3)
        for name, kind in (("intensity", np.float32), ("ring", np.uint8), ("classes", np.uint8), ("moving", bool)):
            value = getattr(sweep, name)
            assert value is None or (value.dtype, value.shape) == (kind, (len(sweep.xyz),)), name
        if sweep.classes is not None:
            assert set(np.unique(sweep.classes)) <= {*range(source.taxonomy.num_classes), IGNORE}
    if frame.boxes is not None:
        count = len(frame.boxes.boxes)
        assert len(frame.boxes.names) == len(frame.boxes.track_ids) == count
        assert frame.boxes.velocity is None or frame.boxes.velocity.shape == (count, 2)
    assert (frame.labels is None) == (source.grid is None)
    if frame.labels:
        _check_labels(frame.labels, source)


def _check_labels(labels, source):
    shape = source.grid.shape
    assert (labels.binary.dtype, labels.binary.shape) == (bool, shape)
    for mask in (labels.mask_lidar, labels.mask_camera):
        assert mask is None or (mask.dtype, mask.shape) == (bool, shape)
    if labels.semantic is not None:
        assert (labels.semantic.dtype, labels.semantic.shape) == (np.uint8, shape)
        assert set(np.unique(labels.semantic)) <= {*range(source.taxonomy.free_id + 1), IGNORE}
        occupied = labels.semantic < source.taxonomy.free_id
        known = labels.semantic != IGNORE
        np.testing.assert_array_equal(labels.binary[known], occupied[known])
    if labels.flow is not None:
        assert labels.flow.shape == (labels.binary.sum(), 2)


def test_missing_root_is_one_clear_error(tmp_path):
    for name in layouts.LAYOUTS:
        if name != "synthetic":
            with pytest.raises(ValueError, match="no such folder; give the one that holds"):
                open_source(name, {"root": str(tmp_path / "nowhere")})


def near_the_ground(frame):
    """Heights in the ego frame of the returns within 10 m and half a meter of z = 0, and their share of those within 10 m."""
    pose = frame.lidar.sensor_to_ego
    ego = frame.lidar.xyz.astype(np.float64) @ pose[:3, :3].T + pose[:3, 3]
    far = np.hypot(ego[:, 0], ego[:, 1])
    near = ego[(far < 10) & (far > 3), 2]
    ground = near[np.abs(near) < 0.5]
    return ground, len(ground) / max(1, len(near))


def assert_on_the_road(source):
    seen = 0
    for name in source.scene_names():
        for frame in source.load(name).frames:
            if frame.lidar is not None:
                ground, share = near_the_ground(frame)
                assert share > 0.3, f"{frame.key}: is the ego frame's origin on the road?"
                assert abs(np.median(ground)) < 0.15, frame.key
                seen += 1
    return seen


@pytest.mark.parametrize(("name", "number"), CASES)
def test_ego_frame_is_on_the_road(opened, name, number):
    """What every other part takes for granted: grids, the vehicle's own returns, levelling."""
    seen = assert_on_the_road(opened(name, number))
    assert seen or name in ("occ3d", "waymo_occ3d"), "labels alone have no returns to see it by"


@pytest.mark.parametrize("name", ["openscene", "semantickitti", "sscbench"])
def test_what_was_packed_with_another_ego_frame_is_flagged(opened, name, tmp_path, monkeypatch):
    source = opened(name)
    load = type(source).load
    pack(source, str(tmp_path / "new"))
    assert verify(str(tmp_path / "new")) == []

    def before(self, scene):
        loaded = load(self, scene)
        del loaded.attributes["ego_height"]
        return loaded

    monkeypatch.setattr(type(source), "load", before)
    pack(source, str(tmp_path / "old"))
    [problem] = verify(str(tmp_path / "old"))
    assert "ego frame is not on the road" in problem
    assert "pack the data set again" in problem


def test_openscene_flat_index_free_and_placeholder_classes_and_flow(opened):
    labels = opened("openscene").load("log-0001-scene-0000").frames[0].labels
    assert labels.semantic[3, 5, 7] == 0  # vehicle
    assert labels.semantic[4, 5, 7] == 1  # raw 4: czone_sign
    assert labels.semantic[199, 199, 15] == 7  # raw 10: background
    assert labels.binary.sum() == 3
    assert (labels.semantic == 8).sum() == 200 * 200 * 16 - 3  # raw 11, what densifying leaves, is free
    # Rows follow the C order of the occupied voxels, whatever the order in the file.
    np.testing.assert_array_equal(labels.flow, [[3, 1], [0.5, 0], [0, 0]])


def test_openscene_boxes_and_cameras(opened):
    frame = opened("openscene").load("log-0001-scene-0001").frames[1]
    assert list(frame.cameras) == ["CAM_F0", "CAM_L0", "CAM_R0", "CAM_L1", "CAM_R1", "CAM_L2", "CAM_R2", "CAM_B0"]
    camera = frame.cameras["CAM_F0"]
    # Forward of the camera is x; it is 1.7 m above the axle, which is 0.325 m above the road.
    np.testing.assert_allclose(camera.sensor_to_ego @ [0, 0, 1, 1], [2, 0, 1.7 + 0.325, 1])
    np.testing.assert_allclose(frame.ego_to_global[:3, 3], [6e5 + 2, 4e6, 600 - 0.325])
    assert camera.distortion is None  # the lens says it, and packing takes it out
    assert camera.lens.coefficients == (-0.3, 0.1, 0, 0, 0.02)
    np.testing.assert_allclose(frame.boxes.boxes[0], [10, 2, 0.5 + 0.325, 4.5, 1.9, 1.6, 0.3], rtol=1e-6)
    assert frame.lidar.ring[41] == 1


def test_openscene_without_occupancy_and_a_pickle_with_code(tmp_path):
    options = layouts.openscene(tmp_path / "v11", occupancy=False)
    assert open_source("openscene", options).grid is None
    (tmp_path / "v11" / "meta_datas" / "evil.pkl").write_bytes(b"cos\nsystem\n(S'touch /tmp/owned'\ntR.")
    with pytest.raises(ValueError, match=r"evil.pkl: not loaded: it wants to import os.system"):
        open_source("openscene", options)


def test_openscene_missing_image_is_named(tmp_path):
    options = layouts.openscene(tmp_path)
    next((tmp_path / "sensor_blobs/mini/log-a/CAM_B0").iterdir()).unlink()
    with pytest.raises(ValueError, match=r"has no file log-a/CAM_B0/.*jpg, which the metadata names"):
        [open_source("openscene", options).load(name) for name in ("log-0001-scene-0000", "log-0001-scene-0001")]


def test_occ3d_labels_under_the_masks(opened):
    """Unobserved voxels carry labels: they must not become binary targets."""
    for labels in (
        opened("nuscenes", 1).load("scene-0000").frames[0].labels,
        opened("occ3d").load("scene-0007").frames[0].labels,
    ):
        assert labels.binary[150, 5, 7]
        assert not labels.mask_lidar[150, 5, 7]
        assert (labels.binary & labels.mask_lidar).sum() == 1
        assert labels.semantic[3, 5, 7] == 4


def test_openoccupancy_axis_order_and_noise(opened):
    source = opened("nuscenes", 2)
    assert (source.grid.shape, source.grid.frame) == ((512, 512, 40), "lidar")
    labels = source.load("scene-0001").frames[1].labels
    assert labels.semantic[3, 5, 7] == 4  # the file has z, y, x
    assert labels.semantic[510, 511, 39] == 16
    assert labels.semantic[3, 5, 8] == IGNORE
    assert not labels.mask_lidar[3, 5, 8]
    assert labels.semantic[0, 0, 0] == 17
    assert labels.binary.sum() == 2


def test_surroundocc(opened):
    labels = opened("nuscenes", 3).load("scene-0000").frames[0].labels
    assert (labels.semantic[3, 5, 7], labels.semantic[199, 198, 15], labels.semantic[3, 5, 8]) == (4, 16, IGNORE)
    assert labels.binary.sum() == 2


def test_wrong_label_set_is_named(tmp_path):
    options = layouts.nuscenes_with("surroundocc")(tmp_path)
    np.save(tmp_path / "nuscenes_occ/samples/ls0-0.bin.npy", np.array([[200, 0, 0, 1]]))
    with pytest.raises(ValueError, match=r"ls0-0.bin.npy: voxel \(200, 0, 0\) is outside the \(200, 200, 16\) grid"):
        open_source("nuscenes", options).load("scene-0000")
    with pytest.raises(ValueError, match="gts: no such folder; give the one that holds the occ3d labels"):
        open_source("nuscenes", options | {"labels": "occ3d"})


def test_semantickitti_bits_learning_map_poses_and_sweeps(opened):
    source = opened("semantickitti")
    assert source.scene_names() == ["00-000"]
    first, second = source.load("00-000").frames
    labels = second.labels
    assert [labels.semantic[x, 20, 5] for x in (10, 11, 12, 13)] == [0, 0, IGNORE, 8]  # car, moving car, other, road
    assert labels.semantic[0, 0, 1] == 19
    assert labels.binary.sum() == 4  # what is ignored is there all the same
    assert (~labels.mask_lidar).sum() == 3  # highest bit first: 131 is voxels 0, 6 and 7
    assert not labels.mask_lidar[0, 0, [0, 6, 7]].any()
    # Poses are of the camera, whose z is the LiDAR's x.
    np.testing.assert_allclose(second.ego_to_global[:3, 3], [10, 0, 0], atol=1e-9)
    assert [s.timestamp for s in second.sweeps] == [104_000, 208_000, 312_000, 416_000]
    assert second.timestamp == 520_000
    assert first.sweeps == []
    raw_moving = second.lidar.moving
    assert 0 < raw_moving.sum() < 90
    assert set(second.lidar.classes[raw_moving]) == {0}
    assert set(second.lidar.instances) == {7}  # the upper half of a label
    # A point 10 m ahead and 1 m left of the LiDAR, by the textbook formula P2 Tr x and by our camera.
    camera, point = second.cameras["image_2"], np.array([10.0, 1.0, 0.5, 1])
    in_ego = second.lidar.sensor_to_ego @ point
    np.testing.assert_allclose(in_ego, [10.76, 1.0, 2.23, 1])
    want = np.array(layouts.P2) @ np.vstack([layouts.TR, [0, 0, 0, 1]]) @ point
    got = camera.intrinsics @ (np.linalg.inv(camera.sensor_to_ego) @ in_ego)[:3]
    np.testing.assert_allclose(got[:2] / got[2], want[:2] / want[2])
    # The voxels are the LiDAR's still.
    np.testing.assert_allclose(sweep_to_grid(second, second.lidar, source.grid), np.eye(4), atol=1e-12)


def test_semantickitti_without_voxels_takes_every_fifth_scan(tmp_path):
    source = open_source("semantickitti", layouts.semantickitti(tmp_path, voxels=False))
    assert source.grid is None
    assert [f.token for f in source.load("00-000").frames] == ["00/000000", "00/000005"]


def test_semantickitti_is_cut_into_scenes(tmp_path):
    options = layouts.semantickitti(tmp_path) | {"frames_per_scene": 1}
    source = open_source("semantickitti", options)
    assert source.scene_names() == ["00-000", "00-001"]
    assert len(source.load("00-001").frames[0].sweeps) == 4


def test_sscbench_learning_map_and_pose(opened):
    source = opened("sscbench")
    assert source.scene_names() == ["2013_05_28_drive_0000-000"]
    frame = source.load(source.scene_names()[0]).frames[1]
    assert [frame.labels.semantic[x, 20, 5] for x in (10, 11, 12, 13)] == [0, 0, 17, 6]
    lidar_to_world = frame.ego_to_global @ frame.lidar.sensor_to_ego
    rectify = np.array(layouts.R_RECT)
    expected = rectify @ [0.02, -0.1, -0.3] + [0, 0, 5]
    np.testing.assert_allclose(lidar_to_world @ [0, 0, 0, 1], [*expected, 1], atol=1e-9)
    # A point of the LiDAR by the calibration's own formula, P_rect R_rect Tr x, and by our camera.
    camera, point = frame.cameras["image_00"], np.array([10.0, 1.0, 0.5, 1])
    want = np.array(layouts.P2)[:, :3] @ rectify @ np.array(layouts.TR) @ point
    got = camera.intrinsics @ (np.linalg.inv(camera.sensor_to_ego) @ frame.lidar.sensor_to_ego @ point)[:3]
    np.testing.assert_allclose(got[:2] / got[2], want[:2] / want[2], atol=1e-6)
    assert len(frame.lidar.xyz) == 60


def test_sscbench_without_the_raw_points_still_says_where_the_voxels_are(tmp_path):
    """Its archives hold images and voxels alone; the voxels lie in the LiDAR's frame, which training asks for."""
    source = open_source("sscbench", layouts.sscbench(tmp_path, points=False))
    frame = source.load(source.scene_names()[0]).frames[0]
    assert len(frame.lidar.xyz) == 0
    np.testing.assert_allclose(frame.lidar.sensor_to_ego[:3, 3], [0.76, 0, 1.73])
    pack(source, str(tmp_path / "out"))
    assert verify(str(tmp_path / "out")) == []
    with pytest.raises(ValueError, match="has no LiDAR sweep, so no labels can be made"):
        label_scene(source.load(source.scene_names()[0]), get_grid("occ3d"), source.taxonomy)


def test_waymo_free_is_15_or_23(opened):
    for frame in opened("waymo_occ3d").load("training-000").frames:
        assert frame.labels.binary.sum() == 2
        assert (frame.labels.semantic == 15).sum() == get_grid("occ3d").size - 2
        assert frame.labels.mask_lidar.sum() == get_grid("occ3d").size // 2
        # A quarter of it lies outside the cameras' field of view, whatever final_voxel_state says.
        assert frame.labels.mask_camera[:100, :150].all()
        assert frame.labels.mask_camera.sum() == get_grid("occ3d").size * 3 // 8


@pytest.mark.parametrize(
    ("name", "number", "rows", "winner"),
    [
        # OpenScene and SurroundOcc write rows one after the other; OpenOccupancy counts, and of equals takes the smallest.
        ("openscene", 0, [[281003, 0], [281003, 9], [281003, 4]], 1),
        ("nuscenes", 3, [[3, 5, 7, 4], [3, 5, 7, 4], [3, 5, 7, 2]], 2),
        ("nuscenes", 2, [[7, 5, 3, 4], [7, 5, 3, 2], [7, 5, 3, 4]], 4),
        ("nuscenes", 2, [[7, 5, 3, 9], [7, 5, 3, 2], [7, 5, 3, 0]], 2),
    ],
)
def test_voxels_listed_twice_follow_the_rule_of_their_data_set(name, number, rows, winner, tmp_path):
    options = layouts.LAYOUTS[name][number](tmp_path)
    pattern = {"openscene": "*occ_final.npy", "nuscenes": "ls0-0*.npy"}[name]
    for file in tmp_path.rglob(pattern):
        np.save(file, np.array(rows))
    for file in tmp_path.rglob("*flow_final.npy"):
        np.save(file, np.array([[1.0, 0], [2, 0], [3, 0]]))
    source = open_source(name, options)
    labels = source.load(source.scene_names()[0]).frames[0].labels
    assert labels.semantic[3, 5, 7] == winner
    assert labels.binary.sum() == 1
    assert labels.flow is None or labels.flow.tolist() == [[3, 0]], "the flow is of the row that stays"


def test_the_most_frequent_of_many_rows_by_a_loop():
    rng = np.random.default_rng(0)
    index, classes = rng.integers(0, 3, (300, 3)), rng.integers(0, 5, 300)
    last, most = np.full((3, 3, 3), 9), np.full((3, 3, 3), 9)
    for voxel in np.unique(index, axis=0):
        there = classes[(index == voxel).all(1)]
        last[tuple(voxel)] = there[-1]
        most[tuple(voxel)] = np.bincount(there).argmax()
    np.testing.assert_array_equal(rawfiles.sparse_to_dense(index, classes, (3, 3, 3), 9, where="x"), last)
    np.testing.assert_array_equal(
        rawfiles.sparse_to_dense(index, classes, (3, 3, 3), 9, where="x", doubles="most"), most
    )


def test_boxes_are_upright_in_a_tilted_ego_frame(opened):
    """The vehicle pitches by 3 degrees: center and heading are exact, the box leans with the vehicle."""
    source = opened("nuscenes", 0)
    [name, *_] = source.scene_names()
    frame = source.load(name).frames[0]
    row = source.records[name]["samples"][0]["boxes"][0]
    tilt = Rotation.from_euler("y", 3, degrees=True).as_matrix()
    to_ego = np.eye(4)
    to_ego[:3, :3] = tilt.T
    level, leaning = source._boxes([row], np.eye(4)).boxes[0], source._boxes([row], to_ego).boxes[0]
    assert len(frame.boxes.boxes)
    np.testing.assert_allclose(leaning[:3], tilt.T @ level[:3].astype(np.float64), rtol=1e-6)
    np.testing.assert_array_equal(leaning[3:6], level[3:6])
    along = tilt.T @ [np.cos(level[6]), np.sin(level[6]), 0]
    assert leaning[6] == pytest.approx(np.arctan2(along[1], along[0]), abs=1e-6)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "no PCD header"),
        (b"FIELDS x\nSIZE 4\nTYPE F\nCOUNT 1\nPOINTS 9\nDATA binary\n1234", "broken PCD"),
        (
            b"FIELDS x\nSIZE 4\nTYPE F\nCOUNT 1\nPOINTS 1\nDATA zipped\n",
            "DATA zipped is not known",
        ),
    ],
)
def test_broken_point_clouds_are_named(tmp_path, content, message):
    (tmp_path / "a.pcd").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        rawfiles.read_pcd(tmp_path / "a.pcd")


@pytest.mark.parametrize(
    ("name", "folder", "options"), [("semantickitti", "semantickitti", {"stride": 1}), ("nuscenes", "nuscenes", {})]
)
def test_ego_frame_of_real_samples_is_on_the_road(shared_data, name, folder, options):
    assert assert_on_the_road(open_source(name, {"root": str(shared_data / folder), **options})) >= 8


def test_one_name_where_a_list_is_wanted():
    with pytest.raises(ValueError, match=r"scenes='scene-0061': write a list, scenes=\[scene-0061\]$"):
        open_source("nuscenes", {"root": "here", "scenes": "scene-0061"})


def test_real_samples(shared_data, tmp_path):
    """The real SemanticKITTI and Occ3D samples are read unchanged."""
    kitti = open_source("semantickitti", {"root": str(shared_data / "semantickitti"), "stride": 1})
    assert kitti.scene_names() == ["00-000", "01-000"]
    frames = kitti.load("00-000").frames
    assert len(frames) == 5
    step = np.linalg.inv(frames[0].ego_to_global) @ frames[1].ego_to_global
    assert step[0, 3] > 0.3  # driving along x of the LiDAR
    assert abs(step[2, 3]) < 0.1
    occ3d = open_source("occ3d", {"root": str(shared_data / "occ3d_nuscenes")})
    labels = occ3d.load("scene-unknown").frames[0].labels
    assert labels.binary.sum() == 31_107  # numbers of the sample's README
    assert (labels.binary & labels.mask_lidar).sum() == 30_282
    assert (labels.binary & labels.mask_camera).sum() == 23_153
    pack(occ3d, str(tmp_path / "occ3d"))
    assert verify(str(tmp_path / "occ3d")) == []


FAULTS = [None, "", "no/such.file", 5, -1, np.nan, np.inf, 10**30, True, [], {}, np.array(5.0), np.array("x"), b"x"]
FAULTS += [[np.nan, 0, 0], [0, 0, 0, 0], [1e300, 0, 0], np.full((3, 3), np.nan), np.zeros((3, 3)), np.zeros((0, 7))]


def refusal(options):
    """What is said of OpenScene's frames, or nothing. Whatever is no ValueError comes through."""
    try:
        source = open_source("openscene", options)
        for name in source.scene_names():
            admit(source.load(name))
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.slow
def test_a_fault_in_any_field_of_openscene_is_one_line(tmp_path):
    options = layouts.openscene(tmp_path, scenes=1, frames=1)
    path = tmp_path / "meta_datas/log-a.pkl"
    [info] = pickle.loads(path.read_bytes())["infos"]

    def places(record, at=()):
        for name, value in record.items():
            yield (*at, name)
            if isinstance(value, dict):
                yield from places(value, (*at, name))

    refused = 0
    for place in [p for p in places(info) if p[0] != "cams" or len(p) == 1 or p[1] == "CAM_B0"]:
        for fault in FAULTS:
            changed = copy.deepcopy(info)
            inner = changed
            for name in place[:-1]:
                inner = inner[name]
            inner[place[-1]] = fault
            path.write_bytes(pickle.dumps([changed]))
            said = refusal(options)
            refused += bool(said)
            if said:
                assert str(tmp_path) in said or "scene name" in said, (place, fault, said)
                assert place[0] in said or "has no file" in said or "scene name" in said, (place, fault, said)
    assert refused > 300


@pytest.mark.parametrize(
    ("name", "file", "content", "message"),
    [
        ("semantickitti", "sequences/00/poses.txt", b"nan " * 12, r"poses\.txt: line 1: a number is not finite"),
        ("semantickitti", "sequences/00/poses.txt", b"0 " * 12, r"poses\.txt: pose of scan 0: is not a rigid pose"),
        ("semantickitti", "sequences/00/calib.txt", b"\xff\xfe", r"calib\.txt: is not text"),
        ("semantickitti", "sequences/00/calib.txt", b"P2: x\nTr: 1", r"calib\.txt: P2: could not convert"),
        ("semantickitti", "sequences/00/calib.txt", b"P2:" + b" 0" * 12 + b"\nTr:" + b" 0" * 12, "not the projection"),
        ("semantickitti", "sequences/00/labels/000000.label", b"123", r"000000\.label: 3 bytes are not a multiple"),
        (
            "sscbench",
            "calibration/perspective.txt",
            b"R_rect_00: 1 0 0 0 1 0 0 0 1\nP_rect_00: 1 2",
            "P_rect_00 is not the projection",
        ),
        ("sscbench", "calibration/calib_cam_to_velo.txt", b"inf " * 12, "line 1: a number is not finite"),
    ],
)
def test_damaged_text_of_kitti_names_file_and_line(tmp_path, name, file, content, message):
    options = {"semantickitti": layouts.semantickitti, "sscbench": layouts.sscbench}[name](tmp_path)
    assert (tmp_path / file).parent.is_dir()
    (tmp_path / file).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        list(iter_scenes(open_source(name, options)))


def test_openscene_names_no_file_outside_its_folder(tmp_path):
    options = layouts.openscene(tmp_path / "set", scenes=1, frames=1)
    path = tmp_path / "set/meta_datas/log-a.pkl"
    [info] = pickle.loads(path.read_bytes())["infos"]
    (tmp_path / "outside.jpg").write_bytes(next((tmp_path / "set").rglob("*.jpg")).read_bytes())
    for name, message in (
        ("../outside.jpg", "points outside"),
        (str(tmp_path / "outside.jpg"), "has no file"),
        ("a\0b", "points outside"),
    ):
        info["cams"]["CAM_B0"]["data_path"] = name
        path.write_bytes(pickle.dumps([info]))
        assert message in refusal(options)


def test_what_unpacks_beyond_measure_is_refused_before(tmp_path, monkeypatch):
    np.savez_compressed(tmp_path / "bomb.npz", semantics=np.zeros(1 << 20, np.uint8))
    assert rawfiles.read_npy(tmp_path / "bomb.npz")["semantics"].size == 1 << 20
    monkeypatch.setattr(rawfiles, "MOST_UNPACKED", 1 << 19)
    with pytest.raises(ValueError, match="unpacks to 1048704 bytes, at most 524288"):
        rawfiles.read_npy(tmp_path / "bomb.npz")
    head = b"FIELDS x\nSIZE 4\nTYPE F\nCOUNT 999999999\nPOINTS 1\nDATA ascii\n1\n"
    (tmp_path / "bomb.pcd").write_bytes(head)
    with pytest.raises(ValueError, match=r"counts .* are out of range"):
        rawfiles.read_pcd(tmp_path / "bomb.pcd")
