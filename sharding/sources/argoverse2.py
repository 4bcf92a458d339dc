"""Argoverse 2 sensor data: ``sensor/{train,val,test}/<log>/``, Feather tables and JPEGs, ego poses at 200 Hz.

Sweeps of two LiDARs at 10 Hz are in one table, in the ego frame and compensated to the file's time stamp, the turn's beginning.
Their points become one sweep seen from the middle between both LiDARs, 6 cm from each. ``ring`` is the laser's number: 0 to
31 belong to the upper LiDAR, 32 to 63 to the lower one, in the order in which they fire, not by height.

The data set's ego frame has its origin in the rear axle, 0.33 m above the road; poses, calibration and boxes are moved to the
road. Images are pinholes already: the distortion in the calibration is that of the lenses before. Points have no classes.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
import simplejpeg

from occstream.sharding.exactmath import angle_of
from occstream.sharding.feather import TEXT, read_feather
from occstream.sharding.motion import Trajectory
from occstream.sharding.poses import apply, compose, inverse, rotate
from occstream.sharding.rawfiles import Wanted, choose, entries, existing_folder, numbered, pose_of, read_jpeg
from occstream.sharding.rawtree import Place, Tree, ahead, raw_place
from occstream.sharding.schema import (
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

SPLITS = ("train", "val", "test")
EGO_HEIGHT = 0.33  # meters of the rear axle above the road: ground returns of a log lie at -0.29 to -0.38
_TO_ROAD = np.eye(4)
_TO_ROAD[2, 3] = EGO_HEIGHT
LIDARS = ("up_lidar", "down_lidar")
CAMERA_WITHIN = 50_000_000  # nanoseconds between a sweep and its images at most
TRACK_WITHIN = 150_000_000  # nanoseconds between boxes of a track that give its velocity
_POSE = ("qw", "qx", "qy", "qz", "tx_m", "ty_m", "tz_m")
_SIGN = "MOBILE_PEDESTRIAN_CROSSING_SIGN"
_KINDS = {
    "car": ("REGULAR_VEHICLE",),
    "truck": ("LARGE_VEHICLE", "TRUCK", "TRUCK_CAB", "BOX_TRUCK"),
    "bus": ("BUS", "SCHOOL_BUS", "ARTICULATED_BUS"),
    "trailer": ("VEHICULAR_TRAILER", "MESSAGE_BOARD_TRAILER", "TRAFFIC_LIGHT_TRAILER"),
    "bicycle": ("BICYCLE", "BICYCLIST"),
    "motorcycle": ("MOTORCYCLE", "MOTORCYCLIST"),
    "pedestrian": ("PEDESTRIAN", "OFFICIAL_SIGNALER"),
    "traffic_cone": ("CONSTRUCTION_CONE", "CONSTRUCTION_BARREL"),
    "others": (
        "RAILED_VEHICLE", "WHEELED_DEVICE", "WHEELED_RIDER", "STROLLER", "WHEELCHAIR", "ANIMAL", "DOG", "BOLLARD", "SIGN",
        "STOP_SIGN", _SIGN,
    ),
}  # fmt: skip
TO_OCC3D = {category: name for name, categories in _KINDS.items() for category in categories}


def open_source(
    *,
    root: str,
    split: Literal["train", "val", "test"] | None = None,
    scenes: Wanted = None,
    taxonomy: Literal["occ3d", "openscene"] = "occ3d",
    stride: int = 5,
    sweeps: bool = True,
    boxes: bool = True,
    cameras: tuple[str, ...] | None = None,
    front_center: Literal["whole", "crop"] = "whole",
) -> Argoverse2:
    """A folder in the layout of the Argoverse 2 sensor data.

    Args:
        root: holds ``train/``, ``val/`` or ``test/``, or ``sensor/`` with these; or is one of the three. The data set is at
            ``s3://argoverse/datasets/av2/sensor``.
        split: read only this one; None for all that are there.
        scenes: ids of logs, or how many of the first; None for all.
        taxonomy: of the names of boxes.
        stride: one sweep in this many is a key-frame; 5 gives 2 Hz.
        sweeps: read the sweeps between key-frames.
        boxes: read ``annotations.feather``, which the split test lacks.
        cameras: names of cameras; None for the ring cameras that are there, an empty list for none.
        front_center: the portrait image of ``ring_front_center`` as it is, or its middle in the landscape format of the others.

    Raises:
        ValueError: a folder is missing or holds no logs, or a log that is asked for is not there.
    """
    top = existing_folder(root, "train/, val/ or test/")
    top = top / "sensor" if (top / "sensor").is_dir() else top
    if top.name in SPLITS and not any((top / name).is_dir() for name in SPLITS):
        if split not in (None, top.name):
            raise ValueError(f"{top}: is split {top.name}, but split={split} is asked for")
        split, top = top.name, raw_place(str(top)[: -len(top.name) - 1])
    if stride < 1:
        raise ValueError(f"stride is {stride}, must be at least 1")
    splits = [split] if split else [name for name in SPLITS if (top / name).is_dir()]
    logs = {}
    for name in splits:
        folder = existing_folder(top / name, "one folder for each log")
        # Of a store, one listing gives the names; to look into each would take a request for every log.
        logs |= {p.name: name for p in entries(folder) if _has_sweeps(p)}
    if not logs:
        raise ValueError(f"{top}: has no logs (<split>/<log>/sensors/lidar); complete the download")
    chosen = {name: logs[name] for name in choose(scenes, sorted(logs), top)}
    return Argoverse2(
        top, chosen, get_taxonomy(taxonomy), stride, sweeps, boxes, cameras, front_center == "crop",
        Findings("Argoverse 2 has boxes alone"),
    )  # fmt: skip


def _has_sweeps(log: Place) -> bool:
    return log.is_dir() if isinstance(log, Tree) and not log.archive else (log / "sensors" / "lidar").is_dir()


@dataclass(frozen=True)
class Argoverse2:
    """See ``open_source``."""

    root: Place = field(repr=False)
    logs: dict[str, str]
    taxonomy: Taxonomy
    stride: int
    sweeps: bool
    boxes: bool
    cameras: tuple[str, ...] | None
    crop: bool
    findings: Findings = field(repr=False)

    name = "argoverse2"
    grid = None

    def scene_names(self) -> list[str]:
        return list(self.logs)

    def load(self, name: str) -> Scene:
        """One log. Raises ValueError if a file is missing or damaged."""
        split = self.logs[name]
        log = _Log.read(self.root / split / name)
        times = numbered(log.folder / "sensors" / "lidar", ".feather")
        if not times:
            raise ValueError(f"{log.folder / 'sensors' / 'lidar'}: has no sweeps (*.feather); complete the download")
        annotations = None
        if self.boxes and split != "test":
            annotations = _Annotations.read(log.folder / "annotations.feather", self.taxonomy)
        shutters = {camera: numbered(log.folder / "sensors" / "cameras" / camera, ".jpg") for camera in self._rig(log)}
        frames = []
        starts = range(0, len(times), self.stride)
        between_of = [times[max(0, s - self.stride + 1) : s] if self.sweeps else [] for s in starts]
        for index, start in enumerate(starts):
            if index == 0:
                log.ahead([times[start]], shutters)
            if index + 1 < len(starts):
                log.ahead([*between_of[index + 1], times[starts[index + 1]]], shutters)
            time, between = times[start], between_of[index]
            frames.append(
                Frame(
                    scene=name,
                    index=index,
                    token=f"{name}/{time}",
                    timestamp=time // 1000,
                    ego_to_global=log.pose(time),
                    cameras=self._cameras(log, shutters, time),
                    lidar=log.sweep(time),
                    sweeps=[log.sweep(t) for t in between],
                    boxes=annotations.at(time, log) if annotations else None,
                )
            )
        attributes = {"split": split, "ego_height": EGO_HEIGHT}
        maps = [found[1] for path in entries(log.folder / "map") if (found := re.search(r"____([A-Z]{3})_", path.name))]
        return Scene(name, frames, attributes | ({"city": maps[0]} if maps else {}))

    def _rig(self, log: _Log) -> list[str]:
        """Names of the cameras to read. Raises ValueError for one that the log does not have."""
        folder = log.folder / "sensors" / "cameras"
        there = [path.name for path in entries(folder) if path.is_dir()]
        if self.cameras is None:
            return [name for name in there if name.startswith("ring_")]
        return choose(self.cameras, there, folder)

    def _cameras(self, log: _Log, shutters: dict[str, list[int]], time: int) -> dict[str, Camera]:
        """The image of each camera that is nearest to a sweep, where there is one within 50 ms."""
        found = {}
        for name, nearest in _nearest(shutters, time).items():
            camera = log.camera(name, nearest)
            found[name] = _middle(camera) if self.crop and name == "ring_front_center" else camera
        return found


def _nearest(shutters: dict[str, list[int]], time: int) -> dict[str, int]:
    """By camera, the time of the image that is nearest to a sweep, where there is one within 50 ms."""
    near = {name: min(taken, key=lambda t: abs(t - time), default=None) for name, taken in shutters.items()}
    return {name: at for name, at in near.items() if at is not None and abs(at - time) <= CAMERA_WITHIN}


@dataclass(frozen=True)
class _Log:
    """What a log's files have in common.

    Attributes:
        poses: ego (on the road) -> city at each time stamp, nanoseconds; ``track`` interpolates between them.
        sensors: sensor -> ego (on the road).
        intrinsics: (3, 3), width and height of each camera.
        origins: (2, 3) where the two LiDARs are in the frame of the sweep.
    """

    folder: Place
    poses: dict[int, np.ndarray]
    track: Trajectory
    sensors: dict[str, np.ndarray]
    intrinsics: dict[str, tuple[np.ndarray, int, int]]
    lidar_to_ego: np.ndarray
    origins: np.ndarray

    @classmethod
    def read(cls, folder: Place) -> _Log:
        """Raises ValueError if a table is missing or damaged, or lacks a LiDAR."""
        path = folder / "city_SE3_egovehicle.feather"
        table = read_feather(path, {"timestamp_ns": "int64", **dict.fromkeys(_POSE, "float64")}, "the ego poses")
        times = table["timestamp_ns"]
        to_city = _poses(table, path)
        if len(times) < 2 or not (np.diff(times) > 0).all():
            raise ValueError(f"{path}: needs two poses or more, with increasing time stamps; download it again")
        ego = compose(to_city, inverse(_TO_ROAD))
        apart = np.flatnonzero(np.diff(times // 1000, prepend=-1) > 0)
        track = Trajectory(folder.name, times[apart] // 1000, ego[apart])
        path = folder / "calibration" / "egovehicle_SE3_sensor.feather"
        table = read_feather(path, {"sensor_name": TEXT, **dict.fromkeys(_POSE, "float64")}, "the calibration")
        sensors = dict(zip(table["sensor_name"].tolist(), compose(_TO_ROAD, _poses(table, path))))
        if lacking := [name for name in LIDARS if name not in sensors]:
            raise ValueError(f"{path}: has no {lacking[0]}; download it again")
        places = np.array([sensors[name][:3, 3] for name in LIDARS])
        lidar_to_ego = np.eye(4)
        lidar_to_ego[:3, 3] = (places[0] + places[1]) / 2
        origins = places - lidar_to_ego[:3, 3]
        poses = dict(zip(times.tolist(), ego))
        return cls(folder, poses, track, sensors, _intrinsics(folder), lidar_to_ego, origins)

    def ahead(self, times: list[int], shutters: dict[str, list[int]]) -> None:
        """Begins to fetch sweeps, and the images of the last of them."""
        ahead(self.sweep_path(time) for time in times)
        ahead(self.image_path(name, time) for name, time in _nearest(shutters, times[-1]).items())

    def sweep_path(self, time: int) -> Place:
        return self.folder / "sensors" / "lidar" / f"{time}.feather"

    def image_path(self, name: str, time: int) -> Place:
        return self.folder / "sensors" / "cameras" / name / f"{time}.jpg"

    def pose(self, time: int) -> np.ndarray:
        """Ego -> city at a time. Raises ValueError if the poses do not reach there."""
        known = self.poses.get(time)
        return self.track.at(np.array([time // 1000]))[0] if known is None else known

    def sweep(self, time: int) -> LidarSweep:
        """Raises ValueError if the file is missing or damaged."""
        path = self.sweep_path(time)
        kinds = {**dict.fromkeys("xyz", "float64"), "intensity": "uint8", "laser_number": "uint8", "offset_ns": "int64"}
        table = read_feather(path, kinds)
        xyz = np.stack([table[axis] for axis in "xyz"], 1) + (_TO_ROAD[:3, 3] - self.lidar_to_ego[:3, 3])
        return LidarSweep(
            xyz=xyz.astype(np.float32),
            sensor_to_ego=self.lidar_to_ego.copy(),
            ego_to_global=self.pose(time),
            timestamp=time // 1000,
            intensity=table["intensity"].astype(np.float32),
            ring=table["laser_number"],
            time_lag=(-table["offset_ns"] * 1e-9).astype(np.float32),  # measured after the time stamp
            lidars=np.concatenate([[[0], [32]], self.origins], 1),
        )

    def camera(self, name: str, time: int) -> Camera:
        """An image. Raises ValueError if it is missing or damaged, or does not fit its calibration."""
        path = self.image_path(name, time)
        if name not in self.intrinsics or name not in self.sensors:
            raise ValueError(
                f"{self.folder / 'calibration'}: has no calibration of camera {name}; set cameras= without it"
            )
        jpeg, width, height = read_jpeg(path)
        matrix, *size = self.intrinsics[name]
        if [width, height] != size:
            raise ValueError(
                f"{path}: has {width}x{height} pixels, its calibration {size[0]}x{size[1]}; download it again"
            )
        return Camera(jpeg, width, height, matrix.copy(), self.sensors[name], self.pose(time), time // 1000)


@dataclass(frozen=True)
class _Annotations:
    """Boxes of a log, one row each, in the ego frame (on the road) at their time stamp.

    Attributes:
        tracks: ids; ``numbers`` are the same as whole numbers.
    """

    times: np.ndarray
    tracks: list[str]
    numbers: np.ndarray
    names: list[str]
    sizes: np.ndarray
    poses: np.ndarray

    @classmethod
    def read(cls, path: Place, taxonomy: Taxonomy) -> _Annotations:
        """Raises ValueError for a damaged table, a category that is not known, or a size that is none."""
        lengths = ("length_m", "width_m", "height_m")
        kinds = {"timestamp_ns": "int64", "track_uuid": TEXT, "category": TEXT}
        kinds |= dict.fromkeys((*lengths, *_POSE), "float64")
        table = read_feather(path, kinds, "its boxes; boxes=false does without")
        for row, category in enumerate(table["category"].tolist()):
            if category not in TO_OCC3D:
                raise ValueError(f"{path}: row {row} has the unknown category {category[:40]!r}")
        sizes = np.stack([table[name] for name in lengths], 1)
        if not (sizes > 0).all():
            row = int(np.argmin((sizes > 0).all(1)))
            raise ValueError(f"{path}: row {row} has length, width and height {sizes[row].tolist()}; download it again")
        names = [_name(category, taxonomy) for category in table["category"].tolist()]
        poses = compose(_TO_ROAD, _poses(table, path))
        numbers = np.unique(table["track_uuid"], return_inverse=True)[1]
        return cls(table["timestamp_ns"], table["track_uuid"].tolist(), numbers, names, sizes, poses)

    def at(self, time: int, log: _Log) -> Boxes:
        """Boxes of a sweep, with velocities from the same tracks' boxes before and after."""
        rows = np.flatnonzero(self.times == time)
        yaws = [angle_of(pose[0, 0], pose[1, 0]) for pose in self.poses[rows]]
        boxes = np.concatenate([self.poses[rows, :3, 3], self.sizes[rows], np.reshape(yaws, (-1, 1))], 1)
        to_ego = inverse(log.pose(time))
        velocity = np.full((len(rows), 2), np.nan, np.float32)
        for i, row in enumerate(rows):
            near = np.flatnonzero((self.numbers == self.numbers[row]) & (np.abs(self.times - time) <= TRACK_WITHIN))
            first, last = near[np.argmin(self.times[near])], near[np.argmax(self.times[near])]
            seconds = (self.times[last] - self.times[first]) * 1e-9
            if seconds > 0:
                ends = [apply(log.pose(int(self.times[r])), self.poses[r, :3, 3]) for r in (first, last)]
                velocity[i] = rotate(to_ego, (ends[1] - ends[0]) / seconds)[:2]
        names, tracks = [self.names[row] for row in rows], [self.tracks[row] for row in rows]
        return Boxes(boxes.astype(np.float32), names, tracks, velocity)


