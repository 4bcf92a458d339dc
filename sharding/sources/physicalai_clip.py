"""One clip of PhysicalAI-AV: calibration, poses, spins, video frames and boxes. See ``physicalai``."""

from __future__ import annotations

import importlib.util
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import cv2
import numpy as np

from occstream.sharding.exactmath import angle_of
from occstream.sharding.feather import BYTES, TEXT, parquet_columns, read_parquet
from occstream.sharding.lenses import FTheta, Lens, View
from occstream.sharding.motion import TOLERANCE, Trajectory, deskew
from occstream.sharding.poses import apply, compose, inverse, rotate
from occstream.sharding.rawfiles import pose_of, read_file
from occstream.sharding.rawtree import Place, ahead
from occstream.sharding.schema import OCC3D_TO_OPENSCENE, Boxes, Camera, Frame, LidarSweep, Taxonomy

EXTRA = "pip install 'occstream[physicalai]'"
LIDAR = "lidar_top_360fov"
SPIN_US = 100_000
ROUNDED = 4  # microseconds: what times of 16 bits may be off
SHUTTER_US = 30_000  # from the first row to the last, where the calibration does not say
CAMERA_WITHIN = 50_000  # microseconds between a key-frame and its images at most
TRACK_WITHIN = 150_000  # microseconds between the rows of a track that a box is interpolated from
VEHICLE_MARGIN = 0.5  # meters around the vehicle from where returns are its own
_QUATERNION, _PLACE = ("qw", "qx", "qy", "qz"), ("x", "y", "z")
_KINDS = {
    "car": ("automobile",),
    "truck": ("heavy_truck",),
    "bus": ("bus", "trolley_bus"),
    "trailer": ("trailer",),
    "pedestrian": ("person",),
    "bicycle": ("rider",),  # with what is ridden, motorcycles too
    "others": ("train_or_tram_car", "other_vehicle", "stroller", "animal", "protruding_object"),
}
TO_OCC3D = {kind: name for name, kinds in _KINDS.items() for kind in kinds}
TO_OPENSCENE = {"other_vehicle": "vehicle", "train_or_tram_car": "vehicle"}

_WIDE = {  # yaw from the camera's axis to the left and width in degrees, and a name, of each view
    "camera_front_wide_120fov": ((0, 70, "_c"),),
    "camera_cross_left_120fov": ((25, 70, "_l"), (-25, 70, "_r")),
    "camera_cross_right_120fov": ((25, 70, "_l"), (-25, 70, "_r")),
    "camera_rear_left_70fov": ((0, 65, "_c"),),
    "camera_rear_right_70fov": ((0, 65, "_c"),),
}
_TELE = ("camera_front_tele_30fov", "camera_rear_tele_30fov")


def needed(*packages: str) -> None:
    """Raises ValueError that names the extra if a package is not installed."""
    for name in packages:
        if importlib.util.find_spec(name) is None:
            raise ValueError(f"source physicalai needs the package {name}: {EXTRA}")


@dataclass(frozen=True)
class Options:
    """What ``physicalai.open_source`` was asked for."""

    rate: float
    sweeps: bool
    boxes: bool
    views: str
    cameras: bool
    tele: bool
    taxonomy: Taxonomy
    max_points: int
    ignore_windshield: bool

    @property
    def sources(self) -> list[str]:
        """Names of the cameras that are read."""
        return [*_WIDE, *(_TELE if self.tele else ())] if self.cameras else []

    def views_of(self, camera: str, width: int) -> tuple[View, ...]:
        """The pinholes of a camera whose images are so wide. None for one with a narrow lens: it becomes one as it is."""
        scale = min(1.0, width / 1920)
        size = round(704 * scale), round(396 * scale)
        center = (size[0] - 1) / 2, (size[1] - 1) / 2
        wanted = _WIDE.get(camera, ())
        if self.views == "single100" and wanted:
            wanted = ((0, min(100, max(fov for _, fov, _ in wanted) if "70fov" in camera else 100), ""),)
        found = []
        for yaw, fov, name in wanted:
            focal = size[0] / 2 / float(np.tan(np.radians(fov / 2)))
            found.append(View(*size, (focal, focal), center, yaw=yaw, name=name))
        return tuple(found)


