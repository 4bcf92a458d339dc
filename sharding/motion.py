"""Where the vehicle was at any time, and points of a LiDAR turn brought to one instant.

A turn takes 50 to 100 ms. A vehicle at 30 m/s has moved by 3 m in that time, so points that are placed with one pose are
wrong by up to 1.5 m to either side. Sources whose data set gives each point's time, and did not compensate the points
itself, call ``deskew``; then labels, networks and viewers agree.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np
from scipy.interpolate import CubicHermiteSpline, interp1d

from occstream.sharding.exactmath import angle, sin
from occstream.sharding.poses import apply, compose, inverse
from occstream.sharding.schema import LidarSweep

DENSE = 20_000  # microseconds: between poses that are closer than this, places are linear
TOLERANCE = 20_000  # microseconds beyond the ends within which the outermost pose is taken
KNOTS = 64  # poses a turn; a point's motion is linear between the two around it (below 0.1 mm at 100 ms)


@dataclass(frozen=True)
class Trajectory:
    """Ego poses of one scene: rotations are interpolated along the shortest arc, places cubically (linearly where poses
    are dense). Nothing is extrapolated.

    Attributes:
        scene: name, for errors.
        times: (N,) int64 microseconds, increasing.
        ego_to_global: (N, 4, 4) float64.

    Raises:
        ValueError: fewer than two poses, times that do not increase, or numbers that are not finite.
    """

    scene: str
    times: np.ndarray
    ego_to_global: np.ndarray

    def __post_init__(self) -> None:
        times, poses = np.asarray(self.times, np.int64), np.asarray(self.ego_to_global, np.float64)
        if len(times) < 2 or poses.shape != (len(times), 4, 4):
            raise ValueError(
                f"scene {self.scene}: a trajectory needs two poses or more, each 4 x 4, and a time for each"
            )
        if not (np.diff(times) > 0).all():
            first = int(np.flatnonzero(np.diff(times) <= 0)[0])
            raise ValueError(
                f"scene {self.scene}: times of poses must increase, but {times[first + 1]} follows {times[first]}"
            )
        if not np.isfinite(poses).all():
            raise ValueError(
                f"scene {self.scene}: the pose at {times[~np.isfinite(poses).all((1, 2))][0]} µs is not finite"
            )
        object.__setattr__(self, "times", times)
        object.__setattr__(self, "ego_to_global", poses)

    def at(self, times: np.ndarray) -> np.ndarray:
        """(M, 4, 4) float64 ego -> global.

        Args:
            times: (M,) microseconds; within the poses' own, or up to 20 ms beyond, where the outermost pose is taken.

        Raises:
            ValueError: a time is further out; names the scene.
        """
        times = np.asarray(times)
        first, last = int(self.times[0]), int(self.times[-1])
        if len(times) and (times.min() < first - TOLERANCE or times.max() > last + TOLERANCE):
            bad = times.min() if times.min() < first - TOLERANCE else times.max()
            raise ValueError(
                f"scene {self.scene}: no pose at {int(bad)} µs, they reach from {first} to {last} µs; omit the sweep"
            )
        # Seconds from the first pose: microseconds since 1970 have too many digits for what follows.
        at = (np.clip(times, first, last) - first) / 1e6
        known = (self.times - first) / 1e6
        before = np.clip(np.searchsorted(known, at, side="right") - 1, 0, len(known) - 2)
        share = (at - known[before]) / (known[before + 1] - known[before])
        turns = _quaternions(self.ego_to_global[:, :3, :3])
        out = np.tile(np.eye(4), (len(at), 1, 1))
        out[:, :3, :3] = _matrices(_slerp(turns[before], turns[before + 1], share))
        place = self.ego_to_global[:, :3, 3]
        if len(known) < 3 or np.diff(self.times).max() <= DENSE:
            out[:, :3, 3] = interp1d(known, place, axis=0)(at)
        else:
            out[:, :3, 3] = CubicHermiteSpline(known, place, np.gradient(place, known, axis=0, edge_order=2))(at)
        return out


def _quaternions(turns: np.ndarray) -> np.ndarray:
    """(N, 4) w, x, y, z of (N, 3, 3). Each component is once the one that is divided by: the largest is taken."""
    m = turns.transpose(1, 2, 0)
    w, x = 1 + m[0, 0] + m[1, 1] + m[2, 2], 1 + m[0, 0] - m[1, 1] - m[2, 2]
    y, z = 1 - m[0, 0] + m[1, 1] - m[2, 2], 1 - m[0, 0] - m[1, 1] + m[2, 2]
    wx, wy, wz = m[2, 1] - m[1, 2], m[0, 2] - m[2, 0], m[1, 0] - m[0, 1]
    xy, xz, yz = m[0, 1] + m[1, 0], m[0, 2] + m[2, 0], m[1, 2] + m[2, 1]
    rows = np.array([[w, wx, wy, wz], [wx, x, xy, xz], [wy, xy, y, yz], [wz, xz, yz, z]])
    return _normal(rows[np.argmax([w, x, y, z], axis=0), :, np.arange(len(turns))])


def _matrices(turns: np.ndarray) -> np.ndarray:
    """(N, 3, 3) of unit quaternions (N, 4)."""
    w, x, y, z = turns.T
    rows = [
        [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
        [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
        [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
    ]
    return np.array(rows).transpose(2, 0, 1)


def _slerp(first: np.ndarray, second: np.ndarray, share: np.ndarray) -> np.ndarray:
    """(N, 4) unit quaternions at a share of the shorter arc between two."""
    along = _dot(first, second)[:, None]
    first, along = np.where(along < 0, -first, first), np.abs(along)
    across = second - along * first
    arc = angle(along[:, 0], np.sqrt(_dot(across, across)))
    whole, share = sin(arc), np.asarray(share, np.float64)
    near = whole < 1e-9
    whole = np.where(near, 1, whole)
    start = np.where(near, 1 - share, sin((1 - share) * arc) / whole)
    end = np.where(near, share, sin(share * arc) / whole)
    return _normal(start[:, None] * first + end[:, None] * second)


def _dot(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return a[:, 0] * b[:, 0] + a[:, 1] * b[:, 1] + a[:, 2] * b[:, 2] + a[:, 3] * b[:, 3]


def _normal(turns: np.ndarray) -> np.ndarray:
    return turns / np.sqrt(_dot(turns, turns))[:, None]


def deskew(sweep: LidarSweep, trajectory: Trajectory) -> LidarSweep:
    """A sweep whose points are where they were at its ``timestamp``, as far as they stand still.

    Args:
        sweep: ``xyz`` in the LiDAR's axes at the time of each point, which is ``timestamp`` - ``time_lag``.
        trajectory: of its scene.

    Returns:
        The sweep with ``xyz`` in the LiDAR's axes at ``timestamp``; all else is kept, ``time_lag`` too.

    Raises:
        ValueError: there are no times of points, or the trajectory does not cover them.
    """
    if sweep.time_lag is None:
        raise ValueError(
            f"scene {trajectory.scene}: the sweep at {sweep.timestamp} µs has no times of points to deskew it by"
        )
    if not len(sweep.xyz):
        return sweep
    lag = sweep.time_lag.astype(np.float64)
    low, high = float(lag.min()), float(lag.max())
    knots = np.linspace(low, high, KNOTS)
    times = np.concatenate([[0.0], knots])
    poses = trajectory.at(sweep.timestamp - np.rint(1e6 * times).astype(np.int64))
    motions = compose(inverse(compose(poses[0], sweep.sensor_to_ego)), poses[1:], sweep.sensor_to_ego)
    place = (lag - low) / (high - low) * (KNOTS - 1) if high > low else np.zeros(len(lag))
    before = np.minimum(place.astype(np.int64), KNOTS - 2)
    share = (place - before)[:, None]
    points = sweep.xyz.astype(np.float64)
    moved = (1 - share) * apply(motions[before], points) + share * apply(motions[before + 1], points)
    return dataclasses.replace(sweep, xyz=moved.astype(np.float32))
