"""Compiled kernels of the synthetic source: ray casting, shading and exact voxel labels of analytic solids.

A solid is one row of ``solids`` (float64): KIND, center x y z, half sizes x y z in its own frame, cos and sin of its yaw.
Solids are binned in a 2-D grid that rays walk through; the ground is a height raster.
"""

from __future__ import annotations

import numba
import numpy as np

from occstream.sharding.exactmath import decay

KIND, CX, CY, CZ, HX, HY, HZ, COS, SIN = range(9)
BOX, ELLIPSOID, CYLINDER, CONE = 0.0, 1.0, 2.0, 3.0
PLAIN, FACADE, FOLIAGE, VEHICLE, STRIPES, ROUGH = range(6)
GROUND, NOTHING = -2, -1


@numba.njit(cache=True, nogil=True)
def bin_solids(
    solids: np.ndarray, x0: float, y0: float, cell: float, nx: int, ny: int
) -> tuple[np.ndarray, np.ndarray]:
    """CSR lists of the solids that touch each cell of the 2-D grid: ``starts`` (nx * ny + 1,), ``items``."""
    count = np.zeros(nx * ny + 1, np.int64)
    bounds = np.zeros((len(solids), 4), np.int64)
    for i in range(len(solids)):
        s = solids[i]
        rx = abs(s[COS]) * s[HX] + abs(s[SIN]) * s[HY]
        ry = abs(s[SIN]) * s[HX] + abs(s[COS]) * s[HY]
        bounds[i, 0] = max(0, int(np.floor((s[CX] - rx - x0) / cell)))
        bounds[i, 1] = min(nx - 1, int(np.floor((s[CX] + rx - x0) / cell)))
        bounds[i, 2] = max(0, int(np.floor((s[CY] - ry - y0) / cell)))
        bounds[i, 3] = min(ny - 1, int(np.floor((s[CY] + ry - y0) / cell)))
        for a in range(bounds[i, 0], bounds[i, 1] + 1):
            for b in range(bounds[i, 2], bounds[i, 3] + 1):
                count[a * ny + b + 1] += 1
    starts = np.cumsum(count)
    items, fill = np.zeros(starts[-1], np.int64), starts[:-1].copy()
    for i in range(len(solids)):
        for a in range(bounds[i, 0], bounds[i, 1] + 1):
            for b in range(bounds[i, 2], bounds[i, 3] + 1):
                items[fill[a * ny + b]] = i
                fill[a * ny + b] += 1
    return starts, items


@numba.njit(cache=True, nogil=True)
def ground_height(height: np.ndarray, x0: float, y0: float, cell: float, x: float, y: float) -> float:
    """Bilinear height at a point; the raster is extended at its border."""
    u, v = (x - x0) / cell - 0.5, (y - y0) / cell - 0.5
    u, v = u if u > 0.0 else 0.0, v if v > 0.0 else 0.0  # NaN becomes 0: it must not become an index
    u, v = min(u, height.shape[0] - 1.001), min(v, height.shape[1] - 1.001)
    i, j = int(u), int(v)
    a, b = u - i, v - j
    low = height[i, j] * (1 - b) + height[i, j + 1] * b
    return low * (1 - a) + (height[i + 1, j] * (1 - b) + height[i + 1, j + 1] * b) * a