class Index(Protocol):
    """What ``Files`` needs of the data set's index."""

    def has(self, feature: str, chunk: int) -> bool: ...

    def path(self, feature: str, chunk: int) -> Place: ...

    def member(self, feature: str, clip: str, chunk: int, alias: str = "") -> Place: ...


@dataclass(frozen=True)
class Files:
    """Where the files of one clip are."""

    index: Index
    clip: str
    chunk: int

    def member(self, feature: str, alias: str = "") -> Place:
        return self.index.member(feature, self.clip, self.chunk, alias)

    def has(self, feature: str) -> bool:
        """Whether the clip's file of a feature is there."""
        return self.index.has(feature, self.chunk) and self.member(feature).is_file()

    def rows(self, feature: str, columns: dict[str, str]) -> dict[str, np.ndarray]:
        """Rows of the clip in a table of its chunk. Raises ValueError if there are none."""
        path = self.index.path(feature, self.chunk)
        table = read_parquet(path, {"clip_id": TEXT, **columns}, "the calibration")
        mine = table["clip_id"] == self.clip
        if not mine.any():
            raise ValueError(f"{path}: has no row of clip {self.clip}; download it again")
        return {name: values[mine] for name, values in table.items()}


def _poses(table: dict[str, np.ndarray], where: object) -> np.ndarray:
    """(N, 4, 4) float64 of quaternions and places."""
    found = []
    for row in range(len(table["qw"])):
        turn, place = ([float(table[k][row]) for k in keys] for keys in (_QUATERNION, _PLACE))
        try:
            found.append(pose_of(place, turn))
        except ValueError as error:
            raise ValueError(f"{where}: row {row}: {error}; download it again") from None
    return np.array(found).reshape(-1, 4, 4)


@dataclass(frozen=True)
class _Lens:
    lens: Lens
    shutter: int
    mask: bytes


@dataclass(frozen=True)
class Clip:
    """A clip whose calibration and poses are read."""

    files: Files
    options: Options
    track: Trajectory
    sensors: dict[str, np.ndarray]
    lenses: dict[str, _Lens]
    vehicle: np.ndarray
    about: dict[str, str]

    @classmethod
    def read(cls, files: Files, options: Options) -> Clip:
        """Raises ValueError if a table is missing or damaged, or a lens cannot be taken out."""
        motion = "egomotion.offline" if files.has("egomotion.offline") else "egomotion"
        path = files.member(motion)
        table = read_parquet(
            path, {"timestamp": "int64", **dict.fromkeys((*_QUATERNION, *_PLACE), "float64")}, "the poses"
        )
        poses = _poses(table, path)
        kept = table["timestamp"] >= 0 if motion.endswith("offline") else np.ones(len(poses), bool)
        track = Trajectory(files.clip, table["timestamp"][kept], poses[kept])
        calibrated = (
            "sensor_extrinsics.offline"
            if files.index.has("sensor_extrinsics.offline", files.chunk)
            else "sensor_extrinsics"
        )
        kinds = {"sensor_name": TEXT, **dict.fromkeys((*_QUATERNION, *_PLACE), "float64")}
        rows = files.rows(calibrated, kinds)
        sensors = dict(zip(rows["sensor_name"].tolist(), _poses(rows, files.index.path(calibrated, files.chunk))))
        if lacking := [name for name in (LIDAR, *options.sources) if name not in sensors]:
            raise ValueError(f"{files.index.path(calibrated, files.chunk)}: has no {lacking[0]}; download it again")
        lenses, said = _lenses(files, options) if options.cameras else ({}, "")
        about = {"egomotion": motion, "extrinsics": calibrated, **({"intrinsics": said} if said else {})}
        return cls(files, options, track, sensors, lenses, _vehicle(files), about)

    def frames(self) -> Iterator[Frame]:
        """Key-frames that the poses cover, in time order."""
        ahead(self.files.member(name, "video") for name in self.options.sources)
        spins = _Spins.read(self)
        step = max(1, round(1e6 / SPIN_US / self.options.rate))
        starts = list(range(0, len(spins.times), step))
        cameras = {name: _video(self, name, spins.times[starts]) for name in self.options.sources}
        tracks = (
            _Tracks.read(self.files, self.track) if self.options.boxes and self.files.has("obstacle.offline") else None
        )
        for index, start in enumerate(starts):
            sweep = spins.sweep(start, 0)
            between = range(max(0, start - step + 1), start) if self.options.sweeps else ()
            yield Frame(
                scene=self.files.clip,
                index=index,
                token=f"{self.files.clip}/{spins.numbers[start]}",
                timestamp=sweep.timestamp,
                ego_to_global=sweep.ego_to_global,
                cameras={name: taken[index] for name, taken in cameras.items() if index in taken},
                lidar=sweep,
                sweeps=[spins.sweep(i, self.options.max_points) for i in between],
                boxes=tracks.at(sweep.timestamp, self.options.taxonomy) if tracks else None,
            )

    def pose(self, time: int) -> np.ndarray:
        return self.track.at(np.array([time]))[0]

    def covers(self, first: int, last: int) -> bool:
        return first >= self.track.times[0] - TOLERANCE and last <= self.track.times[-1] + TOLERANCE


