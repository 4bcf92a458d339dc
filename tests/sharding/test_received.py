"""Manifests, indices and frames of other people: what they say is checked before a path, a loop or memory follows from it."""

import copy
import json
import tarfile

import numpy as np
import pytest
import zstandard

from occstream.sharding.codec import CorruptSample, decode, encode
from occstream.sharding.entries import SceneEntry, ShardEntry
from occstream.sharding.grid import get_grid
from occstream.sharding.manifest import Manifest, _digest
from occstream.sharding.pack import merge
from occstream.sharding.received import check_manifest, read_index
from occstream.sharding.schema import Frame, Labels, get_taxonomy
from occstream.sharding.stream import tar_members

SHARDS = tuple(ShardEntry(g, n, 100_000, "a" * 64) for g in ("lidar", "labels") for n in range(2))
GOOD = Manifest(
    "x", "toy", get_grid("tiny"), "occ3d", get_taxonomy("occ3d").classes, "native", ("lidar", "labels"),
    (SceneEntry("a", 3, 0), SceneEntry("b", 4, 1)), SHARDS,
).content()  # fmt: skip
GOOD["fingerprint"] = "0" * 32


def test_what_was_written_passes():
    check_manifest(GOOD, "m")


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (("scenes", 0, "name"), "../../pwned/x", "cannot be used"),
        (("scenes", 0, "name"), "a\n", "cannot be used"),
        (("scenes", 0, "frames"), 1e9, "not an integer"),
        (("scenes", 0, "frames"), 10**9, "not an integer"),
        (("scenes", 0, "frames"), 900_000, "too few for its frames"),
        (("scenes", 0, "frames"), True, "not an integer"),
        (("scenes", 0, "frames"), 0, "not an integer"),
        (("scenes", 1, "shard"), 7, "no such shard"),
        (("scenes", 1, "shard"), -1, "not an integer"),
        (("scenes", 1, "attributes"), [], "attributes"),
        (("scenes", 1, "more"), 1, "has missing or extra fields"),
        (("scenes",), {}, "not a list of objects"),
        (("groups",), ["lidar", "../x"], "groups is"),
        (("groups",), ["lidar", "lidar"], "different names"),
        (("shards", 0, "group"), "cameras", "groups does not name"),
        (("shards", 0, "group"), [], "groups does not name"),
        (("shards", 0, "size"), -5, "not an integer"),
        (("shards", 0, "sha256"), "../x", "cannot be used"),
        (("shards", 1, "number"), 0, "listed twice"),
        (("grid", "voxel"), [1e-9] * 3, "grid is not valid"),
        (("grid", "lower"), [float("nan"), 0, 0], "grid is not valid"),
        (("grid", "more"), 1, "grid is not valid"),
        (("grid",), None, "labels but no grid"),
        (("source",), "a\x1b[2J", "printable"),
        (("taxonomy",), 5, "printable"),
        (("classes",), "car", "list of names"),
        (("left_out",), [1], "list of names"),
    ],
)
def test_what_cannot_be_is_named(place, value, message):
    data = copy.deepcopy(GOOD)
    inner = data
    for part in place[:-1]:
        inner = inner[part]
    inner[place[-1]] = value
    with pytest.raises(ValueError, match=f"m: .*{message}"):
        check_manifest(data, "m")


def test_a_forged_manifest_with_the_right_sum_is_refused(tmp_path):
    data = {k: copy.deepcopy(v) for k, v in GOOD.items() if k != "fingerprint"}
    data["scenes"][0]["name"] = "../../pwned/x"
    (tmp_path / "manifest.json").write_text(json.dumps({**data, "fingerprint": _digest(data)}))
    with pytest.raises(ValueError, match=r"manifest\.json: name of scenes, entry 0: '../../pwned/x'"):
        Manifest.load(str(tmp_path))
    for text in ("[]", "[" * 5000, "{", "\udcff"):
        (tmp_path / "manifest.json").write_bytes(text.encode(errors="surrogateescape"))
        with pytest.raises(ValueError, match=r"manifest\.json: (damaged|holds)"):
            Manifest.load(str(tmp_path))


@pytest.mark.parametrize(
    "frames",
    [None, 5, [["a", 0]], [["a", -1, 5]], [["a", 0, 101]], [["a", 99, 5]], [[1, 0, 5]], [["a", 0, 1.5]], [["a", 0, 0]]],
)
def test_an_index_stays_in_its_tar(frames):
    with pytest.raises(ValueError, match="w: its index does not fit"):
        read_index({"frames": frames}, "w", 100)
    assert read_index({"frames": [["a", 0, 100]]}, "w", 100) == {"a": (0, 100)}


def test_a_member_of_negative_or_too_large_size_is_no_endless_loop():
    def header(size):
        info = tarfile.TarInfo("k.x")
        info.size = 5
        data = bytearray(info.tobuf(tarfile.USTAR_FORMAT))
        data[124:136] = size.rjust(11, b" ") + b"\0"
        data[148:156] = b" " * 8
        data[148:156] = b"%06o\0 " % sum(data)
        return bytes(data) + bytes(512)

    assert tar_members(header(b"5"), "k") == {"x": bytes(5)}
    for size in (b"-1024", b"-512", b"77777777"):
        with pytest.raises(CorruptSample, match="reaches beyond"):
            tar_members(header(size), "k")


@pytest.fixture(scope="module")
def members():
    labels = Labels(np.zeros((4, 4, 2), bool), np.full((4, 4, 2), 17, np.uint8))
    frame = Frame("s", 0, "t", 5, np.eye(4), labels=labels)
    return {name.split(".", 1)[1]: data for name, data in encode(frame, "labels")}


