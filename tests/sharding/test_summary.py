"""`occstream shard` says the same of every source: label source and why, grid, share unknown, views, what it left out."""

import pickle

import pytest

from occstream.launch.cli import main
from occstream.sharding.manifest import Manifest
from occstream.sharding.sources import open_source
from occstream.sharding.stream import ShardReader
from occstream.sharding.summary import after
from tests.sharding import layouts

SIX = "CAM_BACK, CAM_BACK_LEFT, CAM_BACK_RIGHT, CAM_FRONT, CAM_FRONT_LEFT, CAM_FRONT_RIGHT"
EIGHT = "CAM_B0, CAM_F0, CAM_L0, CAM_L1, CAM_L2, CAM_R0, CAM_R1, CAM_R2"
KITTI = "semantickitti, 256x256x32 voxels of 0.2 m, lidar frame"
NO_MASK = "0.0 %, as these labels have no mask: every voxel counts as known"
OCC3D = "occ3d, 200x200x16 voxels of 0.4 m, ego frame"
TINY = "tiny, 48x48x8 voxels of 0.8 m, ego frame"
# Of each layout: labels, grid, unknown, views (None: whatever the toy has).
SAID = {
    ("nuscenes", 0): (
        "made from LiDAR: no label set was requested with labels=, and there is none below the root",
        TINY,
        None,
    ),
    ("nuscenes", 1): ("native: occ3d, below ", OCC3D, "50.0 % of the voxels of 4 frames"),
    ("nuscenes", 2): (
        "native: openoccupancy, below ",
        "openoccupancy, 512x512x40 voxels of 0.2 m, lidar frame",
        "0.0 % of the voxels of 4 frames",
    ),
    ("nuscenes", 3): (
        "native: surroundocc, below ",
        "surroundocc, 200x200x16 voxels of 0.5 m, lidar frame",
        "0.0 % of the voxels of 4 frames",
    ),
    ("occ3d", 0): ("native: gts/<scene>/<token>/labels.npz", OCC3D, "50.0 % of the voxels of 2 frames", "none"),
    ("openscene", 0): (
        "native: the metadata names occupancy files",
        "openscene, 200x200x16 voxels of 0.5 m, ego frame",
        NO_MASK,
        f"8: {EIGHT}",
    ),
    ("semantickitti", 0): ("native: voxels/*.label", KITTI, "0.0 % of the voxels of 2 frames", "1: image_2"),
    ("sscbench", 0): ("native: voxels/*.label", KITTI, "0.0 % of the voxels of 2 frames", "1: image_00"),
    ("waymo_occ3d", 0): ("native: FFF_04.npz, 0.4 m", OCC3D, "50.0 % of the voxels of 2 frames", "none"),
    ("kitti_object", 0): ("made from LiDAR: KITTI object has boxes alone", TINY, None, "1: image_2"),
    ("argoverse2", 0): (
        "made from LiDAR: Argoverse 2 has boxes alone",
        TINY,
        None,
        "2: ring_front_center, ring_side_left (ring_side_left in 2 of 4 frames)",
    ),
    ("physicalai", 0): ("made from LiDAR: ", TINY, None),
    ("physicalai", 1): ("made from LiDAR: ", TINY, None),
    ("synthetic", 0): ("native: the source brings them", TINY, None, f"6: {SIX}"),
}


def command(name: str, options: dict, out, *more: str) -> list[str]:
    """`occstream shard` with the options that open a layout."""
    options = dict(options)
    root = options.pop("root", None)
    words = [f"{k}={list(v) if isinstance(v, tuple) else v}" for k, v in options.items()]
    return ["shard", name, *words, *(["--root", root] if root else []), "--out", str(out), "--zstd-level", "1", *more]


def lines_of(said: str) -> dict[str, list[str]]:
    found = {}
    for line in said.splitlines():
        for key in ("labels", "points", "grid", "classes", "unknown", "views", "left out"):
            if line.startswith(f"{key} ".ljust(11)):
                found.setdefault(key, []).append(line[11:])
    return found


