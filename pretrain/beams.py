"""Beam re-sampling: sweeps as a LiDAR of fewer beams would take them (SPOT, Sec. 3.3.3).

A sensor's density is its number of beams over its vertical field of view; the ratio of densities, downstream over
pre-training, says which share of the rows is kept. Rows are counted from below, by the inclination at which a sensor sees
them: the number that a data set gives a row may be the order in which it fires. Nothing is drawn here: the caller says the
phase.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

from occstream.sharding.scanrows import spherical

Mode = Literal["rows", "angle"]


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
    *,
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
    finite = np.logical_and.reduce(np.isfinite(points[:, :3]), axis=1)
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
