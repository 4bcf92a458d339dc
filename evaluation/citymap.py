"""One map of whole drives: tiles of the world as targets of the frames' votes (OccFiner's city maps, tile by tile).

The world is cut into shards of tiles at multiples of their size in the data set's global frame, so any machine makes the
same ones. A tile is gathered from all frames whose grids meet it; there are no accumulators and no order. The map is a Zarr
group of four arrays (X, Y, Z), one chunk a tile: ``class`` (uint8, 255 where nothing is known), ``confidence`` (uint8, 255
is certain), ``frames`` (uint16, how many spoke) and ``last`` (int32, the last of them; -1 none).
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib
import itertools
import json
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from occstream.evaluation.drive import DriveReader
from occstream.evaluation.propagate import Device, overlapping, packed, pull, pull_maps
from occstream.evaluation.rules import Pulled, Rule
from occstream.evaluation.votes import VoteConfig, voting
from occstream.sharding import storage
from occstream.sharding.codec import canonical_json
from occstream.sharding.grid import VoxelGrid
from occstream.sharding.manifest import Manifest
from occstream.sharding.poses import apply
from occstream.sharding.received import load_json
from occstream.sharding.schema import IGNORE, Taxonomy, get_taxonomy

VERSION = 1
TILE = 64  # voxels
TILES = (4, 4, 2)  # of a shard: a file of each array
MOST_FRAMES = 200  # of a tile; where more saw it (the vehicle stood), evenly spaced ones
ARRAYS = {"class": ("uint8", IGNORE), "confidence": ("uint8", 0), "frames": ("uint16", 0), "last": ("int32", -1)}
SUMMARY, ARRAYS_IN = "map.json", "map.zarr"


def extra(name: str) -> Any:
    """A package of the extra ``maps``. Raises ValueError if it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError:
        raise ValueError(f"maps need the package {name}: pip install 'occstream[maps]'") from None


@dataclass
class Made:
    """What a call did: shards of the map made, found, and in all; tiles that were thinned to MOST_FRAMES frames; whether the
    map is complete."""

    shards: int = 0
    skipped: int = 0
    total: int = 0
    tiles: int = 0
    thinned: int = 0
    complete: bool = False
    view_from: str = ""


