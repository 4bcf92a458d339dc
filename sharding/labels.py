"""Occupancy labels from LiDAR sweeps, poses and boxes: what to do with a data set that brings none.

A scene's static points are gathered once, points inside boxes in their own box's frame by track. Each key-frame then sees
the whole static cloud, plus its own boxes filled with everything their tracks ever returned. Rays from the sensors tell
free voxels from unseen ones, which stay unknown. Works for one frame and for a whole scene, with or without boxes and
point classes; binary labels need neither.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from occstream.sharding.codec import canonical_json
from occstream.sharding.exactmath import angle_of, cos, sin
from occstream.sharding.grid import VoxelGrid
from occstream.sharding.labelconfig import LabelConfig
from occstream.sharding.levelling import level
from occstream.sharding.poses import apply, compose, inverse
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
    posed,
    sweep_to_key_ego,
    swept,
)
from occstream.sharding.voxelrays import count_points, first_box, mark_free, mark_visible, place_returns

VERSION = "lidar-4"
TILE = 16.0  # meters: edge of the squares that the static cloud is sorted by


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
    config: LabelConfig = dataclasses.field(default_factory=LabelConfig)

    @property
    def version(self) -> str:
        """Goes into the manifest: changes when the method or a setting does."""
        settings = canonical_json(dataclasses.asdict(self.config))
        return f"{VERSION}-{hashlib.blake2b(settings, digest_size=4).hexdigest()}"

    def __call__(self, scene: Scene) -> Scene:
        """The scene with labels in every frame. Raises ValueError if a frame has no LiDAR."""
        return label_scene(scene, self.grid, get_taxonomy(self.taxonomy), self.config)


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
        each voxel, IGNORE where a voxel has only points without class or was never seen; ``ego_to_global`` where poses were
        leveled. The frames keep their own.

    Raises:
        ValueError: a frame has no LiDAR sweep.
    """
    config = config or LabelConfig()
    no_points = not any(
        len(f.lidar.xyz) for f in scene.frames if f.lidar is not None
    )  # of a rig whose place alone is known
    for frame in scene.frames:
        if frame.lidar is None or no_points:
            raise ValueError(
                f"frame {frame.key} has no LiDAR sweep, so no labels can be made; leave its scene out or use --labels none"
            )
    original, scene = scene, level(scene) if config.level else scene
    clouds = _gather(scene, taxonomy, config)
    frames = []
    for number, frame in enumerate(scene.frames):
        to_grid = compose(inverse(grid_to_global(frame, grid)), clouds.to_global)  # from the scene's own axes
        votes = np.zeros((*grid.shape, taxonomy.num_classes if clouds.with_classes else 0), np.uint16)
        counts = np.zeros(grid.shape, np.uint16)
        lower, voxel = np.array(grid.lower), np.array(grid.voxel)
        for xyz, classes, pose in clouds.seen_by(number, frame, to_grid, grid):
            count_points(xyz, classes, np.ascontiguousarray(pose[:3]), lower, voxel, counts, votes)
        occupied = counts >= config.min_points
        passed = np.zeros(grid.shape, bool)
        for sweep, xyz in _rays(scene, number, config):
            pose = sweep_to_grid(frame, sweep, grid)[:3]
            pose[:, 3] -= lower
            mark_free(passed, xyz, pose / voxel[:, None])
        if config.supported:
            passed[:, :, 1:] &= passed[:, :, :-1] | occupied[:, :, :-1]
            passed[:, :, 0] = False
        semantic = None
        if clouds.with_classes:
            semantic = np.where(passed, taxonomy.free_id, IGNORE).astype(np.uint8)
            found = votes[occupied]
            semantic[occupied] = np.where(found.any(1), found.argmax(1), IGNORE)
        if config.dilation:
            occupied, semantic = _dilate(occupied, semantic, ~passed, config.dilation)
        observed = occupied | passed
        seen = _camera_mask(frame, occupied, observed, grid) & observed if frame.cameras else None
        placed = frame.ego_to_global if config.level else None
        labels = Labels(occupied, semantic, observed, seen, ego_to_global=placed)
        frames.append(dataclasses.replace(original.frames[number], labels=labels))
    return dataclasses.replace(original, frames=frames)


