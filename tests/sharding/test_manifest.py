"""Manifests of earlier versions keep their meaning; large ones are arrays, checked like all that other people wrote."""

import dataclasses
import hashlib
import io
import json
import pickle
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import zstandard

from occstream.sharding import pack as packing
from occstream.sharding.arrays import pack_arrays, read_arrays
from occstream.sharding.attach import attach
from occstream.sharding.entries import BLOCK, PackedAttributes, SceneEntry, SceneTable, ShardEntry, ShardTable
from occstream.sharding.grid import get_grid
from occstream.sharding.manifest import Manifest
from occstream.sharding.order import by_scenes
from occstream.sharding.pack import pack
from occstream.sharding.schema import get_taxonomy
from occstream.sharding.stream import ShardReader
from tests.sharding.toy import ToySource

EARLIER = Path(__file__).parent / "earlier"  # written by version 0.2.0
GROUPS = ("lidar", "labels")
SCENES = [
    SceneEntry(f"{'ab_-Z9'[i % 6]}{i * i % 1009}", i % 50 + 1, i // 7, {"n": i, "town": "Köln"} if i % 3 else {})
    for i in range(2 * BLOCK + 5)
]
SHARDS = [ShardEntry(g, n, 10**9 + n, f"{n:064x}") for n in range(80) for g in GROUPS]


def manifest(url="x", arrays=True, **more):
    taxonomy = get_taxonomy("occ3d")
    about = {"source": "toy", "grid": get_grid("tiny"), "taxonomy": "occ3d", "classes": taxonomy.classes}
    return Manifest(url, **about, labels="native", groups=GROUPS, scenes=SCENES, shards=SHARDS, arrays=arrays, **more)


def test_an_earlier_manifest_keeps_its_fingerprints_order_and_bytes(tmp_path):
    found = Manifest.load(str(EARLIER))
    assert found.fingerprint == "da42ffb21b627decaf587380ad362c8b"
    assert dataclasses.replace(found).fingerprint == found.fingerprint  # computed, not read
    assert found.with_sidecar("pseudo-r1").fingerprint == "ba9a96fa3e0b59a57a83c94706d3d4a0"
    assert found.with_label_sets(["pseudo-r1"]).fingerprint == "e64ba104fc3718b75e451df47cc0796a"
    assert found.author("pseudo-r1").trained_on == {"scene-0103"}
    assert (found.subset(seed=3), found.held_out(2, 1)) == ([1, 0, 2, 3], [0, 1])
    assert found.scenes[0].attributes["speed"] == [1.5, None, True]
    assert found.scenes[-1] == SceneEntry("A-log", 5, 2, {})
    assert found.shard("lidar", 2).size == 1_000_015
    dataclasses.replace(found, url=str(tmp_path)).publish()
    assert (tmp_path / "manifest.json").read_bytes() == (EARLIER / "manifest.json").read_bytes()


def test_arrays_say_the_same_as_the_list(tmp_path):
    listed, url = manifest(arrays=False), str(tmp_path)
    manifest(url).publish()
    found = Manifest.load(url)
    assert (found.arrays, listed.arrays) == (True, False)
    assert isinstance(found.scenes.attributes, PackedAttributes)
    assert list(found.scenes) == SCENES == [found.scenes[i] for i in range(len(SCENES))]
    assert list(found.shards) == SHARDS
    assert dataclasses.replace(found, url="x") == listed
    assert found.content() == listed.content()
    assert (found.subset(seed=5), found.num_frames) == (listed.subset(seed=5), listed.num_frames)
    assert found.spread(40) == listed.spread(40)
    name = SCENES[300].name
    assert found.scenes[found.named([name])[0]].name == name
    with pytest.raises(ValueError, match="did you mean"):
        found.named([name + "x"])
    for missing in ("", "é", "zz"):
        assert found.scenes.find(missing) is None
    assert pickle.loads(pickle.dumps(found)) == found
    assert pickle.loads(pickle.dumps(found.scenes[4])) == SCENES[4]


def test_the_fingerprint_of_arrays_is_one_of_the_content_alone(tmp_path):
    found = manifest(str(tmp_path))
    assert found.fingerprint == "70d2544a0acac16660a603bc99a24f0a"
    found.publish()
    assert Manifest.load(str(tmp_path)).fingerprint == found.fingerprint
    longer = [*SCENES[:-1], dataclasses.replace(SCENES[-1], attributes={"n": 0})]
    others = [
        dataclasses.replace(found, scenes=longer),
        dataclasses.replace(found, scenes=SCENES[::-1]),
        dataclasses.replace(found, shards=SHARDS[::-1]),
        dataclasses.replace(found, labels="other"),
        dataclasses.replace(found, groups=(*GROUPS, "cameras")),
    ]
    assert len({m.fingerprint for m in (found, *others)}) == 6
    # Not of how groups are numbered.
    joined = ShardTable.of(SHARDS[:2]) + ShardTable.of(SHARDS[2:])
    assert joined.digest == ShardTable.of(SHARDS).digest
    twice = joined.without("labels") + ShardTable.of(SHARDS).only("labels")
    assert (twice.only("lidar"), twice.only("labels").find("labels", 3)) == (joined.only("lidar"), SHARDS[7])


def test_frames_counted_through_all_scenes():
    found = manifest()
    everything = [(s, i) for s, scene in enumerate(SCENES) for i in range(scene.frames)]
    assert found.places(np.arange(len(everything))) == everything
    assert found.spread(3) == [everything[0], everything[(len(everything) - 1) // 2], everything[-1]]


def test_the_identity_of_an_order_is_hashed_piece_by_piece():
    names = [f"s{i}" for i in range(9000)]
    frames = [i % 40 for i in range(9000)]
    listed = "\n".join(f"{n} {c}" for n, c in zip(names, frames))
    assert by_scenes(names, frames) == hashlib.blake2b(listed.encode(), digest_size=16).hexdigest()


def test_a_large_set_is_packed_read_and_packed_again_as_arrays(tmp_path, monkeypatch):
    url = str(tmp_path / "large")
    small = pack(ToySource(), url)
    monkeypatch.setattr(packing, "MOST_LISTED", 3)
    # As earlier versions left it: the fingerprint, which sidecars name, stays.
    assert pack(ToySource(), url).fingerprint == small.fingerprint
    assert not Manifest.load(url).arrays
    (tmp_path / "large" / "manifest.json").unlink()
    large = pack(ToySource(), url)
    found = Manifest.load(url)
    assert found.arrays
    assert found == small
    assert found.fingerprint == large.fingerprint != small.fingerprint
    assert pack(ToySource(), url).fingerprint == large.fingerprint
    labels = str(tmp_path / "labels")
    pack(ToySource(), labels, groups=("labels",))
    joined = attach(url, labels, "labels-x")
    assert joined.arrays
    assert joined.fingerprint == Manifest.load(url).with_sidecar("labels-x").fingerprint
    assert joined.author("labels-x").network == ""
    reader = ShardReader(joined, joined.groups)
    assert reader.frame(1, 4).key == "toy-1-0004"
    reader.close()


def test_arrays_of_an_earlier_manifest_are_removed_after_it(tmp_path):
    found = manifest(str(tmp_path))
    found.publish()
    changed = dataclasses.replace(found, labels="other")
    changed.publish()
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"manifest-{changed.fingerprint}.tar", "manifest.json"]
    assert Manifest.load(str(tmp_path)).sidecars() == []
    dataclasses.replace(found, arrays=False).publish()
    assert [p.name for p in tmp_path.iterdir()] == ["manifest.json"]


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    folder = tmp_path_factory.mktemp("arrays")
    found = manifest(str(folder))
    found.publish()
    return folder, f"manifest-{found.fingerprint}.tar"


def rewritten(data, edit):
    """The file with its members changed."""
    out = io.BytesIO()
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        members = {m.name: tar.extractfile(m).read() for m in tar}
    edit(members)
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return out.getvalue()


def column(name, dtype, place, value):
    def edit(members):
        array = np.frombuffer(zstandard.decompress(members[f"{name}.zst"]), dtype).copy()
        array[place] = value
        members[f"{name}.zst"] = zstandard.compress(array.tobytes())

    return edit


def about(**more):
    return lambda members: members.update({"about.json": json.dumps(json.loads(members["about.json"]) | more).encode()})


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (column("scenes-name", "S5", 3, "../x"), "name of scenes, entry 3"),
        (column("scenes-name", "S5", 0, ""), "name of scenes, entry 0"),
        (column("scenes-name", "S5", 1, "a\0b"), "name of scenes, entry 1"),
        (column("scenes-name", "S5", slice(None), "a"), "no name is that long"),
        (column("scenes-frames", "<i4", 9, 0), "frames of scenes, entry 9: 0 is not"),
        (column("scenes-frames", "<i4", 9, 10**6), "too few for its frames"),
        (column("scenes-shard", "<i4", 2, -1), "shard of scenes, entry 2"),
        (column("scenes-shard", "<i4", 2, 80), "no such shard"),
        (column("shards-group", "<i4", 0, 2), "group of shards, entry 0"),
        (column("shards-group", "<i4", 0, 1), "listed twice"),
        (column("shards-number", "<i4", 5, 10**9 + 1), "number of shards, entry 5"),
        (column("shards-size", "<i8", 5, 1 << 44), "size of shards, entry 5"),
        (column("scenes-block-end", "<i8", 1, 3), "do not follow each other"),
        (column("scenes-block-size", "<i4", 0, 1 << 30), "are larger than"),
        (about(scenes=10**12), "not an integer from 0"),
        (about(scenes=600), "damaged"),
        (about(name_bytes=0), "name_bytes"),
        (about(shard_groups=["lidar", "../x"]), "shard_groups"),
        (about(shard_groups=["lidar", "cameras"]), "groups does not name"),
        (lambda members: members.pop("shards-size.zst"), "has no shards-size.zst"),
        (lambda members: members.update({"scenes-name.zst": b"x"}), "damaged"),
        (lambda members: members.update({"about.json": b"[]"}), "holds list"),
    ],
)  # fmt: skip
def test_what_arrays_cannot_be_is_named(published, edit, message):
    folder, name = published
    data = rewritten((folder / name).read_bytes(), edit)
    with pytest.raises(ValueError, match=rf"^where: .*{message}"):
        read_arrays(data, "where", GROUPS)


