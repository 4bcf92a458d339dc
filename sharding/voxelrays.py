"""Points, boxes and rays in a voxel grid, compiled with numba. Rays walk as Amanatides and Woo described; their positions
are in voxel units from the lower corner."""

from __future__ import annotations

import numba
import numpy as np

TINY = 1e-12  # instead of a direction's component of 0: it never reaches its next face


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
def mark_free(passed, xyz, pose):
    """Marks the voxels that rays from a sensor to its returns pass before the voxel they end in (which is not marked).

    Args:
        passed: (X, Y, Z) bool, set in place.
        xyz: (N, 3) float32, returns in the sensor's axes.
        pose: (3, 4) float64, sensor -> voxel units.
    """
    nx, ny, nz = passed.shape
    ox, oy, oz = pose[0, 3], pose[1, 3], pose[2, 3]
    for n in range(len(xyz)):
        px, py, pz = np.float64(xyz[n, 0]), np.float64(xyz[n, 1]), np.float64(xyz[n, 2])
        dx = pose[0, 0] * px + pose[0, 1] * py + pose[0, 2] * pz
        dy = pose[1, 0] * px + pose[1, 1] * py + pose[1, 2] * pz
        dz = pose[2, 0] * px + pose[2, 1] * py + pose[2, 2] * pz
        dx = dx if abs(dx) > TINY else TINY
        dy = dy if abs(dy) > TINY else TINY
        dz = dz if abs(dz) > TINY else TINY
        ix, iy, iz = 1.0 / dx, 1.0 / dy, 1.0 / dz
        # Where the ray is inside the grid: t of the nearer and the further face of each axis.
        near = max(0.0, min(-ox * ix, (nx - ox) * ix), min(-oy * iy, (ny - oy) * iy), min(-oz * iz, (nz - oz) * iz))
        far = min(1.0, max(-ox * ix, (nx - ox) * ix), max(-oy * iy, (ny - oy) * iy), max(-oz * iz, (nz - oz) * iz))
        if near >= far:
            continue
        x = min(max(int(np.floor(ox + near * dx)), 0), nx - 1)
        y = min(max(int(np.floor(oy + near * dy)), 0), ny - 1)
        z = min(max(int(np.floor(oz + near * dz)), 0), nz - 1)
        last_x, last_y, last_z = int(np.floor(ox + dx)), int(np.floor(oy + dy)), int(np.floor(oz + dz))
        sx, sy, sz = 1 if dx > 0 else -1, 1 if dy > 0 else -1, 1 if dz > 0 else -1
        tx = (x + (sx > 0) - ox) * ix
        ty = (y + (sy > 0) - oy) * iy
        tz = (z + (sz > 0) - oz) * iz
        ax, ay, az = abs(ix), abs(iy), abs(iz)
        while not (x == last_x and y == last_y and z == last_z):
            passed[x, y, z] = True
            if tx <= ty and tx <= tz:
                if tx > 1.0:
                    break
                x += sx
                tx += ax
                if x < 0 or x >= nx:
                    break
            elif ty <= tz:
                if ty > 1.0:
                    break
                y += sy
                ty += ay
                if y < 0 or y >= ny:
                    break
            else:
                if tz > 1.0:
                    break
                z += sz
                tz += az
                if z < 0 or z >= nz:
                    break


@numba.njit(cache=True, nogil=True)
def crossings(solid, origin, ends, slack):
    """What rays meet before their ends.

    Args:
        solid: (X, Y, Z) bool.
        origin: (3,) float64.
        ends: (N, 3) float64.
        slack: voxels; the last part of each ray, of this length, is not looked at.

    Returns:
        (N, 2) int64: voxels passed, and solid ones among them.
    """
    shape = np.array(solid.shape)
    out = np.zeros((len(ends), 2), np.int64)
    cell, step = np.zeros(3, np.int64), np.zeros(3, np.int64)
    t_next, t_step = np.zeros(3), np.zeros(3)
    for i in range(len(ends)):
        direction = ends[i] - origin
        limit = 1.0 - slack / max(np.sqrt((direction**2).sum()), 1e-9)
        near, far, _ = _enter(origin, direction, shape, limit)
        if near > far:
            continue
        _start(origin, direction, shape, near, cell, step, t_next, t_step)
        while True:
            out[i, 0] += 1
            out[i, 1] += solid[cell[0], cell[1], cell[2]]
            axis = 0 if t_next[0] <= t_next[1] else 1
            if t_next[2] < t_next[axis]:
                axis = 2
            if t_next[axis] > limit:
                break
            cell[axis] += step[axis]
            t_next[axis] += t_step[axis]
            if cell[axis] < 0 or cell[axis] >= shape[axis]:
                break
    return out


