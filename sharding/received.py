"""Checks of manifests and indices: they come from other people, and paths, loops and allocations follow from them.

Columns are checked whole: a manifest may name a million scenes.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Set
from typing import Any

import numpy as np

from occstream.sharding.grid import VoxelGrid
from occstream.sharding.schema import SCENE_NAME

MOST_FRAMES = 1_000_000  # of one scene: a day at 10 Hz
MOST_SHARDS = 1_000_000_000
LARGEST_SHARD = 1 << 43  # bytes
MOST_VOXELS = 1 << 30
LEAST_BYTES = 1024  # of a frame in a tar: one header and one block
_GROUP = re.compile(r"[a-z][a-z0-9-]{0,59}")
_FINGERPRINT = re.compile(r"[0-9a-f]{32}")
_DIGEST = re.compile(r"[0-9a-f]{64}")


def load_json(data: bytes, where: str, remedy: str) -> dict:
    """An object of JSON. Raises ValueError that names the file and the remedy."""
    try:
        found = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: damaged ({' '.join(str(error).split())[:120]}); {remedy}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{where}: holds {type(found).__name__}, not an object; {remedy}")
    return found


class Received:
    """An object of JSON whose fields are checked as they are read.

    Raises:
        ValueError: in the methods: names file and field.
    """

    def __init__(self, data: Mapping[str, Any], where: str) -> None:
        self.data, self.where = data, where

    def fail(self, problem: str) -> ValueError:
        return ValueError(f"{self.where}: {problem}; it was edited, damaged or written by another program")

    def text(self, field: str, longest: int = 200, default: str | None = None) -> str:
        value = self.data.get(field, default)
        if not isinstance(value, str) or len(value) > longest or not value.isprintable():
            raise self.fail(f"{field} is {str(value)[:40]!r}, not a printable text of at most {longest} characters")
        return value

    def texts(self, field: str, default: Any = None) -> tuple[str, ...]:
        value = self.data.get(field, default)
        if not isinstance(value, list) or not all(
            isinstance(v, str) and v.isprintable() and len(v) <= 200 for v in value
        ):
            raise self.fail(f"{field} is not a list of names")
        return tuple(value)

    def groups(self, field: str = "groups") -> tuple[str, ...]:
        found = self.texts(field)
        if not found or len(set(found)) < len(found) or not all(map(_GROUP.fullmatch, found)):
            raise self.fail(
                f"{field} is {str(found)[:80]}: needs different names of lower-case letters, digits and '-'"
            )
        return found

    def fingerprint(self) -> str:
        value = self.text("fingerprint")
        if not _FINGERPRINT.fullmatch(value):
            raise self.fail(f"fingerprint is {value[:40]!r}, not 32 hex digits")
        return value

    def grid(self) -> VoxelGrid | None:
        value = self.data.get("grid")
        if value is None:
            return None
        try:
            numbers = [*value["lower"], *value["upper"], *value["voxel"]]
            if set(value) != {"name", "lower", "upper", "voxel", "frame"} or not isinstance(value["name"], str):
                raise ValueError("other fields than name, lower, upper, voxel and frame")
            if len(numbers) != 9 or not all(type(v) in (int, float) and abs(v) < 1e6 for v in numbers):
                raise ValueError("not three numbers each for lower, upper and voxel")
            grid = VoxelGrid.from_dict(value)
            if math.prod(grid.shape) > MOST_VOXELS:
                raise ValueError(f"{math.prod(grid.shape)} voxels, at most {MOST_VOXELS}")
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise self.fail(f"grid is not valid ({type(error).__name__}: {error})") from None
        return grid

    def rows(self, field: str, needed: set[str], optional: Set[str] = frozenset()) -> list[dict]:
        """A list of objects with these fields and no others."""
        value = self.data.get(field)
        if not isinstance(value, list) or not all(map(dict.__instancecheck__, value)):
            raise self.fail(f"{field} is not a list of objects")
        known = needed | optional
        for number, row in enumerate(value):
            if not needed <= row.keys() <= known:
                odd = sorted(needed - row.keys()) or sorted(row.keys() - known)
                raise self.fail(f"{field}[{number}] has missing or extra fields: {str(odd)[:80]}")
        return value

    def whole(self, field: str, values: Iterable[Any], low: int, high: int) -> np.ndarray:
        """(N,) int64 of whole numbers in a range."""
        values = list(values)
        for number, value in enumerate(values):
            if type(value) is not int or not low <= value <= high:
                raise self.fail(f"{field}, entry {number}: {str(value)[:40]!r} is not an integer from {low} to {high}")
        return np.array(values, np.int64)

    def matches(self, field: str, values: Iterable[Any], pattern: re.Pattern) -> None:
        for number, value in enumerate(values):
            if type(value) is not str or not pattern.fullmatch(value):
                raise self.fail(f"{field}, entry {number}: {str(value)[:80]!r} cannot be used for it")


def check_shards(received: Received, groups: tuple[str, ...]) -> dict[str, dict[int, int]]:
    """Size of each shard by group and number. Raises ValueError."""
    rows = received.rows("shards", {"group", "number", "size", "sha256"})
    received.matches("sha256 of shards", (r["sha256"] for r in rows), _DIGEST)
    received.whole("size of shards", (r["size"] for r in rows), 0, LARGEST_SHARD)
    received.whole("number of shards", (r["number"] for r in rows), 0, MOST_SHARDS)
    sizes: dict[str, dict[int, int]] = {group: {} for group in groups}
    for row in rows:
        if not isinstance(row["group"], str) or row["group"] not in sizes:
            raise received.fail(f"a shard is of group {str(row['group'])[:40]!r}, which groups does not name")
        if row["number"] in sizes[row["group"]]:
            raise received.fail(f"shard {row['number']} of group {row['group']} is listed twice")
        sizes[row["group"]][row["number"]] = row["size"]
    return sizes


def check_head(data: Mapping[str, Any], where: str) -> tuple[str, ...]:
    """Raises ValueError if what a manifest says besides its scenes and shards cannot be. Returns the groups."""
    received = Received(data, where)
    for field in ("source", "taxonomy", "labels", "fingerprint"):
        received.text(field)
    received.text("convention", default="")
    received.text("label_group", default="labels")
    received.texts("classes")
    received.texts("left_out", [])
    grid = received.grid()
    groups = received.groups()
    if grid is None and "labels" in groups:
        raise received.fail("it has labels but no grid")
    return groups


def check_manifest(data: Mapping[str, Any], where: str) -> None:
    """Raises ValueError if a manifest cannot be what ``Manifest.content`` wrote."""
    received, groups = Received(data, where), check_head(data, where)
    sizes = check_shards(received, groups)
    scenes = received.rows("scenes", {"name", "frames", "shard"}, {"attributes"})
    received.matches("name of scenes", (s["name"] for s in scenes), SCENE_NAME)
    frames = received.whole("frames of scenes", (s["frames"] for s in scenes), 1, MOST_FRAMES)
    shards = received.whole("shard of scenes", (s["shard"] for s in scenes), 0, MOST_SHARDS)
    if not all(isinstance(s.get("attributes", {}), dict) for s in scenes):
        raise received.fail("attributes of a scene are not an object")
    rooms = {g: (np.array([*by.keys()], np.int64), np.array([*by.values()], np.int64)) for g, by in sizes.items()}
    check_room(received, frames, shards, rooms)


def check_room(
    received: Received, frames: np.ndarray, shards: np.ndarray, rooms: Mapping[str, tuple[np.ndarray, np.ndarray]]
) -> None:
    """Raises ValueError if a scene lies in a shard that is not there, or that is too small for the frames of its scenes.

    Args:
        frames, shards: (N,) of the scenes.
        rooms: for each group numbers and sizes of its shards.
    """
    numbers, place = np.unique(shards, return_inverse=True)
    needed = np.bincount(place, frames, len(numbers)) * LEAST_BYTES if len(numbers) else np.zeros(0)
    for group, (there, sizes) in rooms.items():
        order = np.argsort(there)
        at = np.searchsorted(there, numbers, sorter=order)
        found = order[np.minimum(at, len(there) - 1)] if len(there) else np.zeros(len(numbers), np.int64)
        lacking = there[found] != numbers if len(there) else np.ones(len(numbers), bool)
        if lacking.any():
            raise received.fail(f"scenes lie in shard {numbers[lacking][0]}, but group {group} has no such shard")
        small = sizes[found] < needed if len(there) else lacking
        if small.any():
            number, size = numbers[small][0], sizes[found][small][0]
            raise received.fail(f"shard {number} of group {group} has {size} bytes, too few for its frames")


def check_sidecar(data: Mapping[str, Any], where: str, group: str) -> None:
    """Raises ValueError if the manifest of a sidecar cannot be what ``Manifest.publish_sidecar`` wrote."""
    received = Received(data, where)
    for field in ("taxonomy", "labels", "base"):
        received.text(field)
    received.text("convention", default="")
    received.text("network", longest=1000, default="")
    received.texts("trained_on", default=[])
    received.texts("classes")
    if received.grid() is None:
        raise received.fail("it has no grid")
    check_shards(received, (group,))


def read_index(record: Mapping[str, Any], where: str, size: int) -> dict[str, tuple[int, int]]:
    """Offset and length of each frame in a shard of ``size`` bytes, by key. Raises ValueError."""
    frames = record.get("frames")
    if not isinstance(frames, list) or not all(
        isinstance(row, list)
        and len(row) == 3
        and type(row[0]) is str
        and type(row[1]) is int
        and type(row[2]) is int
        and row[1] >= 0
        and 0 < row[2] <= size - row[1]
        for row in frames
    ):
        raise ValueError(f"{where}: its index does not fit a tar of {size} bytes; pack the shard again")
    return {key: (offset, length) for key, offset, length in frames}