def test_a_change_that_could_be_is_found_by_the_fingerprint(published, tmp_path):
    folder, name = published
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    edits = [
        column("scenes-frames", "<i4", 9, 3),
        column("shards-sha256", "u1", 9, 3),
        column("scenes-block-digest", "u1", 9, 3),
    ]
    for edit in edits:
        (tmp_path / name).write_bytes(rewritten((folder / name).read_bytes(), edit))
        with pytest.raises(ValueError, match="does not match its fingerprint"):
            Manifest.load(str(tmp_path))
    (tmp_path / name).write_bytes((folder / name).read_bytes()[:700])
    with pytest.raises(ValueError, match=rf"{name}: damaged"):
        Manifest.load(str(tmp_path))
    (tmp_path / name).unlink()
    with pytest.raises(ValueError, match=rf"{name}: is missing"):
        Manifest.load(str(tmp_path))
    head = json.loads((tmp_path / "manifest.json").read_text()) | {"fingerprint": "../../etc/passwd"}
    (tmp_path / "manifest.json").write_text(json.dumps(head))
    with pytest.raises(ValueError, match="not 32 hex digits"):
        Manifest.load(str(tmp_path))


def test_damaged_attributes_are_found_when_they_are_asked_for(published):
    folder, name = published

    def edit(members):
        packed = bytearray(members["scenes-attributes.zst"])
        packed[-6] ^= 1
        members["scenes-attributes.zst"] = bytes(packed)

    scenes, _ = read_arrays(rewritten((folder / name).read_bytes(), edit), "where", GROUPS)
    assert scenes[0].attributes == {}
    assert scenes[1].attributes["town"] == "Köln"
    with pytest.raises(ValueError, match=rf"where: attributes of scenes from number {2 * BLOCK} are damaged"):
        scenes[-1].attributes["n"]


def test_the_file_can_be_read_with_tar_and_zstd_alone(published):
    folder, name = published
    with tarfile.open(folder / name) as tar:
        unpack = zstandard.ZstdDecompressor().stream_reader(
            tar.extractfile("scenes-attributes.zst"), read_across_frames=True
        )
        text = unpack.read().decode()
    rows = json.loads("[" + text.replace("][", ",")[1:])
    assert rows[1] == {"n": 1, "town": "Köln"}
    assert len(rows) == len(SCENES)


def test_no_scenes_and_no_shards():
    scenes, shards = read_arrays(pack_arrays(SceneTable.of([]), ShardTable.of([])), "w", GROUPS)
    assert (list(scenes), list(shards), scenes.find("a"), shards.find("lidar", 0)) == ([], [], None, None)
