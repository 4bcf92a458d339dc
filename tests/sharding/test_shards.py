"""Codec, packing, manifest and reading, on hand-made scenes."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import subprocess
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from occstream.sharding import codec, storage
from occstream.sharding.check import inspect, verify
from occstream.sharding.codec import CorruptSample, decode, encode
from occstream.sharding.grid import VoxelGrid, get_grid
from occstream.sharding.manifest import Manifest
from occstream.sharding.pack import pack
from occstream.sharding.stream import ShardReader
from tests.sharding.toy import GRID, ToySource, toy_frame


def same(a, b) -> bool:
    """Deep equality of dataclasses with arrays, NaN equal to NaN, dtypes included."""
    if dataclasses.is_dataclass(a):
        return type(a) is type(b) and all(same(getattr(a, f.name), getattr(b, f.name)) for f in dataclasses.fields(a))
    if isinstance(a, np.ndarray):
        equal = np.array_equal(a, b, equal_nan=a.dtype.kind == "f")
        return a.dtype == b.dtype and a.shape == b.shape and bool(equal)
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def members(frame, group):
    return {name[len(frame.key) + 1 :]: data for name, data in encode(frame, group)}


def digests(folder: Path) -> dict[str, str]:
    files = [p for p in folder.rglob("*") if p.is_file()]
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


@given(seed=st.integers(0, 10**6))
@settings(max_examples=30, deadline=None)
def test_frames_survive_encoding(seed):
    frame = toy_frame("scene", seed % 100, seed)
    assert same(frame, decode(members(frame, g) for g in codec.GROUPS))
    before = members(frame, "lidar")
    frame.lidar.lidars = np.array([[0, 0.1, 0, 0.06], [16, 0, 0, -0.06]])
    assert same(frame, decode(members(frame, g) for g in codec.GROUPS))
    assert frame.lidar.lidar_of_points().tolist() == [int(ring >= 16) for ring in frame.lidar.ring]
    changed = {name for name, data in members(frame, "lidar").items() if data != before[name]}
    assert changed == {"frame.json"}, "sweeps of one LiDAR are written as they were"


@pytest.mark.parametrize(
    "rows",
    [[], [[1, 0, 0, 0]], [[0, 0, 0, 0], [0, 0, 0, 0]], [[0, 0, 0, 0], [0.5, 0, 0, 0]], [[0, 0, 0]], [[0, 0, 0, "x"]]],
)
def test_lidars_of_a_sweep_are_checked(rows):
    frame = toy_frame("scene", 1)
    frame.lidar.lidars = np.array([[0.0, 0, 0, 0]])
    parts = members(frame, "lidar")
    head = json.loads(parts["frame.json"])
    head["lidar"]["lidars"] = rows
    with pytest.raises(ValueError, match="pack its shard again"):
        decode([parts | {"frame.json": json.dumps(head).encode()}])


@given(
    value=hnp.arrays(
        st.sampled_from([np.float32, np.uint8, np.int16, np.float64]),
        hnp.array_shapes(min_dims=1, max_dims=3, min_side=0, max_side=9),
        elements=st.integers(0, 100),
    )
)
@settings(deadline=None)
def test_arrays_survive_coding(value):
    specs: dict = {}
    [(_, data)] = codec._pack_arrays(type("Holder", (), {"v": value}), ["v"], specs, 3)
    assert same(codec._unpack(data, specs["v"]), value)


@given(bits=hnp.arrays(bool, hnp.array_shapes(min_dims=3, max_dims=3, max_side=7)))
@settings(deadline=None)
def test_bits_are_msb_first_in_c_order(bits):
    specs: dict = {}
    [(_, data)] = codec._pack_arrays(type("Holder", (), {"v": bits}), ["v"], specs, 3)
    expected = bytearray((bits.size + 7) // 8)
    for i, bit in enumerate(bits.reshape(-1)):
        expected[i // 8] |= int(bit) << (7 - i % 8)
    assert zstandard.ZstdDecompressor().decompress(data) == bytes(expected)
    assert same(codec._unpack(data, specs["v"]), bits)


def test_shards_are_plain_tars_with_readable_names(tmp_path):
    pack(ToySource(), str(tmp_path), grid=GRID, scenes_per_shard=2)
    run = subprocess.run(
        ["tar", "tf", tmp_path / "cameras/cameras-000000.tar"], capture_output=True, text=True, check=True
    )
    listed = run.stdout.split()
    assert listed[:3] == ["__header__/header.json", "toy-0-0000.frame.json", "toy-0-0000.cam_a.jpg"]
    assert len(listed) == 1 + 2 * (3 + 5)
    with tarfile.open(tmp_path / "labels/labels-000001.tar") as tar:
        header = json.loads(tar.extractfile(listed[0]).read())
    assert VoxelGrid.from_dict(header["grid"]) == GRID
    assert header["format"] == 1
    assert header["classes"][4] == "car"


@pytest.mark.parametrize("group", codec.GROUPS)
def test_webdataset_alone_reads_the_same_bytes(tmp_path, group):
    source = ToySource()
    pack(source, str(tmp_path), grid=GRID, scenes_per_shard=4)
    samples = list(webdataset.WebDataset(str(tmp_path / f"{group}/{group}-000000.tar"), shardshuffle=False))
    frames = [f for name in source.scene_names() for f in source.load(name).frames]
    assert [s["__key__"] for s in samples] == [f.key for f in frames]
    for sample, frame in zip(samples, frames):
        assert {k: v for k, v in sample.items() if not k.startswith("__")} == members(frame, group)


def test_reader_gives_the_frames_back(tmp_path):
    source = ToySource()
    manifest = pack(source, str(tmp_path), grid=GRID, scenes_per_shard=3)
    reader = ShardReader(manifest, codec.GROUPS)
    for number, name in enumerate(source.scene_names()):
        for frame in source.load(name).frames:
            want = dataclasses.replace(frame, label_sets={"labels": frame.labels})
            assert same(want, reader.frame(number, frame.index))
    only_labels = ShardReader(manifest, ("labels",)).frame(1, 2)
    assert only_labels.cameras == {}
    assert only_labels.lidar is None
    assert only_labels.labels is not None


@pytest.mark.process
def test_workers_kills_and_reruns_do_not_change_a_byte(tmp_path, monkeypatch):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    first = pack(ToySource(), str(whole), grid=GRID)
    load = ToySource.load

    def breaks(self, name):
        if name == "toy-2":
            raise OSError("disk on fire")
        return load(self, name)

    monkeypatch.setattr(ToySource, "load", breaks)
    with pytest.raises(ValueError, match=r"scene toy-2 of toy: OSError: disk on fire"):
        pack(ToySource(), str(parts), grid=GRID)
    monkeypatch.undo()
    assert not (parts / "manifest.json").exists()
    (parts / "cameras/cameras-000001.json").unlink()  # killed between tar and record
    tar = parts / "labels/labels-000000.tar"
    tar.write_bytes(tar.read_bytes()[:-100])  # somebody truncated it
    second = pack(ToySource(), str(parts), grid=GRID, workers=2)
    assert digests(whole) == digests(parts)
    assert first.fingerprint == second.fingerprint


def test_rerun_keeps_what_is_published(tmp_path, monkeypatch):
    pack(ToySource(), str(tmp_path), grid=GRID)
    before = digests(tmp_path)
    monkeypatch.setattr(ToySource, "load", lambda *_: pytest.fail("loaded a scene that was published"))
    pack(ToySource(), str(tmp_path), grid=GRID)
    assert digests(tmp_path) == before


def test_recheck_makes_what_was_damaged_again(tmp_path):
    pack(ToySource(), str(tmp_path), grid=GRID)
    before = digests(tmp_path)
    path = tmp_path / "lidar/lidar-000002.tar"
    data = bytearray(path.read_bytes())
    data[1500] ^= 1
    path.write_bytes(data)
    pack(ToySource(), str(tmp_path), grid=GRID)
    assert digests(tmp_path) != before  # its size is right, so it was taken for whole
    pack(ToySource(), str(tmp_path), grid=GRID, recheck=True)
    assert digests(tmp_path) == before


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda d: d[:-512], "bytes, the manifest says"),
        (lambda d: d[:3000] + bytes([d[3000] ^ 1]) + d[3001:], "SHA-256"),
        (lambda d: None, "missing"),
    ],
)
def test_verify_names_every_damage(tmp_path, harm, message):
    pack(ToySource(), str(tmp_path), grid=GRID)
    assert verify(str(tmp_path)) == []
    path = tmp_path / "cameras/cameras-000002.tar"
    data = harm(path.read_bytes())
    path.unlink() if data is None else path.write_bytes(data)
    problems = verify(str(tmp_path))
    assert len(problems) == 1
    assert "cameras-000002.tar" in problems[0]
    assert message in problems[0]


def test_reading_damage_is_an_error_that_names_it(tmp_path):
    manifest = pack(ToySource(), str(tmp_path), grid=GRID)
    path = tmp_path / "labels/labels-000001.tar"
    data = bytearray(path.read_bytes())
    data[data.index(b"\x28\xb5\x2f\xfd") + 20] ^= 0xFF  # in the first zstd frame
    path.write_bytes(data)
    with pytest.raises(CorruptSample, match="toy-1-0000"):
        ShardReader(manifest, ("labels",)).frame(1, 0)
    path.write_bytes(data[:-1])
    with pytest.raises(ValueError, match=r"labels-000001\.tar.*the manifest says"):
        ShardReader(manifest, ("labels",)).frame(1, 0)
    (tmp_path / "labels/labels-000003.tar").unlink()
    with pytest.raises(FileNotFoundError, match=r"labels-000003\.tar: shard is missing"):
        ShardReader(manifest, ("labels",)).frame(3, 0)


def test_inspect_shows_what_is_there(tmp_path):
    manifest = pack(ToySource(), str(tmp_path), grid=GRID)
    text = inspect(str(tmp_path))
    for part in (manifest.fingerprint, "4 with 14 frames", "toy-3", "8x8x2", "cameras", "lidar", "labels"):
        assert part in text


def test_subsets_are_nested_and_disjoint_from_what_is_held_out(tmp_path):
    manifest = pack(ToySource(counts=(1,) * 20), str(tmp_path), grid=GRID, scenes_per_shard=20)
    for seed in range(5):
        sets = [set(manifest.subset(n, seed, holdout=5)) for n in range(1, 16)]
        assert all(a < b for a, b in itertools.pairwise(sets))
        assert set(manifest.held_out(5, seed)) == set(range(20)) - sets[-1]
    assert manifest.subset(5, 0) != manifest.subset(5, 1)
    with pytest.raises(ValueError, match="16 scenes requested, but it has 20, 5 of them held out"):
        manifest.subset(16, holdout=5)


def test_wrong_data_sets_are_named(tmp_path):
    with pytest.raises(ValueError, match="no manifest there"):
        Manifest.load(str(tmp_path))
    manifest = pack(ToySource(), str(tmp_path / "a"), grid=GRID, groups=("labels",))
    with pytest.raises(ValueError, match=r"grid 'toy' \(8, 8, 2\).*the recipe expects 'occ3d' \(200, 200, 16\)"):
        manifest.check(get_grid("occ3d"), "occ3d", ("labels",))
    with pytest.raises(ValueError, match="no group 'cameras'"):
        manifest.check(GRID, "occ3d", ("cameras",))
    with pytest.raises(ValueError, match="taxonomy"):
        manifest.check(GRID, "openscene", ("labels",))
    path = tmp_path / "a/manifest.json"
    text = path.read_text()
    for harmed, message in [
        (text.replace('"frames": 3', '"frames": 4'), "fingerprint"),
        (text.replace('"format": 1', '"format": 7'), "format version 7"),
        (text[:100], "damaged"),
    ]:
        path.write_text(harmed)
        with pytest.raises(ValueError, match=message):
            Manifest.load(str(tmp_path / "a"))


def test_cache_never_mixes_two_data_sets_with_equal_names(tmp_path):
    cache = storage.ShardCache(tmp_path / "cache", limit=100)
    sha = {n: hashlib.sha256(n.encode() * 40).hexdigest() for n in "ab"}
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.tar").write_bytes(name.encode() * 40)
    for n in "abab":
        path = cache.fetch(str(tmp_path / n / "x.tar"), 40, sha[n])
        assert path.read_bytes() == n.encode() * 40
    path.write_bytes(b"b" * 39)  # damaged on disk between two runs: noticed, fetched again
    again = storage.ShardCache(tmp_path / "cache", limit=100).fetch(str(tmp_path / "b/x.tar"), 40, sha["b"])
    assert again.read_bytes() == b"b" * 40
    with pytest.raises(ValueError, match="SHA-256"):
        storage.ShardCache(tmp_path / "other").fetch(str(tmp_path / "b/x.tar"), 40, sha["a"])
    for i in range(5):
        (tmp_path / f"{i}.tar").write_bytes(b"%d" % i * 40)
        cache.fetch(str(tmp_path / f"{i}.tar"), 40, hashlib.sha256(b"%d" % i * 40).hexdigest())
    assert sum(p.stat().st_size for p in (tmp_path / "cache").glob("*.tar")) <= 100


def test_retry_gives_up_only_on_what_can_help(monkeypatch):
    monkeypatch.setattr(storage, "PAUSE", 0.001)
    calls = []

    def flaky():
        calls.append(1)
        if len(calls) < 3:
            raise ConnectionResetError("reset by peer")
        return "ok"

    def missing():
        calls.append(1)
        raise FileNotFoundError("k")

    def down():
        raise OSError("503 SlowDown")

    assert storage.retry(flaky, "s3://b/k") == "ok"
    assert len(calls) == 3
    with pytest.raises(FileNotFoundError):
        storage.retry(missing, "s3://b/k")
    assert len(calls) == 4
    monkeypatch.setenv("OCCSTREAM_STORAGE_MINUTES", "0.001")
    with pytest.raises(ConnectionError, match=r"s3://b/k: still failing after \d+ tries in 0 s"):
        storage.retry(down, "s3://b/k")
    monkeypatch.setenv("OCCSTREAM_STORAGE_MINUTES", "inf")
    with pytest.raises(ValueError, match="OCCSTREAM_STORAGE_MINUTES is 'inf'"):
        storage.retry(down, "s3://b/k")
