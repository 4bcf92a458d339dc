"""nuScenes, and every folder in its layout: ``v1.0-*/`` tables, ``samples/``, ``sweeps/``, optional ``lidarseg/``.

Only the JSON tables are read, nothing of nuscenes-devkit is needed. Each sensor keeps its own ego pose; the key-frame's
ego pose is the LiDAR's (the first camera's where a sample has no LiDAR).
"""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from occstream.sharding.exactmath import angle_of
from occstream.sharding.grid import VoxelGrid
from occstream.sharding.poses import compose, inverse, rotate
from occstream.sharding.rawfiles import choose, existing_folder, pose_of, read_file, read_points
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

LIDAR = "LIDAR_TOP"
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
    scenes: tuple[str, ...] | None = None,
    sweeps: bool = False,
    taxonomy: Literal["occ3d", "openscene"] = "occ3d",
    labels: Literal["occ3d", "openoccupancy", "surroundocc"] | None = None,
    labels_root: str | None = None,
) -> Nuscenes:
    """A folder in the nuScenes layout.

    Args:
        root: holds the table folder, ``samples/``…
        version: name of the table folder; None if there is only one.
        scenes: names of the scenes to read; None for all.
        sweeps: also read the LiDAR sweeps between key-frames (denser labels).
        taxonomy: of point classes and box names.
        labels: a public label set to read with the frames; None: there are none, make them with ``--labels lidar``.
        labels_root: its folder; None for ``gts``, ``nuScenes-Occupancy`` or ``nuscenes_occ/samples`` below ``root``.

    Raises:
        ValueError: a table is missing or damaged, or a scene is unknown.
    """
    folder = existing_folder(root, "v1.0-*/ and samples/")
    if labels and taxonomy != "occ3d":
        raise ValueError(f"label set {labels} has the classes of taxonomy occ3d, not {taxonomy}")
    where = existing_folder(labels_root or folder / LABEL_SETS[labels].root, f"the {labels} labels") if labels else None
    versions = sorted(p.name for p in folder.glob("v1.0-*") if p.is_dir())
    if version is None and len(versions) != 1:
        raise ValueError(f"{root}: has {', '.join(versions) or 'no'} v1.0-* table folders; choose one with version=")
    tables = folder / (version or versions[0])
    if not tables.is_dir():
        raise ValueError(f"{tables}: no such table folder; there are {', '.join(versions) or 'none'}")
    records = _index(tables, scenes, sweeps)
    found = _findings(folder, labels, where)
    return Nuscenes(folder, tables.name, sweeps, get_taxonomy(taxonomy), labels, where, records, found)


def _findings(folder: Path, labels: str | None, where: Path | None) -> Findings:
    if labels:
        return Findings(f"{labels}, below {where}")
    there = [name for name, kind in LABEL_SETS.items() if (folder / kind.root).is_dir()]
    if not there:
        return Findings("no label set was asked for with labels=, and none lies below the root")
    folders = ", ".join(f"{name} ({LABEL_SETS[name].root}/)" for name in there)
    return Findings("", f"{folder}: holds public labels, {folders}; read them with labels={there[0]}")


@dataclass(frozen=True)
class Nuscenes:
    """See ``open_source``.

    Attributes:
        records: by scene name what the tables say, joined; small enough to be sent to worker processes.
    """

    root: Path = field(repr=False)  # ``repr`` goes into the digests of shards: what they hold, not where it came from
    version: str
    sweeps: bool
    taxonomy: Taxonomy
    labels: str | None
    labels_root: Path | None = field(repr=False)
    records: dict[str, dict] = field(repr=False)
    findings: Findings = field(repr=False)

    name = "nuscenes"

    @property
    def grid(self) -> VoxelGrid | None:
        return LABEL_SETS[self.labels].grid if self.labels else None

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
        key = sample["lidar"] or next(iter(sample["cameras"].values()), None)
        if key is None:
            raise ValueError(f"{self.root}: sample {sample['token']} of {scene} has neither cameras nor LiDAR")
        pose = pose_of(*key["ego"])
        labels = None
        if self.labels:
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
        return Camera(
            jpeg=read_file(self.root / row["filename"], "the tables name it"),
            width=row["width"],
            height=row["height"],
            intrinsics=np.array(row["intrinsics"], np.float64),
            sensor_to_ego=pose_of(*row["sensor"]),
            ego_to_global=pose_of(*row["ego"]),
            timestamp=row["timestamp"],
        )

    def _sweep(self, row: dict) -> LidarSweep:
        points = read_points(self.root / row["filename"], 5)
        classes = None
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
            sensor_to_ego=pose_of(*row["sensor"]),
            ego_to_global=pose_of(*row["ego"]),
            timestamp=row["timestamp"],
            intensity=points[:, 3].copy(),
            ring=points[:, 4].astype(np.uint8),
            classes=classes,
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
            pose = compose(to_ego, pose_of(row["translation"], row["rotation"]))
            width, length, height = row["size"]
            boxes[i] = (*pose[:3, 3], length, width, height, angle_of(pose[0, 0], pose[1, 0]))
            if row["velocity"] is not None:
                velocity[i] = rotate(to_ego, np.array(row["velocity"]))[:2]
        classes = [CLASS_OF_CATEGORY.get(row["category"]) for row in rows]
        names = [self._class_name(c) if c else row["category"] for c, row in zip(classes, rows)]
        return Boxes(boxes, names, [row["track"] for row in rows], velocity)


