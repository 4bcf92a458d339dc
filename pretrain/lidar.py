"""From a ``Frame`` to LiDAR samples: sweeps as points, beams thinned and the scene turned, with voxel labels, boxes or classes
of points (SPOT, Sec. 3.3.3 and 4.1)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch

from occstream.models.spot import column_classes
from occstream.pretrain.annotations import box_fields, ignore_points, write_boxes
from occstream.pretrain.beams import Mode, resample_beams
from occstream.pretrain.reading import cache
from occstream.sharding.exactmath import cos_sin
from occstream.sharding.grid import VoxelGrid
from occstream.sharding.manifest import Manifest
from occstream.sharding.order import generator
from occstream.sharding.poses import apply, compose, inverse, rotate
from occstream.sharding.schema import IGNORE, Frame, Labels, LidarSweep, Taxonomy
from occstream.sharding.stream import Field, ShardReader

FEATURES = ("intensity", "time")
"""Features of a point beside x, y, z that sweeps can give."""
Intensity = Literal["byte", "unit", "tanh"]


@dataclass
class LidarConfig:
    """Points of a sample, and how they vary in training. Evaluation takes them as they are."""

    sweeps: int = 1
    """Sweeps of a sample: that of its key-frame and those of the key-frames before, moved by the ego's motion. With more than
    one, ``model.in_features`` should have ``time``."""
    intensity: Intensity = "byte"
    """Range of the data set's intensities, which become 0 to 1: byte (0 to 255, as of nuScenes, Argoverse 2 and synthetic
    scenes), unit (0 to 1, as of KITTI), or tanh (without limit, as of Waymo)."""
    beams: tuple[float, ...] = ()
    """Shares of the beams to keep, by the ratio of densities, downstream over pre-training LiDAR: one is drawn for each frame
    that is thinned. Empty: all beams."""
    beams_probability: float = 0.5
    """Probability that a frame is thinned."""
    beams_mode: Mode = "rows"
    """Every n-th row (rows), or rows that are evenly spaced in inclination (angle)."""
    flip_x: bool = True
    """Mirror the scene front to back with probability 1/2."""
    flip_y: bool = True
    """Mirror the scene left to right with probability 1/2."""
    turn: Literal["none", "quarters", "free"] = "quarters"
    """Turn the scene about the vertical axis: by quarters of a circle, which moves voxels onto voxels; or by up to
    ``max_angle``, where each voxel takes the label of the one its center came from."""
    max_angle: float = 45.0
    """Largest angle of ``turn: free``, degrees."""
    scaling: tuple[float, float] = (1.0, 1.0)
    """Range of the factor on the scene's size; detectors are often trained with 0.95 to 1.05."""
    enabled: bool = True
    """False: train without any augmentation (for overfitting checks)."""

    def __post_init__(self) -> None:
        if not 1 <= self.sweeps <= 10:
            raise ValueError(f"sweeps is {self.sweeps}, must be 1 to 10")
        if not 0 < self.scaling[0] <= self.scaling[1]:
            raise ValueError(f"scaling is {list(self.scaling)}, must be positive, the low end first")
        if any(not 0 < share <= 1 for share in self.beams):
            raise ValueError(f"beams is {list(self.beams)}, must be shares above 0 and at most 1")
        if self.beams_probability > 1:
            raise ValueError(f"beams_probability is {self.beams_probability}, must be at most 1")
        if self.max_angle > 180:
            raise ValueError(f"max_angle is {self.max_angle}, must be at most 180")


class Turn(NamedTuple):
    """A map of the scene onto itself: mirrored, turned about the vertical axis and scaled.

    forward, backward: (4, 4) float64 in the frame of the labels, x' = forward x, and its inverse. scale: its factor.
    """

    forward: np.ndarray
    backward: np.ndarray
    scale: float = 1.0


