"""Frame <-> tar members: the only place that knows the shard format (see FORMAT.md)."""

from __future__ import annotations

import json
import math
import re
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import simplejpeg
import zstandard

from occstream.sharding.schema import Boxes, Camera, Frame, Labels, LidarSweep, check_scene_name

FORMAT_VERSION = 1
GROUPS = ("cameras", "lidar", "labels")
LIDAR_LEVEL = 9  # at most: byte planes gain little beyond

_LIDAR_ARRAYS = ("xyz", "intensity", "ring", "time_lag", "classes", "moving", "instances")
_LABEL_ARRAYS = ("binary", "semantic", "mask_lidar", "mask_camera", "flow", "logits", "ranked", "evidence")
LARGEST_ARRAY = 1 << 28  # bytes that an array may have when unpacked: more than any grid's or sweep's
_PLAIN = re.compile(r"[<|]?(b1|[iu][1248]|f[248])")
# What damaged JSON and arrays raise when they are taken apart.
_DAMAGED = (
    KeyError, ValueError, TypeError, AttributeError, IndexError, OverflowError, RecursionError, zstandard.ZstdError,
)  # fmt: skip
_local = threading.local()


class CorruptSample(ValueError):
    """A frame that cannot be decoded; says which key and member."""


class IncompleteSample(CorruptSample):
    """A frame that is whole, but lacks what a recipe reads, as one of the rig's cameras: replaced like a corrupt one, and
    no sign of damage."""


@dataclass(frozen=True)
class Coding:
    """Choices at packing that a reader need not know.

    Attributes:
        level: zstd level. Grids decode faster from 19 than from 3, and are written once.
        lidar_step: meters; coordinates of points are rounded to multiples of it. 0: lossless.

    Raises:
        ValueError: a value is out of range.
    """

    level: int = 19
    lidar_step: float = 0.0

    def __post_init__(self) -> None:
        if not 1 <= self.level <= 22:
            raise ValueError(f"zstd level {self.level} is out of range 1..22")
        if not 0 <= self.lidar_step <= 0.1:
            raise ValueError(f"LiDAR step {self.lidar_step} m is out of range 0..0.1; 0.002 is below a sensor's noise")


LOSSLESS = Coding()


def encode(frame: Frame, group: str, coding: Coding = LOSSLESS) -> list[tuple[str, bytes]]:
    """Members of one frame in one group: names and contents, in order.

    Raises:
        ValueError: unknown group, the frame lacks what the group holds, or an image is damaged.
    """
    head: dict[str, Any] = {
        "scene": frame.scene,
        "index": frame.index,
        "token": frame.token,
        "timestamp": frame.timestamp,
        "ego_to_global": _matrix(frame.ego_to_global),
    }
    if group == "cameras":
        about, members = _encode_cameras(frame)
    elif group == "lidar":
        about, members = _encode_lidar(frame, coding)
    elif group == "labels":
        about, members = _encode_labels(frame, coding)
    else:
        raise ValueError(f"unknown group {group!r}; this version writes {', '.join(GROUPS)}")
    first = ("frame.json", canonical_json(head | about))
    return [(f"{frame.key}.{name}", data) for name, data in [first, *members]]


Members = list[tuple[str, bytes]]  # names without the frame's key, and contents


def _encode_cameras(frame: Frame) -> tuple[dict[str, Any], Members]:
    """What a frame's head says about its cameras, and their images."""
    about, members = {}, []
    for name, camera in frame.cameras.items():
        if camera.lens is not None or camera.distortion is not None:
            raise ValueError(
                f"frame {frame.key}, {name}: has a distorting lens, and shards hold pinholes only; rectify it first "
                "(prepare.Images), and give its coefficients as Camera.lens"
            )
        about[name] = {
            "member": f"{name.lower()}.jpg",
            "width": camera.width,
            "height": camera.height,
            "intrinsics": _matrix(camera.intrinsics),
            "sensor_to_ego": _matrix(camera.sensor_to_ego),
            "ego_to_global": _matrix(camera.ego_to_global),
            "timestamp": camera.timestamp,
            "distortion": None,
        }
        try:
            check_jpeg(camera)
        except ValueError as error:
            raise ValueError(f"frame {frame.key}, {name}: {error}") from None
        members.append((f"{name.lower()}.jpg", camera.jpeg))
    return {"cameras": about}, members


