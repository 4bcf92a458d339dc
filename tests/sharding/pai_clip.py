"""Writes tiny synthetic clips in the layout of NVIDIA PhysicalAI-Autonomous-Vehicles (revision 26.03 and newer).

Everything is computed, nothing is copied from the data set: a flat ground, five boxes and one moving car are ray-cast
into seven f-theta cameras with a rolling shutter and into a spinning LiDAR whose points are NOT motion-compensated,
from a vehicle that drives and turns. So a reader that gets a pose, a quaternion order, a polynomial, a time stamp or the
deskewing wrong fails by decimeters.

No pandas is needed (the index columns are written with pandas' own metadata so that
``pandas.read_parquet`` restores the index that the devkit expects).
"""

from __future__ import annotations

import csv
import functools
import io
import json
import zipfile
from dataclasses import dataclass, field
from pathlib import Path

import av
import DracoPy
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

# name -> (full horizontal field of view in degrees, yaw in degrees (left positive), pitch, position on the rig)
CAMERAS = {
    "camera_front_wide_120fov": (120, 0, 2, (1.75, 0.0, 1.45)),
    "camera_front_tele_30fov": (30, 0, 0, (1.75, 0.05, 1.45)),
    "camera_cross_left_120fov": (120, 67, 4, (2.35, 0.95, 0.80)),
    "camera_cross_right_120fov": (120, -67, 4, (2.35, -0.95, 0.80)),
    "camera_rear_left_70fov": (70, 152, 3, (2.10, 0.98, 0.85)),
    "camera_rear_right_70fov": (70, -152, 3, (2.10, -0.98, 0.85)),
    "camera_rear_tele_30fov": (30, 180, 1, (-0.60, 0.0, 1.40)),
}
LIDAR, LIDAR_AT, LIDAR_YAW = (
    "lidar_top_360fov",
    (1.10, 0.0, 1.95),
    90.0,
)  # yawed: an identity extrinsic would hide faults
VEHICLE = {
    "length": 4.87,
    "width": 2.12,
    "height": 1.47,
    "rear_axle_to_bbox_center": 1.39,
    "wheelbase": 2.85,
    "track_width": 1.65,
}
SHUTTER_US, FPS, SPIN_US = 30_000, 30, 100_000
# Static boxes: center, full size, color. One is a curb, one hangs over the road.
BOXES = [
    ((14.0, 5.5, 1.5), (6.0, 2.0, 3.0), (200, 40, 40)),
    ((9.0, -6.0, 1.0), (2.0, 2.0, 2.0), (40, 200, 40)),
    ((-9.0, 3.0, 2.0), (4.0, 1.0, 4.0), (40, 40, 220)),
    ((25.0, 0.0, 5.5), (1.0, 14.0, 1.0), (220, 200, 40)),
    ((2.0, -9.0, 0.1), (30.0, 1.0, 0.2), (150, 150, 150)),
]
CAR = ((6.0, 3.2, 0.8), (4.2, 1.8, 1.6), (230, 120, 230), (4.0, 0.0, 0.0))  # center at t=0, size, color, m/s


def turn(axis: str, degrees: float) -> np.ndarray:
    c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    return {
        "x": np.array([[1, 0, 0], [0, c, -s], [0, s, c]]),
        "y": np.array([[c, 0, s], [0, 1, 0], [-s, 0, c]]),
        "z": np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]]),
    }[axis]


