"""Readers of what other people wrote, each with small valid inputs to start from and the errors that it documents.

python -m tests.fuzz.run [TARGET [SECONDS]]
"""

from __future__ import annotations

import hashlib
import io
import json
import pickle
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from pyarrow import feather
from safetensors.torch import save

from occstream.pretrain.checkpoint import Checkpoint
from occstream.pretrain.yamlfile import read_yaml
from occstream.sharding import pickles, rawfiles
from occstream.sharding.arrays import pack_arrays, read_arrays
from occstream.sharding.codec import CorruptSample, decode, encode
from occstream.sharding.entries import SceneEntry, ShardEntry
from occstream.sharding.feather import TEXT, read_feather
from occstream.sharding.frameclasses import FrameClasses
from occstream.sharding.grid import get_grid
from occstream.sharding.manifest import Manifest
from occstream.sharding.received import check_manifest, load_json, read_index
from occstream.sharding.schema import Boxes, Frame, Labels, LidarSweep, get_taxonomy
from occstream.sharding.stream import tar_members
from tests.sharding.layouts import pcd


@dataclass(frozen=True)
class Target:
    """A reader.

    Attributes:
        seeds: valid inputs.
        read: takes changed ones.
        allowed: what it may raise.
        members: the inputs are packed members, of which one is changed.
    """

    seeds: tuple[bytes, ...]
    read: Callable[[bytes], object]
    allowed: tuple[type[Exception], ...] = (ValueError,)
    members: bool = False


def _frame() -> Frame:
    lidar = LidarSweep(np.ones((5, 3), np.float32), np.eye(4), np.eye(4), 3, ring=np.arange(5, dtype=np.uint8))
    boxes = Boxes(np.ones((1, 7), np.float32), ["car"], ["t"], np.full((1, 2), np.nan, np.float32))
    binary = np.arange(32).reshape(4, 4, 2) % 3 == 0
    labels = Labels(binary, np.where(binary, 4, 17).astype(np.uint8), np.ones((4, 4, 2), bool))
    return Frame("s", 0, "t", 5, np.eye(4), lidar=lidar, boxes=boxes, labels=labels)


def packed(members: dict[str, bytes]) -> bytes:
    """Members in one stored zip, so that one string of bytes is fuzzed."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name, data in members.items():
            archive.writestr(zipfile.ZipInfo(name), data)
    return out.getvalue()


def members_of(data: bytes) -> dict[str, bytes]:
    """The inverse, whatever became of headers and sums: only the members' bytes are to be fuzzed."""
    out: dict[str, bytes] = {}
    for part in data.split(b"PK\x03\x04")[1:]:
        size, name = int.from_bytes(part[18:22], "little"), int.from_bytes(part[22:24], "little")
        out[part[26 : 26 + name].decode(errors="replace")] = part[26 + name :][:size]
    return out


def _decode(data: bytes) -> None:
    decode([members_of(data)])


def _shard(data: bytes) -> None:
    """Index and range of a tar, as the reader takes them."""
    members = members_of(data)
    index, tar = members.get("index", b""), members.get("tar", b"")
    for key, (offset, length) in read_index(load_json(index, "i", "x"), "i", len(tar)).items():
        decode([tar_members(tar[offset : offset + length], key)])


def _tar() -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in encode(_frame(), "lidar"):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    index = json.dumps({"frames": [["s-0000", 0, tar.offset - 1024]]}).encode()
    return packed({"index": index, "tar": out.getvalue()})


def _manifest() -> bytes:
    shards = tuple(ShardEntry(g, n, 100_000, "a" * 64) for g in ("lidar", "labels") for n in range(2))
    scenes = (SceneEntry("a", 3, 0), SceneEntry("b", 4, 1, {"location": "x"}))
    taxonomy = get_taxonomy("openscene")
    manifest = Manifest(
        "x", "toy", get_grid("tiny"), "openscene", taxonomy.classes, "native", ("lidar", "labels"), scenes, shards
    )
    return json.dumps({**manifest.content(), "fingerprint": manifest.fingerprint}).encode()


def _small() -> Manifest:
    return Manifest.from_content("x", json.loads(_manifest()))


def _classes() -> bytes:
    table = FrameClasses(("bus", "car", "tram"), ["0 3 7", "1 1 2 4"])
    return json.dumps({"base": _small().fingerprint, "group": "labels", **table.to_record()}).encode()


def _read_classes(data: bytes) -> None:
    table = FrameClasses.parse(data, _small(), "c", "x")
    assert table.holds([0, 1], ["car"]).shape == (7, 1)


