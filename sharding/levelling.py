"""Corrects the height and tilt of ego poses by the ground that neighboring key-frames both see.

nuScenes' poses have no height (nuscenes-devkit issue 721): on a slope, sweeps drift apart by decimeters within a second,
and aggregated roads become thick. Each key-frame's ground is laid onto that of the frames before it: a robust fit of one
plane through the differences of the two height maps. Poses that are right already stay as they are, to centimeters.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from typing import TypeVar

import numpy as np

from occstream.sharding.exactmath import cos_sin
from occstream.sharding.poses import apply, compose, inverse, rotate
from occstream.sharding.schema import Camera, LidarSweep, Scene, posed

Placed = TypeVar("Placed", LidarSweep, Camera)

CELL = 1.0  # meters: edge of the cells of the height maps
NEAR, FAR = 3.0, 30.0  # meters from the vehicle: where ground is looked for
FLAT = 0.15  # meters: a cell of ground has its points within this height
FEWEST = 60  # cells that two frames must share; else the last correction is kept
KEPT = 4  # frames whose ground the next one is laid onto


def level(scene: Scene) -> Scene:
    """The scene with corrected ``ego_to_global`` of frames, sweeps and cameras; everything else is unchanged."""
    fix, before = np.eye(4), None
    earlier: deque[dict[tuple[int, int], float]] = deque(maxlen=KEPT)
    frames = []
    for frame in scene.frames:
        last = fix
        ground = _ground(frame.lidar, fix) if frame.lidar is not None else {}
        fix = compose(_step(ground, earlier, compose(fix, posed(frame))[:3, 3]), fix)
        earlier.append(_ground(frame.lidar, fix) if frame.lidar is not None else {})
        times = before.timestamp if before else None, frame.timestamp
        frames.append(
            dataclasses.replace(
                frame,
                ego_to_global=compose(fix, posed(frame)),
                lidar=_moved(frame.lidar, fix) if frame.lidar is not None else None,
                sweeps=[_moved(sweep, _between(sweep, times, last, fix)) for sweep in frame.sweeps],
                cameras={name: _moved(camera, fix) for name, camera in frame.cameras.items()},
            )
        )
        before = frame
    return dataclasses.replace(scene, frames=frames)


def _between(sweep: LidarSweep, times: tuple[int | None, int | None], last: np.ndarray, fix: np.ndarray) -> np.ndarray:
    """Correction of a sweep between two key-frames with these times and corrections: it drifts from one to the other."""
    then, now = times
    if now is None or then is None or now == then:
        return fix
    share = np.clip((sweep.timestamp - then) / (now - then), 0, 1)
    return last + share * (fix - last)  # the tilts are so small that the mean of rotations is one


def _moved(placed: Placed, fix: np.ndarray) -> Placed:
    """A sweep or camera with a corrected ego pose."""
    return dataclasses.replace(placed, ego_to_global=compose(fix, placed.ego_to_global))


def _ground(sweep: LidarSweep, fix: np.ndarray) -> dict[tuple[int, int], float]:
    """Height of flat cells around the vehicle, by cell, in the (corrected) global frame."""
    ego = apply(sweep.sensor_to_ego, sweep.xyz)
    far = np.sqrt(ego[:, 0] ** 2 + ego[:, 1] ** 2)
    ego, far = ego[(far > NEAR) & (far < FAR)], far[(far > NEAR) & (far < FAR)]  # without what is not finite, too
    close = ego[far < 10, 2]
    if len(close) < 20:
        return {}
    # Where the ground is: near zero, but for slopes, curbs and tilted LiDARs.
    ego = ego[np.abs(ego[:, 2] - np.percentile(close, 10)) < 0.1 * far + 0.3]
    points = apply(compose(fix, sweep.ego_to_global), ego)
    cell = np.floor(points[:, :2] / CELL).astype(np.int64)
    order = np.lexsort((points[:, 2], cell[:, 1], cell[:, 0]))
    cell, height = cell[order], points[order, 2]
    first = np.flatnonzero(np.append(True, (cell[1:] != cell[:-1]).any(1)))
    last = np.append(first[1:], len(cell)) - 1
    flat = (height[last] - height[first] < FLAT) & (last - first >= 2)
    return dict(zip(map(tuple, cell[first[flat]].tolist()), height[(first + last) // 2][flat].tolist()))


def _step(ground: dict, earlier: deque[dict], at: np.ndarray) -> np.ndarray:
    """(4, 4): the motion about a place that lays a height map onto earlier ones; the identity if they share too little."""
    known: dict[tuple[int, int], float] = {}
    for one in earlier:
        known |= one
    shared = [cell for cell in ground if cell in known]
    if len(shared) < FEWEST:
        return np.eye(4)
    x = (np.array(shared) + 0.5) * CELL - at[:2]
    gap = np.array([known[c] - ground[c] for c in shared])
    # Least squares whose outliers lose their weight (Geman-McClure); from the median, which outliers do not move far.
    solved, scale = np.array([np.median(gap), 0.0, 0.0]), 0.15
    for _ in range(10):
        weight = 1 / (1 + ((gap - solved[0] - x[:, 0] * solved[1] - x[:, 1] * solved[2]) / scale) ** 2)
        solved = _plane(x, gap, weight**2)
        scale = max(0.05, scale * 0.8)
    shift, tilt_x, tilt_y = solved
    motion, to, back = np.eye(4), np.eye(4), np.eye(4)
    motion[:3, :3] = _turn(np.array([tilt_y, -tilt_x, 0.0]))
    motion[2, 3] = shift
    to[:3, 3], back[:3, 3] = -at, at
    return compose(back, motion, to)


def _plane(x: np.ndarray, gap: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """(3,) height and slopes of the plane through (N, 2) places and (N,) heights by weighted least squares. Where the
    places lie on one line, its slope across them is 0."""
    terms = np.stack([np.ones(len(x)), *x.T])
    normal = np.eye(4)
    normal[:3, :3] = (terms[:, None] * terms[None] * weight).sum(-1)
    normal[[1, 2], [1, 2]] += 1e-9 * normal[0, 0]
    return rotate(inverse(normal), (terms * gap * weight).sum(-1))


def _turn(vector: np.ndarray) -> np.ndarray:
    """(3, 3) rotation about a vector by its length in radians."""
    x, y, z = vector
    angle = np.sqrt(x * x + y * y + z * z)
    if angle < 1e-12:
        return np.eye(3)
    axis, (c, s) = vector / angle, cos_sin(angle)
    x, y, z = axis
    return c * np.eye(3) + s * np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]]) + (1 - c) * axis[:, None] * axis
