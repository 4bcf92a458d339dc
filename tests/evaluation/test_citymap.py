"""City maps: tiles against the whole, parts against one run, and files in the eyes of other readers."""

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from occstream.evaluation import citymap
from occstream.evaluation.citymap import CityMap, make_map
from occstream.evaluation.drive import DriveReader
from occstream.evaluation.mapfiles import write_bev, write_laz, write_ply
from occstream.evaluation.propagate import packed, pull, pull_maps
from occstream.evaluation.votes import VoteConfig, voting
from occstream.launch.cli import main
from occstream.sharding.grid import VoxelGrid
from occstream.sharding.manifest import Manifest
from occstream.sharding.pack import pack
from occstream.sharding.schema import IGNORE, OCC3D
from tests.evaluation.drives import GRID, Street

pytest.importorskip("zarr")
PLAIN = VoteConfig("none", empty=1.0)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Two drives along one street, and the map of both."""
    root = tmp_path_factory.mktemp("map")
    pack(Street(scenes=2, frames=8), str(root / "data"), groups=("labels",), grid=GRID, scenes_per_shard=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(citymap, "TILE", 16)  # several shards of few voxels
        patch.setattr(citymap, "TILES", (2, 2, 1))
        made = make_map(str(root / "data"), "labels", root / "city", scenes=[0, 1], config=PLAIN)
        assert made.complete
        assert made.shards == made.total > 4
        yield root


def sources(url, scenes):
    """Poses and what frames say, without things."""
    silent = [OCC3D.id(name) for name in OCC3D.things]
    reader = DriveReader(Manifest.load(url), "labels", view=False, silent=silent)
    found = [reader.read(s, i)[0] for s in scenes for i in range(reader.manifest.scenes[s].frames)]
    reader.close()
    return found


def test_tiles_are_the_whole(place):
    city, found = CityMap.open(place / "city"), sources(str(place / "data"), [0, 1])
    shape = city.array("class").shape
    # One target as large as the map, gathered at once.
    grid = VoxelGrid("whole", (0, 0, 0), tuple(np.multiply(shape, GRID.voxel)), GRID.voxel)
    corner = np.eye(4)
    corner[:3, 3] = city.origin
    maps = pull_maps(grid, corner, GRID, np.stack([s.pose for s in found]))
    volumes = np.stack([packed(s.semantic) for s in found])
    before = np.full(shape, IGNORE, np.uint8)
    whole = pull(voting(PLAIN, GRID, OCC3D), maps, volumes, range(len(found)), before=before, details=True)
    assert (city.array("class")[:] == whole.semantic).all()
    assert (city.array("confidence")[:] == whole.confidence).all()
    assert (city.array("frames")[:] == whole.frames).all()
    assert (city.array("last")[:] == whole.last).all()
    assert whole.last.max() == 15
    assert city.frames[15] == "street-1-0007"
    assert not np.isin(whole.semantic, [OCC3D.id(name) for name in OCC3D.things]).any()


def test_pulled_back_it_says_what_the_frames_say(place, tmp_path):
    city, right, seen = CityMap.open(place / "city"), 0, 0
    for source in sources(str(place / "data"), [0, 1]):
        back = city.pulled_back(GRID, source.pose)
        known = (back != IGNORE) & (source.semantic != IGNORE)
        assert known.mean() > 0.9
        right, seen = right + (back == source.semantic)[known].sum(), seen + known.sum()
    assert right / seen > 0.97, "half-meter voxels of turned grids"
    pack(Street(scenes=1, frames=1), str(tmp_path / "one"), groups=("labels",), grid=GRID)
    make_map(str(tmp_path / "one"), "labels", tmp_path / "city", scenes=[0], config=PLAIN)
    [source] = sources(str(tmp_path / "one"), [0])
    back = CityMap.open(tmp_path / "city").pulled_back(GRID, source.pose)
    seen = back != IGNORE
    assert seen.mean() > 0.9
    assert (back == source.semantic)[seen].all(), "its grid is not turned"


def test_a_grid_along_the_maps_axes_gets_exactly_the_votes_back(place):
    """Votes are counted at the centers of the map's voxels: only a turned or shifted grid asks between them."""
    city, found = CityMap.open(place / "city"), sources(str(place / "data"), [0, 1])
    pose = np.eye(4)
    middle = np.mean([source.pose[:3, 3] for source in found], axis=0)
    pose[:3, 3] = city.origin - GRID.lower + np.round((middle - city.origin + GRID.lower) / GRID.voxel) * GRID.voxel
    maps = pull_maps(GRID, pose, GRID, np.stack([source.pose for source in found]))
    volumes = np.stack([packed(source.semantic) for source in found])
    nothing = np.full(GRID.shape, IGNORE, np.uint8)
    votes = pull(voting(PLAIN, GRID, OCC3D), maps, volumes, range(len(found)), before=nothing).semantic
    assert (votes != IGNORE).mean() > 0.9
    assert (city.pulled_back(GRID, pose) == votes).all()


