"""Scenes and shards of a manifest: sequences of entries that keep columns, because there may be a million of them."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self, overload

import numpy as np
import zstandard

from occstream.sharding.codec import canonical_json, inflate

BLOCK = 256  # scenes whose attributes are compressed together
LARGEST_BLOCK = 64 << 20  # bytes of their JSON
_COLUMNS = ("group", "number", "size", "sha256")  # of shards


@dataclass(frozen=True, slots=True)
class SceneEntry:
    """One scene: its name, number of frames, the number of the shard (of every group) that holds it, attributes."""

    name: str
    frames: int
    shard: int
    attributes: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {"name": self.name, "frames": self.frames, "shard": self.shard, "attributes": dict(self.attributes)}


@dataclass(frozen=True, slots=True)
class ShardEntry:
    """One tar: its group, number, size in bytes and SHA-256."""

    group: str
    number: int
    size: int
    sha256: str

    @property
    def path(self) -> str:
        """Below the root of the data set."""
        return shard_path(self.group, self.number)

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {"group": self.group, "number": self.number, "size": self.size, "sha256": self.sha256}


def shard_path(group: str, number: int) -> str:
    return f"{group}/{group}-{number:06d}.tar"


def blocks(attributes: Iterable[Mapping[str, Any]]) -> Iterator[bytes]:
    """JSON of the attributes of ``BLOCK`` scenes after the other."""
    rows: list[dict] = []
    for row in attributes:
        rows.append(dict(row))
        if len(rows) == BLOCK:
            yield canonical_json(rows)
            rows = []
    if rows:
        yield canonical_json(rows)


class PackedAttributes(Sequence[Mapping[str, Any]]):
    """Attributes as a manifest's arrays keep them: each block is decompressed, and checked, when it is first asked for.

    Args:
        where: the file, for messages.
        data: one zstd frame a block, one after the other.
        ends: (B,) where each ends.
        sizes: (B,) bytes of each when decompressed.
        digests: (B, 16) uint8, BLAKE2b of each then.
        count: scenes.
    """

    def __init__(
        self, where: str, data: bytes, *, ends: np.ndarray, sizes: np.ndarray, digests: np.ndarray, count: int
    ) -> None:
        self._where, self._data, self._count = where, data, count
        self._ends, self._sizes, self.digests = ends, sizes, digests
        self._last: tuple[int, list[dict]] = (-1, [])

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: Any) -> Any:
        number, place = divmod(range(self._count)[index], BLOCK)
        return LazyAttributes(self, number, place)

    def __iter__(self) -> Iterator[Mapping[str, Any]]:
        for number in range(len(self._ends)):
            yield from self.block(number)

    def block(self, number: int) -> list[dict]:
        """Raises ValueError if it is damaged."""
        at, rows = self._last
        if at == number:
            return rows
        start, length = int(self._ends[number - 1]) if number else 0, int(self._sizes[number])
        try:
            raw = inflate(self._data[start : int(self._ends[number])], length, (length,))
            sound = hashlib.blake2b(raw, digest_size=16).digest() == self.digests[number].tobytes()
            rows = json.loads(raw) if sound else None
        except (ValueError, RecursionError, zstandard.ZstdError):
            rows = None
        count = min(BLOCK, self._count - number * BLOCK)
        if not isinstance(rows, list) or len(rows) != count or not all(map(dict.__instancecheck__, rows)):
            raise ValueError(
                f"{self._where}: attributes of scenes from number {number * BLOCK} are damaged; pack the data again, shards "
                "that are intact are kept"
            )
        self._last = (number, rows)  # one assignment: threads may ask
        return rows


class LazyAttributes(Mapping[str, Any]):
    """Attributes of one scene, decompressed when they are asked for."""

    __slots__ = ("_block", "_packed", "_place")

    def __init__(self, packed: PackedAttributes, block: int, place: int) -> None:
        self._packed, self._block, self._place = packed, block, place

    def _row(self) -> dict:
        return self._packed.block(self._block)[self._place]

    def __getitem__(self, key: str) -> Any:
        return self._row()[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._row())

    def __len__(self) -> int:
        return len(self._row())

    def __repr__(self) -> str:
        return repr(self._row())

    def __reduce__(self) -> tuple:
        return dict, (dict(self),)


def _blake2b(*parts: bytes | np.ndarray) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        digest.update(np.ascontiguousarray(part).data if isinstance(part, np.ndarray) else part)
    return digest.hexdigest()


class SceneTable(Sequence[SceneEntry]):
    """Scenes in packing order.

    Attributes:
        texts: (N,) bytes strings, the names; as wide as the longest.
        frames, shards: (N,) int32.
        attributes: of each scene.
    """

    def __init__(
        self, texts: np.ndarray, frames: np.ndarray, shards: np.ndarray, attributes: Sequence[Mapping[str, Any]]
    ) -> None:
        self.texts, self.attributes = texts, attributes
        self.frames, self.shards = frames.astype("<i4", copy=False), shards.astype("<i4", copy=False)

    @classmethod
    def of(cls, entries: Iterable[SceneEntry | Mapping[str, Any]]) -> SceneTable:
        """Of entries, or of their JSON values."""
        if isinstance(entries, cls):
            return entries
        found = [e if isinstance(e, SceneEntry) else SceneEntry(**e) for e in entries]
        texts = np.array([e.name for e in found], "S") if found else np.zeros(0, "S1")
        numbers = np.array([(e.frames, e.shard) for e in found], np.int64).reshape(-1, 2)
        return cls(texts, numbers[:, 0], numbers[:, 1], [e.attributes for e in found])

    def __len__(self) -> int:
        return len(self.texts)

    @overload
    def __getitem__(self, index: int) -> SceneEntry: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[SceneEntry, ...]: ...
    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return tuple(self[i] for i in range(*index.indices(len(self))))
        frames, shard = int(self.frames[index]), int(self.shards[index])
        return SceneEntry(self.texts.item(index).decode(), frames, shard, self.attributes[index])

    def __iter__(self) -> Iterator[SceneEntry]:
        rows = zip(self.texts.tolist(), self.frames.tolist(), self.shards.tolist(), self.attributes)
        return (SceneEntry(name.decode(), frames, shard, about) for name, frames, shard, about in rows)

    def __eq__(self, other: object) -> bool:
        if isinstance(other, SceneTable):
            same = len(self) == len(other) and all(
                np.array_equal(a, b)
                for a, b in ((self.texts, other.texts), (self.frames, other.frames), (self.shards, other.shards))
            )
            return same and all(a == b for a, b in zip(self.attributes, other.attributes))
        return isinstance(other, (tuple, list)) and tuple(self) == tuple(other)

    def __hash__(self) -> int:
        return hash(_blake2b(self.texts, self.frames, self.shards))

    def names(self, numbers: Sequence[int] | np.ndarray | None = None) -> list[str]:
        """Names of some scenes; None: of all."""
        texts = self.texts if numbers is None else self.texts[np.asarray(numbers, np.int64)]
        return [text.decode() for text in texts.tolist()]

    @functools.cached_property
    def by_name(self) -> np.ndarray:
        """(N,) int64: numbers of the scenes in the order of their names."""
        return np.argsort(self.texts, kind="stable")

    def find(self, name: str) -> int | None:
        """Number of the scene of this name (the last one, were there several); None if there is none."""
        try:
            text = name.encode("ascii")
        except UnicodeEncodeError:
            return None
        place = int(np.searchsorted(self.texts, np.bytes_(text), "right", sorter=self.by_name)) - 1
        return int(self.by_name[place]) if place >= 0 and self.texts[self.by_name[place]] == text else None

    @functools.cached_property
    def digest(self) -> str:
        """32 hex digits, a function of the content alone."""
        if isinstance(self.attributes, PackedAttributes):
            about = _blake2b(self.attributes.digests)
        else:
            about = _blake2b(*(hashlib.blake2b(block, digest_size=16).digest() for block in blocks(self.attributes)))
        columns = [_blake2b(column) for column in (self.texts, self.frames, self.shards)]
        return _blake2b(canonical_json([len(self), self.texts.dtype.itemsize, *columns, about]))


class ShardTable(Sequence[ShardEntry]):
    """Shards in packing order.

    Attributes:
        groups: names.
        group: (N,) int32, which of them; ``number`` (N,) int32; ``size`` (N,) int64, bytes; ``sha256`` (N, 32) uint8.
    """

    def __init__(
        self, groups: Sequence[str], *, group: np.ndarray, number: np.ndarray, size: np.ndarray, sha256: np.ndarray
    ) -> None:
        self.groups = tuple(groups)
        self.group, self.number = group.astype("<i4", copy=False), number.astype("<i4", copy=False)
        self.size, self.sha256 = size.astype("<i8", copy=False), sha256

    @classmethod
    def of(cls, entries: Iterable[ShardEntry | Mapping[str, Any]]) -> ShardTable:
        """Of entries, or of their JSON values. Raises ValueError if a hash is not of 64 hex digits."""
        if isinstance(entries, cls):
            return entries
        found = [e if isinstance(e, ShardEntry) else ShardEntry(**e) for e in entries]
        groups = list(dict.fromkeys(e.group for e in found))
        place = {group: i for i, group in enumerate(groups)}
        numbers = np.array([(place[e.group], e.number, e.size) for e in found], np.int64).reshape(-1, 3)
        sha256 = np.frombuffer(bytes.fromhex("".join(e.sha256 for e in found)), np.uint8)
        group, number, size = numbers.T
        return cls(groups, group=group, number=number, size=size, sha256=sha256.reshape(len(found), 32))

    def __len__(self) -> int:
        return len(self.number)

    @overload
    def __getitem__(self, index: int) -> ShardEntry: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[ShardEntry, ...]: ...
    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return tuple(self[i] for i in range(*index.indices(len(self))))
        group, number = self.groups[self.group[index]], int(self.number[index])
        return ShardEntry(group, number, int(self.size[index]), self.sha256[index].tobytes().hex())

    def __eq__(self, other: object) -> bool:
        if isinstance(other, ShardTable):
            return len(self) == len(other) and self.digest == other.digest
        return isinstance(other, (tuple, list)) and tuple(self) == tuple(other)

    def __hash__(self) -> int:
        return hash(self.digest)

    def _of(self, kept: np.ndarray) -> Self:
        columns = {name: getattr(self, name)[kept] for name in _COLUMNS}
        return type(self)(self.groups, **columns)

    def only(self, *groups: str) -> Self:
        """The shards of some groups."""
        return self._of(np.isin(self.group, [i for i, group in enumerate(self.groups) if group in groups]))

    def without(self, *groups: str) -> Self:
        """The shards of the others."""
        return self._of(np.isin(self.group, [i for i, group in enumerate(self.groups) if group not in groups]))

    def __add__(self, other: ShardTable) -> ShardTable:
        groups = list(dict.fromkeys((*self.groups, *other.groups)))
        moved = np.array([groups.index(group) for group in other.groups], np.int64)
        theirs = {name: getattr(other, name) for name in _COLUMNS} | {"group": moved[other.group]}
        return ShardTable(groups, **{n: np.concatenate([getattr(self, n), theirs[n]]) for n in _COLUMNS})

    def rooms(self) -> tuple[np.ndarray, np.ndarray]:
        """Numbers and sizes."""
        return self.number, self.size

    @functools.cached_property
    def sorted_keys(self) -> tuple[np.ndarray, np.ndarray]:
        """(N,) int64 each: group and number in one number, sorted; and which shard each is of."""
        keys = (self.group.astype(np.int64) << 32) + self.number
        order = np.argsort(keys, kind="stable")
        return keys[order], order

    def find(self, group: str, number: int) -> ShardEntry | None:
        """The shard of a group and number (the last one, were there several); None if there is none."""
        if group not in self.groups:
            return None
        keys, order = self.sorted_keys
        wanted = (self.groups.index(group) << 32) + number
        place = int(np.searchsorted(keys, wanted, "right")) - 1
        return self[int(order[place])] if place >= 0 and keys[place] == wanted else None

    @functools.cached_property
    def digest(self) -> str:
        """32 hex digits, a function of the content alone."""
        # Groups that have no shards here, and the order in which they are named, are no content.
        used, first = np.unique(self.group, return_index=True)
        ranked = np.zeros(len(self.groups), "<i4")
        ranked[used[np.argsort(first)]] = np.arange(len(used))
        names = [self.groups[i] for i in used[np.argsort(first)]]
        columns = [_blake2b(c) for c in (ranked[self.group], self.number, self.size, self.sha256)]
        return _blake2b(canonical_json([len(self), names, *columns]))