@numba.njit(cache=True, nogil=True)
def _look(solid, seen, ox, oy, oz, ex, ey, ez):
    """Marks the voxels from one point to another, up to the first solid one."""
    nx, ny, nz = solid.shape
    dx, dy, dz = ex - ox, ey - oy, ez - oz
    dx = dx if abs(dx) > TINY else TINY
    dy = dy if abs(dy) > TINY else TINY
    dz = dz if abs(dz) > TINY else TINY
    ix, iy, iz = 1.0 / dx, 1.0 / dy, 1.0 / dz
    near = max(0.0, min(-ox * ix, (nx - ox) * ix), min(-oy * iy, (ny - oy) * iy), min(-oz * iz, (nz - oz) * iz))
    x = min(max(int(np.floor(ox + near * dx)), 0), nx - 1)
    y = min(max(int(np.floor(oy + near * dy)), 0), ny - 1)
    z = min(max(int(np.floor(oz + near * dz)), 0), nz - 1)
    sx, sy, sz = 1 if dx > 0 else -1, 1 if dy > 0 else -1, 1 if dz > 0 else -1
    tx = (x + (sx > 0) - ox) * ix
    ty = (y + (sy > 0) - oy) * iy
    tz = (z + (sz > 0) - oz) * iz
    ax, ay, az = abs(ix), abs(iy), abs(iz)
    while True:
        seen[x, y, z] = True
        if solid[x, y, z]:
            return
        if tx <= ty and tx <= tz:
            if tx > 1.0:
                return
            x += sx
            tx += ax
            if x < 0 or x >= nx:
                return
        elif ty <= tz:
            if ty > 1.0:
                return
            y += sy
            ty += ay
            if y < 0 or y >= ny:
                return
        else:
            if tz > 1.0:
                return
            z += sz
            tz += az
            if z < 0 or z >= nz:
                return


@numba.njit(cache=True, nogil=True)
def mark_visible(solid, wanted, seen, origin, to_camera, intrinsics, width, height):
    """Marks what a camera sees: on the way to every voxel centre in its image, all voxels up to the first solid one.

    Args:
        solid: (X, Y, Z) bool.
        wanted: (X, Y, Z) bool: of other voxels it does not matter whether they are marked.
        seen: (X, Y, Z) bool, set in place.
        origin: (3,) float64 of the camera.
        to_camera: (3, 4) float64: position in voxel units -> camera axes, metres.
        intrinsics: (3, 3) float64 pixels.
        width, height: of the image.
    """
    shape = solid.shape
    # Rays to the outside of the grid pass nearly everything; few of the inner voxels then need one of their own.
    for inner in range(2):
        for i in range(shape[0]):
            for j in range(shape[1]):
                for k in range(shape[2]):
                    edge = i == 0 or j == 0 or k == 0 or i == shape[0] - 1 or j == shape[1] - 1 or k == shape[2] - 1
                    if edge == (inner == 1) or seen[i, j, k] or (inner == 1 and not wanted[i, j, k]):
                        continue
                    a, b, c = i + 0.5, j + 0.5, k + 0.5
                    z = to_camera[2, 0] * a + to_camera[2, 1] * b + to_camera[2, 2] * c + to_camera[2, 3]
                    if z <= 0.1:
                        continue
                    x = (to_camera[0, 0] * a + to_camera[0, 1] * b + to_camera[0, 2] * c + to_camera[0, 3]) / z
                    y = (to_camera[1, 0] * a + to_camera[1, 1] * b + to_camera[1, 2] * c + to_camera[1, 3]) / z
                    u = intrinsics[0, 0] * x + intrinsics[0, 1] * y + intrinsics[0, 2]
                    v = intrinsics[1, 0] * x + intrinsics[1, 1] * y + intrinsics[1, 2]
                    if u <= -0.5 or u >= width - 0.5 or v <= -0.5 or v >= height - 0.5:
                        continue
                    _look(solid, seen, origin[0], origin[1], origin[2], a, b, c)