def _encode_lidar(frame: Frame, coding: Coding) -> tuple[dict[str, Any], Members]:
    """What a frame's head says about its sweep, and the sweep's arrays."""
    if frame.lidar is None:
        return {}, []
    sweep = frame.lidar
    about = {
        "sensor_to_ego": _matrix(sweep.sensor_to_ego),
        "ego_to_global": _matrix(sweep.ego_to_global),
        "timestamp": sweep.timestamp,
    }
    if sweep.token is not None:
        about["token"] = sweep.token
    if sweep.lidars is not None:
        about["lidars"] = _matrix(_lidars(sweep.lidars))
    arrays: dict[str, dict] = {}
    level = min(LIDAR_LEVEL, coding.level)
    members = _pack_arrays(sweep, _LIDAR_ARRAYS, arrays, level, step=coding.lidar_step)
    return {"lidar": about} | ({"arrays": arrays} if arrays else {}), members


def _encode_labels(frame: Frame, coding: Coding) -> tuple[dict[str, Any], Members]:
    """What a frame's head says about its labels and boxes, and the labels' arrays."""
    if frame.labels is None:
        raise ValueError(f"frame {frame.key} has no labels; make them (--labels lidar) or leave the group out")
    rows = int(np.count_nonzero(frame.labels.binary))
    for name in ("flow", "logits", "ranked"):
        value = getattr(frame.labels, name)
        if value is not None and len(value) != rows:
            raise ValueError(
                f"frame {frame.key}: {name} has {len(value)} rows, but {rows} voxels are occupied; its source is wrong"
            )
    arrays: dict[str, dict] = {}
    members = _pack_arrays(frame.labels, _LABEL_ARRAYS, arrays, coding.level)
    about: dict[str, Any] = {"arrays": arrays} if arrays else {}
    if frame.labels.ego_to_global is not None:
        about["labels"] = {"ego_to_global": _matrix(frame.labels.ego_to_global)}
    if frame.boxes is not None:
        about["boxes"] = {
            "boxes": np.asarray(frame.boxes.boxes, np.float32).tolist(),
            "names": list(frame.boxes.names),
            "track_ids": list(frame.boxes.track_ids),
            "velocity": _nullable(frame.boxes.velocity),
        }
    return about, members


def check_jpeg(camera: Camera) -> None:
    """Cheap check of a JPEG that is not decoded: header and size, and that the end is there (a truncated file lacks it).

    Raises:
        ValueError: one of them is wrong.
    """
    try:
        height, width, space, *_ = simplejpeg.decode_jpeg_header(camera.jpeg)
    except ValueError as error:
        if camera.jpeg.startswith((b"\x89PNG", b"RIFF", b"BM", b"II*", b"MM\0*")):
            raise ValueError(
                "is a PNG or another image, not a JPEG; its source must read it with rawfiles.read_jpeg"
            ) from None
        raise ValueError(f"not a JPEG ({error}); download the image again") from None
    if space in ("CMYK", "YCCK"):
        raise ValueError(f"JPEG is in {space}, not in color or gray; read it with rawfiles.read_jpeg")
    if (width, height) != (camera.width, camera.height):
        raise ValueError(
            f"image has {width}x{height} pixels, its metadata says {camera.width}x{camera.height}; one of them is wrong"
        )
    if b"\xff\xd9" not in camera.jpeg[-1024:]:
        raise ValueError(f"JPEG is truncated ({len(camera.jpeg)} bytes); download the image again")