def masks(out) -> list:
    manifest = Manifest.load(str(out))
    reader = ShardReader(manifest, ("labels",))
    found = [reader.frame(i, 0).labels.mask_lidar for i in range(len(manifest.scenes))]
    reader.close()
    return found


def test_every_layout_is_here():
    assert set(SAID) == {(name, i) for name, writers in layouts.LAYOUTS.items() for i in range(len(writers))}


@pytest.mark.parametrize(("name", "number"), SAID)
def test_what_every_source_says(name, number, tmp_path, capsys):
    labels, grid, unknown, *views = SAID[name, number]
    options = layouts.LAYOUTS[name][number](tmp_path / "in")
    more = ["--grid", "tiny"] if labels.startswith("made") else []
    assert main(command(name, options, tmp_path / "out", *more)) == 0
    found = lines_of(capsys.readouterr().out)
    scenes = len(open_source(name, options).scene_names())
    [said] = found["labels"]
    assert said.startswith(labels)
    assert said.endswith("; for the one scene" if scenes == 1 else f"; the same for all {scenes} scenes")
    assert found["grid"] == [grid]
    made = labels.startswith("made")
    assert found.get("points") == (["without classes: labels are binary"] if made else None)
    assert found["classes"][0].startswith("none: labels are binary" if made else "semantic in ")
    [said] = found["unknown"]
    assert said == unknown if unknown else said.endswith("frames")
    assert not unknown or (said == NO_MASK) == all(mask is None for mask in masks(tmp_path / "out"))
    [said] = found["views"]
    assert not views or said == views[0]
    assert found["left out"] == ["nothing"]


def drop_occupancy(root, frames: set[tuple[int, int]]) -> None:
    """Takes the occupancy of (scene, frame) out of the metadata, as public files do: the key is there, and None."""
    file = root / "meta_datas" / "log-a.pkl"
    content = pickle.loads(file.read_bytes())
    for info in content["infos"]:
        if (int(info["scene_name"][-4:]), info["frame_idx"]) in frames:
            info["occ_gt_final_path"] = info["flow_gt_final_path"] = None
    file.write_bytes(pickle.dumps(content))


def test_openscene_frames_without_occupancy_are_left_out_and_named(tmp_path, capsys):
    options = layouts.openscene(tmp_path / "in", frames=3)
    drop_occupancy(tmp_path / "in", {(1, 1)})
    assert main(command("openscene", options, tmp_path / "out", "--groups", "labels")) == 0
    found = lines_of(capsys.readouterr().out)
    assert found["left out"] == ["1 frame without occupancy, of 1 scene (log-0001-scene-0001 frames 1)"]
    manifest = Manifest.load(str(tmp_path / "out"))
    assert [s.frames for s in manifest.scenes] == [3, 2]
    assert manifest.labels == "native"
    # Labels that are made from LiDAR need no occupancy.
    assert [
        len(open_source("openscene", options | {"labels": False}).load(n).frames)
        for n in ("log-0001-scene-0000", "log-0001-scene-0001")
    ] == [3, 3]


def test_mixed_label_sources_are_refused(tmp_path, capsys):
    options = layouts.openscene(tmp_path / "a")
    drop_occupancy(tmp_path / "a", {(1, 0), (1, 1)})
    assert main(command("openscene", options, tmp_path / "out")) == 2
    assert "1 scene (log-0001-scene-0001) without any occupancy, but others have it" in capsys.readouterr().err
    options = layouts.semantickitti(tmp_path / "b")
    layouts.semantickitti(tmp_path / "c", voxels=False)
    (tmp_path / "c/sequences/00").rename(tmp_path / "b/sequences/11")
    assert main(command("semantickitti", options, tmp_path / "out")) == 2
    said = capsys.readouterr().err
    assert "1 sequence (11) without voxel labels, but 00 has them; choose sequences= or labels=false" in said
    assert not (tmp_path / "out").exists()
    (tmp_path / "b/sequences/11/labels").rename(tmp_path / "b/sequences/11/others")
    assert main(command("semantickitti", options, tmp_path / "out", "--labels", "lidar")) == 2
    said = capsys.readouterr().err
    assert "1 sequence (11) without labels of points, but 00 has them; choose sequences=" in said
    (tmp_path / "b/sequences/11/others").rename(tmp_path / "b/sequences/11/labels")
    assert open_source("semantickitti", options | {"labels": False}).grid is None
    assert open_source("semantickitti", options | {"sequences": ("00",)}).grid is not None


