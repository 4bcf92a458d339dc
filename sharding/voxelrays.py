"""Rays through a voxel grid (Amanatides and Woo), compiled with numba; positions in voxel units from the lower corner."""

from __future__ import annotations

import numba
import numpy as np


@numba.njit(cache=True, nogil=True)
def _enter(origin, direction, shape, limit):
    """Parameter range [near, far] of a ray inside the box; near > far if it misses."""
    near, far, axis = 0.0, limit, -1
    for a in range(3):
        if direction[a] == 0.0:
            if origin[a] < 0.0 or origin[a] >= shape[a]:
                return 1.0, 0.0, -1
        else:
            t0 = -origin[a] / direction[a]
            t1 = (shape[a] - origin[a]) / direction[a]
            if t0 > t1:
                t0, t1 = t1, t0
            if t0 > near:
                near, axis = t0, a
            far = min(far, t1)
    return near, far, axis


@numba.njit(cache=True, nogil=True)
def _start(origin, direction, shape, near, cell, step, t_next, t_step):
    for a in range(3):
        at = origin[a] + near * direction[a]
        cell[a] = min(max(int(np.floor(at)), 0), shape[a] - 1)
        if direction[a] > 0.0:
            step[a], t_step[a] = 1, 1.0 / direction[a]
            t_next[a] = (cell[a] + 1 - origin[a]) / direction[a]
        elif direction[a] < 0.0:
            step[a], t_step[a] = -1, -1.0 / direction[a]
            t_next[a] = (cell[a] - origin[a]) / direction[a]
        else:
            step[a], t_step[a], t_next[a] = 0, np.inf, np.inf


@numba.njit(cache=True, nogil=True)
def first_hit(solid, origins, directions):
    """First solid voxel on each ray.

    Args:
        solid: (X, Y, Z) bool.
        origins: (N, 3) float64.
        directions: (N, 3) float64, any length.

    Returns:
        voxel: (N,) int64 flat index in C order, -1 where nothing is hit.
        axis: (N,) int8, 0..2: the axis whose face was entered, -1 where the ray began in the voxel.
    """
    shape = np.array(solid.shape)
    voxel, faces = np.full(len(origins), -1), np.full(len(origins), -1, np.int8)
    cell, step = np.zeros(3, np.int64), np.zeros(3, np.int64)
    t_next, t_step = np.zeros(3), np.zeros(3)
    for i in range(len(origins)):
        near, far, axis = _enter(origins[i], directions[i], shape, np.inf)
        if near > far:
            continue
        _start(origins[i], directions[i], shape, near, cell, step, t_next, t_step)
        while True:
            if solid[cell[0], cell[1], cell[2]]:
                voxel[i] = (cell[0] * shape[1] + cell[1]) * shape[2] + cell[2]
                faces[i] = axis
                break
            axis = 0 if t_next[0] <= t_next[1] else 1
            if t_next[2] < t_next[axis]:
                axis = 2
            cell[axis] += step[axis]
            t_next[axis] += t_step[axis]
            if cell[axis] < 0 or cell[axis] >= shape[axis]:
                break
    return voxel, faces


@numba.njit(cache=True, nogil=True)
def mark_free(seen, origins, ends):
    """Counts, for each voxel, the rays that pass through it before the voxel they end in (which is not counted).

    Args:
        seen: (X, Y, Z) uint16, counted up in place, saturating.
        origins, ends: (N, 3) float64.
    """
    shape = np.array(seen.shape)
    cell, step = np.zeros(3, np.int64), np.zeros(3, np.int64)
    t_next, t_step = np.zeros(3), np.zeros(3)
    for i in range(len(origins)):
        direction = ends[i] - origins[i]
        near, far, _ = _enter(origins[i], direction, shape, 1.0)
        if near > far:
            continue
        _start(origins[i], direction, shape, near, cell, step, t_next, t_step)
        last = (int(np.floor(ends[i][0])), int(np.floor(ends[i][1])), int(np.floor(ends[i][2])))
        while not (cell[0] == last[0] and cell[1] == last[1] and cell[2] == last[2]):
            if seen[cell[0], cell[1], cell[2]] < 65535:
                seen[cell[0], cell[1], cell[2]] += 1
            axis = 0 if t_next[0] <= t_next[1] else 1
            if t_next[2] < t_next[axis]:
                axis = 2
            if t_next[axis] > 1.0:
                break
            cell[axis] += step[axis]
            t_next[axis] += t_step[axis]
            if cell[axis] < 0 or cell[axis] >= shape[axis]:
                break


@numba.njit(cache=True, nogil=True)
def visible_from(solid, seen, origin, targets):
    """Marks voxels whose centre can be seen from a point: all voxels on the way up to and including the first solid one.

    Args:
        solid: (X, Y, Z) bool.
        seen: (X, Y, Z) bool, set in place.
        origin: (3,) float64.
        targets: (N, 3) float64, points to look at; a ray ends there.
    """
    shape = np.array(solid.shape)
    cell, step = np.zeros(3, np.int64), np.zeros(3, np.int64)
    t_next, t_step = np.zeros(3), np.zeros(3)
    for i in range(len(targets)):
        direction = targets[i] - origin
        near, far, _ = _enter(origin, direction, shape, 1.0)
        if near > far:
            continue
        _start(origin, direction, shape, near, cell, step, t_next, t_step)
        while True:
            seen[cell[0], cell[1], cell[2]] = True
            if solid[cell[0], cell[1], cell[2]]:
                break
            axis = 0 if t_next[0] <= t_next[1] else 1
            if t_next[2] < t_next[axis]:
                axis = 2
            if t_next[axis] > 1.0:
                break
            cell[axis] += step[axis]
            t_next[axis] += t_step[axis]
            if cell[axis] < 0 or cell[axis] >= shape[axis]:
                break