@dataclass
class _Clouds:
    """The points of a scene in the axes of its first ego pose (float32 would not hold a city's coordinates).

    Attributes:
        to_global: (4, 4) float64.
        xyz, classes: (N, 3) float32 and (N,) uint8 of what stands still, sorted by tile.
        tiles: (T, 2) int64 tile numbers, ``starts`` (T + 1,) where each begins.
        own: by frame, points that are true at one moment only: (xyz, classes) in the same axes.
        tracks: by track, points in the axes of its box.
    """

    to_global: np.ndarray
    xyz: np.ndarray
    classes: np.ndarray
    tiles: np.ndarray
    starts: np.ndarray
    own: list[tuple[np.ndarray, np.ndarray]]
    tracks: dict[str, tuple[np.ndarray, np.ndarray]]
    with_classes: bool

    def seen_by(
        self, number: int, frame: Frame, to_grid: np.ndarray, grid: VoxelGrid
    ) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """(points, classes, pose into the grid) of everything that may lie in the grid at a frame."""
        corners = np.array(np.meshgrid(*zip(grid.lower, grid.upper))).reshape(3, -1).T
        reach = apply(inverse(to_grid), corners)[:, :2]
        low, high = np.floor(reach.min(0) / TILE), np.floor(reach.max(0) / TILE)
        for tile in np.flatnonzero(((self.tiles >= low) & (self.tiles <= high)).all(1)):
            part = slice(self.starts[tile], self.starts[tile + 1])
            yield self.xyz[part], self.classes[part], to_grid
        yield *self.own[number], to_grid
        if frame.boxes is not None:
            here = compose(inverse(self.to_global), posed(frame))
            _, owners, poses, _ = box_poses(frame.boxes, here, frame.key)
            for track, pose in zip(owners, poses):
                if track in self.tracks:
                    yield *self.tracks[track], compose(to_grid, pose)


