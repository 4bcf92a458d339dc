"""The scenes and shards of a large data set as a file of arrays beside its manifest: read and checked in a fraction of a second.

A plain tar: ``about.json``, and each column as ``<table>-<column>.zst``, one zstd frame of little-endian numbers; attributes of
scenes are one zstd frame for every ``BLOCK`` scenes, each a JSON list. They come from other people, like all of a manifest.
"""

from __future__ import annotations

import hashlib
import io
import tarfile

import numpy as np
import zstandard

from occstream.sharding.codec import canonical_json, inflate
from occstream.sharding.entries import BLOCK, LARGEST_BLOCK, PackedAttributes, SceneTable, ShardTable, blocks
from occstream.sharding.received import (
    LARGEST_SHARD,
    MOST_FRAMES,
    MOST_SHARDS,
    Received,
    check_room,
    load_json,
)

MOST_LISTED = 100_000  # scenes and shards of a manifest that is all JSON
MOST_ROWS = 10_000_000  # of a table
LONGEST_NAME = 60
_LEVEL = 3
_PIECE = 1 << 16  # names that are checked at a time
_LETTERS = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_-"  # of SCENE_NAME


def pack_arrays(scenes: SceneTable, shards: ShardTable) -> bytes:
    """The file."""
    packer = zstandard.ZstdCompressor(level=_LEVEL, write_checksum=True)
    raw = list(blocks(scenes.attributes))
    packed = [packer.compress(block) for block in raw]
    digests = b"".join(hashlib.blake2b(block, digest_size=16).digest() for block in raw)
    columns = {
        "scenes-name": scenes.texts,
        "scenes-frames": scenes.frames,
        "scenes-shard": scenes.shards,
        "scenes-block-end": np.cumsum([len(p) for p in packed], dtype="<i8"),
        "scenes-block-size": np.array([len(r) for r in raw], "<i4"),
        "scenes-block-digest": np.frombuffer(digests, np.uint8),
        "shards-group": shards.group,
        "shards-number": shards.number,
        "shards-size": shards.size,
        "shards-sha256": shards.sha256,
    }
    about = {
        "scenes": len(scenes),
        "name_bytes": scenes.texts.dtype.itemsize,
        "shards": len(shards),
        "shard_groups": list(shards.groups),
    }
    members = {"about.json": canonical_json(about)}
    members |= {f"{name}.zst": packer.compress(np.ascontiguousarray(a).tobytes()) for name, a in columns.items()}
    members["scenes-attributes.zst"] = b"".join(packed)
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return file.getvalue()


class _File:
    """Members of the tar, and a remedy for what is wrong with them."""

    def __init__(self, data: bytes, where: str) -> None:
        self.where = where
        view = memoryview(data)
        try:
            with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
                self.members = {m.name: view[m.offset_data : m.offset_data + m.size] for m in tar if m.isreg()}
        except (tarfile.TarError, ValueError, OverflowError, EOFError) as error:
            raise self.damaged(str(error)) from None
        self.about = load_json(bytes(self._member("about.json")), where, "pack the data again")

    def damaged(self, problem: str) -> ValueError:
        return ValueError(
            f"{self.where}: damaged ({problem[:160]}); pack the data again, shards that are intact are kept"
        )

    def _member(self, name: str) -> memoryview:
        if name not in self.members:
            raise self.damaged(f"has no {name}")
        return self.members[name]

    def attributes(self) -> bytes:
        return bytes(self._member("scenes-attributes.zst"))

    def column(self, name: str, dtype: str, count: int) -> np.ndarray:
        """One column of ``count`` numbers."""
        kind, packed = np.dtype(dtype), self._member(f"{name}.zst")
        try:
            if zstandard.frame_content_size(packed) < 0:
                raise ValueError("does not say its size")
            raw = inflate(packed, count * kind.itemsize, (count,))
        except (ValueError, zstandard.ZstdError, MemoryError) as error:
            raise self.damaged(f"{name}: {error}") from None
        return np.frombuffer(raw, kind)


