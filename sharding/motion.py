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
from scipy.spatial.transform import Rotation, Slerp

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

    def __post_init__(self):
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
                f"scene {self.scene}: no pose at {int(bad)} µs, they reach from {first} to {last} µs; leave out the sweep"
            )
        # Seconds from the first pose: microseconds since 1970 have too many digits for what follows.
        at = (np.clip(times, first, last) - first) / 1e6
        known = (self.times - first) / 1e6
        out = np.tile(np.eye(4), (len(at), 1, 1))
        out[:, :3, :3] = Slerp(known, Rotation.from_matrix(self.ego_to_global[:, :3, :3]))(at).as_matrix()
        place = self.ego_to_global[:, :3, 3]
        if len(known) < 3 or np.diff(self.times).max() <= DENSE:
            out[:, :3, 3] = interp1d(known, place, axis=0)(at)
        else:
            out[:, :3, 3] = CubicHermiteSpline(known, place, np.gradient(place, known, axis=0, edge_order=2))(at)
        return out


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