def turn_of(mirror: tuple[bool, bool], cosine: float, sine: float, scale: float = 1.0) -> Turn:
    """Mirrors along x and y, then turns, then scales."""
    fx, fy = (-1.0 if wanted else 1.0 for wanted in mirror)
    forward, backward = np.eye(4), np.eye(4)
    forward[:2, :2] = [[cosine * fx * scale, -sine * fy * scale], [sine * fx * scale, cosine * fy * scale]]
    backward[:2, :2] = [[cosine * fx / scale, sine * fx / scale], [-sine * fy / scale, cosine * fy / scale]]
    forward[2, 2], backward[2, 2] = scale, 1 / scale
    return Turn(forward, backward, scale)


def draw_turn(rng: np.random.Generator, config: LidarConfig) -> Turn:
    """The map of one training frame; the number of draws is the same for all settings."""
    flips, angle, scale = rng.random(2) < 0.5, rng.random(), rng.random()
    cosine, sine = 1.0, 0.0
    if config.turn == "quarters":
        cosine, sine = ((1.0, 0.0), (0.0, 1.0), (-1.0, 0.0), (0.0, -1.0))[int(4 * angle)]
    elif config.turn == "free":
        cosine, sine = cos_sin(math.radians(config.max_angle) * (2 * angle - 1))
    low, high = config.scaling
    mirror = bool(flips[0] and config.flip_x), bool(flips[1] and config.flip_y)
    return turn_of(mirror, cosine, sine, low + (high - low) * scale)


def turned(labels: np.ndarray, grid: VoxelGrid, turn: Turn, outside: int) -> np.ndarray:
    """Voxels of the turned scene: each has the value of the voxel that its center came from.

    Args:
        labels: (X, Y, Z) on ``grid``.
        outside: value of voxels that came from outside of the grid.
    """
    if (turn.backward == np.eye(4)).all():
        return labels
    (x, y, z), out = grid.shape, np.full(grid.shape, outside, labels.dtype)
    centers = grid.centers()
    from_xy = rotate(turn.backward, centers[:, :, 0])[..., :2]
    index = np.floor((from_xy - grid.lower[:2]) / grid.voxel[:2]).astype(np.int64)
    from_z = np.floor((centers[0, 0, :, 2] / turn.scale - grid.lower[2]) / grid.voxel[2]).astype(np.int64)
    there = ((index >= 0) & (index < (x, y))).all(-1)
    above = (from_z >= 0) & (from_z < z)
    columns = labels.reshape(x * y, z)[index[there] @ (y, 1)]
    block = np.full(columns.shape, outside, labels.dtype)
    block[:, above] = columns[:, from_z[above]]
    out[there] = block
    return out


class _Cloud(NamedTuple):
    """Points (n, 3), their features (n, C), classes (n,) uint8 and whether they are kept (n,) bool."""

    xyz: np.ndarray
    features: np.ndarray
    classes: np.ndarray
    kept: np.ndarray


@dataclass(frozen=True)
class Targets:
    """What a sample has beside its points.

    Attributes:
        occupancy: voxel labels: ids of the taxonomy (semantic); 0 for occupied and 1 for free (binary); or none.
        columns: labels of whole columns, by this priority of classes, free last (see ``models.spot.column_classes``); None: of
            voxels.
        boxes: classes of the boxes, in the order of their ids; None: no boxes.
        points: classes of the points.
        known: False: voxel labels are not read, and all unknown.
        all_points: thinned points are only marked (``Points.kept``), for a teacher that sees all.
    """

    occupancy: Literal["semantic", "binary", ""] = ""
    columns: tuple[int, ...] | None = None
    boxes: tuple[str, ...] | None = None
    points: bool = False
    known: bool = True
    all_points: bool = False


