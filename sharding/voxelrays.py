"""Points, boxes and rays in a voxel grid, compiled with numba. Rays walk as Amanatides and Woo described; their positions
are in voxel units from the lower corner."""

from __future__ import annotations

import numba
import numpy as np

At = tuple[int, int, int]  # a voxel, or a whole number on each axis
Along = tuple[float, float, float]  # a value on each axis
TINY = 1e-12  # instead of a direction's component of 0: it never reaches its next face


@numba.njit(cache=True, nogil=True)
def _begin(
    ox: float, oy: float, oz: float, dx: float, dy: float, dz: float, shape: tuple[int, ...], limit: float
) -> tuple[bool, int, At, Along, At, Along]:
    """The start of a walk along origin + t * direction, 0 <= t <= limit.

    Returns:
        inside: whether the ray enters the grid at all.
        axis: of the face it enters by, -1 if it begins inside.
        at, turn: voxel, and t of its next face on each axis; what ``_advance`` moves.
        step, pace: direction and distance in t of the faces on each axis; what it needs for that.
    """
    nx, ny, nz = shape
    dx = dx if abs(dx) > TINY else TINY
    dy = dy if abs(dy) > TINY else TINY
    dz = dz if abs(dz) > TINY else TINY
    ix, iy, iz = 1.0 / dx, 1.0 / dy, 1.0 / dz
    near_x, near_y, near_z = min(-ox * ix, (nx - ox) * ix), min(-oy * iy, (ny - oy) * iy), min(-oz * iz, (nz - oz) * iz)
    far = min(max(-ox * ix, (nx - ox) * ix), max(-oy * iy, (ny - oy) * iy), max(-oz * iz, (nz - oz) * iz), limit)
    near, axis = 0.0, -1
    if near_x > near:
        near, axis = near_x, 0
    if near_y > near:
        near, axis = near_y, 1
    if near_z > near:
        near, axis = near_z, 2
    x = min(max(int(np.floor(ox + near * dx)), 0), nx - 1)
    y = min(max(int(np.floor(oy + near * dy)), 0), ny - 1)
    z = min(max(int(np.floor(oz + near * dz)), 0), nz - 1)
    step = 1 if dx > 0 else -1, 1 if dy > 0 else -1, 1 if dz > 0 else -1
    turn = (x + (dx > 0) - ox) * ix, (y + (dy > 0) - oy) * iy, (z + (dz > 0) - oz) * iz
    return near < far, axis, (x, y, z), turn, step, (abs(ix), abs(iy), abs(iz))


@numba.njit(cache=True, nogil=True)
def _advance(at: At, turn: Along, step: At, pace: Along) -> tuple[float, int, At, Along]:
    """(t, axis, at, turn): where the walk leaves a voxel, by which axis, and the next voxel."""
    x, y, z = at
    tx, ty, tz = turn
    if tx <= ty and tx <= tz:
        return tx, 0, (x + step[0], y, z), (tx + pace[0], ty, tz)
    if ty <= tz:
        return ty, 1, (x, y + step[1], z), (tx, ty + pace[1], tz)
    return tz, 2, (x, y, z + step[2]), (tx, ty, tz + pace[2])


@numba.njit(cache=True, nogil=True)
def _within(at: At, shape: tuple[int, ...]) -> bool:
    return 0 <= at[0] < shape[0] and 0 <= at[1] < shape[1] and 0 <= at[2] < shape[2]