def read_arrays(data: bytes, where: str, groups: tuple[str, ...]) -> tuple[SceneTable, ShardTable]:
    """The inverse of ``pack_arrays``.

    Args:
        where: the file, for messages.
        groups: of the manifest: there are shards of no others.

    Raises:
        ValueError: it is damaged, or holds what a manifest cannot say.
    """
    file = _File(data, where)
    received = Received(file.about, where)
    [scenes, shards] = received.whole(
        "scenes and shards", (file.about.get(k) for k in ("scenes", "shards")), 0, MOST_ROWS
    )
    [width] = received.whole("name_bytes", [file.about.get("name_bytes")], 1, LONGEST_NAME)
    count = -(-int(scenes) // BLOCK)
    ends = file.column("scenes-block-end", "<i8", count)
    sizes = file.column("scenes-block-size", "<i4", count)
    digests = file.column("scenes-block-digest", "u1", 16 * count).reshape(count, 16)
    packed = file.attributes()
    if count and not (ends[0] >= 0 and (np.diff(ends) >= 0).all() and ends[-1] == len(packed) and (sizes >= 0).all()):
        raise file.damaged("blocks of attributes do not follow each other")
    if count and sizes.max() > LARGEST_BLOCK:
        raise file.damaged(f"attributes of {BLOCK} scenes are larger than {LARGEST_BLOCK} bytes")
    table = SceneTable(
        file.column("scenes-name", f"S{width}", int(scenes)),
        file.column("scenes-frames", "<i4", int(scenes)),
        file.column("scenes-shard", "<i4", int(scenes)),
        PackedAttributes(where, packed, ends=ends, sizes=sizes, digests=digests, count=int(scenes)),
    )
    names = received.groups("shard_groups") if shards else ()
    tars = ShardTable(
        names,
        group=file.column("shards-group", "<i4", int(shards)),
        number=file.column("shards-number", "<i4", int(shards)),
        size=file.column("shards-size", "<i8", int(shards)),
        sha256=file.column("shards-sha256", "u1", 32 * int(shards)).reshape(-1, 32),
    )
    _check(received, table, tars, groups)
    return table, tars


def _check(received: Received, scenes: SceneTable, shards: ShardTable, groups: tuple[str, ...]) -> None:
    """Raises ValueError if a column holds what a manifest cannot say."""
    _check_names(received, scenes.texts)
    _in_range(received, "frames of scenes", scenes.frames, low=1, high=MOST_FRAMES)
    _in_range(received, "shard of scenes", scenes.shards, low=0, high=MOST_SHARDS)
    _in_range(received, "group of shards", shards.group, low=0, high=len(shards.groups) - 1)
    _in_range(received, "number of shards", shards.number, low=0, high=MOST_SHARDS)
    _in_range(received, "size of shards", shards.size, low=0, high=LARGEST_SHARD)
    if odd := [group for group in shards.groups if group not in groups]:
        raise received.fail(f"a shard is of group {odd[0]!r}, which groups does not name")
    keys = shards.sorted_keys[0]
    if len(twice := keys[1:][keys[1:] == keys[:-1]]):
        group, number = divmod(int(twice[0]), 1 << 32)
        raise received.fail(f"shard {number} of group {shards.groups[group]} is listed twice")
    check_room(received, scenes.frames, scenes.shards, {group: shards.only(group).rooms() for group in groups})


def _in_range(received: Received, what: str, values: np.ndarray, *, low: int, high: int) -> None:
    if len(odd := np.flatnonzero((values < low) | (values > high))):
        at = int(odd[0])
        raise received.fail(f"{what}, entry {at}: {int(values[at])!r} is not an integer from {low} to {high}")


def _check_names(received: Received, texts: np.ndarray) -> None:
    """Letters, digits, "_" and "-", one at least, then nothing but zeros; the longest fills the column."""
    width, full = texts.dtype.itemsize, not len(texts)
    for start in range(0, len(texts), _PIECE):
        piece = texts[start : start + _PIECE]
        if not piece.tobytes().translate(None, _LETTERS):  # all of the full width
            full = True
            continue
        letters = piece.view(np.uint8).reshape(len(piece), width)
        ended = letters == 0
        usable = np.isin(letters, list(_LETTERS)) | ended
        usable[:, 0] &= ~ended[:, 0]
        usable[:, 1:] &= ~ended[:, :-1] | ended[:, 1:]
        if len(odd := np.flatnonzero(~usable.all(1))):
            at = int(odd[0])
            raise received.fail(f"name of scenes, entry {start + at}: {letters[at].tobytes()!r} cannot be used for it")
        full = full or not ended[:, -1].all()
    if not full:
        raise received.fail(f"name_bytes is {width}, but no name is that long")