def _gather(scene: Scene, taxonomy: Taxonomy, config: LabelConfig) -> _Clouds:
    to_global = posed(scene.frames[0])
    from_global = inverse(to_global)
    thing = np.zeros(256, bool)
    thing[[taxonomy.id(c) for c in taxonomy.things]] = True
    with_classes = any(s.classes is not None for f in scene.frames for s in (*f.sweeps, swept(f)))
    static, own = [], []
    tracks: dict[str, list[tuple[np.ndarray, np.ndarray]]] = defaultdict(list)
    for number, frame in enumerate(scene.frames):
        before = scene.frames[number - 1] if number else None
        for sweep in (*frame.sweeps, swept(frame)):
            boxes = frame.boxes if sweep is frame.lidar else _boxes_at(before, frame, sweep.timestamp)
            local, keep = usable_returns(sweep, compose(from_global, sweep.ego_to_global, sweep.sensor_to_ego), config)
            classes = np.full(len(local), IGNORE, np.uint8) if sweep.classes is None else sweep.classes[keep]
            # A road user that no box covers has moved by the next frame, unless the data set says that it stood.
            mover = thing[classes] if sweep.moving is None else sweep.moving[keep]
            if boxes is not None and len(boxes.boxes):
                names, owners, poses, half = box_poses(boxes, compose(from_global, posed(frame)), frame.key)
                into = inverse(poses)
                inside = first_box(local, np.ascontiguousarray(into[:, :3]), half + config.box_margin)
                hit = np.flatnonzero(inside >= 0)
                for box in np.unique(inside[hit]):
                    chosen = hit[inside[hit] == box]
                    kinds = classes[chosen]
                    if with_classes and names[box] in taxonomy.classes:
                        kinds[kinds == IGNORE] = taxonomy.id(names[box])
                    tracks[owners[box]].append((apply(into[box], local[chosen]).astype(np.float32), kinds))
                left = inside < 0
                local, classes, mover = local[left], classes[left], mover[left]
            static.append((local[~mover], classes[~mover]))
            if sweep is frame.lidar:
                own.append((local[mover], classes[mover]))
    xyz, classes = _join(static)
    tile = np.floor(xyz[:, :2] / TILE).astype(np.int64)
    low = tile.min(0) if len(tile) else np.zeros(2, np.int64)
    number = ((tile - low) @ [2**16, 1]).astype(np.int64)
    order = np.argsort(number, kind="stable")
    found, starts = np.unique(number[order], return_index=True)
    return _Clouds(
        to_global=to_global,
        xyz=xyz[order],
        classes=classes[order],
        tiles=np.stack([found // 2**16, found % 2**16], 1) + low,
        starts=np.append(starts, len(order)),
        own=own,
        tracks={track: _join(pieces) for track, pieces in tracks.items()},
        with_classes=with_classes,
    )


def _join(pieces: list[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    return np.concatenate([p[0] for p in pieces]), np.concatenate([p[1] for p in pieces])


def usable_returns(sweep: LidarSweep, pose: np.ndarray, config: LabelConfig) -> tuple[np.ndarray, np.ndarray]:
    """(M, 3) float32 of a sweep's returns moved by a pose, without the vehicle itself; (N,) bool which are left."""
    low, high = np.array(config.vehicle[:3]), np.array(config.vehicle[3:])
    return place_returns(sweep.xyz, sweep.sensor_to_ego[:3].copy(), pose[:3].copy(), low, high, config.max_range)


def _rays(scene: Scene, number: int, config: LabelConfig) -> Iterator[tuple[LidarSweep, np.ndarray]]:
    """Sweeps and those of their points whose rays are followed in a frame: all of its own, an even share of the others."""
    own = swept(scene.frames[number])
    low, high = max(0, number - config.ray_frames), number + config.ray_frames + 1
    others = [s for f in scene.frames[low:high] for s in (*f.sweeps, swept(f)) if s is not own]
    total = sum(len(s.xyz) for s in others)
    stride = -(-total // config.max_rays) if config.max_rays else 0
    for turn, sweep in [(0, own), *enumerate(others)]:
        if sweep is not own and not stride:
            return
        xyz = sweep.xyz if sweep is own else sweep.xyz[turn % stride :: stride]
        near = np.asarray(np.isfinite(xyz).all(1))
        if config.max_range:
            near &= (xyz.astype(np.float64) ** 2).sum(1) <= config.max_range**2
        yield sweep, xyz[near]


def _dilate(
    occupied: np.ndarray, semantic: np.ndarray | None, unseen: np.ndarray, times: int
) -> tuple[np.ndarray, np.ndarray | None]:
    """Grown ``occupied``, and ``semantic`` with the class of a neighbor in the new voxels."""
    for _ in range(times):
        grown = np.asarray(ndimage.binary_dilation(occupied), bool) & (unseen | occupied)
        if semantic is not None:
            new, semantic = grown & ~occupied, semantic.copy()
            source = np.where(occupied, semantic, 0).astype(np.int16)
            source[occupied & (semantic == IGNORE)] = 0
            source[occupied & (semantic != IGNORE)] += 1
            around = ndimage.maximum_filter(source, footprint=ndimage.generate_binary_structure(3, 1), mode="constant")
            semantic[new] = np.where(around[new] > 0, around[new] - 1, IGNORE)
        occupied = grown
    return occupied, semantic


def _camera_mask(frame: Frame, solid: np.ndarray, wanted: np.ndarray, grid: VoxelGrid) -> np.ndarray:
    """(X, Y, Z) bool: in the view of a camera and not behind something solid. Right where ``wanted``."""
    seen = np.zeros(grid.shape, bool)
    from_ego = compose(inverse(grid_to_global(frame, grid)), posed(frame))
    scale = np.diag([*grid.voxel, 1.0])
    scale[:3, 3] = grid.lower  # voxel units -> meters
    for camera in frame.cameras.values():
        pose = compose(inverse(scale), from_ego, camera_to_key_ego(frame, camera))
        to_camera = np.ascontiguousarray(inverse(pose)[:3])
        intrinsics = np.ascontiguousarray(camera.intrinsics, np.float64)
        mark_visible(solid, wanted, seen, pose[:3, 3].copy(), to_camera, intrinsics, camera.width, camera.height)
    return seen


def box_poses(boxes: Boxes, from_ego: np.ndarray, key: str) -> tuple[list[str], list[str], np.ndarray, np.ndarray]:
    """Of all boxes: class names; tracks (a box without one is one of its own); (B, 4, 4) box -> where ``from_ego`` leads;
    (B, 3) half sizes."""
    rows = boxes.boxes.astype(np.float64)
    poses = np.zeros((len(rows), 4, 4))
    c, s = cos(rows[:, 6]), sin(rows[:, 6])
    poses[:, 0, 0], poses[:, 0, 1], poses[:, 1, 0], poses[:, 1, 1] = c, -s, s, c
    poses[:, 2, 2], poses[:, 3, 3], poses[:, :3, 3] = 1, 1, rows[:, :3]
    owners = [track or f"{key}/{i}" for i, track in enumerate(boxes.track_ids)]
    return boxes.names, owners, compose(from_ego, poses), rows[:, 3:6] / 2


def _boxes_at(before: Frame | None, frame: Frame, timestamp: int) -> Boxes | None:
    """Boxes between two key-frames, in the ego frame of the later one: linear in place and heading by track; what has
    only one of the two stays where that is."""
    if frame.boxes is None or before is None or before.boxes is None:
        return frame.boxes
    now, then = frame.timestamp, before.timestamp
    if now is None or then is None or now == then:
        return frame.boxes
    share = np.clip((timestamp - then) / (now - then), 0, 1)
    shift = compose(inverse(posed(frame)), posed(before))
    turn = angle_of(shift[0, 0], shift[1, 0])
    earlier = {t: i for i, t in enumerate(before.boxes.track_ids) if t}
    rows = frame.boxes.boxes.astype(np.float64).copy()
    for row, track in zip(rows, frame.boxes.track_ids):
        if track in earlier:
            old = before.boxes.boxes[earlier[track]].astype(np.float64)
            row[:3] = (1 - share) * apply(shift, old[:3]) + share * row[:3]
            row[6] -= (1 - share) * math.remainder(row[6] - old[6] - turn, 2 * math.pi)
    return dataclasses.replace(frame.boxes, boxes=rows)


def sweep_to_grid(frame: Frame, sweep: LidarSweep, grid: VoxelGrid) -> np.ndarray:
    """LiDAR axes of any sweep -> meters of the grid of a key-frame, (4, 4) float64."""
    return compose(inverse(grid_to_global(frame, grid)), sweep.ego_to_global, sweep.sensor_to_ego)


def grid_to_global(frame: Frame, grid: VoxelGrid) -> np.ndarray:
    """Frame of a key-frame's grid -> global, (4, 4) float64; a grid in the LiDAR frame needs the sweep."""
    if grid.frame == "ego":
        return posed(frame)
    return compose(posed(frame), sweep_to_key_ego(frame, swept(frame)))


def labels_to_global(frame: Frame, labels: Labels, grid: VoxelGrid) -> np.ndarray:
    """``grid_to_global`` by the pose of labels of the frame, which may be better than the frame's own."""
    if labels.ego_to_global is None:
        return grid_to_global(frame, grid)
    if grid.frame == "ego":
        return labels.ego_to_global
    return compose(labels.ego_to_global, inverse(posed(frame)), grid_to_global(frame, grid))