@numba.njit(cache=True, nogil=True)
def _intersect(
    s: np.ndarray, ox: float, oy: float, oz: float, dx: float, dy: float, dz: float, limit: float, out: np.ndarray
) -> float:
    """Nearest entry of a ray into a solid before ``limit``; writes normal (world) and hit point (own frame) to ``out``."""
    px, py, pz = ox - s[CX], oy - s[CY], oz - s[CZ]
    lx, ly = s[COS] * px + s[SIN] * py, -s[SIN] * px + s[COS] * py
    vx, vy = s[COS] * dx + s[SIN] * dy, -s[SIN] * dx + s[COS] * dy
    near, far = 1e-3, limit
    nx, ny, nz = 0.0, 0.0, 1.0
    kind = s[KIND]
    if kind == ELLIPSOID:
        qx, qy, qz = lx / s[HX], ly / s[HY], pz / s[HZ]
        wx, wy, wz = vx / s[HX], vy / s[HY], dz / s[HZ]
        a, b, c = wx * wx + wy * wy + wz * wz, qx * wx + qy * wy + qz * wz, qx * qx + qy * qy + qz * qz - 1
        disc = b * b - a * c
        if disc <= 0:
            return -1.0
        t = (-b - np.sqrt(disc)) / a
        if t < near or t > far:
            return -1.0
        nx, ny, nz = (lx + t * vx) / s[HX] ** 2, (ly + t * vy) / s[HY] ** 2, (pz + t * dz) / s[HZ] ** 2
        near = t
    else:
        # Slabs: all three for a box, z alone for cylinder and cone.
        axes = 3 if kind == BOX else 1
        for n in range(axes):
            axis = 2 - n
            p = pz if axis == 2 else (ly if axis == 1 else lx)
            v = dz if axis == 2 else (vy if axis == 1 else vx)
            h = s[HX + axis]
            if abs(v) < 1e-12:
                if abs(p) > h:
                    return -1.0
                continue
            t0, t1 = (-h - p) / v, (h - p) / v
            sign = -1.0
            if t0 > t1:
                t0, t1, sign = t1, t0, 1.0
            if t0 > near:
                near = t0
                nx, ny, nz = 0.0, 0.0, 0.0
                if axis == 0:
                    nx = sign
                elif axis == 1:
                    ny = sign
                else:
                    nz = sign
            far = min(far, t1)
            if near > far:
                return -1.0
        if kind != BOX:
            # Radius falls linearly from HX at the bottom to ``top`` at the upper end.
            slope = 0.0 if kind == CYLINDER else -0.45 * s[HX] / s[HZ]
            middle = s[HX] if kind == CYLINDER else 0.55 * s[HX]
            r0, r1 = middle + slope * pz, slope * dz
            a, b, c = vx * vx + vy * vy - r1 * r1, lx * vx + ly * vy - r0 * r1, lx * lx + ly * ly - r0 * r0
            if abs(a) < 1e-12:
                return -1.0
            disc = b * b - a * c
            if disc <= 0:
                return -1.0
            root = np.sqrt(disc)
            t0, t1 = (-b - root) / a, (-b + root) / a
            if t0 > t1:
                t0, t1 = t1, t0
            if t0 > near:
                near = t0
                nx, ny, nz = lx + t0 * vx, ly + t0 * vy, -slope * (r0 + r1 * t0)
            if near > min(far, t1):
                return -1.0
        if near <= 1e-3:
            return -1.0
    out[0], out[1], out[2] = s[COS] * nx - s[SIN] * ny, s[SIN] * nx + s[COS] * ny, nz
    norm = np.sqrt(out[0] ** 2 + out[1] ** 2 + out[2] ** 2) + 1e-12
    out[0], out[1], out[2] = out[0] / norm, out[1] / norm, out[2] / norm
    out[3], out[4], out[5] = lx + near * vx, ly + near * vy, pz + near * dz
    return near