class LidarFiller:
    """Writes one frame as one sample of a ``Batch``; stateless, so threads may share it.

    Args:
        config: sweeps and augmentation.
        features: of a point, as ``models.spot.SpotConfig.in_features``: x, y, z, then of ``FEATURES``.
        grid: of the labels; points are in its frame.
        taxonomy: of the labels.
        targets: what samples have beside points.
        seed: of the run; None: no augmentation.
        mask: voxels that count, as ``data.mask`` says.

    Raises:
        ValueError: an unknown feature, or a grid that cannot be mirrored or turned as the recipe asks.
    """

    def __init__(
        self,
        config: LidarConfig,
        features: tuple[str, ...],
        *,
        grid: VoxelGrid,
        taxonomy: Taxonomy,
        targets: Targets,
        seed: int | None = None,
        mask: Literal["auto", "none", "lidar", "camera"] = "auto",
    ) -> None:
        self.config, self.grid, self.taxonomy, self.targets = config, grid, taxonomy, targets
        self.seed, self.mask, self.extra = seed if config.enabled else None, mask, features[3:]
        if unknown := [name for name in self.extra if name not in FEATURES]:
            raise ValueError(
                f"model.in_features has {unknown[0]!r}; sweeps give x, y, z and of {', '.join(FEATURES)} what is wanted"
            )
        if self.seed is not None and targets.occupancy:
            self._check_turns()
        priority = targets.columns
        self.columns = None if priority is None else torch.tensor(priority)

    def _check_turns(self) -> None:
        grid, config = self.grid, self.config
        even = [math.isclose(grid.lower[axis], -grid.upper[axis], abs_tol=1e-6) for axis in (0, 1)]
        for name, wanted, good in zip("xy", (config.flip_x, config.flip_y), even):
            if wanted and not good:
                raise ValueError(
                    f"grid {grid.name!r} is not symmetric in {name}, so the scene cannot be mirrored exactly; set "
                    f"lidar.flip_{name}=false"
                )
        if config.turn == "quarters" and not (all(even) and grid.shape[0] == grid.shape[1]):
            raise ValueError(
                f"grid {grid.name!r} is not a square around the vehicle, so the scene cannot be turned by quarters; set "
                "lidar.turn to none or free"
            )

    @property
    def window(self) -> tuple[int, ...]:
        """Offsets of the key-frames whose sweeps it reads beside each one's."""
        return tuple(range(-1, -self.config.sweeps, -1))

    @property
    def groups(self) -> tuple[str, ...]:
        """What is read of a shard: no camera."""
        labels = (self.targets.occupancy and self.targets.known) or self.targets.boxes is not None
        return ("lidar", "labels") if labels else ("lidar",)

    def finish(self, device: torch.device, threads: int) -> None:
        """Nothing is left to be made of a batch."""

    def invalidate(self, arrays: dict[str, np.ndarray], index: int) -> None:
        """Makes no voxel and no point of a sample valid; its boxes are known by its empty key."""
        if "occupancy.binary_valid" in arrays:
            arrays["occupancy.binary_valid"][index] = False
        if "occupancy.semantic" in arrays:
            arrays["occupancy.semantic"][index] = IGNORE
        ignore_points(arrays, index)

    @property
    def label_shape(self) -> tuple[int, int, int]:
        """Of the voxel labels of a sample."""
        return self.grid.shape if self.columns is None else (*self.grid.shape[:2], 1)

    def fields(self) -> Mapping[str, Field]:
        """Arrays of one sample."""
        found = {"scene_aug": Field((3, 3), "float32"), "points.xyz": Field((3,), "float32", ragged=True)}
        if self.extra:
            found["points.features"] = Field((len(self.extra),), "float32", ragged=True)
        if self.targets.all_points:
            found["points.kept"] = Field((), "bool", ragged=True)
        if self.targets.occupancy:
            names = {"binary": "bool", "binary_valid": "bool"} | ({"semantic": "uint8"} if self.targets.known else {})
            found |= {f"occupancy.{name}": Field(self.label_shape, dtype) for name, dtype in names.items()}
        if self.targets.boxes is not None:
            found |= box_fields()
        if self.targets.points:
            found["point_labels.classes"] = Field((), "uint8", ragged=True)
        return found

    def __call__(self, frame: Frame, epoch: int, views: dict[str, np.ndarray]) -> None:
        """Fills a sample.

        Raises:
            ValueError: the frame has no sweep, or not the features and labels that are asked for.
        """
        rng = None if self.seed is None else generator(self.seed, epoch, frame.key)
        turn = turn_of((False, False), 1.0, 0.0) if rng is None else draw_turn(rng, self.config)
        share, phase = self._thinning(rng)
        sweeps = [_sweep_of(frame)]
        sweeps += [near.lidar for o in self.window if (near := frame.window.get(o)) and near.lidar is not None]
        to_grid = inverse(sweeps[0].sensor_to_ego) if self.grid.frame == "lidar" else np.eye(4)
        to_scene = compose(turn.forward, to_grid)
        taken = [self._points(frame, sweep, to_scene, share=share, phase=phase) for sweep in sweeps]
        joined = _Cloud(*(np.concatenate(arrays) for arrays in zip(*taken)))
        xyz = joined.xyz
        views["points.xyz"], views["scene_aug"][...] = xyz, turn.forward[:3, :3]
        if self.extra:
            views["points.features"] = joined.features
        if self.targets.all_points:
            views["points.kept"] = joined.kept
        if self.targets.occupancy and self.targets.known:
            self._voxels(frame, turn, views)
        elif self.targets.occupancy:
            views["occupancy.binary"][...] = views["occupancy.binary_valid"][...] = False
        if self.targets.boxes is not None:
            wanted, train = self.targets.boxes, self.seed is not None
            write_boxes(frame, wanted, to_scene, views=views, xyz=xyz, train=train, scale=turn.scale)
        if self.targets.points:
            views["point_labels.classes"] = joined.classes

    def _thinning(self, rng: np.random.Generator | None) -> tuple[float, float]:
        """Share of the beams to keep, and the phase."""
        if rng is None or not self.config.beams:
            return 1.0, 0.0
        thin, which, phase = rng.random(3)
        if thin >= self.config.beams_probability:
            return 1.0, 0.0
        return self.config.beams[int(which * len(self.config.beams))], phase

    def _points(self, frame: Frame, sweep: LidarSweep, to_scene: np.ndarray, *, share: float, phase: float) -> _Cloud:
        """Points of a sweep in the augmented scene."""
        keep, kept = np.isfinite(sweep.xyz).all(1), np.ones(len(sweep.xyz), bool)
        if share < 1:
            if sweep.ring is None:
                raise ValueError(
                    f"frame {frame.key}: its LiDAR points have no beam numbers; pack them with ring, or set lidar.beams=[]"
                )
            number, origins = sweep.lidar_of_points(), None if sweep.lidars is None else sweep.lidars[:, 1:]
            mode = self.config.beams_mode
            kept = resample_beams(sweep.xyz, sweep.ring, share, mode=mode, phase=phase, lidar=number, origins=origins)
        if not self.targets.all_points:
            keep &= kept
        to_ego = sweep.sensor_to_ego
        if sweep is not frame.lidar:
            to_ego = compose(inverse(_pose_of(frame)), sweep.ego_to_global, to_ego)
        xyz = apply(compose(to_scene, to_ego), sweep.xyz[keep]).astype(np.float32)
        features = np.empty((len(xyz), len(self.extra)), np.float32)
        for column, name in enumerate(self.extra):
            features[:, column] = self._feature(frame, sweep, name)[keep]
        classes = np.full(len(xyz), IGNORE, np.uint8)
        if self.targets.points and sweep is frame.lidar:
            if sweep.classes is None:
                raise ValueError(f"frame {frame.key}: its LiDAR points have no classes; use data that has them")
            classes = sweep.classes[keep]
        return _Cloud(xyz, features, classes, kept[keep])

    def _feature(self, frame: Frame, sweep: LidarSweep, name: str) -> np.ndarray:
        if name == "intensity":
            if sweep.intensity is None:
                raise ValueError(
                    f"frame {frame.key}: its LiDAR points have no intensity; set model.in_features=[x,y,z]"
                )
            return scale_intensity(sweep.intensity, self.config.intensity)
        lag = 1e-6 * ((frame.lidar or sweep).timestamp - sweep.timestamp)
        return np.full(len(sweep.xyz), lag, np.float32) if sweep.time_lag is None else sweep.time_lag + np.float32(lag)

    def _voxels(self, frame: Frame, turn: Turn, views: dict[str, np.ndarray]) -> None:
        labels, semantic = self._labels_of(frame), self.targets.occupancy == "semantic"
        free = self.taxonomy.free_id if semantic else 1
        if not semantic:
            classes = (~labels.binary).astype(np.uint8)
        elif labels.semantic is None:
            raise ValueError(
                f"frame {frame.key} has no semantic labels; set occupancy=binary or use data that has them"
            )
        else:
            classes = labels.semantic
        known = self._known(frame, labels)
        if known is not None:
            classes = np.where(known, classes, np.uint8(IGNORE))
        classes = turned(classes, self.grid, turn, IGNORE)
        if self.columns is not None:
            columns = column_classes(torch.from_numpy(np.ascontiguousarray(classes))[None], self.columns)
            classes = columns[0, ..., None].numpy()
        views["occupancy.binary_valid"][...] = valid = classes != IGNORE
        views["occupancy.binary"][...] = (classes != free) & valid
        views["occupancy.semantic"][...] = classes

    def _labels_of(self, frame: Frame) -> Labels:
        if frame.labels is None:
            raise ValueError(f"frame {frame.key} has no labels; pack the labels group")
        if frame.labels.binary.shape != self.grid.shape:
            raise ValueError(
                f"frame {frame.key}: labels are {frame.labels.binary.shape}, grid {self.grid.name!r} is {self.grid.shape}"
            )
        return frame.labels

    def _known(self, frame: Frame, labels: Labels) -> np.ndarray | None:
        if self.mask == "none":
            return None
        known = labels.mask_camera if self.mask == "camera" else labels.mask_lidar
        if known is None and self.mask != "auto":
            raise ValueError(f"frame {frame.key} has no {self.mask} mask; set mask=auto or pack labels that have it")
        return known