def decode(groups: Iterable[dict[str, bytes]]) -> Frame:
    """One frame from the members of its groups.

    Args:
        groups: per group a mapping from member name without the key (``"frame.json"``, ``"xyz.zst"``…) to bytes.

    Raises:
        CorruptSample: a member is missing or damaged.
    """
    frame: Frame | None = None
    for members in groups:
        try:
            head = json.loads(members["frame.json"])
            if frame is None:
                frame = _decode_head(head)
        except _DAMAGED as error:
            said = " ".join(str(error).split())[:120]
            raise CorruptSample(f"frame.json is missing or damaged ({type(error).__name__}: {said})") from None
        try:
            _decode_group(frame, head, members)
        except _DAMAGED as error:
            raise CorruptSample(f"frame {frame.key}: {type(error).__name__}: {error}; pack its shard again") from None
    if frame is None:
        raise ValueError("no groups given")
    return frame


def _decode_head(head: dict) -> Frame:
    scene, index, token, timestamp = head["scene"], head["index"], head["token"], head["timestamp"]
    check_scene_name(scene)
    if type(index) is not int or not 0 <= index < 10**7 or not isinstance(token, str):
        raise ValueError(f"index {str(index)[:40]!r} or token {str(token)[:40]!r} is not valid")
    pose = head["ego_to_global"]
    return Frame(
        scene, index, token, None if timestamp is None else _time(timestamp), None if pose is None else _pose(pose)
    )


def _decode_group(frame: Frame, head: dict, members: dict[str, bytes]) -> None:
    for name, c in head.get("cameras", {}).items():
        frame.cameras[name] = Camera(
            jpeg=members[c["member"]],
            width=c["width"],
            height=c["height"],
            intrinsics=_numbers(c["intrinsics"], 3, 3),
            sensor_to_ego=_pose(c["sensor_to_ego"]),
            ego_to_global=_pose(c["ego_to_global"]),
            timestamp=_time(c["timestamp"]),
            distortion=tuple(_numbers(c["distortion"], -1).tolist()) if c["distortion"] is not None else None,
        )
        size = frame.cameras[name].width, frame.cameras[name].height
        if not all(type(n) is int and 0 < n < 65536 for n in size):
            raise ValueError(f"{name} has {size} pixels")
    arrays = {name: _unpack(members[f"{name}.zst"], spec) for name, spec in head.get("arrays", {}).items()}
    _check_arrays(arrays)
    if "lidar" in head:
        pose = head["lidar"]
        frame.lidar = LidarSweep(
            sensor_to_ego=_pose(pose["sensor_to_ego"]),
            ego_to_global=_pose(pose["ego_to_global"]),
            timestamp=_time(pose["timestamp"]),
            xyz=arrays["xyz"],
            lidars=_lidars(pose["lidars"]) if "lidars" in pose else None,
            token=_token(pose.get("token")),
            **{name: arrays.get(name) for name in _LIDAR_ARRAYS if name != "xyz"},
        )
    if "binary" in arrays:
        others = {name: arrays.get(name) for name in _LABEL_ARRAYS if name != "binary"}
        frame.labels = Labels(arrays["binary"], **others)
        if "labels" in head:
            frame.labels.ego_to_global = _pose(head["labels"]["ego_to_global"])
    if "boxes" in head:
        b = head["boxes"]
        velocity = b["velocity"]
        names, tracks = b["names"], b["track_ids"]
        if (
            not isinstance(names, list)
            or not isinstance(tracks, list)
            or not all(isinstance(word, str) for word in (*names, *tracks))
        ):
            raise ValueError("names or tracks of boxes are not lists of strings")
        if len(names) != len(tracks):
            raise ValueError(f"boxes have {len(names)} names and {len(tracks)} tracks")
        frame.boxes = Boxes(
            boxes=_numbers(b["boxes"], len(names), 7).astype(np.float32) if names else np.zeros((0, 7), np.float32),
            names=names,
            track_ids=tracks,
            velocity=None if velocity is None else np.array(velocity, np.float32).reshape(len(names), 2),
        )


def _token(value: Any) -> str | None:
    if value is not None and not isinstance(value, str):
        raise ValueError(f"token {str(value)[:40]!r} of a sweep is not a text")
    return value


