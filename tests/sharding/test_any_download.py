"""What people's folders hold: images of every kind that a viewer opens, files of operating systems, half a download."""

import io
import json

import cv2
import numpy as np
import pytest
import simplejpeg
from PIL import Image

from occstream.launch.cli import main
from occstream.pretrain.tasks.occupancy import camera_names
from occstream.sharding import rawfiles
from occstream.sharding.check import verify
from occstream.sharding.codec import encode
from occstream.sharding.pack import Job, estimate, pack
from occstream.sharding.prepare import Images
from occstream.sharding.sources import open_source
from occstream.sharding.summary import after
from tests.sharding import layouts
from tests.sharding.test_shards import same
from tests.sharding.toy import ToySource, toy_frame

# A smooth picture, which survives JPEG: by its colors one sees that none were swapped or inverted.
PICTURE = cv2.resize(np.random.default_rng(3).integers(0, 255, (6, 8, 3)).astype(np.uint8), (64, 48))


def image(kind, mode="RGB", **options):
    out = io.BytesIO()
    Image.fromarray(PICTURE).convert(mode).save(out, kind, **options)
    return out.getvalue()


def turned(orientation):
    exif = Image.Exif()
    exif[0x112] = orientation
    return image("JPEG", quality=95, exif=exif)


IMAGES = {
    "jpeg": image("JPEG", quality=95),
    "progressive": image("JPEG", quality=95, progressive=True),
    "gray": image("JPEG", "L", quality=95),
    "cmyk": image("JPEG", "CMYK", quality=95),
    "upright": turned(1),
    "png": image("PNG"),
    "png-alpha": image("PNG", "RGBA"),
    "png-palette": image("PNG", "P"),
    "webp": image("WEBP", quality=95),
    "bmp": image("BMP"),
    "tiff": image("TIFF"),
}


@pytest.mark.parametrize("kind", IMAGES)
def test_images_that_a_viewer_opens(tmp_path, kind):
    (tmp_path / "a").write_bytes(IMAGES[kind])
    jpeg, width, height = rawfiles.read_jpeg(tmp_path / "a")
    assert (width, height) == (64, 48)
    assert (jpeg == IMAGES[kind]) == (kind in ("jpeg", "progressive", "gray", "upright"))
    want = np.asarray(Image.fromarray(PICTURE).convert("L" if kind == "gray" else "RGB").convert("RGB"), float)
    limit = 20 if kind == "png-palette" else 5
    assert np.abs(simplejpeg.decode_jpeg(jpeg, "RGB") - want).mean() < limit


@pytest.mark.parametrize("orientation", [3, 6])
def test_an_image_that_is_to_be_shown_turned_is_refused(tmp_path, orientation):
    (tmp_path / "a.jpg").write_bytes(turned(orientation))
    with pytest.raises(ValueError, match=rf"a.jpg: is marked for rotated display \(EXIF orientation {orientation}\)"):
        rawfiles.read_jpeg(tmp_path / "a.jpg")


@pytest.mark.parametrize("data", [b"", b"\x89PNG broken", b"\xff\xd8\xff broken", b"<html>not found</html>"])
def test_what_is_no_image_is_named(tmp_path, data):
    (tmp_path / "a.jpg").write_bytes(data)
    with pytest.raises(ValueError, match=r"a.jpg: not a readable image .*download it again"):
        rawfiles.read_jpeg(tmp_path / "a.jpg")


@pytest.mark.parametrize(
    ("name", "where"),
    [
        ("nuscenes", "samples/CAM_FRONT/*"),
        ("openscene", "sensor_blobs/mini/log-a/CAM_L1/*"),
        ("semantickitti", "sequences/00/image_2/*"),
    ],
)
@pytest.mark.parametrize("kind", ["png", "cmyk", "gray"])
def test_sources_take_them_and_what_they_pack_is_intact(tmp_path, name, where, kind):
    options = layouts.LAYOUTS[name][0](tmp_path / "raw")
    for path in (tmp_path / "raw").glob(where):
        path.write_bytes(IMAGES[kind])
    pack(open_source(name, options), str(tmp_path / "out"), groups=("cameras",))
    assert verify(str(tmp_path / "out")) == []


