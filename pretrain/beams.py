"""Beam re-sampling: sweeps as a LiDAR of fewer beams would take them (SPOT, Sec. 3.3.3).

A sensor's density is its number of beams over its vertical field of view; the ratio of densities, downstream over
pre-training, says which share of the rows is kept. Rows are counted from below, by the inclination at which a sensor sees
them: the number that a data set gives a row may be the order in which it fires. Nothing is drawn here: the caller says the
phase.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

Mode = Literal["rows", "angle"]
_SHORT_ROW = 100  # fewer points than any turn of a spinning LiDAR gives


def spherical(points: np.ndarray) -> np.ndarray:
    """(N, 3) points in the frame of the sensor, meters -> (N, 3) float64 range in meters, inclination above the horizon and
    azimuth from +x to +y in degrees."""
    x, y, z = np.asarray(points, dtype=np.float64)[:, :3].T
    flat = np.hypot(x, y)
    return np.stack([np.hypot(flat, z), np.degrees(np.arctan2(z, flat)), np.degrees(np.arctan2(y, x))], 1)


def density(beams: int, low: float, up: float) -> float:
    """Beams per degree of a field of view from ``low`` to ``up`` degrees. Raises ValueError if there is none."""
    if beams < 1 or not low < up:
        raise ValueError(
            f"{beams} beams from {low} to {up} degrees: need at least one, and a field of view from below to above"
        )
    return beams / (up - low)


def _kept_count(rows: int, ratio: float) -> int:
    if not ratio > 0:
        raise ValueError(f"ratio of beams is {ratio}, must be positive")
    return min(rows, max(1, int(np.floor(rows * ratio + 0.5))))


def kept_ranks(rows: int, ratio: float, phase: float = 0.0) -> np.ndarray:
    """Every (1 / ratio)-th of ``rows`` rows, counted from below.

    Args:
        ratio: share to keep; 1 and more keeps all.
        phase: 0 to below 1, where within the first stride the first row lies.
    """
    if not 0 <= phase < 1:
        raise ValueError(f"phase is {phase}, must be from 0 to below 1")
    count = _kept_count(rows, ratio)
    return np.floor((np.arange(count) + phase) * rows / count).astype(np.int64)


def kept_by_angle(inclinations: np.ndarray, ratio: float) -> np.ndarray:
    """Ranks of the rows nearest to angles that divide the field of view evenly, from the lowest row to the highest: uniform in
    inclination also where a sensor's rows are not. Where two angles have the same nearest row, fewer are kept.

    Args:
        inclinations: (rows,) ascending, degrees.
    """
    count = _kept_count(len(inclinations), ratio)
    wanted = np.linspace(inclinations[0], inclinations[-1], count)
    return np.unique(np.abs(wanted[:, None] - inclinations).argmin(1))


def resample_beams(
    points: np.ndarray,
    rows: np.ndarray,
    ratio: float,
    mode: Mode = "rows",
    phase: float = 0.0,
    lidar: np.ndarray | None = None,
    origins: np.ndarray | None = None,
) -> np.ndarray:
    """Which points of a sweep stay; each LiDAR is thinned by itself, seen from its own origin.

    Args:
        points: (N, 3 or more) meters.
        rows: (N,) integers, the row of each point, in any numbering that is unique within its LiDAR.
        ratio: share of rows to keep; 1 and more keeps all.
        mode: ``rows`` (every n-th) or ``angle`` (evenly in inclination; the phase has no part in it).
        phase: of mode ``rows``.
        lidar: (N,) integers, which of several LiDARs a point is from. None: one.
        origins: (L, 3) of LiDARs 0 to L - 1 in the frame of the points. None: all at zero.

    Returns:
        (N,) bool. Points that are not finite do not stay.

    Raises:
        ValueError: another mode, a ratio or phase out of range, or shapes that do not fit.
    """
    if mode not in ("rows", "angle"):
        raise ValueError(f"mode of beams is {mode!r}, must be rows or angle")
    lidar = np.zeros(len(points), dtype=np.int64) if lidar is None else np.asarray(lidar)
    if len(rows) != len(points) or len(lidar) != len(points):
        raise ValueError(
            f"{len(points)} points have {len(rows)} rows and {len(lidar)} LiDARs; need one of each per point"
        )
    _kept_count(1, ratio)
    kept_ranks(1, 1.0, phase)
    finite = np.isfinite(points[:, :3]).all(1)
    if ratio >= 1:
        return finite
    stay = np.zeros(len(points), dtype=bool)
    for number in np.unique(lidar[finite]):
        own = np.flatnonzero(finite & (lidar == number))
        origin = np.zeros(3) if origins is None else np.asarray(origins, dtype=np.float64)[number]
        names, place = np.unique(np.asarray(rows)[own], return_inverse=True)
        inclination = spherical(points[own, :3].astype(np.float64) - origin)[:, 1]
        medians = np.array([np.median(inclination[place == i]) for i in range(len(names))])
        order = np.argsort(medians, kind="stable")
        ranks = kept_ranks(len(names), ratio, phase) if mode == "rows" else kept_by_angle(medians[order], ratio)
        chosen = np.zeros(len(names), dtype=bool)
        chosen[order[ranks]] = True
        stay[own] = chosen[place]
    return stay


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
    _, inclination, azimuth = spherical(points).T
    starts = [0]
    for at in np.flatnonzero((azimuth[:-1] < 0) & (azimuth[1:] >= 0)) + 1:
        if at - starts[-1] >= _SHORT_ROW:
            starts.append(at)
    if len(starts) > 1 and len(points) - starts[-1] < _SHORT_ROW:
        starts.pop()
    if beams - 4 <= len(starts) <= beams:
        return np.searchsorted(starts, np.arange(len(points)), side="right") - 1
    low, up = inclination.min(), inclination.max()
    return np.minimum((inclination - low) / max(up - low, 1e-9) * beams, beams - 1).astype(np.int64)
