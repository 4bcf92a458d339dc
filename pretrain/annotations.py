"""Boxes and LiDAR points of a key-frame as arrays of a sample, for samples of any sensors."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from occstream.sharding.exactmath import angle_of, cos_sin
from occstream.sharding.poses import apply, compose, rotate
from occstream.sharding.schema import IGNORE, Frame, sweep_to_key_ego
from occstream.sharding.stream import Field


@dataclass(frozen=True)
class Annotations:
    """What a sample has of its key-frame beside sensors and voxels.

    Attributes:
        boxes: classes of the boxes, in the order of their ids; None: no boxes.
        seen: read the sweep and count the points in boxes: in training, those without any are left out. False: boxes count as
            seen all the same.
        points: the points of the sweep, in its order.
        labels: the classes of these points, and their instances.
    """

    boxes: tuple[str, ...] | None = None
    seen: bool = True
    points: bool = False
    labels: bool = False

    @property
    def groups(self) -> tuple[str, ...]:
        """What is read of a shard."""
        sweep = self.points or (self.boxes is not None and self.seen)
        return (*(("labels",) if self.boxes is not None else ()), *(("lidar",) if sweep else ()))

    def fields(self) -> dict[str, Field]:
        """Arrays of one sample."""
        found = box_fields() if self.boxes is not None else {}
        if self.points:
            found["points.xyz"] = Field((3,), "float32", ragged=True)
        if self.points and self.labels:
            found["point_labels.classes"] = Field((), "uint8", ragged=True)
            found["point_labels.instances"] = Field((), "int32", ragged=True)
        return found

    def write(self, frame: Frame, to_scene: np.ndarray, views: dict[str, np.ndarray], *, train: bool) -> None:
        """Fills them.

        Args:
            to_scene: (4, 4) ego -> frame of the labels, augmented.
            train: leave out boxes that no point lies in.

        Raises:
            ValueError: the frame has no boxes, sweep or classes of points.
        """
        xyz = None
        if "lidar" in self.groups:
            sweep = frame.lidar
            if sweep is None:
                raise ValueError(f"frame {frame.key} has no LiDAR sweep; pack the lidar group")
            xyz = apply(compose(to_scene, sweep_to_key_ego(frame, sweep)), sweep.xyz).astype(np.float32)
            if self.points:
                views["points.xyz"] = xyz
            if self.points and self.labels:
                if sweep.classes is None:
                    raise ValueError(f"frame {frame.key}: its LiDAR points have no classes; use data that has them")
                views["point_labels.classes"] = sweep.classes
                ids = np.full(len(xyz), -1) if sweep.instances is None else sweep.instances
                views["point_labels.instances"] = ids.astype(np.int32)
        if self.boxes is not None:
            write_boxes(frame, self.boxes, to_scene, views=views, xyz=xyz if self.seen else None, train=train)

    def invalidate(self, arrays: dict[str, np.ndarray], index: int) -> None:
        """Makes no point of a sample valid; its boxes are known by its empty key."""
        ignore_points(arrays, index)


def box_fields() -> dict[str, Field]:
    """Arrays of ``models.batch.Boxes``."""
    shapes = {
        "boxes": ((7,), "float32"),
        "velocity": ((2,), "float32"),
        "classes": ((), "uint8"),
        "points": ((), "int32"),
    }
    return {f"boxes.{name}": Field(shape, dtype, ragged=True) for name, (shape, dtype) in shapes.items()}


def write_boxes(
    frame: Frame,
    wanted: tuple[str, ...],
    to_scene: np.ndarray,
    *,
    views: dict[str, np.ndarray],
    xyz: np.ndarray | None,
    train: bool,
    scale: float = 1.0,
) -> None:
    """Fills the arrays of ``box_fields``.

    Args:
        frame: with boxes, in the ego frame.
        wanted: classes, in the order of their ids; others are left out.
        to_scene: (4, 4) ego -> frame of the labels, augmented, and by how much it scales.
        xyz: (N, 3) points in that frame, that count in boxes; None: each box counts as one that has a point.
        train: leave out boxes without a point, which nobody can find; in evaluation the metric decides.

    Raises:
        ValueError: the frame has no boxes.
    """
    found = frame.boxes
    if found is None:
        raise ValueError(f"frame {frame.key} has no boxes; pack the labels group of a source that has them")
    ids = np.array([wanted.index(name) if name in wanted else IGNORE for name in found.names], np.uint8)
    rows = np.flatnonzero(ids != IGNORE)
    boxes = np.asarray(found.boxes, np.float64).reshape(-1, 7)[rows]
    moved = np.empty_like(boxes)
    moved[:, :3], moved[:, 3:6] = apply(to_scene, boxes[:, :3]), boxes[:, 3:6] * scale
    velocity = np.full((len(rows), 3), np.nan)
    for number, yaw in enumerate(boxes[:, 6]):
        heading = rotate(to_scene, np.array([*cos_sin(yaw), 0.0]))
        moved[number, 6] = angle_of(heading[0], heading[1])
    if found.velocity is not None:
        velocity = rotate(to_scene, np.pad(np.asarray(found.velocity, np.float64)[rows], ((0, 0), (0, 1))))
    inside = points_inside(xyz, moved) if xyz is not None else np.ones(len(rows), np.int32)
    keep = inside > 0 if train else np.ones(len(rows), bool)
    views["boxes.boxes"], views["boxes.velocity"] = (
        moved[keep].astype(np.float32),
        velocity[keep, :2].astype(np.float32),
    )
    views["boxes.classes"], views["boxes.points"] = ids[rows][keep], inside[keep]


def points_inside(points: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """(B,) int32 number of points (N, 3) in each box (B, 7), faces included; center, length, width, height, yaw."""
    found = np.zeros(len(boxes), np.int32)
    for number, (x, y, z, *half, yaw) in enumerate(boxes.astype(np.float64) / [1, 1, 1, 2, 2, 2, 1]):
        near = points[np.abs(points[:, 0] - x) <= half[0] + half[1]].astype(np.float64) - (x, y, z)
        cosine, sine = cos_sin(yaw)
        along, across = near[:, 0] * cosine + near[:, 1] * sine, near[:, 1] * cosine - near[:, 0] * sine
        found[number] = ((abs(along) <= half[0]) & (abs(across) <= half[1]) & (abs(near[:, 2]) <= half[2])).sum()
    return found


def ignore_points(arrays: dict[str, np.ndarray], index: int) -> None:
    """Makes no labeled point of a sample of a batch valid."""
    if "point_labels.classes" in arrays:
        counts = arrays["point_labels.counts"]
        end = int(counts[: index + 1].sum())
        arrays["point_labels.classes"][end - int(counts[index]) : end] = IGNORE