@dataclass
class CityMap:
    """A complete map.

    Attributes:
        folder: of the map; the Zarr group is ``map.zarr`` in it.
        origin: (3,) float64, lower corner of voxel (0, 0, 0), meters in the data set's global frame.
        voxel: (3,) meters.
        taxonomy: of the classes.
        frames: keys of frames; ``last`` counts in them.
        shards: places of those that hold something, in shards from the origin.
    """

    folder: Path
    origin: np.ndarray
    voxel: np.ndarray
    taxonomy: Taxonomy
    frames: list[str]
    shards: list[tuple[int, int, int]]

    @classmethod
    def open(cls, folder: str | Path) -> CityMap:
        """Raises ValueError if there is no complete map."""
        where = Path(folder) / SUMMARY
        if not where.exists():
            raise ValueError(f"{folder}: no complete map there; make its remaining parts with `occstream map`")
        data = load_json(where.read_bytes(), str(where), "make the map again")
        try:
            return cls(
                Path(folder),
                np.array(data["origin"], np.float64).reshape(3),
                np.array(data["voxel"], np.float64).reshape(3),
                get_taxonomy(data["taxonomy"]),
                [str(key) for key in data["frames"]],
                [_place(place) for place in data["shards"]],
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{where}: damaged ({' '.join(str(error).split())[:120]}); make the map again") from None

    def array(self, name: str) -> Any:
        """One of the four arrays, read as it is indexed."""
        return extra("zarr").open_group(str(self.folder / ARRAYS_IN), mode="r")[name]

    def occupied(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(N, 3) int64 voxel indices and (N,) uint8 classes of what is occupied, shard by shard."""
        array, size = self.array("class"), np.multiply(TILES, TILE)
        for place in self.shards:
            low = np.multiply(place, size)
            block = array[tuple(slice(int(a), int(a + n)) for a, n in zip(low, size))]
            index = np.argwhere(block < self.taxonomy.free_id)
            if len(index):
                yield index + low, block[tuple(index.T)]

    def pulled_back(self, grid: VoxelGrid, pose: np.ndarray) -> np.ndarray:
        """(X, Y, Z) uint8: what the map says at the voxels of a frame, IGNORE where nothing.

        Args:
            grid: of the frame.
            pose: (4, 4) frame of the grid -> global.
        """
        array = self.array("class")
        index = np.floor((apply(pose, grid.centers()) - self.origin) / self.voxel + 1e-6).astype(np.int64)
        low = index.reshape(-1, 3).min(0).clip(0, array.shape)
        high = (index.reshape(-1, 3).max(0) + 1).clip(0, array.shape)
        block = array[tuple(slice(int(a), int(b)) for a, b in zip(low, high))]
        inside = ((index >= low) & (index < high)).all(-1)
        out = np.full(grid.shape, IGNORE, np.uint8)
        out[inside] = block[tuple((index[inside] - low).T)]
        return out


def _place(numbers: Iterable[Any]) -> tuple[int, int, int]:
    x, y, z = numbers
    return int(x), int(y), int(z)


@dataclass
class _Frames:
    """Frames of the drives: which scene and index, pose, and the volumes of those that were used last."""

    reader: DriveReader
    places: list[tuple[int, int]] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)
    poses: list[np.ndarray] = field(default_factory=list)
    volumes: np.ndarray = field(init=False)
    slots: OrderedDict[int, int] = field(default_factory=OrderedDict)

    def add(self, scene: int) -> None:
        for index in range(self.reader.manifest.scenes[scene].frames):
            source, _ = self.reader.read(scene, index)
            self.places.append((scene, index))
            self.keys.append(source.frame.key)
            self.poses.append(source.pose)

    def load(self, chosen: np.ndarray) -> list[int]:
        """Slots of frames."""
        for number in chosen.tolist():
            if number in self.slots:
                self.slots.move_to_end(number)
        for number in chosen.tolist():
            if number not in self.slots:
                full = len(self.slots) == len(self.volumes)
                slot = self.slots.popitem(last=False)[1] if full else len(self.slots)
                source, view = self.reader.read(*self.places[number])
                packed(source.semantic, view, self.volumes[slot])
                self.slots[number] = slot
        return [self.slots[number] for number in chosen.tolist()]


def make_map(
    url: str,
    group: str,
    folder: str | Path,
    *,
    scenes: list[int],
    config: VoteConfig | None = None,
    things: bool = False,
    part: tuple[int, int] = (1, 1),
    threads: int = 1,
    device: Device = "auto",
    progress: Callable[[int, int], None] | None = None,
) -> Made:
    """Makes a map, shard by shard; a rerun continues where it stopped.

    Args:
        url: a packed data set.
        group: of the labels, such as refined ones.
        folder: of the map.
        scenes: numbers of the drives, which must share one global frame.
        config: weights of the frames' votes; by default the camera's, with free at full weight.
        things: keep classes of what may move.
        part: (i, n): only every n-th shard; parts may be made anywhere and their folders copied together, the last part run
            then completes the map.
        threads: of this process on the CPU.
        device: cuda, cpu, or the GPU where there is one (auto); the bytes are the same.
        progress: gets shards done and shards in all.

    Raises:
        ValueError: the map in the folder is another one, or an input does not fit.
    """
    if not 1 <= part[0] <= part[1]:
        raise ValueError(f"part {part[0]}/{part[1]}: needs i/n with 1 <= i <= n")
    if not storage.is_local(str(folder)):
        raise ValueError(f"{folder}: a map is made in a folder; copy it to the store afterwards")
    zarr, folder = extra("zarr"), Path(folder)
    config = config or VoteConfig(empty=1.0)
    base = Manifest.load(url)
    taxonomy = get_taxonomy(base.taxonomy)
    silent = () if things else [taxonomy.id(name) for name in taxonomy.things]
    reader = DriveReader(base, group, view=config.sensor == "camera", silent=silent)
    frames = _Frames(reader)
    for scene in scenes:
        frames.add(scene)
    frames.volumes = np.empty((min(MOST_FRAMES, len(frames.places)), *reader.grid.shape), np.uint8)
    work = _Tiles(frames, voting(config, reader.grid, taxonomy), threads, device)
    origin = {"map": VERSION, "labels": reader.manifest.fingerprint, "scenes": scenes, "things": things,
              "votes": dataclasses.asdict(config)}  # fmt: skip
    digest = hashlib.blake2b(canonical_json(origin), digest_size=16).hexdigest()
    about = {
        "origin": work.origin.tolist(),
        "voxel": list(reader.grid.voxel),
        "taxonomy": taxonomy.name,
        "classes": list(taxonomy.classes),
    }
    arrays = _arrays(zarr, folder, work.shape, digest=digest, about=about)
    work.made.total = len(work.shards)
    done = folder / "done"
    done.mkdir(exist_ok=True)
    mine = work.shards[part[0] - 1 :: part[1]]
    for count, place in enumerate(mine, 1):
        mark = done / "-".join(map(str, place))
        if mark.exists():
            work.made.skipped += 1
        else:
            for name, block in work.shard(place).items():
                where = tuple(slice(p * n * TILE, (p + 1) * n * TILE) for p, n in zip(place, TILES))
                arrays[name][where] = block
            mark.write_text("")
            work.made.shards += 1
        if progress:
            progress(count, len(mine))
    reader.close()
    work.made.view_from = reader.view_from
    work.made.complete = all((done / "-".join(map(str, place))).exists() for place in work.shards)
    if work.made.complete:
        shards = [list(place) for place in work.shards]
        summary = {**origin, **about, "digest": digest, "frames": frames.keys, "shards": shards}
        storage.publish(json.dumps(summary, indent=1).encode(), str(folder / SUMMARY))
    return work.made


def _arrays(zarr: Any, folder: Path, shape: tuple[int, ...], *, digest: str, about: dict) -> dict[str, Any]:
    """The group's arrays, made unless they are there. Raises ValueError if the folder holds another map."""
    if folder.exists() and any(folder.iterdir()):
        mark = folder / "digest"
        if not mark.exists() or mark.read_text() != digest:
            raise ValueError(
                f"{folder}: holds something else, or a map of other labels or settings; name another folder"
            )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "digest").write_text(digest)
    group = zarr.open_group(str(folder / ARRAYS_IN), mode="a", zarr_format=3, attributes=about)
    for name, (dtype, fill) in ARRAYS.items():
        with contextlib.suppress(zarr.errors.ContainsArrayError):  # a rerun, or another machine was faster
            group.create_array(
                name,
                shape=shape,
                dtype=dtype,
                chunks=(TILE,) * 3,
                shards=tuple(n * TILE for n in TILES),
                fill_value=fill,
                compressors=zarr.codecs.ZstdCodec(level=9),
                dimension_names=("x", "y", "z"),
            )
    return {name: group[name] for name in ARRAYS}


class _Tiles:
    """The tiles that frames meet.

    Attributes:
        origin: (3,) float64 meters, lower corner of the map.
        shape: of the map in voxels.
        shards: places of shards that hold tiles, in shards from the origin, in the order of the drive.
        made: counts.
    """

    def __init__(self, frames: _Frames, rule: Rule, threads: int, device: Device) -> None:
        grid = frames.reader.grid
        self.device: Device = device
        self.frames, self.rule, self.threads, self.grid, self.made = frames, rule, threads, grid, Made()
        self.tile = VoxelGrid(
            "tile", (0, 0, 0), (TILE * grid.voxel[0], TILE * grid.voxel[1], TILE * grid.voxel[2]), grid.voxel
        )
        self.edge = TILE * np.asarray(grid.voxel)
        self.poses = np.stack(frames.poses)
        corners = np.array(list(itertools.product(*zip(grid.lower, grid.upper))))
        met: OrderedDict[tuple[int, ...], list[int]] = OrderedDict()
        for number, pose in enumerate(frames.poses):
            box = apply(pose, corners) / self.edge
            low, high = np.floor(box.min(0)).astype(int), np.ceil(box.max(0)).astype(int)
            for place in itertools.product(*map(range, low, high)):
                met.setdefault(place, []).append(number)
        self.met = met
        per_shard = np.array(TILES)
        places = np.array(list(met)) // per_shard
        first = places.min(0)
        self.first = first * per_shard  # of the map, in tiles
        self.origin = self.first * self.edge
        self.shape = tuple(int(n) for n in (places.max(0) + 1 - first) * per_shard * TILE)
        self.shards = list(OrderedDict.fromkeys(_place(place - first) for place in places))

    def shard(self, place: tuple[int, int, int]) -> dict[str, np.ndarray]:
        """Arrays of one shard by name."""
        size = tuple(n * TILE for n in TILES)
        blocks = {name: np.full(size, fill, dtype) for name, (dtype, fill) in ARRAYS.items()}
        tiles = [t for t in itertools.product(*map(range, TILES)) if self._of(place, t) in self.met]
        for tile in sorted(tiles, key=lambda t: self.met[self._of(place, t)][0]):
            found = self._pull(self._of(place, tile))
            if found is None:
                continue
            where = tuple(slice(t * TILE, (t + 1) * TILE) for t in tile)
            for name, value in zip(ARRAYS, (found.semantic, found.confidence, found.frames, found.last)):
                blocks[name][where] = value
        return blocks

    def _of(self, place: tuple[int, ...], tile: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(int(f + p * n + t) for f, p, n, t in zip(self.first, place, TILES, tile))

    def _pull(self, tile: tuple[int, ...]) -> Pulled | None:
        corner = np.eye(4)
        corner[:3, 3] = np.asarray(tile) * self.edge
        numbers = np.array(self.met[tile])
        maps = pull_maps(self.tile, corner, self.grid, self.poses[numbers])
        near = overlapping(maps, (0, 0, 0), self.tile.shape, self.grid.shape)
        numbers, maps = numbers[near], maps[near]
        if not len(numbers):
            return None
        if len(numbers) > MOST_FRAMES:
            even = np.unique(np.linspace(0, len(numbers) - 1, MOST_FRAMES).astype(int))
            numbers, maps = numbers[even], maps[even]
            self.made.thinned += 1
        self.made.tiles += 1
        slots = self.frames.load(numbers)
        before = np.full(self.tile.shape, IGNORE, np.uint8)
        said = numbers.tolist()
        return pull(
            self.rule,
            maps,
            self.frames.volumes,
            slots,
            before=before,
            details=True,
            numbers=said,
            threads=self.threads,
            device=self.device,
        )