def _vehicle(files: Files) -> np.ndarray:
    """(2, 3) lower and upper corner of the vehicle in its own frame, grown by a margin."""
    names = ("length", "width", "height", "rear_axle_to_bbox_center")
    rows = files.rows("vehicle_dimensions", dict.fromkeys(names, "float64"))
    length, width, height, middle = (float(rows[name][0]) for name in names)
    low, high = (middle - length / 2, -width / 2, 0.0), (middle + length / 2, width / 2, height)
    return np.array([np.subtract(low, VEHICLE_MARGIN), np.add(high, VEHICLE_MARGIN)])


def _lenses(files: Files, options: Options) -> tuple[dict[str, _Lens], str]:
    """Lenses of the cameras that are read, and which feature they are from."""
    feature = "camera_intrinsics.offline"
    if not files.index.has(feature, files.chunk):
        return _flat_lenses(files, options), "camera_intrinsics"
    path = files.index.path(feature, files.chunk)
    kinds = {"camera_name": TEXT, "model_type": TEXT, "model_parameters": TEXT, "ego_mask_image_png": BYTES}
    rows = files.rows(feature, kinds)
    found = {}
    for row, name in enumerate(rows["camera_name"].tolist()):
        if name not in options.sources:
            continue
        where = f"{path}: camera {name} of clip {files.clip}"
        if rows["model_type"][row] != "ftheta":
            raise ValueError(f"{where}: its lens is of type {rows['model_type'][row]!r:.40}, only ftheta is read")
        try:
            given = json.loads(rows["model_parameters"][row])
            if given.get("external_distortion_parameters") and not options.ignore_windshield:
                raise ValueError(
                    "it is behind a windshield with a distortion of its own, which is not modelled: say windshield=ignore"
                )
            width, height = (int(n) for n in given["resolution"])
            polynomials = {
                k: tuple(float(c) for c in given[k]) for k in ("angle_to_pixeldist_poly", "pixeldist_to_angle_poly")
            }
            center = float(given["principal_point"][0]), float(given["principal_point"][1])
            c, d, e = (float(number) for number in given.get("linear_cde", (1, 0, 0)))
            linear = c, d, e
            forward = given["reference_poly"] == "ANGLE_TO_PIXELDIST"
            lens = FTheta(
                width, height, center,
                polynomials["angle_to_pixeldist_poly"] if forward else None,
                None if forward else polynomials["pixeldist_to_angle_poly"],
                float(given["max_angle"]), linear,
            )  # fmt: skip
            shutter = int(given["shutter_delay_us"])
        except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(
                f"{where}: {error if isinstance(error, ValueError) else f'lens not readable ({error!r})'}"
            ) from None
        found[name] = _Lens(lens, shutter, rows["ego_mask_image_png"][row])
    if lacking := [name for name in options.sources if name not in found]:
        raise ValueError(f"{path}: has no lens of {lacking[0]}; download it again")
    return found, feature