def digests(folder):
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in Path(folder).rglob("*")
        if p.is_file()
    }


def test_parts_of_two_machines_and_a_kill_give_the_same_bytes(place, tmp_path):
    url = str(place / "data")

    def killed(done, total):
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_map(url, "labels", tmp_path / "a", scenes=[0, 1], config=PLAIN, part=(1, 2), progress=killed)
    first = make_map(url, "labels", tmp_path / "a", scenes=[0, 1], config=PLAIN, part=(1, 2), threads=3)
    assert (first.skipped, first.complete) == (2, False)
    with pytest.raises(ValueError, match="no complete map"):
        CityMap.open(tmp_path / "a")
    second = make_map(url, "labels", tmp_path / "b", scenes=[0, 1], config=PLAIN, part=(2, 2))
    assert not second.complete
    shutil.copytree(tmp_path / "b", tmp_path / "a", dirs_exist_ok=True)
    last = make_map(url, "labels", tmp_path / "a", scenes=[0, 1], config=PLAIN)
    assert (last.shards, last.complete) == (0, True)
    assert digests(tmp_path / "a") == {
        k: v for k, v in digests(place / "city").items() if "/" in k or k in ("digest", "map.json")
    }


def test_points_and_picture_open_in_other_readers(place):
    laspy, plyfile = pytest.importorskip("laspy"), pytest.importorskip("plyfile")
    city = CityMap.open(place / "city")
    array = city.array("class")[:]
    index = np.argwhere(array < 17)
    want = city.origin + (index + 0.5) * city.voxel
    rows = lambda xyz: {tuple(r) for r in np.rint(4 * np.asarray(xyz)).astype(int).tolist()}  # noqa: E731
    assert write_laz(city, place / "map.laz") == len(index)
    points = laspy.read(place / "map.laz")
    assert (str(points.header.version), points.header.point_format.id) == ("1.4", 7)
    assert rows(points.xyz) == rows(want)
    assert (
        np.bincount(points.classification, minlength=17).tolist()
        == np.bincount(array[array < 17], minlength=17).tolist()
    )
    assert write_ply(city, place / "map.ply") == len(index)
    data = plyfile.PlyData.read(str(place / "map.ply"))
    vertex = data["vertex"]
    assert rows(np.stack([vertex[n] for n in "xyz"], 1) + city.origin) == rows(want)
    assert sorted(vertex["class"]) == sorted(array[array < 17])
    assert f"origin {float(city.origin[0])!r}" in data.comments[0]
    width, height = write_bev(city, place / "map.png")
    picture = np.array(Image.open(place / "map.png"))
    assert picture.shape == (height, width, 4)
    step_x, _, _, step_y, left, above = map(float, (place / "map.pgw").read_text().split())
    for _ in range(50):
        i, j = np.random.default_rng(_).integers(0, array.shape[:2])
        column, row = (
            round((city.origin[0] + (i + 0.5) * 0.5 - left) / step_x),
            round((city.origin[1] + (j + 0.5) * 0.5 - above) / step_y),
        )
        solid = np.flatnonzero(array[i, j] < 17)
        color = (*OCC3D.colors[array[i, j, solid[-1]]], 255) if len(solid) else (0, 0, 0, 0)
        assert tuple(picture[row, column]) == color


def test_the_command_says_what_it_did(place, tmp_path, capsys):
    words = ["map", str(place / "data"), "--labels", "labels", "--out", str(tmp_path / "city")]
    assert main(words) == 2
    assert "name them with --scenes" in capsys.readouterr().err
    assert main([*words, "--scenes", "street-1", "--ply", "--bev"]) == 0
    said = capsys.readouterr().out
    assert "complete: 8 frames, origin 449984.0, 5199984.0, 64.0 m" in said
    assert "map.ply: " in said
    assert json.loads((tmp_path / "city" / "map.json").read_text())["scenes"] == [1]
    assert main([*words, "--scenes", "street-0"]) == 2
    assert "a map of other labels or settings" in capsys.readouterr().err
    assert main([*words, "--scenes", "street-9"]) == 2
    assert "has no scene" in capsys.readouterr().err
    assert (
        main(["map", str(place / "data"), "--labels", "pseudo-x", "--out", str(tmp_path / "x"), "--scenes", "all"]) == 2
    )
    assert not (tmp_path / "x").exists()


def test_things_stay_if_they_are_asked_for(place, tmp_path):
    make_map(str(place / "data"), "labels", tmp_path / "city", scenes=[0], config=PLAIN, things=True)
    array = CityMap.open(tmp_path / "city").array("class")[:]
    assert (array == OCC3D.id("car")).sum() > 50, "the parked one"