def ego_at(us: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(N, 3, 3) rig->anchor rotations, (N, 3) positions, (N,) yaw: 8 m/s on a circle, 0.3 rad/s, slight constant pitch."""
    t = np.atleast_1d(us) / 1e6
    rate, speed = 0.3, 8.0
    yaw = rate * t
    place = np.stack([speed / rate * np.sin(yaw), speed / rate * (1 - np.cos(yaw)), 0 * t], -1)
    c, s = np.cos(yaw), np.sin(yaw)
    spin = np.zeros((len(t), 3, 3))
    spin[:, 0, 0], spin[:, 0, 1], spin[:, 1, 0], spin[:, 1, 1], spin[:, 2, 2] = c, -s, s, c, 1
    return spin, place, yaw


def cast(origin: np.ndarray, ray: np.ndarray, us: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Distance (inf: sky), (N, 3) uint8 color and (N,) what was hit (-1 sky, 0 ground, 1.. boxes, last the car)."""
    n = len(ray)
    best, color, hit = np.full(n, np.inf), np.tile(np.uint8([120, 170, 230]), (n, 1)), np.full(n, -1)
    with np.errstate(divide="ignore", invalid="ignore"):
        down = -origin[:, 2] / ray[:, 2]
        on = (ray[:, 2] < 0) & (down < 120)
        spot = origin + ray * np.where(on, down, 0)[:, None]
        dark = (np.floor(spot[:, 0] / 2) + np.floor(spot[:, 1] / 2)) % 2 == 0
        best[on], hit[on] = down[on], 0
        color[on] = np.where(dark[on, None], np.uint8([70, 70, 70]), np.uint8([110, 110, 110]))
        for i, (center, size, paint, velocity) in enumerate([(*b, (0, 0, 0)) for b in BOXES] + [CAR], 1):
            at = np.array(center) + np.outer(us / 1e6, velocity)
            one, two = ((at - origin) + s * np.array(size) / 2 for s in (-1, 1))
            near, far = np.minimum(one / ray, two / ray).max(1), np.maximum(one / ray, two / ray).min(1)
            on = (near < far) & (near > 0) & (near < best)
            best[on], hit[on], color[on] = near[on], i, paint
    return best, color, hit


def lens(fov: float, width: int, height: int) -> dict:
    """An f-theta lens: forward polynomial angle -> pixels, its fitted inverse, principal point off the middle."""
    half = np.radians(fov / 2)
    focal = (width / 2) / (half - 0.04 * half**3)
    forward = np.array([0.0, focal, 0.0, -0.04 * focal, 0.0, 0.0])
    angles = np.linspace(0, half * 1.25, 400)
    pixels = np.polynomial.polynomial.polyval(angles, forward)
    powers = np.stack([pixels**k for k in range(1, 5)], 1)  # degree 4: the flat table has no more
    backward = np.r_[0.0, np.linalg.lstsq(powers / powers.max(0), angles, rcond=None)[0] / powers.max(0), 0.0]
    center = np.array([width / 2 - 0.5 + 0.013 * width, height / 2 - 0.5 - 0.021 * height])
    return dict(width=width, height=height, center=center, forward=forward, backward=backward, max_angle=half * 1.2)


def rays_of(model: dict) -> np.ndarray:
    """(H, W, 3) unit rays, camera axes (x right, y down, z forward); pixel centers are whole numbers."""
    u, v = np.meshgrid(np.arange(model["width"]), np.arange(model["height"]))
    d = np.stack([u, v], -1) - model["center"]
    r = np.linalg.norm(d, axis=-1)
    theta = r / model["forward"][1]
    for _ in range(12):  # Newton on the forward polynomial: it is the reference
        slope = np.polynomial.polynomial.polyval(theta, np.polynomial.polynomial.polyder(model["forward"]))
        theta -= (np.polynomial.polynomial.polyval(theta, model["forward"]) - r) / slope
    side = np.sin(theta) / np.maximum(r, 1e-9)
    return np.concatenate([d * side[..., None], np.cos(theta)[..., None]], -1)


def camera_pose(name: str) -> tuple[np.ndarray, np.ndarray]:
    _, yaw, pitch, at = CAMERAS[name]
    axes = np.array([[0, 0, 1], [-1, 0, 0], [0, -1, 0]], float)  # camera -> forward, left, up
    return turn("z", yaw) @ turn("y", pitch) @ axes, np.array(at)


@functools.cache
def _film(name: str, size: tuple[int, int], ends: tuple[int, ...]) -> bytes:
    return film(name, lens(CAMERAS[name][0], *size), np.array(ends))


def film(name: str, model: dict, ends: np.ndarray) -> bytes:
    """MP4 (H.264, constant 30 fps) of the frames whose last row is read out at ``ends`` microseconds."""
    spin, at = camera_pose(name)
    rays = (rays_of(model) @ spin.T).reshape(-1, 3)
    rows = np.repeat(np.arange(model["height"]), model["width"])
    sink = io.BytesIO()
    with av.open(sink, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=FPS, options={"crf": "8", "preset": "fast", "g": "5", "bf": "0"})
        stream.width, stream.height, stream.pix_fmt = model["width"], model["height"], "yuv420p"
        for end in ends:
            us = end - SHUTTER_US * (1 - (rows + 1) / model["height"])
            turns, places, _ = ego_at(us)
            origin, ray = places + turns @ at, np.einsum("nij,nj->ni", turns, rays)
            _, color, _ = cast(origin, ray, us)
            frame = av.VideoFrame.from_ndarray(color.reshape(model["height"], model["width"], 3), format="rgb24")
            for packet in stream.encode(frame):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    return sink.getvalue()


def sweep(start: int, rows: int = 32, columns: int = 180) -> dict[str, np.ndarray]:
    """One turn: points in the axes of the sensor *when each was measured*, and what it takes to check them."""
    column = np.repeat(np.arange(columns), rows)
    row = np.tile(np.arange(rows), columns)
    us = start + np.round((column + 0.5) / columns * SPIN_US)
    azimuth, elevation = -2 * np.pi * column / columns, np.radians(np.linspace(14, -24, rows))[row]
    ray = np.stack([np.cos(elevation) * np.cos(azimuth), np.cos(elevation) * np.sin(azimuth), np.sin(elevation)], -1)
    turns, places, _ = ego_at(us)
    origin = places + turns @ np.array(LIDAR_AT)
    out = np.einsum("nij,nj->ni", turns, ray @ turn("z", LIDAR_YAW).T)
    distance, color, hit = cast(origin, out, us)
    keep = distance < 100
    return {
        "xyz": (ray[keep] * distance[keep, None]).astype(np.float32),
        "intensity": color[keep].mean(1).astype(np.uint8),
        "us": us[keep].astype(np.int64),
        "element": np.stack([row, column], -1)[keep].astype(np.uint16),
        "hit": hit[keep],
    }


def draco(points: dict[str, np.ndarray], start: int, generation: str) -> bytes:
    if generation == "25.10":  # intensity and a 16-bit time in the colors, as the first release had it
        raw = np.clip(np.round((105_000 - (points["us"] - start)) * 65_535 / 210_000), 0, 65_535).astype(np.uint16)
        colors = np.stack([points["intensity"], raw & 255, raw >> 8], -1).astype(np.uint8)
        return DracoPy.encode(points["xyz"], quantization_bits=0, preserve_order=True, colors=colors)
    named = {
        "intensity": points["intensity"][:, None],
        "timestamp": points["us"].astype(np.uint32)[:, None],
        "model_element": points["element"],
    }
    # 0 quantisation bits: lossless and in order, so that tests can compare bits; the released clips are quantised.
    return DracoPy.encode(points["xyz"], quantization_bits=0, preserve_order=True, generic_attributes=named)


def parquet(columns: dict, index: tuple[str, ...] = (), **write) -> bytes:
    """A parquet file; ``index`` columns become pandas' index when pandas reads it, plain columns otherwise."""
    table = pa.table(columns)
    if index:
        note = {
            "index_columns": list(index),
            "column_indexes": [],
            "pandas_version": "2.0.0",
            "columns": [
                {
                    "name": n,
                    "field_name": n,
                    "pandas_type": "unicode" if pa.types.is_string(table[n].type) else "object",
                    "numpy_type": "object",
                    "metadata": None,
                }
                for n in index
            ],
        }
        table = table.replace_schema_metadata({b"pandas": json.dumps(note).encode()})
    sink = io.BytesIO()
    pq.write_table(table, sink, **write)
    return sink.getvalue()


def quaternion(matrix: np.ndarray) -> tuple[float, float, float, float]:
    """x, y, z, w of a rotation matrix (scalar last, as the data set has it)."""
    w = np.sqrt(max(0.0, 1 + np.trace(matrix))) / 2
    if w > 1e-6:
        x, y, z = (matrix[2, 1] - matrix[1, 2], matrix[0, 2] - matrix[2, 0], matrix[1, 0] - matrix[0, 1])
        return x / (4 * w), y / (4 * w), z / (4 * w), w
    i = int(np.argmax(np.diag(matrix)))
    j, k = (i + 1) % 3, (i + 2) % 3
    q = np.zeros(3)
    q[i] = np.sqrt(max(0.0, 1 + matrix[i, i] - matrix[j, j] - matrix[k, k])) / 2
    q[j], q[k] = matrix[i, j] / (2 * q[i]), matrix[i, k] / (2 * q[i])
    return q[0], q[1], q[2], 0.0


@dataclass
class Tree:
    """The data set that is being made: its clips and settings, and so far its features and files."""

    ids: list[str]
    seconds: float
    size: tuple[int, int]
    old: bool
    chunk: int = 7
    features: list[tuple[str, str, dict | None]] = field(default_factory=list)
    files: dict[str, bytes] = field(default_factory=dict)

    def zipped(self, feature: str, directory: str, names: dict[str, str], members: dict[str, bytes]) -> None:
        path = f"{directory}/{feature}/{feature}.chunk_{{chunk_id:04d}}.zip"
        self.features.append((feature, path, names))
        sink = io.BytesIO()
        with zipfile.ZipFile(sink, "w", zipfile.ZIP_STORED) as archive:
            for name, data in members.items():
                archive.writestr(zipfile.ZipInfo(name), data)
        self.files[path.format(chunk_id=self.chunk)] = sink.getvalue()

    def tabled(self, feature: str, data: bytes) -> None:
        path = f"calibration/{feature}/{feature}.chunk_{{chunk_id:04d}}.parquet"
        self.features.append((feature, path, None))
        self.files[path.format(chunk_id=self.chunk)] = data


def columns_of(rows: list[dict]) -> dict[str, list]:
    return {key: [row[key] for row in rows] for key in rows[0]}


def flat_row(clip: str, name: str, model: dict) -> dict:
    row = {"clip_id": clip, "camera_name": name, "width": model["width"], "height": model["height"]}
    row |= {"cx": model["center"][0], "cy": model["center"][1]}
    row |= {f"bw_poly_{k}": model["backward"][k] for k in range(5)}
    return row | {f"fw_poly_{k}": model["forward"][k] for k in range(5)}


def rich_row(clip: str, name: str, model: dict) -> dict:
    mask = np.zeros((model["height"], model["width"]), np.uint8)
    mask[-6:] = 255
    png = io.BytesIO()
    Image.fromarray(mask).save(png, "PNG")
    parameters = {
        "resolution": [model["width"], model["height"]],
        "shutter_type": "ROLLING_TOP_TO_BOTTOM",
        "external_distortion_parameters": None,
        "principal_point": model["center"].tolist(),
        "reference_poly": "ANGLE_TO_PIXELDIST",
        "pixeldist_to_angle_poly": model["backward"].tolist(),
        "angle_to_pixeldist_poly": model["forward"].tolist(),
        "max_angle": model["max_angle"],
        "linear_cde": [1.0, 0.0, 0.0],
        "shutter_delay_us": SHUTTER_US,
    }
    about = {"clip_id": clip, "camera_name": name, "model_type": "ftheta", "model_parameters": json.dumps(parameters)}
    return about | {"ego_mask_image_png": png.getvalue() if "cross" in name else b""}


def extrinsic_row(clip: str, name: str) -> dict:
    spin, at = camera_pose(name) if name in CAMERAS else (turn("z", LIDAR_YAW), np.array(LIDAR_AT))
    numbers = zip(("qx", "qy", "qz", "qw", "x", "y", "z"), map(float, (*quaternion(spin), *at)))
    return {"clip_id": clip, "sensor_name": name, **dict(numbers)}


def add_calibration(tree: Tree) -> None:
    models = {name: lens(fov, *tree.size) for name, (fov, *_) in CAMERAS.items()}
    each = [(clip, name, model) for clip in tree.ids for name, model in models.items()]
    extrinsics = columns_of([extrinsic_row(clip, name) for clip in tree.ids for name in (*CAMERAS, LIDAR)])
    vehicles = columns_of([{"clip_id": clip, **VEHICLE} for clip in tree.ids])
    camera, sensor = ("clip_id", "camera_name"), ("clip_id", "sensor_name")
    tree.tabled("camera_intrinsics", parquet(columns_of([flat_row(*row) for row in each]), camera))
    tree.tabled("sensor_extrinsics", parquet(extrinsics, sensor))
    tree.tabled("vehicle_dimensions", parquet(vehicles, ("clip_id",)))
    if not tree.old:
        tree.tabled("camera_intrinsics.offline", parquet(columns_of([rich_row(*row) for row in each]), camera))
        tree.tabled("sensor_extrinsics.offline", parquet(extrinsics, sensor))


def motion(us: np.ndarray, full: bool) -> bytes:
    turns, places, yaw = ego_at(us)
    q = np.array([quaternion(m) for m in turns])
    columns = {"timestamp": us.astype(np.int64)} | {k: q[:, i] for i, k in enumerate(("qx", "qy", "qz", "qw"))}
    columns |= {k: places[:, i] for i, k in enumerate("xyz")}
    if full:
        columns |= {"vx": 8 * np.cos(yaw), "vy": 8 * np.sin(yaw), "vz": 0 * yaw}
        columns |= {"ax": -2.4 * np.sin(yaw), "ay": 2.4 * np.cos(yaw), "az": 0 * yaw, "curvature": 0 * yaw + 0.3 / 8}
    return parquet(columns)


def obstacles(seconds: float) -> bytes:
    rows = []
    things = [("11", "automobile", CAR[0], CAR[1], CAR[3]), ("12", "heavy_truck", *BOXES[0][:2], (0, 0, 0))]
    for offset, (track, kind, center, extent, velocity) in zip((0, 37_000), things):  # tracks are staggered in time
        for us in range(offset, int(seconds * 1e6) + 1, 100_000):
            turns, places, _ = ego_at(np.array([us]))
            here = turns[0].T @ (np.array(center) + np.array(velocity) * us / 1e6 - places[0])
            row = {"timestamp_us": us, "source": "scene:obstacles:autolabels:v2", "track_id": track}
            row |= dict(zip(("center_x", "center_y", "center_z"), here))
            row |= dict(zip(("size_x", "size_y", "size_z"), extent))
            row |= dict(zip([f"orientation_{axis}" for axis in "xyzw"], quaternion(turns[0].T)))
            row |= {"label_class": kind, "reference_frame": "rig", "reference_frame_timestamp_us": us}
            rows.append(row)
    return parquet(columns_of(rows))


def add_labels(tree: Tree) -> None:
    last = int(tree.seconds * 1e6) + 150_001
    made = {"egomotion": motion(np.arange(-50_000, last, 10_000), True)}
    if not tree.old:
        made["egomotion.offline"] = motion(np.arange(0, last, 100_000), False)
        made["obstacle.offline"] = obstacles(tree.seconds)
    for feature, data in made.items():
        names = {feature: f"{{clip_id}}.{feature}.parquet"}
        tree.zipped(feature, "labels", names, {f"{clip}.{feature}.parquet": data for clip in tree.ids})


def add_lidar(tree: Tree) -> None:
    starts = [20_000 + i * SPIN_US for i in range(int(tree.seconds * 1e6 // SPIN_US))]
    columns = {"spin_index": list(range(len(starts)))}
    if tree.old:
        columns["reference_timestamp"] = starts
    else:
        columns |= {"spin_start_timestamp": starts, "spin_end_timestamp": [s + SPIN_US for s in starts]}
    columns["draco_encoded_pointcloud"] = [draco(sweep(s), s, "25.10" if tree.old else "26.03") for s in starts]
    cloud = parquet(columns, row_group_size=1)  # one row group a spin: a reader can fetch one spin alone
    names = {"scans": f"{{clip_id}}.{LIDAR}.parquet"}
    tree.zipped(LIDAR, "lidar", names, {f"{clip}.{LIDAR}.parquet": cloud for clip in tree.ids})


def add_cameras(tree: Tree) -> None:
    for number, name in enumerate(CAMERAS):
        # Not synchronous.
        ends = 33_333 + 3_000 * number + np.round(np.arange(int(tree.seconds * FPS)) * 1e6 / FPS).astype(np.int64)
        boxes = {"frame_index": [0], "x1": [3.0], "y1": [4.0], "x2": [9.0], "y2": [8.0]}
        content = {
            "video": ("mp4", _film(name, tree.size, tuple(ends.tolist()))),
            "frame_timestamps": ("timestamps.parquet", parquet({"timestamp": ends})),
            "blurred_boxes": ("blurred_boxes.parquet", parquet(boxes)),
        }
        names = {alias: f"{{clip_id}}.{name}.{ending}" for alias, (ending, _) in content.items()}
        members = {f"{clip}.{name}.{ending}": data for clip in tree.ids for ending, data in content.values()}
        tree.zipped(name, "camera", names, members)


def add_index(tree: Tree) -> None:
    splits = [("train", "val", "test")[n % 3] for n in range(len(tree.ids))]
    rows = [{"clip_id": c, "clip_is_valid": True, "chunk": tree.chunk, "split": s} for c, s in zip(tree.ids, splits)]
    tree.files["clip_index.parquet"] = parquet(columns_of(rows), ("clip_id",))
    about = {"country": "Germany", "month": 6, "hour_of_day": 12, "platform_class": "hyperion_8", "radar_config": "nan"}
    rows = [{"clip_id": clip, **about} for clip in tree.ids]
    tree.files["metadata/data_collection.parquet"] = parquet(columns_of(rows), ("clip_id",))
    rows = [{"clip_id": clip, **{name: True for name, *_ in tree.features}} for clip in tree.ids]
    presence = "sensor_presence" if tree.old else "feature_presence"
    tree.files[f"metadata/{presence}.parquet"] = parquet(columns_of(rows), ("clip_id",))
    table = io.StringIO()
    writer = csv.writer(table)
    writer.writerow(("feature", "directory", "chunk_path", "clip_files_in_zip"))
    for feature, path, names in tree.features:
        writer.writerow((feature, path.split("/")[0], path, json.dumps(names) if names else ""))
    tree.files["features.csv"] = table.getvalue().encode()


def make(
    out: Path, clips: int = 2, seconds: float = 0.5, size: tuple[int, int] = (192, 108), generation: str = "26.03"
) -> list[str]:
    """Writes the tree below ``out`` and returns the clip ids. All clips are in one chunk."""
    ids = [f"{n:08x}-0000-4000-8000-{n:012x}" for n in range(1, clips + 1)]
    tree = Tree(ids, seconds, size, generation == "25.10")
    for add in (add_calibration, add_labels, add_lidar, add_cameras, add_index):
        add(tree)
    for name, data in tree.files.items():
        path = out / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return ids
