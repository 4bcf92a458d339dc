"""nuScenes, and every folder in its layout: ``v1.0-*/`` tables, ``samples/``, ``sweeps/``, optional ``lidarseg/`` and
``panoptic/``.

Only the JSON tables are read, nothing of nuscenes-devkit is needed. Each sensor keeps its own ego pose; the key-frame's
ego pose is the LiDAR's (the first camera's where a sample has no LiDAR).
"""

from __future__ import annotations

import fnmatch
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np

from occstream.sharding.exactmath import angle_of
from occstream.sharding.grid import VoxelGrid
from occstream.sharding.poses import compose, inverse, rotate
from occstream.sharding.rawfiles import (
    Wanted,
    choose,
    entries,
    existing_folder,
    listed,
    read_file,
    read_jpeg,
    read_npy,
    read_pcd,
    read_points,
)
from occstream.sharding.rawtree import Place, ahead
from occstream.sharding.rows import Row, Table, read_list
from occstream.sharding.schema import (
    IGNORE,
    OCC3D_TO_OPENSCENE,
    Boxes,
    Camera,
    Findings,
    Frame,
    LidarSweep,
    Scene,
    Taxonomy,
    get_taxonomy,
)
from occstream.sharding.sources.nuscenes_labels import LABEL_SETS

LIDAR, CAMERAS = "LIDAR_TOP", ("CAM*",)
_TABLES = (
    "scene", "sample", "sample_data", "calibrated_sensor", "sensor", "ego_pose", "sample_annotation", "instance", "category",
    "log",
)  # fmt: skip

# The benchmark's merge of 32 categories into 16 classes, by category name; the names are Occ3D's. Others are ignored.
CLASS_OF_CATEGORY = {
    "movable_object.barrier": "barrier", "vehicle.bicycle": "bicycle", "vehicle.bus.bendy": "bus",
    "vehicle.bus.rigid": "bus", "vehicle.car": "car", "vehicle.construction": "construction_vehicle",
    "vehicle.motorcycle": "motorcycle", "human.pedestrian.adult": "pedestrian", "human.pedestrian.child": "pedestrian",
    "human.pedestrian.construction_worker": "pedestrian", "human.pedestrian.police_officer": "pedestrian",
    "movable_object.trafficcone": "traffic_cone", "vehicle.trailer": "trailer", "vehicle.truck": "truck",
    "flat.driveable_surface": "driveable_surface", "flat.other": "other_flat", "flat.sidewalk": "sidewalk",
    "flat.terrain": "terrain", "static.manmade": "manmade", "static.vegetation": "vegetation",
}  # fmt: skip


def open_source(
    *,
    root: str,
    version: str | None = None,
    scenes: Wanted = None,
    sweeps: bool = False,
    taxonomy: Literal["occ3d", "openscene"] = "occ3d",
    labels: Literal["occ3d", "openoccupancy", "surroundocc"] | None = None,
    labels_root: str | None = None,
    further: tuple[str, ...] = (),
    lidar: str = LIDAR,
    cameras: tuple[str, ...] = CAMERAS,
) -> Nuscenes:
    """A folder in the nuScenes layout.

    Args:
        root: holds the table folder, ``samples/``…
        version: name of the table folder; None if there is only one.
        scenes: names of the scenes to read, or how many of the first; None for all.
        sweeps: also read the LiDAR sweeps between key-frames (denser labels).
        taxonomy: of point classes and box names.
        labels: a public label set to read with the frames; None: there are none, make them with ``--labels lidar``.
        lidar: channel of the LiDAR, in folders of other rigs.
        cameras: channels of the cameras, ``*`` stands for anything.
        further: channels of further LiDARs, likewise: their turns at a key-frame's time become sweeps that labels are made from.
        labels_root: its folder; None for ``gts``, ``nuScenes-Occupancy`` or ``nuscenes_occ/samples`` below ``root``.

    Raises:
        ValueError: a table is missing or damaged, a scene is unknown, or there are sensors but none by these names.
    """
    folder = existing_folder(root, "v1.0-*/ and samples/")
    if labels and taxonomy != "occ3d":
        raise ValueError(f"label set {labels} has the classes of taxonomy occ3d, not {taxonomy}")
    where = existing_folder(labels_root or folder / LABEL_SETS[labels].root, f"the {labels} labels") if labels else None
    versions = sorted(p.name for p in entries(folder, "v1.0-*") if p.is_dir())
    if version is None and len(versions) != 1:
        raise ValueError(f"{root}: has {', '.join(versions) or 'no'} v1.0-* table folders; choose one with version=")
    tables = folder / (version or versions[0])
    if not tables.is_dir():
        raise ValueError(f"{tables}: no such table folder; there are {', '.join(versions) or 'none'}")
    rig = Rig(lidar, tuple(cameras), tuple(further))
    records = _index(tables, scenes, sweeps, rig)
    found = _findings(folder, labels, where, records)
    return Nuscenes(folder, tables.name, sweeps, get_taxonomy(taxonomy), labels, where, records, found, rig)