def check_intensity(manifest: Manifest, scene: int, kind: str) -> None:
    """Raises ValueError if the intensities of a scene's first sweep are plainly of another range than the recipe says."""
    reader = ShardReader(manifest, ("lidar",), cache(manifest.url))
    try:
        sweep = reader.frame(scene, 0).lidar
    finally:
        reader.close()
    if sweep is None or sweep.intensity is None:
        return
    most = float(np.max(sweep.intensity, initial=0.0, where=np.isfinite(sweep.intensity)))
    right = {"byte": 1.0 < most <= 255.5, "unit": most <= 1.0, "tanh": True}
    if most > 0 and not right[kind]:  # a sweep that is empty, or dark, says nothing
        better = "unit" if most <= 1 else "byte" if most <= 255.5 else "tanh"
        raise ValueError(
            f"{manifest.url}: intensities of scene {manifest.scenes[scene].name} reach {most:g}, but lidar.intensity is "
            f"{kind!r}: set lidar.intensity={better}"
        )


def scale_intensity(values: np.ndarray, kind: Intensity) -> np.ndarray:
    """(N,) float32 intensities from 0 to 1."""
    values = np.asarray(values, np.float32)
    if kind == "tanh":
        return np.tanh(values)
    return np.clip(values / np.float32(255), 0, 1) if kind == "byte" else np.clip(values, 0, 1)


def _sweep_of(frame: Frame) -> LidarSweep:
    if frame.lidar is None:
        raise ValueError(f"frame {frame.key} has no LiDAR sweep; pack the lidar group")
    return frame.lidar


def _pose_of(frame: Frame) -> np.ndarray:
    if frame.ego_to_global is None:
        raise ValueError(f"frame {frame.key} has no ego pose, so sweeps before it cannot be moved; set lidar.sweeps=1")
    return frame.ego_to_global
