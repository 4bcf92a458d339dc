"""NVIDIA PhysicalAI-Autonomous-Vehicles: clips of 20 s with seven f-theta cameras and one roof LiDAR, in zips of about 100 clips.

The data set's own ``features.csv`` says where files are. Both generations are read: the newer one, and that of 25.10, whose
LiDAR has intensity and time in colors and which has no ``.offline`` features and so no boxes. The rig's frame is the ego frame of
shards: its origin is on the ground below the rear axle. The scene's global frame is the rig's at the clip's start without yaw.

LiDAR spins are not compensated: each is brought to its middle with the time of each point. Cameras roll from top to bottom;
their time is that of the middle row. There are no classes of points: labels are binary, with boxes.

The license allows internal development of driving systems with NVIDIA technology, and no redistribution.
"""

from __future__ import annotations

import csv
import io
import json
import re
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from occstream.sharding.feather import TEXT, parquet_columns, read_parquet
from occstream.sharding.rawfiles import Wanted, choose, existing_folder, read_text
from occstream.sharding.rawtree import Place, inside
from occstream.sharding.schema import Findings, Frame, Scene, Taxonomy, get_taxonomy
from occstream.sharding.sources.physicalai_clip import Clip, Files, Options, needed

LICENSE = "NVIDIA Autonomous Vehicle Dataset License: internal development with NVIDIA technology, no redistribution"
LIDAR = "lidar_top_360fov"
_CHUNK = re.compile(r"\{chunk_id:0(\d)d\}")
_REVISION = re.compile(r"@([0-9a-f]{40}|[\w.-]{1,40})(/|$)")