@pytest.mark.parametrize("name", [n for n in layouts.LAYOUTS if n != "synthetic"])
def test_files_that_operating_systems_leave_change_nothing(tmp_path, name):
    options = layouts.LAYOUTS[name][0](tmp_path)
    source = open_source(name, options)
    before = {scene: source.load(scene) for scene in source.scene_names()}
    for folder in [tmp_path, *(p for p in tmp_path.rglob("*") if p.is_dir())]:
        for path in [p for p in folder.iterdir() if p.is_file()]:
            (folder / f"._{path.name}").write_bytes(b"\x00\x05\x16\x07 AppleDouble")
        for left in (".DS_Store", "Thumbs.db", "desktop.ini"):
            (folder / left).write_bytes(b"\x00\x00\x00\x01Bud1")
        (folder / "__MACOSX").mkdir()
        (folder / "__MACOSX" / "._log-a.pkl").write_bytes(b"\x00\x05\x16\x07")
    again = open_source(name, options)
    assert again.scene_names() == list(before)
    assert repr(again) == repr(source)
    assert getattr(again, "findings", None) == getattr(source, "findings", None)
    for scene, frames in before.items():
        assert same(again.load(scene), frames)


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("semantickitti", "sequences/00/velodyne/000000 (1).bin"),
        ("sscbench", "data_2d_raw/2013_05_28_drive_0000_sync/voxels/copy.label"),
        ("waymo_occ3d", "training/000/x_04.npz"),
    ],
)
def test_a_file_whose_name_is_no_number_is_named(tmp_path, name, file):
    options = layouts.LAYOUTS[name][0](tmp_path)
    (tmp_path / file).write_bytes(b"")

    def load():
        source = open_source(name, options)
        source.load(source.scene_names()[0])

    with pytest.raises(ValueError, match=r"its name is not a .*number.*; move it elsewhere"):
        load()


@pytest.fixture
def partial(tmp_path):
    """Four scenes of nuScenes, of which one is downloaded."""
    layouts.toy_nuscenes.write(tmp_path / "raw", scenes=4)
    for path in (tmp_path / "raw").glob("samples/*/*"):
        if "s2-" not in path.name:
            path.unlink()
    return tmp_path


def test_dry_run_works_on_the_scenes_that_are_there(partial):
    job = Job(open_source("nuscenes", {"root": str(partial / "raw")}), str(partial / "out"), ("cameras", "lidar"))
    found = estimate(job)
    assert (found.scenes, found.tried, sorted(found.failed)) == (4, 1, ["scene-0000", "scene-0001", "scene-0003"])
    assert found.packable == 1
    assert found.frames == 2
    assert found.bytes["cameras"] > 1000
    assert not (partial / "out").exists()


