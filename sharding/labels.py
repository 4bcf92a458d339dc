"""Occupancy labels from LiDAR sweeps, poses and boxes: what to do with a data set that brings none.

A scene's static points are gathered in the global frame, points inside boxes in their own box's frame by track. Each
key-frame then sees the whole static cloud, plus its own boxes filled with everything their tracks ever returned. Rays
from the sensors tell free voxels from unseen ones. Works for one frame and for a whole scene, with or without boxes and
point classes; binary labels need neither.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections import defaultdict
from dataclasses import dataclass

import numpy as np

from occstream.sharding.codec import canonical_json
from occstream.sharding.grid import VoxelGrid
from occstream.sharding.schema import (
    IGNORE,
    Boxes,
    Frame,
    Labels,
    LidarSweep,
    Scene,
    Taxonomy,
    camera_to_key_ego,
    get_taxonomy,
    sweep_to_key_ego,
)
from occstream.sharding.voxelrays import mark_free, visible_from

VERSION = "lidar-1"


@dataclass(frozen=True)
class LabelConfig:
    """How labels are made.

    Attributes:
        min_points: so many points make a voxel occupied.
        box_margin: metres by which boxes are grown when points are assigned to them.
        ray_frames: rays of so many key-frames before and after a frame tell what is free in it.
        vehicle: (x, y, z low; x, y, z high) metres, ego frame: returns from there are the vehicle itself.
    """

    min_points: int = 1
    box_margin: float = 0.1
    ray_frames: int = 10
    vehicle: tuple[float, float, float, float, float, float] = (-1.2, -1.2, -0.5, 4.0, 1.2, 2.3)


@dataclass(frozen=True)
class Labeler:
    """Makes the labels of a scene; the label step of ``pack``. Picklable.

    Args:
        grid: of the labels.
        taxonomy: name; point classes are ids of it.
        config: see there.
    """

    grid: VoxelGrid
    taxonomy: str
    config: LabelConfig = LabelConfig()

    @property
    def version(self) -> str:
        """Goes into the manifest: changes when the method or a setting does."""
        settings = canonical_json(dataclasses.asdict(self.config))
        return f"{VERSION}-{hashlib.blake2b(settings, digest_size=4).hexdigest()}"

    def __call__(self, scene: Scene) -> Scene:
        """The scene with labels in every frame. Raises ValueError if a frame has no LiDAR."""
        return label_scene(scene, self.grid, get_taxonomy(self.taxonomy), self.config)


@dataclass
class _Cloud:
    """Points with what is known of them: (N, 3) float64, (N,) uint8 class or IGNORE."""

    xyz: np.ndarray
    classes: np.ndarray

    @classmethod
    def join(cls, parts: list[_Cloud]) -> _Cloud:
        if not parts:
            return cls(np.zeros((0, 3)), np.zeros(0, np.uint8))
        return cls(np.concatenate([p.xyz for p in parts]), np.concatenate([p.classes for p in parts]))

    def __getitem__(self, keep: np.ndarray) -> _Cloud:
        return _Cloud(self.xyz[keep], self.classes[keep])

    def moved(self, pose: np.ndarray) -> _Cloud:
        return _Cloud(_apply(pose, self.xyz), self.classes)


def label_scene(scene: Scene, grid: VoxelGrid, taxonomy: Taxonomy, config: LabelConfig | None = None) -> Scene:
    """Labels every frame of a scene.

    Args:
        scene: each frame with its LiDAR sweep; boxes, further sweeps, point classes and cameras are used where present.
        grid: of the labels; ego or LiDAR frame of each key-frame.
        taxonomy: of the point classes.
        config: None for the defaults.

    Returns:
        The same scene with ``Frame.labels``: ``binary``, ``mask_lidar`` (occupied, or passed by a ray), ``mask_camera``
        (of these, in view of a camera and not hidden), and ``semantic`` if the scene has point classes: the majority of
        each voxel, IGNORE where a voxel has only points without class or was never seen.

    Raises:
        ValueError: a frame has no LiDAR sweep.
    """
    config = config or LabelConfig()
    for frame in scene.frames:
        if frame.lidar is None:
            raise ValueError(
                f"frame {frame.key} has no LiDAR sweep, so no labels can be made; leave its scene out or use --labels none"
            )
    with_classes = any(s.classes is not None for f in scene.frames for s in (*f.sweeps, f.lidar))
    static: list[_Cloud] = []
    own: list[list[_Cloud]] = [[] for _ in scene.frames]  # only true at one moment
    tracks: dict[str, list[_Cloud]] = defaultdict(list)
    for number, frame in enumerate(scene.frames):
        before = scene.frames[number - 1] if number else None
        for sweep in (*frame.sweeps, frame.lidar):
            boxes = frame.boxes if sweep is frame.lidar else _boxes_at(before, frame, sweep.timestamp)
            cloud = _world_cloud(sweep, config)
            if boxes is not None:
                left = np.ones(len(cloud.xyz), bool)
                for name, track, pose, half in _box_poses(boxes, frame.ego_to_global, frame.key):
                    local = _apply(np.linalg.inv(pose), cloud.xyz)
                    inside = left & (np.abs(local) <= half + config.box_margin).all(1)
                    if inside.any():
                        points = _Cloud(local[inside], cloud.classes[inside])
                        if with_classes and name in taxonomy.classes:
                            points.classes[points.classes == IGNORE] = taxonomy.id(name)
                        tracks[track].append(points)
                        left &= ~inside
                cloud = cloud[left]
            # A road user that no box covers has moved by the next frame.
            mover = np.isin(cloud.classes, [taxonomy.id(c) for c in taxonomy.things])
            static.append(cloud[~mover])
            if sweep is frame.lidar:
                own[number].append(cloud[mover])
    still = _Cloud.join(static)
    filled = {track: _Cloud.join(parts) for track, parts in tracks.items()}
    frames = []
    for number, frame in enumerate(scene.frames):
        parts = [still, *own[number]]
        if frame.boxes is not None:
            for _, track, pose, _ in _box_poses(frame.boxes, frame.ego_to_global, frame.key):
                if track in filled:
                    parts.append(filled[track].moved(pose))
        to_grid = np.linalg.inv(_grid_to_global(frame, grid))
        cloud = _Cloud.join([part.moved(to_grid) for part in parts])
        low, high = max(0, number - config.ray_frames), number + config.ray_frames + 1
        sweeps = [s for f in scene.frames[low:high] for s in (*f.sweeps, f.lidar)]
        labels = _voxel_labels(frame, cloud, sweeps, to_grid, grid, taxonomy if with_classes else None, config)
        frames.append(dataclasses.replace(frame, labels=labels))
    return dataclasses.replace(scene, frames=frames)


def _voxel_labels(
    frame: Frame,
    cloud: _Cloud,
    sweeps: list[LidarSweep],
    to_grid: np.ndarray,
    grid: VoxelGrid,
    taxonomy: Taxonomy | None,
    config: LabelConfig,
) -> Labels:
    index, inside = grid.to_index(cloud.xyz)
    flat = np.ravel_multi_index(index[inside].T, grid.shape)
    occupied = (np.bincount(flat, minlength=grid.size) >= config.min_points).reshape(grid.shape)

    lower, voxel = np.array(grid.lower), np.array(grid.voxel)
    passed = np.zeros(grid.shape, np.uint16)
    for sweep in sweeps:
        pose = to_grid @ sweep.ego_to_global @ sweep.sensor_to_ego
        ends = (_apply(pose, sweep.xyz.astype(np.float64)) - lower) / voxel
        mark_free(passed, np.broadcast_to((pose[:3, 3] - lower) / voxel, ends.shape), ends)
    observed = occupied | (passed > 0)

    semantic = None
    if taxonomy is not None:
        known = cloud.classes[inside] != IGNORE
        k = taxonomy.num_classes
        votes = np.bincount(flat[known] * k + cloud.classes[inside][known], minlength=grid.size * k).reshape(-1, k)
        winner = np.where(votes.any(1), votes.argmax(1), IGNORE).reshape(grid.shape)
        semantic = np.where(occupied, winner, np.where(observed, taxonomy.free_id, IGNORE)).astype(np.uint8)
    return Labels(
        occupied, semantic, observed, _camera_mask(frame, occupied, grid) & observed if frame.cameras else None
    )


def _camera_mask(frame: Frame, solid: np.ndarray, grid: VoxelGrid) -> np.ndarray:
    """(X, Y, Z) bool: in the view of a camera and not behind something solid."""
    seen = np.zeros(grid.shape, bool)
    centers = grid.centers().reshape(-1, 3)
    from_ego = np.linalg.inv(_grid_to_global(frame, grid)) @ frame.ego_to_global
    lower, voxel = np.array(grid.lower), np.array(grid.voxel)
    for camera in frame.cameras.values():
        pose = from_ego @ camera_to_key_ego(frame, camera)
        local = _apply(np.linalg.inv(pose), centers)
        depth = np.maximum(local[:, 2], 1e-6)
        pixels = local @ camera.intrinsics.T / depth[:, None]
        view = (local[:, 2] > 0.1) & (pixels[:, 0] > -0.5) & (pixels[:, 0] < camera.width - 0.5)
        view &= (pixels[:, 1] > -0.5) & (pixels[:, 1] < camera.height - 0.5)
        visible_from(solid, seen, (pose[:3, 3] - lower) / voxel, (centers[view] - lower) / voxel)
    return seen


def _world_cloud(sweep: LidarSweep, config: LabelConfig) -> _Cloud:
    """A sweep's points in the global frame, without the vehicle itself."""
    classes = np.full(len(sweep.xyz), IGNORE, np.uint8) if sweep.classes is None else sweep.classes
    ego = _apply(sweep.sensor_to_ego, sweep.xyz.astype(np.float64))
    low, high = np.array(config.vehicle[:3]), np.array(config.vehicle[3:])
    keep = np.isfinite(ego).all(1) & ~((ego > low) & (ego < high)).all(1)
    return _Cloud(ego[keep], classes[keep]).moved(sweep.ego_to_global)