@numba.njit(cache=True, nogil=True)
def first_hit(solid: np.ndarray, origins: np.ndarray, directions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """First solid voxel on each ray.

    Args:
        solid: (X, Y, Z) bool.
        origins: (N, 3) float64.
        directions: (N, 3) float64, any length.

    Returns:
        voxel: (N,) int64 flat index in C order, -1 where nothing is hit.
        axis: (N,) int8, 0..2: the axis whose face was entered, -1 where the ray began in the voxel.
    """
    shape = solid.shape
    voxel, faces = np.full(len(origins), -1), np.full(len(origins), -1, np.int8)
    for i in range(len(origins)):
        o, d = origins[i], directions[i]
        inside, axis, at, turn, step, pace = _begin(o[0], o[1], o[2], d[0], d[1], d[2], shape, np.inf)
        while inside:
            if solid[at]:
                voxel[i] = (at[0] * shape[1] + at[1]) * shape[2] + at[2]
                faces[i] = axis
                break
            _, axis, at, turn = _advance(at, turn, step, pace)
            inside = _within(at, shape)
    return voxel, faces


@numba.njit(cache=True, nogil=True)
def mark_free(passed: np.ndarray, xyz: np.ndarray, pose: np.ndarray) -> None:
    """Marks the voxels that rays from a sensor to its returns pass before the voxel they end in (which is not marked).

    Args:
        passed: (X, Y, Z) bool, set in place.
        xyz: (N, 3) float32, returns in the sensor's axes.
        pose: (3, 4) float64, sensor -> voxel units.
    """
    shape = passed.shape
    ox, oy, oz = pose[0, 3], pose[1, 3], pose[2, 3]
    for n in range(len(xyz)):
        px, py, pz = np.float64(xyz[n, 0]), np.float64(xyz[n, 1]), np.float64(xyz[n, 2])
        dx = pose[0, 0] * px + pose[0, 1] * py + pose[0, 2] * pz
        dy = pose[1, 0] * px + pose[1, 1] * py + pose[1, 2] * pz
        dz = pose[2, 0] * px + pose[2, 1] * py + pose[2, 2] * pz
        last = int(np.floor(ox + dx)), int(np.floor(oy + dy)), int(np.floor(oz + dz))
        inside, _, at, turn, step, pace = _begin(ox, oy, oz, dx, dy, dz, shape, 1.0)
        while inside and at != last:
            passed[at] = True
            t, _, at, turn = _advance(at, turn, step, pace)
            inside = t <= 1.0 and _within(at, shape)


@numba.njit(cache=True, nogil=True)
def crossings(solid: np.ndarray, origin: np.ndarray, ends: np.ndarray, slack: float) -> np.ndarray:
    """What rays meet before their ends.

    Args:
        solid: (X, Y, Z) bool.
        origin: (3,) float64.
        ends: (N, 3) float64.
        slack: voxels; the last part of each ray, of this length, is not looked at.

    Returns:
        (N, 2) int64: voxels passed, and solid ones among them.
    """
    shape = solid.shape
    out = np.zeros((len(ends), 2), np.int64)
    for i in range(len(ends)):
        dx, dy, dz = ends[i, 0] - origin[0], ends[i, 1] - origin[1], ends[i, 2] - origin[2]
        limit = 1.0 - slack / max(np.sqrt(dx * dx + dy * dy + dz * dz), 1e-9)
        inside, _, at, turn, step, pace = _begin(origin[0], origin[1], origin[2], dx, dy, dz, shape, limit)
        while inside:
            out[i, 0] += 1
            out[i, 1] += solid[at]
            t, _, at, turn = _advance(at, turn, step, pace)
            inside = t <= limit and _within(at, shape)
    return out


@numba.njit(cache=True, nogil=True)
def _look(solid: np.ndarray, seen: np.ndarray, origin: np.ndarray, a: float, b: float, c: float) -> None:
    """Marks the voxels from one point to another, up to the first solid one."""
    shape = solid.shape
    ox, oy, oz = origin[0], origin[1], origin[2]
    inside, _, at, turn, step, pace = _begin(ox, oy, oz, a - ox, b - oy, c - oz, shape, 1.0)
    while inside:
        seen[at] = True
        if solid[at]:
            return
        t, _, at, turn = _advance(at, turn, step, pace)
        inside = t <= 1.0 and _within(at, shape)


@numba.njit(cache=True, nogil=True)
def mark_visible(
    solid: np.ndarray,
    wanted: np.ndarray,
    seen: np.ndarray,
    origin: np.ndarray,
    to_camera: np.ndarray,
    intrinsics: np.ndarray,
    width: int,
    height: int,
) -> None:
    """Marks what a camera sees: on the way to every voxel center in its image, all voxels up to the first solid one.

    Args:
        solid: (X, Y, Z) bool.
        wanted: (X, Y, Z) bool: of other voxels it does not matter whether they are marked.
        seen: (X, Y, Z) bool, set in place.
        origin: (3,) float64 of the camera.
        to_camera: (3, 4) float64: position in voxel units -> camera axes, meters.
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
                    if not z > 0.1:
                        continue
                    x = (to_camera[0, 0] * a + to_camera[0, 1] * b + to_camera[0, 2] * c + to_camera[0, 3]) / z
                    y = (to_camera[1, 0] * a + to_camera[1, 1] * b + to_camera[1, 2] * c + to_camera[1, 3]) / z
                    u = intrinsics[0, 0] * x + intrinsics[0, 1] * y + intrinsics[0, 2]
                    v = intrinsics[1, 0] * x + intrinsics[1, 1] * y + intrinsics[1, 2]
                    if not (-0.5 < u < width - 0.5 and -0.5 < v < height - 0.5):
                        continue
                    _look(solid, seen, origin, a, b, c)


@numba.njit(cache=True, nogil=True)
def place_returns(
    xyz: np.ndarray, to_ego: np.ndarray, to_scene: np.ndarray, low: np.ndarray, high: np.ndarray, reach: float
) -> tuple[np.ndarray, np.ndarray]:
    """Moves a sweep's returns, and tells which can be used.

    Args:
        xyz: (N, 3) float32 in the sensor's axes.
        to_ego, to_scene: (3, 4) float64.
        low, high: (3,) float64 corners of the vehicle itself in its frame; returns within are not used.
        reach: meters; returns further away are not used. 0: all are.

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
        if not (reach <= 0 or x * x + y * y + z * z <= reach * reach):
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
def count_points(
    xyz: np.ndarray,
    classes: np.ndarray,
    pose: np.ndarray,
    lower: np.ndarray,
    voxel: np.ndarray,
    counts: np.ndarray,
    votes: np.ndarray,
) -> None:
    """Counts points by voxel, and their classes where ``votes`` has room.

    Args:
        xyz: (N, 3) float32.
        classes: (N,) uint8; ids beyond ``votes`` do not vote.
        pose: (3, 4) float64, points -> meters of the grid.
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
        if not (0 <= x < nx and 0 <= y < ny and 0 <= z < nz):  # never "x < 0 or …": NaN would pass
            continue
        i, j, k = int(x), int(y), int(z)
        if counts[i, j, k] < 65535:
            counts[i, j, k] += 1
        kind = classes[n]
        if kind < kinds and votes[i, j, k, kind] < 65535:
            votes[i, j, k, kind] += 1


@numba.njit(cache=True, nogil=True)
def first_box(points: np.ndarray, into_box: np.ndarray, half: np.ndarray) -> np.ndarray:
    """The first box that holds each point.

    Args:
        points: (N, 3) float32.
        into_box: (B, 3, 4) float64, points -> axes of a box from its center.
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