def _index(tables: Path, scenes: tuple[str, ...] | None, with_sweeps: bool) -> dict[str, dict]:
    """Joins the tables into one record per scene, and drops the rest (the full tables take gigabytes)."""
    found = {name: _table(tables, name) for name in _TABLES}
    rows = {name: {row["token"]: row for row in found[name]} for name in _TABLES if name != "sample_data"}
    wanted = {row["name"]: row for row in found["scene"]}
    wanted = {name: wanted[name] for name in choose(scenes, list(wanted), tables)}
    scene_tokens = {row["token"] for row in wanted.values()}
    samples = {t: row for t, row in rows["sample"].items() if row["scene_token"] in scene_tokens}

    segmentation = {}
    if (tables / "lidarseg.json").is_file():
        segmentation = {row["sample_data_token"]: row["filename"] for row in _table(tables, "lidarseg")}
    class_table = _class_table(tables, found["category"]) if segmentation else None

    keys: dict[str, dict[str, dict]] = defaultdict(dict)
    between: dict[str, dict] = {}
    for row in found["sample_data"]:
        channel = rows["sensor"][rows["calibrated_sensor"][row["calibrated_sensor_token"]]["sensor_token"]]["channel"]
        if row["is_key_frame"] and row["sample_token"] in samples:
            keys[row["sample_token"]][channel] = row
        elif with_sweeps and channel == LIDAR:
            between[row["token"]] = row

    def joined(row: dict) -> dict:
        calibration, ego = (
            rows["calibrated_sensor"][row["calibrated_sensor_token"]],
            rows["ego_pose"][row["ego_pose_token"]],
        )
        return {
            "token": row["token"],
            "filename": row["filename"],
            "timestamp": row["timestamp"],
            "width": row.get("width"),
            "height": row.get("height"),
            "intrinsics": calibration["camera_intrinsic"],
            "sensor": (calibration["translation"], calibration["rotation"]),
            "ego": (ego["translation"], ego["rotation"]),
            "lidarseg": segmentation.get(row["token"]),
            "class_table": class_table if row["token"] in segmentation else None,
        }

    annotations: dict[str, list[dict]] = defaultdict(list)
    for row in found["sample_annotation"]:
        if row["sample_token"] in samples:
            instance = rows["instance"][row["instance_token"]]
            annotations[row["sample_token"]].append(
                {
                    "translation": row["translation"],
                    "rotation": row["rotation"],
                    "size": row["size"],
                    "category": rows["category"][instance["category_token"]]["name"],
                    "track": row["instance_token"],
                    "velocity": _velocity(row, rows["sample_annotation"], rows["sample"]),
                }
            )

    records = {}
    for name, scene in wanted.items():
        chain, token = [], scene["first_sample_token"]
        while token:
            if token not in samples:
                raise ValueError(
                    f"{tables}: sample.json has no sample {token} that scene {name} needs; the tables are damaged"
                )
            sample, lidar = samples[token], keys[token].get(LIDAR)
            cameras = {c: joined(r) for c, r in sorted(keys[token].items()) if c.startswith("CAM")}
            extra, at = [], lidar["prev"] if lidar else ""
            while at in between:
                extra.append(joined(between[at]))
                at = between[at]["prev"]
            chain.append(
                {
                    "token": token,
                    "cameras": cameras,
                    "lidar": joined(lidar) if lidar else None,
                    "sweeps": extra[::-1],
                    "boxes": annotations[token],
                }
            )
            token = sample["next"]
        log = rows["log"].get(scene["log_token"], {})
        attributes = {"description": scene.get("description", ""), "location": log.get("location", "")}
        records[name] = {"token": scene["token"], "samples": chain, "attributes": attributes}
    return records


def _table(tables: Path, name: str) -> list[dict[str, Any]]:
    path = tables / f"{name}.json"
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        raise ValueError(f"{path}: table is missing; the metadata archive of nuScenes holds all of them") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not readable as JSON ({error}); unpack the metadata archive again") from None


def _class_table(tables: Path, categories: list[dict]) -> list[int]:
    """Raw lidarseg value -> Occ3D id or IGNORE."""
    if any("index" not in row for row in categories):
        raise ValueError(
            f"{tables / 'category.json'}: has no 'index' values; with lidarseg, unpack its category.json over this one"
        )
    occ3d, out = get_taxonomy("occ3d"), [IGNORE] * 256
    for row in categories:
        name = CLASS_OF_CATEGORY.get(row["name"])
        out[row["index"]] = occ3d.id(name) if name else IGNORE
    return out


def _velocity(row: dict, annotations: dict[str, dict], samples: dict[str, dict]) -> np.ndarray | None:
    """(3,) m/s in the global frame from the track's neighbours in time, None where it has none within 1.5 s."""
    first, last = annotations.get(row["prev"], row), annotations.get(row["next"], row)
    seconds = (samples[last["sample_token"]]["timestamp"] - samples[first["sample_token"]]["timestamp"]) / 1e6
    limit = 3.0 if first is not row and last is not row else 1.5
    if not 0 < seconds <= limit:
        return None
    return (np.array(last["translation"]) - np.array(first["translation"])) / seconds