def _box_poses(boxes: Boxes, ego_to_global: np.ndarray, key: str):
    """(class name, track, box -> global, half size) of each box. A box without a track is one of its own."""
    for i, (x, y, z, length, width, height, yaw) in enumerate(boxes.boxes.astype(np.float64)):
        pose = np.eye(4)
        c, s = math.cos(yaw), math.sin(yaw)
        pose[:2, :2], pose[:3, 3] = [[c, -s], [s, c]], (x, y, z)
        half = np.array([length, width, height]) / 2
        yield boxes.names[i], boxes.track_ids[i] or f"{key}/{i}", ego_to_global @ pose, half


def _boxes_at(before: Frame | None, frame: Frame, timestamp: int) -> Boxes | None:
    """Boxes between two key-frames, in the ego frame of the later one: linear in place and heading by track; what has
    only one of the two stays where that is."""
    if frame.boxes is None or before is None or before.boxes is None or frame.timestamp == before.timestamp:
        return frame.boxes
    share = np.clip((timestamp - before.timestamp) / (frame.timestamp - before.timestamp), 0, 1)
    shift = np.linalg.inv(frame.ego_to_global) @ before.ego_to_global
    turn = math.atan2(shift[1, 0], shift[0, 0])
    earlier = {t: i for i, t in enumerate(before.boxes.track_ids) if t}
    rows = frame.boxes.boxes.astype(np.float64).copy()
    for row, track in zip(rows, frame.boxes.track_ids):
        if track in earlier:
            old = before.boxes.boxes[earlier[track]].astype(np.float64)
            row[:3] = (1 - share) * _apply(shift, old[None, :3])[0] + share * row[:3]
            row[6] -= (1 - share) * math.remainder(row[6] - old[6] - turn, 2 * math.pi)
    return dataclasses.replace(frame.boxes, boxes=rows)


def _grid_to_global(frame: Frame, grid: VoxelGrid) -> np.ndarray:
    if grid.frame == "ego":
        return frame.ego_to_global
    return frame.ego_to_global @ sweep_to_key_ego(frame, frame.lidar)


def _apply(pose: np.ndarray, points: np.ndarray) -> np.ndarray:
    return points @ pose[:3, :3].T + pose[:3, 3]