def _flat_lenses(files: Files, options: Options) -> dict[str, _Lens]:
    """Lenses of a table that does not say which of its polynomials is the model: that from pixels to angles is taken."""
    powers = [f"bw_poly_{k}" for k in range(5)]
    kinds = {
        "camera_name": TEXT,
        "width": "int64",
        "height": "int64",
        **dict.fromkeys(("cx", "cy", *powers), "float64"),
    }
    rows = files.rows("camera_intrinsics", kinds)
    found = {}
    for row, name in enumerate(rows["camera_name"].tolist()):
        width, height, cx, cy = (rows[key][row] for key in ("width", "height", "cx", "cy"))
        backward = tuple(float(rows[k][row]) for k in powers)
        corner = np.hypot(max(cx, width - 1 - cx), max(cy, height - 1 - cy))
        widest = float(np.polynomial.polynomial.polyval(corner, backward))
        if not 0 < widest < np.pi:
            raise ValueError(
                f"{files.index.path('camera_intrinsics', files.chunk)}: the lens of {name} sees {widest:.2f} rad"
            )
        found[name] = _Lens(
            FTheta(int(width), int(height), (float(cx), float(cy)), None, backward, widest), SHUTTER_US, b""
        )
    if lacking := [name for name in options.sources if name not in found]:
        raise ValueError(f"{files.index.path('camera_intrinsics', files.chunk)}: has no lens of {lacking[0]}")
    return found