@dataclass(frozen=True)
class Rig:
    """Channels to read: the LiDAR's name, and patterns of the names of cameras and further LiDARs."""

    lidar: str = LIDAR
    cameras: tuple[str, ...] = CAMERAS
    further: tuple[str, ...] = field(default=(), repr=False)  # its ``repr`` is as it was where there are none

    def is_further(self, channel: str) -> bool:
        return channel != self.lidar and any(fnmatch.fnmatchcase(channel, pattern) for pattern in self.further)

    def is_camera(self, channel: str) -> bool:
        return any(fnmatch.fnmatchcase(channel, pattern) for pattern in self.cameras)

    def check(self, table: Table) -> None:
        """Raises ValueError if there are LiDARs or cameras in the table of sensors, but none by the rig's names."""
        kinds = {row.text("channel"): str(row.values.get("modality", "")) for row in table}
        lidars = sorted(c for c, kind in kinds.items() if kind == "lidar" or "lidar" in c.lower())
        cameras = sorted(c for c, kind in kinds.items() if kind == "camera" or "cam" in c.lower())
        if self.lidar not in kinds and (lidars or self.lidar != LIDAR):
            there = f"its LiDARs are {', '.join(lidars)}" if lidars else "it has no LiDAR"
            raise ValueError(f"{table.path}: has no channel {self.lidar}, {there}; set lidar=NAME")
        if self.further and not any(self.is_further(c) for c in kinds):
            raise ValueError(
                f"{table.path}: no further LiDAR is named like {' or '.join(self.further)}; its LiDARs are {', '.join(lidars)}"
            )
        if not any(self.is_camera(c) for c in kinds) and (cameras or self.cameras != CAMERAS):
            there = f"its cameras are {', '.join(cameras)}" if cameras else "it has no camera"
            raise ValueError(
                f"{table.path}: no channel is named like {' or '.join(self.cameras)}, {there}; set cameras=[NAME,…] (* for any)"
            )


def _findings(folder: Place, labels: str | None, where: Place | None, records: dict[str, dict]) -> Findings:
    if labels:
        return Findings(f"{labels}, below {where}")
    having = {
        kind: [n for n, r in records.items() if any((s["lidar"] or {}).get(kind) for s in r["samples"])]
        for kind in ("lidarseg", "panoptic")
    }
    points = " and ".join(kind for kind, names in having.items() if names)
    with_classes = [name for name in records if any(name in names for names in having.values())]
    bare = [name for name in records if name not in set(with_classes)]
    mixture = ""
    if with_classes and bare:
        mixture = (
            f"{folder}: {listed('scene', bare)} without {points}, but {with_classes[0]} has it; choose scenes=, so that all "
            "labels have classes or none"
        )
    why, unused = "no label set was requested with labels=, and there is none below the root", ""
    if there := [name for name, kind in LABEL_SETS.items() if (folder / kind.root).is_dir()]:
        folders = ", ".join(f"{name} ({LABEL_SETS[name].root}/)" for name in there)
        why, unused = "", f"{folder}: holds public labels, {folders}; read them with labels={there[0]}"
    return Findings(why, unused, points, mixture)