def test_evidence_is_stored_and_checked():
    """Probabilities of a prediction, one byte a voxel; what does not fit the voxels is refused."""
    evidence = np.arange(32, dtype=np.uint8).reshape(4, 4, 2)
    labels = Labels(np.zeros((4, 4, 2), bool), np.full((4, 4, 2), 17, np.uint8), evidence=evidence)
    stored = {
        name.split(".", 1)[1]: data for name, data in encode(Frame("s", 0, "t", 5, np.eye(4), labels=labels), "labels")
    }
    assert (decode([stored]).labels.evidence == evidence).all()
    head = json.loads(stored["frame.json"])
    for spec in ({"shape": [4, 2, 4]}, {"dtype": "<i1"}):
        head["arrays"]["evidence"] = {"dtype": "|u1", "shape": [4, 4, 2], "coding": "raw"} | spec
        with pytest.raises(CorruptSample, match="evidence has"):
            decode([{**stored, "frame.json": json.dumps(head).encode()}])


def forged(members, edit, **more):
    head = json.loads(members["frame.json"])
    edit(head)
    return {**members, "frame.json": json.dumps(head).encode(), **more}


def test_what_unpacks_to_more_than_its_head_says_is_refused_before(members):
    bomb = zstandard.ZstdCompressor().compress(bytes(64 << 20))
    assert len(bomb) < 10_000
    with pytest.raises(CorruptSample, match="unpacks to 67108864 bytes"):
        decode([{**members, "semantic.zst": bomb}])
    unsaid = zstandard.ZstdCompressor(write_content_size=False).compress(bytes(64 << 20))
    with pytest.raises(CorruptSample, match="s-0000"):
        decode([{**members, "semantic.zst": unsaid}])
    with pytest.raises(CorruptSample, match="larger than"):
        decode([forged(members, lambda h: h["arrays"]["semantic"].update(shape=[4, 4, 2**28]))])


@pytest.mark.parametrize(
    "edit",
    [
        lambda h: h.update(scene="../../pwned"),
        lambda h: h.update(scene=None),
        lambda h: h.update(index=-1),
        lambda h: h.update(index="0"),
        lambda h: h.update(timestamp=1.5),
        lambda h: h.update(ego_to_global=[[1, 2], [3]]),
        lambda h: h.update(ego_to_global="x"),
        lambda h: h.update(ego_to_global=[[float("nan")] * 4] * 4),
        lambda h: h.update(cameras=[]),
        lambda h: h.update(cameras={"a": None}),
        lambda h: h.update(cameras={"a": {"member": []}}),
        lambda h: h.update(lidar=5),
        lambda h: h.update(arrays={"binary": {"dtype": "O", "shape": [4], "coding": "raw"}}),
        lambda h: h["arrays"]["binary"].update(shape=[4, 4, -2]),
        lambda h: h["arrays"]["binary"].update(shape=[]),
        lambda h: h["arrays"]["binary"].update(shape="444"),
        lambda h: h["arrays"]["semantic"].update(coding=None),
        lambda h: h["arrays"]["semantic"].update(dtype="<f8"),
        lambda h: h["arrays"].pop("binary"),
        lambda h: h["arrays"].update(odd=h["arrays"]["semantic"]),
        lambda h: h.update(boxes={"boxes": [[1, 2]], "names": ["a"], "track_ids": ["b"], "velocity": None}),
        lambda h: h.update(boxes={"boxes": [], "names": 5, "track_ids": [], "velocity": None}),
    ],
)
def test_a_frame_head_that_cannot_be_is_a_corrupt_sample(members, edit):
    decode([members])
    with pytest.raises(CorruptSample):
        decode([forged(members, edit)])


def test_a_million_scenes_are_checked_by_column():
    scenes = [{"name": f"s{i}", "frames": 1, "shard": i % 2, "attributes": {}} for i in range(20_000)]
    data = {**GOOD, "scenes": scenes, "shards": [{**s, "size": 10**9} for s in GOOD["shards"]]}
    check_manifest(data, "m")


@pytest.mark.parametrize(
    "left",
    [
        [],
        {"part": [1, 1]},
        {"part": [0, 1], "job": "x"},
        {"part": 5, "job": "x"},
        {"part": [1, 1], "job": "x", "shards": []},
    ],
)
def test_what_a_part_left_is_checked_before_it_is_merged(tmp_path, left):
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts" / "1-of-1.json").write_text(json.dumps(left))
    with pytest.raises(ValueError, match=r"is not the record of|holds list"):
        merge(str(tmp_path))


def test_a_merged_manifest_is_checked_like_a_loaded_one(tmp_path):
    (tmp_path / "parts").mkdir()
    about = {k: GOOD[k] for k in ("source", "grid", "taxonomy", "classes", "labels", "groups")}
    sizes = {"lidar": 100_000, "labels": 100_000}
    scene = {"name": "../x", "frames": 3, "attributes": {}}
    shard = {"number": 0, "scenes": [scene], "failed": {}, "size": sizes, "sha256": dict.fromkeys(sizes, "a" * 64)}
    left = {"part": [1, 1], "job": "x", "description": about, "shards": [shard]}
    (tmp_path / "parts" / "1-of-1.json").write_text(json.dumps(left))
    with pytest.raises(ValueError, match=r"'\.\./x' cannot be used"):
        merge(str(tmp_path))