def test_dry_run_says_how_many_are_there_and_packing_how_to_go_on(partial, capsys):
    command = [
        "shard",
        "nuscenes",
        "--root",
        str(partial / "raw"),
        "--out",
        str(partial / "out"),
        "--groups",
        "cameras,lidar",
    ]
    assert main([*command, "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "3 of 4 scenes tried cannot be packed, such as scene-0000: " in said
    assert "is missing (the tables name it); complete the download" in said
    assert "estimated from 1 scene for the about 1 that can be packed:" in said
    assert main(command) == 2
    assert "To pack the others anyway: --max-failures N" in capsys.readouterr().err
    assert main([*command, "--max-failures", "3"]) == 0
    assert verify(str(partial / "out")) == []


class Gappy(ToySource):
    """Two cameras; one frame of the first scene lacks one, and so does its first frame of the other."""

    def load(self, name):
        scene = super().load(name)
        for frame in scene.frames:
            camera = frame.cameras["CAM_A"]
            frame.cameras = {"CAM_A": camera, "CAM_B": camera}
        if name == "toy-0":
            del scene.frames[0].cameras["CAM_A"], scene.frames[1].cameras["CAM_B"]
        return scene


def test_a_missing_camera_is_told_at_packing_and_verifying(tmp_path, capsys):
    manifest = pack(Gappy((3, 2)), str(tmp_path / "out"))
    assert manifest.scenes[0].attributes["lacking"] == {"CAM_A": 1, "CAM_B": 1}
    assert "lacking" not in manifest.scenes[1].attributes
    line = "missing: CAM_A in 1 frame, CAM_B in 1 frame; training replaces such frames with others of their scene, evaluation "
    line += "skips them"
    assert f"cameras    {line}" in after(manifest)
    assert main(["verify", str(tmp_path / "out")]) == 0
    assert line in capsys.readouterr().out


def test_a_chosen_camera_may_be_missing_in_a_frame_but_not_in_a_scene(tmp_path):
    manifest = pack(Gappy((3, 2)), str(tmp_path / "out"), images=Images(cameras=("CAM_B",)))
    assert manifest.scenes[0].attributes["lacking"] == {"CAM_B": 1}
    assert verify(str(tmp_path / "out")) == []
    with pytest.raises(ValueError, match="scene toy-0 has no camera 'CAM_C', only CAM_B, CAM_A"):
        pack(Gappy((3, 2)), str(tmp_path / "other"), images=Images(cameras=("CAM_C",)))


def test_cameras_to_train_on_are_the_rigs_and_not_the_first_frames(tmp_path):
    manifest = pack(Gappy((3, 2)), str(tmp_path / "out"))
    assert sorted(camera_names(manifest, 0)) == sorted(camera_names(manifest, 0, None)) == ["CAM_A", "CAM_B"]
    assert camera_names(manifest, 0, ("CAM_B",)) == ("CAM_B",)
    with pytest.raises(ValueError, match=r"scene toy-0 has no camera 'CAM_TOP', only CAM_B, CAM_A; set data.cameras"):
        camera_names(manifest, 0, ("CAM_TOP",))


def renamed(root, names):
    """Channels of a nuScenes folder by other names."""
    path = root / "v1.0-toy" / "sensor.json"
    rows = json.loads(path.read_text())
    for row in rows:
        row["channel"] = names[row["channel"]]
    path.write_text(json.dumps(rows))


def test_rigs_with_other_names_are_told_what_to_set(tmp_path):
    options = layouts.nuscenes(tmp_path)
    usual = open_source("nuscenes", options)
    assert repr(usual) == "Nuscenes(version='v1.0-toy', sweeps=True, taxonomy=Taxonomy(name='occ3d'), labels=None)"
    renamed(tmp_path, {"CAM_FRONT": "FRONT_CAMERA", "LIDAR_TOP": "LIDAR_LEFT"})
    with pytest.raises(
        ValueError, match=r"sensor.json: has no channel LIDAR_TOP, its LiDARs are LIDAR_LEFT; set lidar=NAME"
    ):
        open_source("nuscenes", options)
    with pytest.raises(ValueError, match=r"named like CAM\*, its cameras are FRONT_CAMERA; set cameras=\[NAME,…\]"):
        open_source("nuscenes", options | {"lidar": "LIDAR_LEFT"})
    source = open_source("nuscenes", options | {"lidar": "LIDAR_LEFT", "cameras": ["*_CAMERA"]})
    assert repr(source) != repr(usual)
    frame, before = source.load("scene-0000").frames[1], usual.load("scene-0000").frames[1]
    assert list(frame.cameras) == ["FRONT_CAMERA"]
    assert same([frame.lidar, frame.sweeps], [before.lidar, before.sweeps])


def test_sets_without_a_lidar_or_cameras_need_no_setting(tmp_path):
    options = layouts.nuscenes(tmp_path)
    renamed(tmp_path, {"CAM_FRONT": "CAM_FRONT", "LIDAR_TOP": "RADAR_FRONT"})
    assert open_source("nuscenes", options).load("scene-0000").frames[0].lidar is None


@pytest.mark.parametrize(("kind", "message"), [("png", "is a PNG or another image"), ("cmyk", "JPEG is in CMYK")])
def test_a_source_that_hands_over_other_images_is_told_so(kind, message):
    frame = toy_frame("a", 0)
    frame.cameras["CAM_A"].jpeg = IMAGES[kind]
    with pytest.raises(ValueError, match=rf"frame a-0000, CAM_A: {message}.* rawfiles.read_jpeg"):
        encode(frame, "cameras")