@dataclass(frozen=True)
class _Spins:
    """Turns of the LiDAR that the poses cover.

    Attributes:
        numbers: of the turns; ``times`` (N,) int64 of their middles; ``ends`` (N, 2) int64.
        clouds: compressed points.
        old: they are of the generation of 25.10.
    """

    clip: Clip
    numbers: np.ndarray
    times: np.ndarray
    ends: np.ndarray
    clouds: list[bytes]
    old: bool

    @classmethod
    def read(cls, clip: Clip) -> _Spins:
        """Raises ValueError if the file is missing or damaged."""
        path = clip.files.member(LIDAR, "scans")
        old = "reference_timestamp" in parquet_columns(path)
        times = ["reference_timestamp"] if old else ["spin_start_timestamp", "spin_end_timestamp"]
        kinds = {"spin_index": "int64", **dict.fromkeys(times, "int64"), "draco_encoded_pointcloud": BYTES}
        table = read_parquet(path, kinds, "the LiDAR")
        ends = np.stack([table[times[0]], table[times[0]] + SPIN_US if old else table[times[1]]], 1)
        if not (ends[:, 1] > ends[:, 0]).all() or not (np.diff(ends[:, 0]) > 0).all():
            raise ValueError(f"{path}: turns of the LiDAR do not follow each other in time; download it again")
        kept = [i for i, (first, last) in enumerate(ends.tolist()) if clip.covers(first, last)]
        clouds = [table["draco_encoded_pointcloud"][i] for i in kept]
        return cls(clip, table["spin_index"][kept], ends[kept].mean(1).astype(np.int64), ends[kept], clouds, old)

    def sweep(self, number: int, most: int) -> LidarSweep:
        """One turn, as at its middle, without the vehicle's own returns; ``most``: points, about. Raises ValueError."""
        import DracoPy

        clip, where = self.clip, f"clip {self.clip.files.clip}: turn {self.numbers[number]} of the LiDAR"
        try:
            cloud: Any = DracoPy.decode(self.clouds[number])
            xyz = np.asarray(cloud.points, np.float32).reshape(-1, 3)
        except Exception as error:  # its bindings raise several kinds
            raise ValueError(f"{where} is not readable as Draco ({str(error)[:100]}); download it again") from None
        first, last = self.ends[number].tolist()
        intensity, times, element = _old_attributes(cloud, first) if self.old else _attributes(cloud)
        if not len(xyz) == len(intensity) == len(times):
            raise ValueError(f"{where}: has {len(xyz)} points and {len(times)} times")
        sensor = clip.sensors[LIDAR]
        own = apply(sensor, xyz.astype(np.float64))
        kept = (times >= first - ROUNDED) & (times <= last + ROUNDED)
        kept &= ~((own >= clip.vehicle[0]) & (own <= clip.vehicle[1])).all(1)
        if most and (step := -(-int(kept.sum()) // most)) > 1:
            # Where points do not say their column, their time does: those of a column are measured at once.
            column = np.unique(times, return_inverse=True)[1] if element is None else element[:, 1]
            kept &= column % step == 0
        time = int(self.times[number])
        sweep = LidarSweep(
            xyz=xyz[kept],
            sensor_to_ego=sensor.copy(),
            ego_to_global=clip.pose(time),
            timestamp=time,
            intensity=intensity[kept].astype(np.float32),
            ring=None if element is None else element[kept, 0].astype(np.uint8),
            time_lag=((time - times[kept]) * 1e-6).astype(np.float32),
        )
        return deskew(sweep, clip.track)


def _attributes(cloud: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Intensity, time in microseconds, and row and column of each point, by name, or by number where names are missing."""
    known = {
        a["name"] or {1: "intensity", 2: "timestamp", 3: "model_element"}.get(a["unique_id"]): a["data"]
        for a in cloud.attributes
    }
    if not {"intensity", "timestamp"} <= known.keys():
        raise ValueError(f"points have no intensity or time, only {', '.join(str(k) for k in known)}")
    return known["intensity"].ravel(), known["timestamp"].ravel().astype(np.int64), known.get("model_element")


def _old_attributes(cloud: Any, start: int) -> tuple[np.ndarray, np.ndarray, None]:
    """Of 25.10: intensity in red; in green (low) and blue (high) 16 bits of time, backward from 105 ms after the start."""
    if cloud.colors is None:
        raise ValueError("points have no colors, which hold their times")
    colors = np.asarray(cloud.colors, np.int64)
    raw = colors[:, 2] * 256 + colors[:, 1]
    return colors[:, 0], start + np.rint(105_000 - raw * 210_000 / 65_535).astype(np.int64), None


def _video(clip: Clip, name: str, keys: np.ndarray) -> dict[int, Camera]:
    """The image of a camera that is nearest to each key-frame, where there is one within 50 ms that the poses cover."""
    lens, feature = clip.lenses[name], clip.files
    ends = read_parquet(feature.member(name, "frame_timestamps"), {"timestamp": "int64"})["timestamp"]
    times = ends - lens.shutter // 2
    path = feature.member(name, "video")
    if not len(times):
        return {}
    nearest = {i: int(np.argmin(np.abs(times - key))) for i, key in enumerate(keys.tolist())}
    wanted = {
        i: n for i, n in nearest.items()
        if abs(int(times[n]) - int(keys[i])) <= CAMERA_WITHIN and clip.covers(int(times[n]), int(times[n]))
    }  # fmt: skip
    images = decoded(path, sorted(set(wanted.values())), len(times))
    mask = _mask(lens, path)
    found = {}
    for i, n in wanted.items():
        image = images[n]
        if image.shape[:2] != (lens.lens.height, lens.lens.width):
            raise ValueError(
                f"{path}: has images of {image.shape[1]}x{image.shape[0]} pixels, its calibration "
                f"{lens.lens.width}x{lens.lens.height}"
            )
        if mask is not None:
            image[mask] = 0
        focal, center = lens.lens.focal, lens.lens.center
        matrix = np.array([[focal[0], 0, center[0]], [0, focal[1], center[1]], [0, 0, 1.0]])
        time = int(times[n])
        found[i] = Camera(
            b"", lens.lens.width, lens.lens.height, matrix, clip.sensors[name].copy(), clip.pose(time), time,
            image=image, lens=lens.lens, views=clip.options.views_of(name, lens.lens.width),
        )  # fmt: skip
    return found


def _mask(lens: _Lens, path: Place) -> np.ndarray | None:
    """(height, width) bool, True where the vehicle itself is in the image."""
    if not lens.mask:
        return None
    mask = cv2.imdecode(np.frombuffer(lens.mask, np.uint8), cv2.IMREAD_GRAYSCALE)
    if mask is None:
        raise ValueError(f"{path}: the mask of the vehicle in its calibration is not readable")
    return cv2.resize(mask, (lens.lens.width, lens.lens.height), interpolation=cv2.INTER_NEAREST) > 0


def decoded(path: Place, wanted: list[int], count: int) -> dict[int, np.ndarray]:
    """(height, width, 3) uint8 RGB of some frames of a video, by number. Groups of pictures without one are not decoded.

    Args:
        wanted: numbers, ascending.
        count: frames that it must have.

    Raises:
        ValueError: it is not readable, has another number of frames, or not at a constant rate.
    """
    import av
    from av.container import InputContainer
    from av.error import FFmpegError

    found: dict[int, np.ndarray] = {}
    try:
        with av.open(io.BytesIO(read_file(path, "a camera's video"))) as container:
            assert isinstance(container, InputContainer), "a file that is read"
            stream = container.streams.video[0]
            packets = [(p.pts, p.is_keyframe) for p in container.demux(stream) if p.pts is not None]
            order = np.array(sorted(pts for pts, _ in packets))
            if len(order) != count:
                raise ValueError(f"has {len(order)} frames, but {count} time stamps")
            if len(order) > 2 and np.ptp(np.diff(order)) > 1:
                raise ValueError("its frames do not follow each other at a constant rate")
            starts = np.searchsorted(order, sorted(pts for pts, key in packets if key))
            group = np.searchsorted(starts, wanted, "right") - 1
            for begin in np.unique(group).tolist():
                mine = [n for n, g in zip(wanted, group.tolist()) if g == begin]
                container.seek(int(order[starts[max(begin, 0)]]), stream=stream)
                for frame in container.decode(stream):
                    if frame.pts is None:
                        continue
                    n = int(np.searchsorted(order, frame.pts))
                    if n in mine:
                        found[n] = frame.to_ndarray(format="rgb24")
                    if n >= mine[-1]:
                        break
    except (FFmpegError, IndexError, ValueError) as error:
        raise ValueError(f"{path}: not usable as a video ({str(error)[:150]}); download it again") from None
    if lacking := [n for n in wanted if n not in found]:
        raise ValueError(f"{path}: frame {lacking[0]} cannot be decoded; download it again")
    return found


@dataclass(frozen=True)
class _Tracks:
    """Boxes of a clip in the anchor's frame, by track and time.

    Attributes:
        track: of the poses.
        rows: by track, the numbers of its rows in time order.
    """

    track: Trajectory
    times: np.ndarray
    poses: np.ndarray
    sizes: np.ndarray
    kinds: list[str]
    rows: dict[str, np.ndarray]

    @classmethod
    def read(cls, files: Files, track: Trajectory) -> _Tracks:
        """Raises ValueError for a damaged table, a class that is not known, or boxes in another frame than the rig's."""
        path = files.member("obstacle.offline")
        numbers = [f"{kind}_{axis}" for kind in ("center", "size") for axis in "xyz"] + [
            f"orientation_{a}" for a in "xyzw"
        ]
        kinds = {"timestamp_us": "int64", "track_id": TEXT, "label_class": TEXT, "reference_frame": TEXT}
        table = read_parquet(
            path,
            kinds | {"reference_frame_timestamp_us": "int64"} | dict.fromkeys(numbers, "float64"),
            "its boxes; boxes=false does without",
        )
        times = table["timestamp_us"]
        if not (table["reference_frame"] == "rig").all() or (table["reference_frame_timestamp_us"] != times).any():
            raise ValueError(
                f"{path}: boxes are not in the rig's frame at their own time, which is not supported; say boxes=false"
            )
        if odd := [kind for kind in table["label_class"].tolist() if kind not in TO_OCC3D]:
            raise ValueError(f"{path}: has the unknown class {odd[0]!r:.40}")
        sizes = np.stack([table[f"size_{axis}"] for axis in "xyz"], 1)
        if not (sizes > 0).all():
            raise ValueError(
                f"{path}: row {int(np.argmin((sizes > 0).all(1)))} has a size that is not above 0; download it again"
            )
        named = {f"q{a}": table[f"orientation_{a}"] for a in "xyzw"} | {a: table[f"center_{a}"] for a in "xyz"}
        inside = (times >= track.times[0] - TOLERANCE) & (times <= track.times[-1] + TOLERANCE)
        poses = compose(track.at(np.clip(times, track.times[0], track.times[-1])), _poses(named, path))
        rows: dict[str, list[int]] = {}
        for row in np.argsort(times, kind="stable").tolist():
            if inside[row]:
                rows.setdefault(str(table["track_id"][row]), []).append(row)
        by_track = {name: np.array(found) for name, found in rows.items()}
        return cls(track, times, poses, sizes, table["label_class"].tolist(), by_track)

    def at(self, time: int, taxonomy: Taxonomy) -> Boxes:
        """Boxes at a time in the ego frame then: of tracks with rows close before and after it, linear between them."""
        to_ego = inverse(self.track.at(np.array([time]))[0])
        boxes, names, tracks, velocity = [], [], [], []
        for name, rows in self.rows.items():
            after = int(np.searchsorted(self.times[rows], time))
            if after < len(rows) and self.times[rows[after]] == time:
                near = rows[max(0, after - 1)], rows[min(after + 1, len(rows) - 1)]
            elif 0 < after < len(rows):
                near = rows[after - 1], rows[after]
            else:
                continue
            first, last = (int(self.times[row]) for row in near)
            exact = after < len(rows) and self.times[rows[after]] == time
            if last - first > (2 * TRACK_WITHIN if exact else TRACK_WITHIN):
                continue
            a, b = (rows[after], rows[after]) if exact else near
            share = 0.0 if exact else (time - first) / (last - first)
            place = (1 - share) * self.poses[a, :3, 3] + share * self.poses[b, :3, 3]
            heads = [rotate(to_ego, self.poses[row, :3, 0]) for row in (a, b)]
            turns = [angle_of(head[0], head[1]) for head in heads]
            turned = (turns[1] - turns[0] + np.pi) % (2 * np.pi) - np.pi
            size = (1 - share) * self.sizes[a] + share * self.sizes[b]
            boxes.append([*apply(to_ego, place), *size, turns[0] + share * turned])
            names.append(_class(self.kinds[a], taxonomy))
            tracks.append(name)
            moved = self.poses[near[1], :3, 3] - self.poses[near[0], :3, 3]
            velocity.append(rotate(to_ego, moved / ((last - first) * 1e-6))[:2] if last > first else [np.nan] * 2)
        return Boxes(
            np.array(boxes, np.float32).reshape(-1, 7), names, tracks, np.array(velocity, np.float32).reshape(-1, 2)
        )


def _class(kind: str, taxonomy: Taxonomy) -> str:
    """Class name of a kind of obstacle."""
    if taxonomy.name == "openscene":
        return TO_OPENSCENE.get(kind) or OCC3D_TO_OPENSCENE[TO_OCC3D[kind]]
    return TO_OCC3D[kind]