def test_labels_of_two_kinds_from_lidar_are_refused_by_scene(tmp_path, capsys, shared_data):
    """The real sample has lidarseg for one of its scenes."""
    root = str(shared_data / "nuscenes")
    for command in ("shard", "label"):
        assert main([command, "nuscenes", "--root", root, "--out", str(tmp_path / "out"), "--dry-run"]) == 2
        said = capsys.readouterr().err
        assert "without lidarseg, but scene-9001 has it; choose scenes=" in said
    source = open_source("nuscenes", {"root": root, "scenes": ("scene-9001",)})
    assert (source.findings.points, source.findings.mixture) == ("lidarseg", "")


def test_scans_without_a_label_and_drives_without_voxels_are_named(tmp_path):
    options = layouts.semantickitti(tmp_path / "a")
    (tmp_path / "a/sequences/00/voxels/000006.bin").write_bytes(b"")
    [line] = open_source("semantickitti", options).findings.left_out
    assert line == "1 scan (000006) of sequence 00 with voxels but without a .label"
    options = layouts.sscbench(tmp_path / "b")
    (tmp_path / "b/data_2d_raw/2013_05_28_drive_0002_sync").mkdir()
    [line] = open_source("sscbench", options).findings.left_out
    assert line == "1 drive (2013_05_28_drive_0002_sync) without voxels/*.label"
    options = layouts.occ3d(tmp_path / "c")
    (tmp_path / "c/gts/scene-0007/bare").mkdir()
    (tmp_path / "c/gts/scene-0008").mkdir()
    assert open_source("occ3d", options).findings.left_out == (
        "1 frame (scene-0007/bare) without a labels.npz",
        "1 scene (scene-0008) without any labels.npz",
    )


def test_ground_truth_that_is_there_and_not_read_is_an_error_unless_asked_for(tmp_path, capsys):
    options = layouts.nuscenes_with("occ3d")(tmp_path / "in")
    del options["labels"]
    assert main(command("nuscenes", options, tmp_path / "out")) == 2
    said = capsys.readouterr().err
    assert "holds public labels, occ3d (gts/); read them with labels=occ3d; or say --labels lidar" in said
    assert main(command("nuscenes", options, tmp_path / "out", "--labels", "none", "--groups", "cameras,labels")) == 0
    assert lines_of(capsys.readouterr().out)["labels"][0].startswith("none")
    options = layouts.openscene(tmp_path / "v11", occupancy=False)
    (tmp_path / "v11/occupancy").mkdir()
    assert main(command("openscene", options, tmp_path / "out2")) == 2
    assert "there is occupancy, but the metadata in" in capsys.readouterr().err


def test_another_grid_than_that_of_the_labels_needs_a_word(tmp_path, capsys):
    options = layouts.occ3d(tmp_path / "in")
    assert main(command("occ3d", options, tmp_path / "out", "--grid", "tiny")) == 2
    assert "leave --grid out to take them, or say --labels lidar" in capsys.readouterr().err


def test_frames_with_fewer_views_are_counted(tmp_path, capsys):
    options = layouts.semantickitti(tmp_path / "in")
    (tmp_path / "in/sequences/00/image_2/000005.png").unlink()
    assert main(command("semantickitti", options, tmp_path / "out", "--groups", "cameras")) == 0
    capsys.readouterr()
    assert after(Manifest.load(str(tmp_path / "out"))) == [
        "unknown    no labels",
        "views      1: image_2 (image_2 in 1 of 2 frames)",
        "cameras    missing: image_2 in 1 frame; training replaces such frames with others of their scene, evaluation skips "
        "them",
    ]