@numba.njit(cache=True, nogil=True)
def place_returns(xyz, to_ego, to_scene, low, high, reach):
    """Moves a sweep's returns, and tells which can be used.

    Args:
        xyz: (N, 3) float32 in the sensor's axes.
        to_ego, to_scene: (3, 4) float64.
        low, high: (3,) float64 corners of the vehicle itself in its frame; returns within are not used.
        reach: metres; returns further away are not used. 0: all are.

    Returns:
        (M, 3) float32 in the scene's axes, of those that are used; (N,) bool which.
    """
    keep = np.zeros(len(xyz), np.bool_)
    out = np.empty((len(xyz), 3), np.float32)
    m = 0
    for n in range(len(xyz)):
        x, y, z = np.float64(xyz[n, 0]), np.float64(xyz[n, 1]), np.float64(xyz[n, 2])
        if not (np.isfinite(x) and np.isfinite(y) and np.isfinite(z)):
            continue
        if reach > 0 and x * x + y * y + z * z > reach * reach:
            continue
        inside = True
        for a in range(3):
            e = to_ego[a, 0] * x + to_ego[a, 1] * y + to_ego[a, 2] * z + to_ego[a, 3]
            inside = inside and low[a] < e < high[a]
        if inside:
            continue
        for a in range(3):
            out[m, a] = to_scene[a, 0] * x + to_scene[a, 1] * y + to_scene[a, 2] * z + to_scene[a, 3]
        keep[n] = True
        m += 1
    return out[:m], keep


@numba.njit(cache=True, nogil=True)
def count_points(xyz, classes, pose, lower, voxel, counts, votes):
    """Counts points by voxel, and their classes where ``votes`` has room.

    Args:
        xyz: (N, 3) float32.
        classes: (N,) uint8; ids beyond ``votes`` do not vote.
        pose: (3, 4) float64, points -> metres of the grid.
        lower, voxel: (3,) float64 of the grid.
        counts: (X, Y, Z) uint16, saturating, in place.
        votes: (X, Y, Z, K) uint16, saturating, in place; K may be 0.
    """
    nx, ny, nz = counts.shape
    kinds = votes.shape[3]
    for n in range(len(xyz)):
        px, py, pz = xyz[n, 0], xyz[n, 1], xyz[n, 2]
        x = (pose[0, 0] * px + pose[0, 1] * py + pose[0, 2] * pz + pose[0, 3] - lower[0]) / voxel[0]
        y = (pose[1, 0] * px + pose[1, 1] * py + pose[1, 2] * pz + pose[1, 3] - lower[1]) / voxel[1]
        z = (pose[2, 0] * px + pose[2, 1] * py + pose[2, 2] * pz + pose[2, 3] - lower[2]) / voxel[2]
        if x < 0 or y < 0 or z < 0 or x >= nx or y >= ny or z >= nz:
            continue
        i, j, k = int(x), int(y), int(z)
        if counts[i, j, k] < 65535:
            counts[i, j, k] += 1
        kind = classes[n]
        if kind < kinds and votes[i, j, k, kind] < 65535:
            votes[i, j, k, kind] += 1


@numba.njit(cache=True, nogil=True)
def first_box(points, into_box, half):
    """The first box that holds each point.

    Args:
        points: (N, 3) float32.
        into_box: (B, 3, 4) float64, points -> axes of a box from its centre.
        half: (B, 3) float64.

    Returns:
        (N,) int32 number of the box, -1: none.
    """
    found = np.full(len(points), -1, np.int32)
    for n in range(len(points)):
        x, y, z = points[n, 0], points[n, 1], points[n, 2]
        for b in range(len(half)):
            m = into_box[b]
            if (
                abs(m[0, 0] * x + m[0, 1] * y + m[0, 2] * z + m[0, 3]) <= half[b, 0]
                and abs(m[1, 0] * x + m[1, 1] * y + m[1, 2] * z + m[1, 3]) <= half[b, 1]
                and abs(m[2, 0] * x + m[2, 1] * y + m[2, 2] * z + m[2, 3]) <= half[b, 2]
            ):
                found[n] = b
                break
    return found