def open_source(
    *,
    root: str,
    split: Literal["train", "val", "test"] | None = None,
    scenes: Wanted = None,
    countries: tuple[str, ...] | None = None,
    rate: float = 2.0,
    sweeps: bool = True,
    boxes: bool = True,
    views: Literal["seven70", "single100"] = "seven70",
    cameras: bool = True,
    tele: bool = False,
    taxonomy: Literal["occ3d", "openscene"] = "occ3d",
    max_points: int = 120_000,
    windshield: Literal["refuse", "ignore"] = "refuse",
) -> PhysicalAi:
    """The data set, or what a mirror has of it.

    Args:
        root: holds ``features.csv``; the data set is at ``hf://datasets/nvidia/PhysicalAI-Autonomous-Vehicles@COMMIT``.
        split: read only this one; None for all.
        scenes: ids of clips, or how many of the first; None for all that have LiDAR, cameras and poses whose files are there.
        countries: read only clips of these; None for all.
        rate: key-frames a second.
        sweeps: read the sweeps between key-frames.
        boxes: read the tracks of obstacles, which 25.10 lacks.
        views: pinholes to make of the wide cameras: seven of 70 degrees all round, or one of 100 degrees for each camera.
        cameras: read the cameras.
        tele: also the two with narrow lenses.
        taxonomy: of the names of boxes.
        max_points: of a sweep between key-frames, about; whole columns are omitted. 0: all.
        windshield: what to do about a camera behind a windshield whose distortion is given apart from the lens: it is not
            modelled.

    Raises:
        ValueError: a package is missing, the index is, or a clip that is asked for is not there.
    """
    needed("av", "DracoPy") if cameras else needed("DracoPy")
    folder = existing_folder(root, "features.csv and clip_index.parquet")
    if not 0 < rate <= 10:
        raise ValueError(f"rate is {rate:g}, must be above 0 and at most 10 key-frames a second")
    if max_points < 0:
        raise ValueError(f"max_points is {max_points}, must be 0 (all) or more")
    options = Options(
        rate, sweeps, boxes, views, cameras, tele, get_taxonomy(taxonomy), max_points, windshield == "ignore"
    )
    index = _Index.read(folder)
    there = index.clips(options, split)
    about = _collection(folder)
    there = {
        clip: chunk for clip, chunk in there.items() if not countries or about.get(clip, {}).get("country") in countries
    }
    if not there:
        raise ValueError(
            f"{folder}: has no clip with LiDAR, poses and cameras whose files are there; complete the download"
        )
    chosen = choose(scenes, list(there), folder)
    found = _REVISION.search(root) if "://" in root else None
    return PhysicalAi(
        {name: _Clip(there[name], about.get(name, {})) for name in chosen}, options, found[1] if found else "", index,
        Findings("PhysicalAI-AV has boxes alone"),
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Clip:
    """Number of its chunk, and where and when it was recorded."""

    chunk: int
    about: dict[str, Any]


@dataclass(frozen=True)
class PhysicalAi:
    """See ``open_source``."""

    clips: dict[str, _Clip] = field(repr=False)
    options: Options
    revision: str
    index: _Index = field(repr=False)
    findings: Findings = field(repr=False)

    name = "physicalai"
    grid = None

    @property
    def taxonomy(self) -> Taxonomy:
        return self.options.taxonomy

    def scene_names(self) -> list[str]:
        return list(self.clips)

    def load(self, name: str) -> Scene:
        """One clip. Raises ValueError if a file is missing or damaged, or the poses cover no key-frame."""
        known = self.clips[name]
        clip = Clip.read(Files(self.index, name, known.chunk), self.options)
        frames: list[Frame] = list(clip.frames())
        if not frames:
            raise ValueError(f"scene {name}: its poses cover no sweep; omit the clip")
        about = {"license": LICENSE, "revision": self.revision, **known.about, **clip.about}
        return Scene(name, frames, about)


@dataclass(frozen=True)
class _Index:
    """Where the data set's files are.

    Attributes:
        features: path of a feature's chunk, with a mark for the number, and names of a clip's files in it by alias.
    """

    root: Place
    features: dict[str, tuple[str, dict[str, str]]]

    @classmethod
    def read(cls, root: Place) -> _Index:
        """Raises ValueError if the table of features is missing or damaged."""
        features = {}
        path = root / "features.csv"
        for number, row in enumerate(csv.DictReader(io.StringIO(read_text(path))), 2):
            try:
                inner = json.loads(row["clip_files_in_zip"]) if row["clip_files_in_zip"] else {}
                features[row["feature"]] = row["chunk_path"], {str(k): str(v) for k, v in inner.items()}
            except (KeyError, TypeError, ValueError, AttributeError) as error:
                raise ValueError(f"{path}: line {number} is not a feature ({error}); download it again") from None
        return cls(root, features)

    def path(self, feature: str, chunk: int) -> Place:
        """File of a feature's chunk. Raises ValueError if there is no such feature."""
        if feature not in self.features:
            raise ValueError(f"{self.root / 'features.csv'}: has no feature {feature}")
        pattern = self.features[feature][0]
        return self.root / _CHUNK.sub(lambda found: f"{chunk:0{found[1]}d}", pattern)

    def has(self, feature: str, chunk: int) -> bool:
        return feature in self.features and self.path(feature, chunk).is_file()

    def clips(self, options: Options, split: str | None) -> dict[str, int]:
        """Chunk of each clip that can be read, by chunk and name: neighbors are in the same files."""
        path = self.root / "clip_index.parquet"
        table = read_parquet(path, {"clip_id": TEXT, "clip_is_valid": "bool", "chunk": "int64", "split": TEXT})
        present = _present(self.root, self.features, {name: row for row, name in enumerate(table["clip_id"].tolist())})
        wanted = table["clip_is_valid"].copy()
        if split:
            wanted &= table["split"] == split
        chunks: dict[int, bool] = {}
        found = []
        needs = [LIDAR, *options.sources]
        for row in np.flatnonzero(wanted).tolist():
            name, chunk = str(table["clip_id"][row]), int(table["chunk"][row])
            if chunk not in chunks:
                poses = self.has("egomotion", chunk) or self.has("egomotion.offline", chunk)
                chunks[chunk] = poses and all(self.has(feature, chunk) for feature in needs)
            if chunks[chunk] and all(present[f][row] for f in needs if f in present):
                found.append((chunk, name))
        return {name: chunk for chunk, name in sorted(found)}

    def member(self, feature: str, clip: str, chunk: int, alias: str = "") -> Place:
        """A clip's file in the archive of its chunk."""
        names = self.features[feature][1] if feature in self.features else {}
        name = names.get(alias or feature) or next(iter(names.values()), "")
        if not name:
            raise ValueError(f"{self.root / 'features.csv'}: names no file {alias} of feature {feature}")
        return inside(self.path(feature, chunk)) / name.replace("{clip_id}", clip)


def _present(root: Place, features: dict, row_of: dict[str, int]) -> dict[str, np.ndarray]:
    """(clips,) bool by feature, where the data set says which clips have it."""
    for name in ("feature_presence", "sensor_presence"):
        path = root / "metadata" / f"{name}.parquet"
        if path.is_file():
            known = [f for f in parquet_columns(path) if f in features]
            table = read_parquet(path, {"clip_id": TEXT, **dict.fromkeys(known, "bool")})
            rows = np.array([row_of.get(clip, -1) for clip in table["clip_id"].tolist()], np.int64)
            found = {}
            for feature in known:
                found[feature] = np.zeros(len(row_of), bool)
                found[feature][rows[rows >= 0]] = table[feature][rows >= 0]
            return found
    return {}


def _collection(root: Place) -> dict[str, dict[str, Any]]:
    """Where and when clips were recorded."""
    path = root / "metadata" / "data_collection.parquet"
    if not path.is_file():
        return {}
    have = parquet_columns(path)
    kinds = {"country": TEXT, "month": "int64", "hour_of_day": "int64", "platform_class": TEXT}
    table = read_parquet(path, {"clip_id": TEXT, **{k: v for k, v in kinds.items() if k in have}})
    names = [name for name in kinds if name in table]
    rows = zip(table["clip_id"].tolist(), *(table[name].tolist() for name in names))
    return {clip: dict(zip(names, values)) for clip, *values in rows}