@dataclass(frozen=True)
class Nuscenes:
    """See ``open_source``.

    Attributes:
        records: by scene name what the tables say, joined; small enough to be sent to worker processes.
    """

    root: Place = field(repr=False)  # ``repr`` goes into the digests of shards: what they hold, not where it came from
    version: str
    sweeps: bool
    taxonomy: Taxonomy
    labels: str | None
    labels_root: Place | None = field(repr=False)
    records: dict[str, dict] = field(repr=False)
    findings: Findings = field(repr=False)
    rig: Rig = Rig()

    name = "nuscenes"

    def __repr__(self) -> str:
        rig = f", rig={self.rig!r}" if self.rig != Rig(further=self.rig.further) else ""
        rig += f", further={self.rig.further!r}" if self.rig.further else ""  # sets of the usual rig keep their digests
        about = f"version={self.version!r}, sweeps={self.sweeps!r}, taxonomy={self.taxonomy!r}, labels={self.labels!r}"
        return f"Nuscenes({about}{rig})"

    @property
    def grid(self) -> VoxelGrid | None:
        return LABEL_SETS[self.labels].grid if self.labels else None

    @property
    def convention(self) -> str:
        return LABEL_SETS[self.labels].convention if self.labels else ""

    def scene_names(self) -> list[str]:
        return list(self.records)

    def load(self, name: str) -> Scene:
        """One scene. Raises ValueError if a file is missing or does not hold what the tables say."""
        if name not in self.records:
            raise ValueError(f"{self.root}: has no scene {name!r}")
        record = self.records[name]
        frames = [self._frame(name, i, sample, record["token"]) for i, sample in enumerate(record["samples"])]
        return Scene(name, frames, record["attributes"])

    def _frame(self, scene: str, index: int, sample: dict, scene_token: str) -> Frame:
        ahead(self.root / name for name in _files(sample))
        key = sample["lidar"] or next(iter(sample["cameras"].values()), None)
        if key is None:
            raise ValueError(f"{self.root}: sample {sample['token']} of {scene} has neither cameras nor LiDAR")
        pose = self._ego(key)
        labels = None
        if self.labels and self.labels_root:
            kind, lidar = LABEL_SETS[self.labels], sample["lidar"]
            if lidar is None and kind.grid.frame == "lidar":
                raise ValueError(
                    f"{self.root}: sample {sample['token']} of {scene} has no LiDAR, which {self.labels} needs"
                )
            names = (lidar["token"], Path(lidar["filename"]).name) if lidar else ("", "")
            labels = kind.read(self.labels_root / kind.path(scene, scene_token, sample["token"], *names), kind.grid)
        return Frame(
            scene=scene,
            index=index,
            token=sample["token"],
            timestamp=key["timestamp"],
            ego_to_global=pose,
            cameras={channel: self._camera(row) for channel, row in sample["cameras"].items()},
            lidar=self._sweep(sample["lidar"]) if sample["lidar"] else None,
            sweeps=[self._sweep(row) for row in sample["sweeps"]],
            boxes=self._boxes(sample["boxes"], inverse(pose)),
            labels=labels,
        )

    def _camera(self, row: dict) -> Camera:
        calibration = self._row("calibrated_sensor", row["calibration"])
        jpeg, width, height = read_jpeg(self.root / row["filename"], "the tables name it")
        return Camera(
            jpeg=jpeg,
            width=row["width"] or width,
            height=row["height"] or height,
            intrinsics=calibration.intrinsics("camera_intrinsic"),
            sensor_to_ego=calibration.pose("translation", "rotation"),
            ego_to_global=self._ego(row),
            timestamp=row["timestamp"],
        )

    def _row(self, table: str, record: dict) -> Row:
        return Row(f"{self.root / self.version / table}.json: row {record['token']}", record)

    def _ego(self, row: dict) -> np.ndarray:
        return self._row("ego_pose", row["ego"]).pose("translation", "rotation")

    def _sweep(self, row: dict) -> LidarSweep:
        points = _points(self.root / row["filename"])
        if not ((points[:, 4] >= 0) & (points[:, 4] <= 255) & (points[:, 4] == np.floor(points[:, 4]))).all():
            raise ValueError(
                f"{self.root / row['filename']}: the ring of its points is not an integer from 0 to 255; it looks like 4 "
                "columns, this layout has 5 (x, y, z, intensity, ring): write the ring, or 0, as fifth"
            )
        classes = instances = None
        if row.get("panoptic"):
            labels = _panoptic(self.root / row["panoptic"], len(points))
            classes, instances = self._ids()[np.array(row["class_table"], np.uint8)[labels // 1000]], labels % 1000
        if row.get("lidarseg"):
            raw = np.frombuffer(read_file(self.root / row["lidarseg"]), np.uint8)
            if len(raw) != len(points):
                raise ValueError(
                    f"{self.root / row['lidarseg']}: has {len(raw)} labels for the {len(points)} points of {row['filename']}"
                )
            classes = np.array(row["class_table"], np.uint8)[raw]
            classes = self._ids()[classes]
        return LidarSweep(
            xyz=points[:, :3].copy(),
            sensor_to_ego=self._row("calibrated_sensor", row["calibration"]).pose("translation", "rotation"),
            ego_to_global=self._ego(row),
            timestamp=row["timestamp"],
            intensity=points[:, 3].copy(),
            ring=points[:, 4].astype(np.uint8),
            classes=classes,
            instances=instances,
            token=row["token"],
        )

    def _ids(self) -> np.ndarray:
        """(256,) uint8: Occ3D id -> id of our taxonomy."""
        table = np.full(256, IGNORE, np.uint8)
        for name in set(CLASS_OF_CATEGORY.values()):
            table[get_taxonomy("occ3d").id(name)] = self.taxonomy.id(self._class_name(name))
        return table

    def _class_name(self, name: str) -> str:
        return OCC3D_TO_OPENSCENE[name] if self.taxonomy.name == "openscene" else name

    def _boxes(self, rows: list[dict], to_ego: np.ndarray) -> Boxes:
        boxes = np.zeros((len(rows), 7), np.float32)
        velocity = np.full((len(rows), 2), np.nan, np.float32)
        for i, row in enumerate(rows):
            found = self._row("sample_annotation", row["row"])
            pose = compose(to_ego, found.pose("translation", "rotation"))
            width, length, height = found.numbers("size", 3)
            if not min(width, length, height) > 0:
                raise found.error("size", f"is {found.values['size']}, not above 0")
            boxes[i] = (*pose[:3, 3], length, width, height, angle_of(pose[0, 0], pose[1, 0]))
            if row["neighbors"]:
                first, last, seconds = row["neighbors"]
                first, last = (self._row("sample_annotation", r).numbers("translation", 3) for r in (first, last))
                velocity[i] = rotate(to_ego, (last - first) / seconds)[:2]
        classes = [CLASS_OF_CATEGORY.get(row["category"]) for row in rows]
        names = [self._class_name(c) if c else row["category"] for c, row in zip(classes, rows)]
        return Boxes(boxes, names, [row["track"] for row in rows], velocity)


def _files(sample: dict) -> Iterator[str]:
    """Files of a sample, below the root."""
    for row in (*sample["cameras"].values(), *([sample["lidar"]] if sample["lidar"] else []), *sample["sweeps"]):
        yield row["filename"]
        yield from (row[kind] for kind in ("lidarseg", "panoptic") if row.get(kind))


def _index(tables: Place, scenes: Wanted, with_sweeps: bool, rig: Rig) -> dict[str, dict]:
    """Joins the tables into one record per scene, and drops the rest (the full tables take gigabytes)."""
    found = {name: Table(tables / f"{name}.json") for name in _TABLES}
    wanted = {row.text("name"): row for row in found["scene"]}
    if len(wanted) < len(found["scene"].records):
        raise ValueError(f"{found['scene'].path}: two scenes have one name; unpack the metadata archive again")
    wanted = {name: wanted[name] for name in choose(scenes, list(wanted), tables)}
    samples = _samples(found["sample"], {row.text("token") for row in wanted.values()})
    rig.check(found["sensor"])
    keys, between = _sensor_rows(found, samples, rig.lidar if with_sweeps else None)
    joined = _joiner(found, tables)
    annotations = _annotations(found, samples)
    records = {}
    for name, scene in wanted.items():
        chain = []
        for token in _chain(scene, samples, found["sample"]):
            lidar = keys[token].get(rig.lidar)
            cameras = {c: joined(r) for c, r in sorted(keys[token].items()) if rig.is_camera(c)}
            extra, at = [], lidar.text("prev", empty=True) if lidar else ""
            while at in between:
                row = between.pop(at)  # so that links which lead in a circle come to an end
                extra.append(joined(row))
                at = row.text("prev", empty=True)
            further = [joined(r) for c, r in sorted(keys[token].items()) if rig.is_further(c)]
            chain.append(
                {
                    "token": token,
                    "cameras": cameras,
                    "lidar": joined(lidar) if lidar else None,
                    "sweeps": extra[::-1] + further,
                    "boxes": annotations[token],
                }
            )
        log = found["log"].join(scene, "log_token").values if scene.has("log_token") else {}
        attributes = {
            "description": str(scene.values.get("description", "")),
            "location": str(log.get("location", "")),
        }
        records[name] = {"token": scene.text("token"), "samples": chain, "attributes": attributes}
    return records


def _samples(table: Table, scene_tokens: set[str]) -> dict[str, Row]:
    """Samples of the scenes, by token."""
    return {row.text("token"): row for row in table if row.text("scene_token") in scene_tokens}


def _chain(scene: Row, samples: dict[str, Row], table: Table) -> list[str]:
    """Tokens of a scene's samples in order. Raises ValueError if the links do not lead through all of them, once."""
    chain: dict[str, int] = {}
    row, field = scene, "first_sample_token"
    last = None
    while token := row.text(field, empty=row is not scene):
        if token not in samples:
            raise row.error(field, f"is {token!r}, which {table.path.name} does not have for this scene")
        if token in chain:
            raise row.error(field, f"leads back to {token!r}: the samples form a cycle; unpack the archive again")
        row, field = samples[token], "next"
        if row.text("scene_token") != scene.text("token"):
            raise row.error("scene_token", f"is not {scene.text('token')!r}, whose samples lead here")
        time = row.whole("timestamp")
        if last is not None and time <= last:
            raise row.error("timestamp", f"is {time}, not after that of the sample before it, {last}")
        chain[token] = last = time
    own = {t for t, r in samples.items() if r.values["scene_token"] == scene.values["token"]}
    if own - chain.keys():
        stray = samples[min(own - chain.keys())]
        raise stray.error("scene_token", f"is {scene.text('token')!r}, but no 'next' of its samples leads here")
    return list(chain)


def _sensor_rows(
    found: dict[str, Table], samples: dict[str, Row], sweeps_of: str | None
) -> tuple[dict[str, dict[str, Row]], dict[str, Row]]:
    """Rows of key-frames by sample and channel; rows of LiDAR sweeps between them by token."""
    calibrations, table = found["calibrated_sensor"], found["sample_data"]
    channels = {row.text("token"): found["sensor"].join(row, "sensor_token").text("channel") for row in calibrations}
    keys: dict[str, dict[str, Row]] = defaultdict(dict)
    between: dict[str, Row] = {}
    for row in table:
        calibrated = row.text("calibrated_sensor_token")
        if calibrated not in channels:
            calibrations.join(row, "calibrated_sensor_token")
        channel, sample = channels[calibrated], row.text("sample_token")
        if row.flag("is_key_frame") and sample in samples:
            if channel in keys[sample]:
                raise row.error("sample_token", f"is {sample!r}, which has another key-frame of {channel}")
            keys[sample][channel] = row
        elif channel == sweeps_of:
            between[row.text("token")] = row
    return keys, between


def _joiner(found: dict[str, Table], tables: Place) -> Callable[[Row], dict]:
    """Joins a row of sample_data with what it points to."""
    files: dict[str, dict[str, str]] = {"lidarseg": {}, "panoptic": {}}
    for kind in files:
        table = tables / f"{kind}.json"
        if table.is_file():
            rows = [Row(f"{table}: row number {i}", r) for i, r in enumerate(read_list(table))]
            files[kind] = {row.text("sample_data_token"): row.path("filename") for row in rows}
    class_table = _class_table(found["category"]) if any(files.values()) else None

    def joined(row: Row) -> dict:
        token, image = row.text("token"), row.has("width")
        return {
            "token": token,
            "filename": row.path("filename"),
            "timestamp": row.whole("timestamp"),
            "width": row.whole("width", 0, 65535) if image else None,
            "height": row.whole("height", 0, 65535) if image else None,
            "calibration": found["calibrated_sensor"].join(row, "calibrated_sensor_token").values,
            "ego": found["ego_pose"].join(row, "ego_pose_token").values,
            **{kind: there.get(token) for kind, there in files.items()},
            "class_table": class_table if any(token in there for there in files.values()) else None,
        }

    return joined


def _points(path: Place) -> np.ndarray:
    """(N, 5) float32 x, y, z, intensity, ring of a bare binary file or of a PCD file, in which the last two may be missing."""
    if path.suffix != ".pcd":
        return read_points(path, 5)
    fields = read_pcd(path)
    if not {"x", "y", "z"} <= fields.keys():
        raise ValueError(f"{path}: has no fields x, y and z, only {', '.join(fields)}")
    zeros = np.zeros(len(fields["x"]), np.float32)
    return np.stack([fields.get(name, zeros).astype(np.float32) for name in ("x", "y", "z", "intensity", "ring")], 1)


def _panoptic(path: Place, points: int) -> np.ndarray:
    """(N,) uint16 raw category * 1000 + instance. Raises ValueError if the file does not hold as many."""
    arrays = read_npy(path, "the tables name it")
    labels = arrays.get("data") if isinstance(arrays, dict) else None
    if labels is None or labels.shape != (points,) or labels.dtype != np.uint16:
        said = "no data" if labels is None else f"{labels.dtype} {labels.shape}"
        raise ValueError(f"{path}: holds {said}, expected data, uint16 ({points},): a label for each point")
    return labels


def _annotations(found: dict[str, Table], samples: dict[str, Row]) -> dict[str, list[dict]]:
    """Boxes by sample."""
    annotations: dict[str, list[dict]] = defaultdict(list)
    for row in found["sample_annotation"]:
        sample = row.text("sample_token")
        if sample in samples:
            instance = found["instance"].join(row, "instance_token")
            annotations[sample].append(
                {
                    "row": row.values,
                    "category": found["category"].join(instance, "category_token").text("name"),
                    "track": row.text("instance_token"),
                    "neighbors": _neighbors(row, found["sample_annotation"], found["sample"]),
                }
            )
    return annotations


def _class_table(categories: Table) -> list[int]:
    """Raw lidarseg value -> Occ3D id or IGNORE."""
    if any("index" not in row.values for row in categories):
        raise ValueError(
            f"{categories.path}: has no 'index' values; with lidarseg, unpack its category.json over this one"
        )
    occ3d, out = get_taxonomy("occ3d"), [IGNORE] * 256
    for row in categories:
        name = CLASS_OF_CATEGORY.get(row.text("name"))
        out[row.whole("index", 0, 255)] = occ3d.id(name) if name else IGNORE
    return out


def _neighbors(row: Row, annotations: Table, samples: Table) -> tuple[Mapping, Mapping, float] | None:
    """A track's box before and after, for its velocity, and the seconds between; None if it has none within 1.5 s."""
    first, last = (annotations.join(row, field) if row.text(field, empty=True) else row for field in ("prev", "next"))
    seconds = (
        samples.join(last, "sample_token").whole("timestamp") - samples.join(first, "sample_token").whole("timestamp")
    ) / 1e6
    limit = 3.0 if first is not row and last is not row else 1.5
    return (first.values, last.values, seconds) if 0 < seconds <= limit else None