def _name(category: str, taxonomy: Taxonomy) -> str:
    """Class name of a category."""
    if taxonomy.name == "openscene":
        return "czone_sign" if category == _SIGN else OCC3D_TO_OPENSCENE[TO_OCC3D[category]]
    return TO_OCC3D[category]


def _poses(table: dict[str, np.ndarray], path: Place) -> np.ndarray:
    """(N, 4, 4) of rows with a quaternion and a place. Raises ValueError that names the row."""
    found = np.zeros((len(table["qw"]), 4, 4))
    for row, values in enumerate(np.stack([table[name] for name in _POSE], 1)):
        try:
            found[row] = pose_of(values[4:].tolist(), values[:4].tolist())
        except ValueError as error:
            raise ValueError(f"{path}: row {row}: {error}; download it again") from None
    return found


def _intrinsics(folder: Place) -> dict[str, tuple[np.ndarray, int, int]]:
    """Matrix, width and height by camera. Raises ValueError."""
    path = folder / "calibration" / "intrinsics.feather"
    kinds = {"sensor_name": TEXT, **dict.fromkeys(("fx_px", "fy_px", "cx_px", "cy_px"), "float64")}
    table = read_feather(path, {**kinds, "width_px": "int64", "height_px": "int64"}, "the calibration")
    found = {}
    for row, name in enumerate(table["sensor_name"].tolist()):
        fx, fy, cx, cy = (float(table[key][row]) for key in ("fx_px", "fy_px", "cx_px", "cy_px"))
        if not (fx > 0 and fy > 0):
            raise ValueError(f"{path}: row {row}: focal lengths of {name} are {fx} and {fy}; download it again")
        matrix = np.array([[fx, 0, cx], [0, fy, cy], [0, 0, 1]])
        found[name] = matrix, int(table["width_px"][row]), int(table["height_px"][row])
    return found


def _middle(camera: Camera) -> Camera:
    """The middle of a portrait image, in the format of a landscape image of the same cameras (4:3)."""
    height = camera.width * camera.width // camera.height
    above = (camera.height - height) // 2
    image = simplejpeg.decode_jpeg(camera.jpeg, "RGB")[above : above + height]
    matrix = camera.intrinsics.copy()
    matrix[1, 2] -= above
    return replace(camera, jpeg=b"", image=np.ascontiguousarray(image), height=height, intrinsics=matrix)