@numba.njit(cache=True, nogil=True)
def cast(
    origin: np.ndarray, directions: np.ndarray, solids: np.ndarray, starts: np.ndarray, items: np.ndarray,
    bins: np.ndarray, height: np.ndarray, raster: np.ndarray, limit: float,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:  # fmt: skip
    """Nearest hit of each ray.

    Args:
        origin: (3,) world. directions: (N, 3) unit vectors.
        solids, starts, items: see ``bin_solids``; bins: (x0, y0, cell, nx, ny) of its grid.
        height: ground raster; raster: (x0, y0, cell) of it.
        limit: farthest distance, meters.

    Returns:
        distance (N,) float64, ``limit`` where nothing was hit; what (N,) int64: solid number, GROUND or NOTHING; normal
        (N, 3) and hit point in the solid's own frame (N, 3).
    """
    n = len(directions)
    distance, what = np.full(n, limit), np.full(n, NOTHING)
    normal, local = np.zeros((n, 3)), np.zeros((n, 3))
    x0, y0, cell, nx, ny = bins[0], bins[1], bins[2], int(bins[3]), int(bins[4])
    rx, ry, rc = raster[0], raster[1], raster[2]
    out = np.zeros(6)
    ox, oy, oz = origin[0], origin[1], origin[2]
    for r in range(n):
        dx, dy, dz = directions[r, 0], directions[r, 1], directions[r, 2]
        i, j = int(np.floor((ox - x0) / cell)), int(np.floor((oy - y0) / cell))
        si, sj = (1 if dx > 0 else -1), (1 if dy > 0 else -1)
        tx = ((x0 + (i + (dx > 0)) * cell) - ox) / dx if abs(dx) > 1e-9 else np.inf
        ty = ((y0 + (j + (dy > 0)) * cell) - oy) / dy if abs(dy) > 1e-9 else np.inf
        step_x = cell / abs(dx) if abs(dx) > 1e-9 else np.inf
        step_y = cell / abs(dy) if abs(dy) > 1e-9 else np.inf
        enter = 0.0
        above = oz - ground_height(height, rx, ry, rc, ox, oy)
        best = limit
        while enter < best and 0 <= i < nx and 0 <= j < ny:
            leave = min(tx, ty, limit)
            for k in range(starts[i * ny + j], starts[i * ny + j + 1]):
                t = _intersect(solids[items[k]], ox, oy, oz, dx, dy, dz, best, out)
                if t > 0:
                    best = t
                    what[r] = items[k]
                    normal[r], local[r] = out[:3], out[3:]
            below = oz + leave * dz - ground_height(height, rx, ry, rc, ox + leave * dx, oy + leave * dy)
            if above > 0 >= below:
                a, b = enter, leave
                for _ in range(12):
                    m = 0.5 * (a + b)
                    if oz + m * dz > ground_height(height, rx, ry, rc, ox + m * dx, oy + m * dy):
                        a = m
                    else:
                        b = m
                if b < best:
                    best = b
                    what[r] = GROUND
                    gx, gy = ox + b * dx, oy + b * dy
                    ux = ground_height(height, rx, ry, rc, gx + 0.3, gy) - ground_height(
                        height, rx, ry, rc, gx - 0.3, gy
                    )
                    uy = ground_height(height, rx, ry, rc, gx, gy + 0.3) - ground_height(
                        height, rx, ry, rc, gx, gy - 0.3
                    )
                    norm = np.sqrt(ux * ux + uy * uy + 0.36)
                    normal[r, 0], normal[r, 1], normal[r, 2] = -ux / norm, -uy / norm, 0.6 / norm
                    local[r, 0], local[r, 1], local[r, 2] = gx, gy, oz + b * dz
            above = below
            if best <= leave:
                break
            enter = leave
            if tx < ty:
                i += si
                tx += step_x
            else:
                j += sj
                ty += step_y
        distance[r] = best
    return distance, what, normal, local


@numba.njit(cache=True, nogil=True)
def _noise(a: int, b: int, c: int, seed: int) -> float:
    """Hash of three integers to 0..1."""
    h = (a * 73856093) ^ (b * 19349663) ^ (c * 83492791) ^ (seed * 2654435761)
    h &= 0xFFFFFFFF
    h = ((h ^ (h >> 15)) * 2246822519) & 0xFFFFFFFF
    h = ((h ^ (h >> 13)) * 3266489917) & 0xFFFFFFFF
    return ((h ^ (h >> 16)) & 0xFFFF) / 65535.0


@numba.njit(cache=True, nogil=True)
def shade(
    directions: np.ndarray,
    distance: np.ndarray,
    what: np.ndarray,
    normal: np.ndarray,
    local: np.ndarray,
    colors: np.ndarray,
    textures: np.ndarray,
    ground: np.ndarray,
    raster: np.ndarray,
    ground_colors: np.ndarray,
    light: np.ndarray,
    seed: int,
) -> np.ndarray:
    """Color of each ray.

    Args:
        directions, distance, what, normal, local: of ``cast``.
        colors: (solids, 3) 0..1; textures: (solids,) texture numbers.
        ground: (nx, ny) uint8 surface number (0..3 classes, 4 marking); ground_colors: (5, 3).
        light: sun x y z, sun strength, ambient, fog density, sky r g b, headlights.

    Returns:
        (N, 3) float32 in 0..1, before exposure and noise.
    """
    n = len(directions)
    out = np.zeros((n, 3), np.float32)
    for r in range(n):
        w = what[r]
        if w == NOTHING:
            up = min(max(directions[r, 2] * 2.5, 0.0), 1.0)
            for c in range(3):
                out[r, c] = light[6 + c] * (1.0 - 0.35 * up) + (0.12 * up if c == 2 else 0.0)
            continue
        x, y, z = local[r, 0], local[r, 1], local[r, 2]
        if w == GROUND:
            i = min(max(int((x - raster[0]) / raster[2]), 0), ground.shape[0] - 1)
            j = min(max(int((y - raster[1]) / raster[2]), 0), ground.shape[1] - 1)
            g = ground[i, j]
            k = 3.0 if g == 3 else 6.0
            fine = _noise(int(np.floor(x * k)), int(np.floor(y * k)), g, seed)
            rough = _noise(int(np.floor(x * 0.7)), int(np.floor(y * 0.7)), g, seed + 1)
            gain = 1.0 + (0.5 if g == 3 else 0.16) * (fine - 0.5) + 0.22 * (rough - 0.5)
            if g == 2 and (abs(x - np.floor(x)) < 0.08 or abs(y - np.floor(y)) < 0.08):
                gain *= 0.8  # joints of paving
            cr, cg, cb = ground_colors[g, 0] * gain, ground_colors[g, 1] * gain, ground_colors[g, 2] * gain
        else:
            cr, cg, cb = colors[w, 0], colors[w, 1], colors[w, 2]
            texture = textures[w]
            gain = 1.0
            if texture == FACADE:
                along = x + y
                u, v = along * 0.45 - np.floor(along * 0.45), z * 0.33 - np.floor(z * 0.33)
                if abs(normal[r, 2]) < 0.5 and 0.22 < u < 0.75 and 0.25 < v < 0.8:
                    lit = _noise(int(np.floor(along * 0.45)), int(np.floor(z * 0.33)), w, seed)
                    cr, cg, cb = 0.12 + 0.3 * lit, 0.14 + 0.28 * lit, 0.2 + 0.2 * lit
                gain = 0.9 + 0.2 * _noise(int(np.floor(along * 5)), int(np.floor(z * 8)), w, seed)
            elif texture == FOLIAGE:
                gain = 0.55 + 0.9 * _noise(int(np.floor(x * 4)), int(np.floor(y * 4)), int(np.floor(z * 4)), seed)
            elif texture == VEHICLE:
                if abs(normal[r, 2]) < 0.5 and z > 0.1:
                    cr, cg, cb = 0.1, 0.12, 0.15  # windows
            elif texture == STRIPES:
                if (x + y + z) * 2.2 - np.floor((x + y + z) * 2.2) < 0.4:
                    cr, cg, cb = 0.92, 0.92, 0.9
            elif texture == ROUGH:
                gain = 0.75 + 0.5 * _noise(int(np.floor(x * 7)), int(np.floor(y * 7)), int(np.floor(z * 7)), seed)
            cr, cg, cb = cr * gain, cg * gain, cb * gain
        sun = max(0.0, normal[r, 0] * light[0] + normal[r, 1] * light[1] + normal[r, 2] * light[2])
        facing = abs(
            normal[r, 0] * directions[r, 0] + normal[r, 1] * directions[r, 1] + normal[r, 2] * directions[r, 2]
        )
        d = distance[r]
        lit = light[4] * (0.8 + 0.2 * normal[r, 2]) + light[3] * sun + light[9] * facing / (1.0 + (d / 12.0) ** 2)
        clear = decay(light[5] * d)
        out[r, 0] = cr * lit * clear + light[6] * (1 - clear)
        out[r, 1] = cg * lit * clear + light[7] * (1 - clear)
        out[r, 2] = cb * lit * clear + light[8] * (1 - clear)
    return out


@numba.njit(cache=True, nogil=True)
def _inside(s: np.ndarray, x: float, y: float, z: float, margin: float) -> bool:
    """Whether a point lies in a solid grown by ``margin``."""
    px, py, pz = x - s[CX], y - s[CY], z - s[CZ]
    lx, ly = s[COS] * px + s[SIN] * py, -s[SIN] * px + s[COS] * py
    if s[KIND] == BOX:
        return abs(lx) <= s[HX] + margin and abs(ly) <= s[HY] + margin and abs(pz) <= s[HZ] + margin
    if s[KIND] == ELLIPSOID:
        return (lx / (s[HX] + margin)) ** 2 + (ly / (s[HY] + margin)) ** 2 + (pz / (s[HZ] + margin)) ** 2 <= 1.0
    if abs(pz) > s[HZ] + margin:
        return False
    radius = s[HX] if s[KIND] == CYLINDER else 0.55 * s[HX] - 0.45 * s[HX] * pz / s[HZ]
    return lx * lx + ly * ly <= (radius + margin) ** 2


@numba.njit(cache=True, nogil=True)
def voxelize(
    semantic: np.ndarray,
    rank: np.ndarray,
    to_world: np.ndarray,
    to_grid: np.ndarray,
    lower: np.ndarray,
    voxel: np.ndarray,
    solids: np.ndarray,
    classes: np.ndarray,
    priority: np.ndarray,
    height: np.ndarray,
    ground: np.ndarray,
    raster: np.ndarray,
    sub: int,
) -> None:
    """Exact labels: the class of highest priority among what touches a voxel.

    Args:
        semantic: (X, Y, Z) uint8, free at first, set in place.
        rank: (X, Y, Z) int8, -1 at first.
        to_world, to_grid: (4, 4) grid frame <-> world.
        lower, voxel: (3,) of the grid.
        solids, classes: (P, 9) and (P,) class ids; priority: (256,) int8 by class id.
        height, ground, raster: ground rasters; ground holds class ids here.
        sub: points per voxel edge.
    """
    _voxelize_solids(semantic, rank, to_world, to_grid, lower, voxel, solids, classes, priority, sub)
    _voxelize_ground(semantic, rank, to_world, to_grid, lower, voxel, priority, height, ground, raster, sub)


@numba.njit(cache=True, nogil=True)
def _voxelize_solids(
    semantic: np.ndarray,
    rank: np.ndarray,
    to_world: np.ndarray,
    to_grid: np.ndarray,
    lower: np.ndarray,
    voxel: np.ndarray,
    solids: np.ndarray,
    classes: np.ndarray,
    priority: np.ndarray,
    sub: int,
) -> None:
    nx, ny, nz = semantic.shape
    spacing = voxel / sub
    point = np.zeros(3)
    for p in range(len(solids)):
        s, c = solids[p], classes[p]
        mine = priority[c]
        lo, hi = np.full(3, 1e9), np.full(3, -1e9)
        for corner in range(8):
            lx = s[HX] * (1 if corner & 1 else -1)
            ly = s[HY] * (1 if corner & 2 else -1)
            wx, wy = s[CX] + s[COS] * lx - s[SIN] * ly, s[CY] + s[SIN] * lx + s[COS] * ly
            wz = s[CZ] + s[HZ] * (1 if corner & 4 else -1)
            for a in range(3):
                v = to_grid[a, 0] * wx + to_grid[a, 1] * wy + to_grid[a, 2] * wz + to_grid[a, 3]
                lo[a], hi[a] = min(lo[a], v), max(hi[a], v)
        i0, i1 = max(0, int((lo[0] - lower[0]) / voxel[0] - 0.5)), min(nx - 1, int((hi[0] - lower[0]) / voxel[0] + 0.5))
        j0, j1 = max(0, int((lo[1] - lower[1]) / voxel[1] - 0.5)), min(ny - 1, int((hi[1] - lower[1]) / voxel[1] + 0.5))
        k0, k1 = max(0, int((lo[2] - lower[2]) / voxel[2] - 0.5)), min(nz - 1, int((hi[2] - lower[2]) / voxel[2] + 0.5))
        # A sample stands for its cell: grown by half the cell, the solid touches it. Less than half keeps flat sides flat.
        margin = 0.35 * min(spacing[0], spacing[1], spacing[2])
        for i in range(i0, i1 + 1):
            for j in range(j0, j1 + 1):
                for k in range(k0, k1 + 1):
                    if rank[i, j, k] >= mine:
                        continue
                    found = False
                    for m in range(sub * sub * sub):
                        point[0] = lower[0] + i * voxel[0] + (m % sub + 0.5) * spacing[0]
                        point[1] = lower[1] + j * voxel[1] + (m // sub % sub + 0.5) * spacing[1]
                        point[2] = lower[2] + k * voxel[2] + (m // sub // sub + 0.5) * spacing[2]
                        x = (
                            to_world[0, 0] * point[0]
                            + to_world[0, 1] * point[1]
                            + to_world[0, 2] * point[2]
                            + to_world[0, 3]
                        )
                        y = (
                            to_world[1, 0] * point[0]
                            + to_world[1, 1] * point[1]
                            + to_world[1, 2] * point[2]
                            + to_world[1, 3]
                        )
                        z = (
                            to_world[2, 0] * point[0]
                            + to_world[2, 1] * point[1]
                            + to_world[2, 2] * point[2]
                            + to_world[2, 3]
                        )
                        if _inside(s, x, y, z, margin):
                            found = True
                            break
                    if found:
                        semantic[i, j, k], rank[i, j, k] = c, mine


@numba.njit(cache=True, nogil=True)
def _voxelize_ground(
    semantic: np.ndarray,
    rank: np.ndarray,
    to_world: np.ndarray,
    to_grid: np.ndarray,
    lower: np.ndarray,
    voxel: np.ndarray,
    priority: np.ndarray,
    height: np.ndarray,
    ground: np.ndarray,
    raster: np.ndarray,
    sub: int,
) -> None:
    nx, ny, nz = semantic.shape
    spacing = voxel / sub
    for i in range(nx):
        for j in range(ny):
            for m in range(sub * sub):
                gx, gy = (
                    lower[0] + i * voxel[0] + (m % sub + 0.5) * spacing[0],
                    lower[1] + j * voxel[1] + (m // sub + 0.5) * spacing[1],
                )
                # The grid is nearly level: one step from the height under the cell's foot point is exact enough.
                gz = 0.0
                x = y = 0.0
                for _ in range(3):
                    x = to_world[0, 0] * gx + to_world[0, 1] * gy + to_world[0, 2] * gz + to_world[0, 3]
                    y = to_world[1, 0] * gx + to_world[1, 1] * gy + to_world[1, 2] * gz + to_world[1, 3]
                    h = ground_height(height, raster[0], raster[1], raster[2], x, y)
                    gz = to_grid[2, 0] * x + to_grid[2, 1] * y + to_grid[2, 2] * h + to_grid[2, 3]
                k = int(np.floor((gz - lower[2]) / voxel[2]))
                if 0 <= k < nz:
                    a = min(max(int((x - raster[0]) / raster[2]), 0), ground.shape[0] - 1)
                    b = min(max(int((y - raster[1]) / raster[2]), 0), ground.shape[1] - 1)
                    c = ground[a, b]
                    if rank[i, j, k] < priority[c]:
                        semantic[i, j, k], rank[i, j, k] = c, priority[c]
