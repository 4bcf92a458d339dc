"""``verify`` finds every kind of damage, also where hashes and sizes agree because somebody made the shard so."""

import dataclasses
import hashlib
import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from occstream.launch import cli
from occstream.sharding import check, codec
from occstream.sharding.check import inspect, verify
from occstream.sharding.entries import ShardEntry
from occstream.sharding.frameclasses import FrameClasses
from occstream.sharding.manifest import Manifest
from occstream.sharding.pack import pack
from tests.sharding.toy import GRID, ToySource, toy_frame


@pytest.fixture
def packed(tmp_path) -> Path:
    pack(ToySource(), str(tmp_path), grid=GRID)
    assert verify(str(tmp_path)) == []
    return tmp_path


Members = list[tuple[str, bytes]]


def rewrite(root: Path, group: str, number: int, edit: Callable[[Members], Members]) -> None:
    """Changes the members of a shard, and makes record, hashes, manifest and table of classes agree with the result."""
    path = root / group / f"{group}-{number:06d}.tar"
    with tarfile.open(path) as tar:
        members = [(m.name, tar.extractfile(m).read()) for m in tar.getmembers()]
    out, index = io.BytesIO(), {}
    with tarfile.open(fileobj=out, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in edit(members):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            start = out.tell()
            tar.addfile(info, io.BytesIO(data))
            key = name.split(".")[0]
            if not name.startswith("__"):
                index[key] = [key, index.get(key, [key, start])[1], 0]
                index[key][2] = out.tell() - index[key][1]
    path.write_bytes(out.getvalue())
    record = json.loads(path.with_suffix(".json").read_text())
    sha = hashlib.sha256(out.getvalue()).hexdigest()
    record |= {"size": len(out.getvalue()), "sha256": sha, "frames": list(index.values())}
    path.with_suffix(".json").write_bytes(codec.canonical_json(record))
    manifest = Manifest.load(str(root))
    mine = ShardEntry(group, number, record["size"], sha)
    shards = tuple(mine if (s.group, s.number) == (group, number) else s for s in manifest.shards)
    changed = dataclasses.replace(manifest, shards=shards)
    FrameClasses.load(manifest).publish(changed)
    changed.publish()


def change(suffix: str, work: Callable[[bytes], bytes], key: str = "toy-1-0002") -> Callable[[Members], Members]:
    return lambda members: [(n, work(d) if n == f"{key}.{suffix}" else d) for n, d in members]


def in_head(work: Callable[[dict], None]) -> Callable[[bytes], bytes]:
    def edit(data: bytes) -> bytes:
        head = json.loads(data)
        work(head)
        return codec.canonical_json(head)

    return edit


def frame_members(group: str, **labels) -> dict[str, bytes]:
    frame = toy_frame("toy-1", 2)
    if labels:
        frame.labels = dataclasses.replace(frame.labels, **labels)
    return dict(codec.encode(frame, group))


def out_of_range() -> np.ndarray:
    semantic = toy_frame("toy-1", 2).labels.semantic.copy()
    semantic[0, 0, 0] = 18
    return semantic


def absurd(head: dict) -> None:
    head["cameras"]["CAM_A"]["intrinsics"][0][0] = 20e6


def outside(head: dict) -> None:
    head["cameras"]["CAM_A"]["intrinsics"][0][2] = -400


def sheared(head: dict) -> None:
    head["cameras"]["CAM_A"]["sensor_to_ego"][0][1] = 0.7


DAMAGE = {
    "missing member": ("labels", lambda m: [x for x in m if x[0] != "toy-1-0002.binary.zst"], "KeyError: 'binary.zst'"),
    "missing frame": (
        "labels",
        lambda m: [x for x in m if not x[0].startswith("toy-1-0002")],
        "has no frame toy-1-0002",
    ),
    "strange frame": ("lidar", lambda m: [*m, ("toy-9-0000.frame.json", b"{}")], "holds frame toy-9-0000, which"),
    "duplicate member": ("cameras", lambda m: [*m[:3], m[2], *m[3:]], "cam_a.jpg appears twice"),
    "duplicate frame": ("cameras", lambda m: [*m, *m[1:3]], "frame toy-1-0000 appears twice"),
    "label out of range": (
        "labels",
        lambda m: [(n, frame_members("labels", semantic=out_of_range()).get(n, d)) for n, d in m],
        "frame toy-1-0002: labels: class 18 is out of range 0..17",
    ),
    "binary against semantic": (
        "labels",
        lambda m: [(n, frame_members("labels", binary=~toy_frame("toy-1", 2).labels.binary).get(n, d)) for n, d in m],
        "binary and semantic disagree",
    ),
    "wrong grid in the header": (
        "labels",
        lambda m: [(m[0][0], in_head(lambda h: h["grid"].update(name="occ3d"))(m[0][1])), *m[1:]],
        "its header says grid",
    ),
    "wrong grid in a frame": (
        "labels",
        change("frame.json", in_head(lambda h: h["arrays"]["binary"].update(shape=[4, 8, 4]))),
        "has shape (8, 8, 2), which does not match (4, 8, 4)",
    ),
    "no header": ("labels", lambda m: m[1:], "has no header member"),
    "another scene": ("lidar", change("frame.json", in_head(lambda h: h.update(scene="toy-7"))), "differ in scene"),
    "another pose": (
        "lidar",
        change("frame.json", in_head(lambda h: h["ego_to_global"][0].__setitem__(3, 5.0))),
        "groups cameras, lidar, labels differ in ego_to_global",
    ),
    "absurd focal length": (
        "cameras",
        change("frame.json", in_head(absurd)),
        "intrinsics are implausible: focal lengths 20000000.0",
    ),
    "principal point outside": ("cameras", change("frame.json", in_head(outside)), "principal point (-400.0"),
    "pose that is not valid": (
        "cameras",
        change("frame.json", in_head(sheared)),
        "CAM_A: sensor_to_ego is not a rigid pose",
    ),
    "broken image": ("cameras", change("cam_a.jpg", lambda d: d[:300] + d[-2:]), "CAM_A: image cannot be decoded"),
    "wrong size": (
        "cameras",
        change("frame.json", in_head(lambda h: h["cameras"]["CAM_A"].update(width=23))),
        "image has 24x16 pixels, its metadata says 23x16",
    ),
    "broken zstd": ("labels", change("semantic.zst", lambda d: d[:-3]), "ZstdError"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_that_hashes_do_not_show(packed, name):
    group, edit, message = DAMAGE[name]
    rewrite(packed, group, 1, edit)
    problems = verify(str(packed))
    assert any(message in p for p in problems), problems
    assert all("toy-1" in p or f"{group}-000001" in p or "shard 000001" in p for p in problems), problems


def test_flipped_byte_truncation_and_swapped_shards(packed, capsys):
    a, b = packed / "cameras/cameras-000001.tar", packed / "cameras/cameras-000003.tar"
    first, second = a.read_bytes(), b.read_bytes()
    flipped = bytearray(first)
    flipped[2000] ^= 4
    a.write_bytes(flipped)
    assert verify(str(packed)) == [f"{a}: content differs from the manifest's SHA-256"]
    a.write_bytes(first[:-1024])
    assert verify(str(packed)) == [f"{a}: {len(first) - 1024} bytes, the manifest says {len(first)}"]
    a.write_bytes(second)
    b.write_bytes(first)
    assert len(verify(str(packed))) == 2
    assert cli.main(["verify", str(packed)]) == 1
    assert capsys.readouterr().out.endswith("2 problems\n")


def test_index_that_does_not_fit(packed):
    path = packed / "labels/labels-000002.json"
    record = json.loads(path.read_text())
    record["frames"][0][1] += 512
    path.write_text(json.dumps(record))
    assert verify(str(packed)) == [f"{path}: its index does not fit the tar"]
    path.unlink()
    assert verify(str(packed)) == [f"{path}: index is missing"]


def test_scene_listed_twice(packed):
    manifest = Manifest.load(str(packed))
    dataclasses.replace(manifest, scenes=(*manifest.scenes, manifest.scenes[0])).publish()
    assert f"{packed}: scene toy-0 is listed 2 times" in verify(str(packed))


def test_sample_reads_a_share_and_always_checks_presence(tmp_path, monkeypatch):
    pack(ToySource((1,) * 20), str(tmp_path), grid=GRID)
    read = []
    original = check.storage.read_bytes
    monkeypatch.setattr(check.storage, "read_bytes", lambda url, *a: read.append(url) or original(url, *a))
    assert verify(str(tmp_path), share=0.1) == []
    assert sum(url.endswith(".tar") for url in read) == 2 * 3
    (tmp_path / "lidar/lidar-000013.tar").unlink()
    assert verify(str(tmp_path), share=0.01) == [f"{tmp_path}/lidar/lidar-000013.tar: missing"]
    with pytest.raises(ValueError, match="must be above 0"):
        verify(str(tmp_path), share=0)


def test_inspect_counts_classes_shares_and_what_is_missing(packed):
    text = inspect(str(packed))
    frames = [toy_frame(f"toy-{s}", i) for s, n in enumerate((3, 5, 2, 4)) for i in range(n)]
    observed = np.mean([f.labels.mask_lidar.mean() for f in frames])
    assert f"{100 * observed:.1f} % observed" in text
    assert "missing    labels.mask_camera in 14, lidar.classes in 14" in text
    cars = sum(((f.labels.semantic == 4) & f.labels.mask_lidar).sum() for f in frames)
    occupied = sum(((f.labels.semantic < 17) & f.labels.mask_lidar).sum() for f in frames)
    assert f"car                    {100 * cars / occupied:>6.2f} %" in text