def _feather() -> bytes:
    out = io.BytesIO()
    columns = {"a": np.arange(20), "b": np.linspace(0, 1, 20).astype(np.float16), "c": [f"x{i}" for i in range(20)]}
    feather.write_feather(pa.table(columns), out)
    return out.getvalue()


def _read_feather(path: Path) -> None:
    read_feather(path, {"a": "int64", "b": "float32", "c": TEXT})


def _read_manifest(data: bytes) -> None:
    content = load_json(data, "m", "x")
    check_manifest(content, "m")
    assert sum(s.frames for s in Manifest.from_content("x", content).scenes) < 10**9


def _arrays() -> bytes:
    data = pack_arrays(_small().scenes, _small().shards)
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        return packed({m.name: data[m.offset_data : m.offset_data + m.size] for m in tar})


def _read_arrays(data: bytes) -> None:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name, content in members_of(data).items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    scenes, shards = read_arrays(out.getvalue(), "a", ("lidar", "labels"))
    assert sum(scene.frames + len(scene.attributes) for scene in scenes) < 10**9
    assert len(list(shards)) < 10**6


def _checkpoint() -> bytes:
    files = {
        "state.json": json.dumps({"format": 1, "step": 3, "config": {}, "cameras": ["a"], "data": {"a": [1]}}).encode(),
        "model.safetensors": save({"a": torch.ones(2, 3)}),
    }
    listed = {name: {"size": len(d), "sha256": hashlib.sha256(d).hexdigest()} for name, d in files.items()}
    return packed({**files, "COMPLETE.json": json.dumps({"files": listed}).encode()})


def _read_checkpoint(data: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        for name, content in members_of(data).items():
            if name in ("state.json", "model.safetensors", "COMPLETE.json"):
                (Path(folder) / name).write_bytes(content)
        checkpoint = Checkpoint(folder, hashed=False)
        checkpoint.weights()
        assert checkpoint.digest


def _file(read: Callable[[Path], object], suffix: str) -> Callable[[bytes], None]:
    def call(data: bytes) -> None:
        with tempfile.NamedTemporaryFile(suffix=suffix) as file:
            file.write(data)
            file.flush()
            read(Path(file.name))

    return call


def _pcd(coding: str) -> bytes:
    head = "# .PCD\nVERSION 0.7\nFIELDS x y z ring\nSIZE 4 4 4 1\nTYPE F F F U\nCOUNT 1 1 1 1\n"
    head += f"WIDTH 2\nHEIGHT 1\nPOINTS 2\nDATA {coding}\n"
    rows = np.ones(2, [("x", "<f4"), ("y", "<f4"), ("z", "<f4"), ("ring", "u1")])
    return head.encode() + (rows.tobytes() if coding == "binary" else b"1 2 3 4\n5 6 7 8\n")


def _npy(**arrays: np.ndarray) -> bytes:
    out = io.BytesIO()
    if len(arrays) == 1:
        np.save(out, *arrays.values())
    else:
        np.savez_compressed(out, **arrays)
    return out.getvalue()


_INFO = {
    "token": "t", "timestamp": 1, "a": np.arange(3.0), "b": [np.float64(1), None, True], "c": {"d": np.array(["x"])},
}  # fmt: skip
_YAML = b"base: demo\ntrain: &t {lr: 1e-4, steps: 10}\ndata:\n  url: s3://a/b\n  list: [1, 2.5, x]\nmore: *t\n"

_FRAMES = tuple(
    packed({name.split(".", 1)[1]: data for name, data in encode(_frame(), group)}) for group in ("lidar", "labels")
)

TARGETS = {
    "decode": Target(_FRAMES, _decode, (CorruptSample,), members=True),
    "manifest": Target((_manifest(),), _read_manifest),
    "arrays": Target((_arrays(),), _read_arrays, members=True),
    "shard": Target((_tar(),), _shard, members=True),
    "checkpoint": Target((_checkpoint(),), _read_checkpoint, members=True),
    "classes": Target((_classes(),), _read_classes),
    "feather": Target((_feather(),), _file(_read_feather, ".feather")),
    "pcd": Target((_pcd("binary"), _pcd("ascii"), pcd(np.ones((4, 4)), "binary_compressed")), _file(rawfiles.read_pcd, ".pcd")),
    "npy": Target((_npy(a=np.ones((2, 3))), _npy(a=np.ones(3), b=np.zeros((2, 2), np.uint8))), _file(rawfiles.read_npy, ".npz")),
    "pickle": Target(tuple(pickle.dumps([_INFO], protocol) for protocol in range(6)), pickles.loads),
    "yaml": Target((_YAML,), lambda data: read_yaml(data.decode(errors="replace"), "w")),
}  # fmt: skip