def _check_arrays(arrays: dict[str, np.ndarray]) -> None:
    """Arrays of one frame must fit each other. Raises ValueError."""
    xyz, binary = arrays.get("xyz"), arrays.get("binary")
    if xyz is not None and (xyz.ndim != 2 or xyz.shape[1] != 3 or xyz.dtype != np.float32):
        raise ValueError(f"xyz has shape {xyz.shape} and type {xyz.dtype}, expected (N, 3) float32")
    if binary is not None and (binary.ndim != 3 or binary.dtype != bool):
        raise ValueError(f"binary has shape {binary.shape} and type {binary.dtype}, expected (X, Y, Z) bool")
    if "evidence" in arrays and arrays["evidence"].dtype != np.uint8:
        raise ValueError(f"evidence has type {arrays['evidence'].dtype}, expected uint8")
    if "instances" in arrays and arrays["instances"].dtype != np.uint16:
        raise ValueError(f"instances has type {arrays['instances'].dtype}, expected uint16")
    known = {**dict.fromkeys(_LIDAR_ARRAYS, xyz), **dict.fromkeys(_LABEL_ARRAYS, binary)}
    for name, value in arrays.items():
        like = known.get(name)
        if like is None:
            raise ValueError(f"array {name!r:.40} is unknown, or stands without xyz or binary")
        if name in ("flow", "logits", "ranked"):
            if value.ndim != 2:
                raise ValueError(f"{name} has shape {value.shape}, expected rows")
        elif value.shape != (like.shape[:1] if like is xyz else like.shape) and name != "xyz":
            raise ValueError(f"{name} has shape {value.shape}, which does not match {like.shape}")


def _pack_arrays(owner: Any, names: Iterable[str], specs: dict, level: int, *, step: float = 0.0) -> Members:
    members = []
    for name in names:
        value = getattr(owner, name)
        if value is None:
            continue
        value = np.asarray(value)
        spec = {"dtype": value.dtype.newbyteorder("<").str, "shape": list(value.shape)}
        if value.dtype == bool:
            spec["coding"], raw = "bits", np.packbits(value.reshape(-1)).tobytes()
        elif name == "xyz" and step:
            steps = np.rint(value.astype(np.float64) / step).clip(-(2**31) + 1, 2**31 - 1).astype("<i4")
            if not steps.size or np.abs(steps).max() < 2**15:
                steps = steps.astype("<i2")
            spec |= {"coding": "steps", "step": step, "stored": steps.dtype.str}
            raw = _to_planes(steps)
        elif value.dtype.itemsize > 1:
            spec["coding"], raw = "planes", _to_planes(value)
        else:
            spec["coding"], raw = "raw", np.ascontiguousarray(value).tobytes()
        specs[name] = spec
        members.append((f"{name}.zst", zstandard.ZstdCompressor(level=level, write_checksum=True).compress(raw)))
    return members


