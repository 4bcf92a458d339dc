"""Rows of a LiDAR's scan: the directions of its points, and row numbers for sweeps that come without."""

from __future__ import annotations

import numpy as np

from occstream.sharding.exactmath import angle

_SHORT_ROW = 100  # fewer points than any turn of a spinning LiDAR gives


def spherical(points: np.ndarray) -> np.ndarray:
    """(N, 3) points in the frame of the sensor, meters -> (N, 3) float64 range in meters, inclination above the horizon and
    azimuth from +x to +y in degrees."""
    x, y, z = np.asarray(points, dtype=np.float64)[:, :3].T
    flat = np.hypot(x, y)
    return np.stack([np.hypot(flat, z), np.degrees(np.arctan2(z, flat)), np.degrees(np.arctan2(y, x))], 1)


def rows_of_scan(points: np.ndarray, beams: int) -> np.ndarray:
    """Row numbers for sweeps that have none, but whose points come turn by turn (KITTI).

    A turn ends where the azimuth passes zero upward. Turns of fewer than 100 points (noise at the seam) belong to the one
    before. Where that does not give ``beams`` rows, or up to 4 less, rows are ``beams`` equal bins of the inclination.

    Args:
        points: (N, 3 or more) in the frame of the sensor, in the order of the scan.

    Returns:
        (N,) int64.
    """
    if not len(points):
        return np.zeros(0, dtype=np.int64)
    x, y, z = points[:, :3].astype(np.float64).T
    starts = [0]
    for at in (np.flatnonzero((y[:-1] < 0) & (y[1:] >= 0)) + 1).tolist():
        if at - starts[-1] >= _SHORT_ROW:
            starts.append(at)
    if len(starts) > 1 and len(points) - starts[-1] < _SHORT_ROW:
        starts.pop()
    if beams - 4 <= len(starts) <= beams:
        return np.searchsorted(starts, np.arange(len(points)), side="right") - 1
    inclination = angle(np.sqrt(x * x + y * y), z)  # the same on every CPU: the numbers go into shards
    low, up = inclination.min(), inclination.max()
    return np.minimum((inclination - low) / max(up - low, 1e-9) * beams, beams - 1).astype(np.int64)