def _unpack(data: bytes, spec: dict) -> np.ndarray:
    dtype, shape, coding = _plain(spec["dtype"]), tuple(spec["shape"]), spec["coding"]
    if not 1 <= len(shape) <= 5 or not all(type(n) is int and 0 <= n <= LARGEST_ARRAY for n in shape):
        raise ValueError(f"shape {str(shape)[:40]} is not valid")
    count = math.prod(shape)
    stored = _plain(spec["stored"]) if coding == "steps" else dtype
    length = -(-count // 8) if coding == "bits" else count * stored.itemsize
    if max(length, count * dtype.itemsize) > LARGEST_ARRAY:
        raise ValueError(f"an array of shape {shape} is larger than {LARGEST_ARRAY} bytes")
    raw = inflate(data, length, shape)
    if coding == "bits":
        return np.unpackbits(np.frombuffer(raw, np.uint8), count=count).view(bool).reshape(shape)
    if coding == "planes":
        return _from_planes(raw, dtype, shape)
    if coding == "steps":
        step = float(spec["step"])
        if stored.kind != "i" or not 0 < step < 1:
            raise ValueError(f"steps of {step} stored as {stored}")
        return (_from_planes(raw, stored, shape) * np.float64(step)).astype(dtype)
    if coding == "raw":
        return np.frombuffer(raw, dtype).reshape(shape)
    raise ValueError(f"unknown coding {str(coding)[:40]!r}")


def inflate(data: bytes | memoryview, length: int, shape: tuple[int, ...]) -> bytes:
    """``length`` bytes of an array from a zstd frame. Raises ValueError if it holds more or fewer."""
    # A context per thread: making one costs more than decoding a small member.
    if not hasattr(_local, "zstd"):
        _local.zstd = zstandard.ZstdDecompressor()
    # Before anything is allocated: a few bytes can be made to fill any memory.
    if (said := zstandard.frame_content_size(data)) not in (-1, length):
        raise ValueError(f"unpacks to {said} bytes, an array of shape {shape} has {length}")
    raw = _local.zstd.decompress(data, max_output_size=length) if length else b""
    if len(raw) != length:
        raise ValueError(f"unpacks to {len(raw)} bytes, an array of shape {shape} has {length}")
    return raw


def _plain(name: Any) -> np.dtype:
    if not isinstance(name, str) or not _PLAIN.fullmatch(name):
        raise ValueError(f"type {str(name)[:40]!r} is not one of numbers")
    return np.dtype(name)


def _to_planes(value: np.ndarray) -> bytes:
    """Columns one after the other, and in each the first bytes of all rows, then the second bytes, …"""
    width = int(np.prod(value.shape[1:]))
    little = value.astype(value.dtype.newbyteorder("<")).reshape(len(value), width)
    columns = np.frombuffer(little.T.tobytes(), np.uint8).reshape(width, len(value), value.dtype.itemsize)
    return np.ascontiguousarray(columns.transpose(0, 2, 1)).tobytes()


def _from_planes(raw: bytes, dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
    rows = shape[0]
    planes = np.frombuffer(raw, np.uint8).reshape(int(np.prod(shape[1:])), dtype.itemsize, rows)
    return np.frombuffer(planes.transpose(2, 0, 1).tobytes(), dtype).reshape(shape)


def canonical_json(value: Any) -> bytes:
    """JSON whose bytes depend on the value alone."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def _matrix(value: np.ndarray | None) -> list[list[float]] | None:
    return None if value is None else np.asarray(value, np.float64).tolist()


def _numbers(value: Any, *shape: int) -> np.ndarray:
    """float64, finite, of a shape (-1: any length). Raises ValueError."""
    array = np.array(value)
    if array.dtype.kind not in "fiu" or array.ndim != len(shape):
        raise ValueError(f"{str(value)[:40]} is not numbers of shape {shape}")
    if any(want not in (-1, have) for want, have in zip(shape, array.shape)) or not np.isfinite(array).all():
        raise ValueError(f"{str(value)[:40]} is not finite or not of shape {shape}")
    return array.astype(np.float64)


def _pose(value: Any) -> np.ndarray:
    return _numbers(value, 4, 4)


def _lidars(value: Any) -> np.ndarray:
    """(L, 4) of ``LidarSweep.lidars``. Raises ValueError."""
    rows = _numbers(value, -1, 4)
    first = rows[:, 0]
    if (
        not 1 <= len(rows) <= 256
        or first[0] != 0
        or (np.diff(first) <= 0).any()
        or (first % 1).any()
        or first[-1] > 255
    ):
        raise ValueError(
            f"LiDARs begin at beams {str(first.tolist())[:80]}, need whole numbers that ascend from 0 to 255"
        )
    return rows


def _time(value: Any) -> int:
    if type(value) is not int or not -(2**63) <= value < 2**63:
        raise ValueError(f"time stamp {str(value)[:40]!r} is not an integer")
    return value


def _nullable(velocity: np.ndarray | None) -> list | None:
    if velocity is None:
        return None
    rows = np.asarray(velocity, np.float32).tolist()
    return [[None if v != v else v for v in row] for row in rows]  # JSON has no NaN
