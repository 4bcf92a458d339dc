"""The kernels that ``kernels`` launches, in Triton. Importing this needs Triton."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def pool_forward(
    weight, pixel, context, starts, voxels, out, channels, ACC: tl.constexpr, POINTS: tl.constexpr, CH: tl.constexpr
) -> None:
    """One program per voxel with points: sums weight * context over its sorted points; no atomics, so deterministic."""
    m = tl.program_id(0)
    begin, end = tl.load(starts + m), tl.load(starts + m + 1)
    c = tl.arange(0, CH)
    total = tl.zeros([CH], ACC)
    for at in range(begin, end, POINTS):
        p = at + tl.arange(0, POINTS)
        inside = p < end
        w = tl.load(weight + p, mask=inside, other=0).to(ACC)
        row = tl.load(pixel + p, mask=inside, other=0).to(tl.int64)
        mask = inside[:, None] & (c < channels)[None, :]
        x = tl.load(context + row[:, None] * channels + c[None, :], mask=mask, other=0).to(ACC)
        total += tl.sum(x * w[:, None], 0)
    v = tl.load(voxels + m).to(tl.int64)
    tl.store(out + v * channels + c, total, mask=c < channels)


@triton.jit
def pool_backward(
    grad, weight, context, voxel, to_weight, to_context, channels, bins, cells,
    ACC: tl.constexpr, POINTS: tl.constexpr, CH: tl.constexpr,
) -> None:  # fmt: skip
    """One program per image feature: its points are its depth bins, so both gradients are sums of its own."""
    n = tl.program_id(0).to(tl.int64)
    view, cell = n // cells, n % cells
    c = tl.arange(0, CH)
    x = tl.load(context + n * channels + c, mask=c < channels, other=0).to(ACC)
    total = tl.zeros([CH], ACC)
    for at in range(0, bins, POINTS):
        d = at + tl.arange(0, POINTS)
        place = (view * bins + d) * cells + cell
        v = tl.load(voxel + place, mask=d < bins, other=-1).to(tl.int64)
        w = tl.load(weight + place, mask=d < bins, other=0).to(ACC)
        mask = (v >= 0)[:, None] & (c < channels)[None, :]
        g = tl.load(grad + v[:, None] * channels + c[None, :], mask=mask, other=0).to(ACC)
        tl.store(to_weight + place, tl.sum(g * x[None, :], 1), mask=d < bins)
        total += tl.sum(g * w[:, None], 0)
    tl.store(to_context + n * channels + c, total, mask=c < channels)


@triton.jit
def sample(
    values, owner, locations, weights, grad, out, to_values, to_locations, to_weights,
    queries, heads, channels, sx, sy, sz,
    POINTS: tl.constexpr, DIMS: tl.constexpr, BACK: tl.constexpr, ACC: tl.constexpr, ROWS: tl.constexpr, CH: tl.constexpr,
) -> None:  # fmt: skip
    """Weighted linear samples of some queries of one head, or their gradients. Axis order of the arrays: values
    (N, X, Y, Z, heads, C) with X = 1 in two dimensions, locations (…, DIMS) as (x, y, z) or (u, v) = (z, y); owner says
    which of the N a query samples."""
    q = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    h = tl.program_id(1)
    c = tl.arange(0, CH)
    live, wide = q < queries, c < channels
    b = tl.load(owner + q, mask=live, other=0).to(tl.int64)
    row = q * heads + h
    total = tl.zeros([ROWS, CH], ACC)
    if BACK:
        mask = live[:, None] & wide[None, :]
        g = tl.load(grad + row[:, None] * channels + c[None, :], mask=mask, other=0).to(ACC)
    for p in range(POINTS):
        at = row * POINTS + p
        w = tl.load(weights + at, mask=live, other=0).to(ACC)
        if DIMS == 3:
            x = tl.load(locations + at * 3, mask=live, other=0).to(ACC) * sx - 0.5
            y = tl.load(locations + at * 3 + 1, mask=live, other=0).to(ACC) * sy - 0.5
            z = tl.load(locations + at * 3 + 2, mask=live, other=0).to(ACC) * sz - 0.5
        else:
            z = tl.load(locations + at * 2, mask=live, other=0).to(ACC) * sz - 0.5
            y = tl.load(locations + at * 2 + 1, mask=live, other=0).to(ACC) * sy - 0.5
            x = tl.zeros([ROWS], ACC)
        x0, y0, z0 = tl.floor(x), tl.floor(y), tl.floor(z)
        fx, fy, fz = x - x0, y - y0, z - z0
        by_weight = tl.zeros([ROWS], ACC)
        by_x, by_y, by_z = tl.zeros([ROWS], ACC), tl.zeros([ROWS], ACC), tl.zeros([ROWS], ACC)
        for corner in tl.static_range(2**DIMS):
            dz, dy, dx = corner % 2, corner // 2 % 2, corner // 4
            ix, iy, iz = x0.to(tl.int64) + dx, y0.to(tl.int64) + dy, z0.to(tl.int64) + dz
            inside = live & (ix >= 0) & (ix < sx) & (iy >= 0) & (iy < sy) & (iz >= 0) & (iz < sz)
            ax = fx if dx else 1 - fx
            ay = fy if dy else 1 - fy
            az = fz if dz else 1 - fz
            cell = (((b * sx + ix) * sy + iy) * sz + iz) * heads + h
            place = cell[:, None] * channels + c[None, :]
            mask = inside[:, None] & wide[None, :]
            value = tl.load(values + place, mask=mask, other=0).to(ACC)
            if BACK:
                dot = tl.sum(value * g, 1)
                by_weight += dot * ax * ay * az
                by_x += dot * ay * az * (1 if dx else -1)
                by_y += dot * ax * az * (1 if dy else -1)
                by_z += dot * ax * ay * (1 if dz else -1)
                tl.atomic_add(to_values + place, g * (w * ax * ay * az)[:, None], mask=mask)
            else:
                total += value * (w * ax * ay * az)[:, None]
        if BACK:
            tl.store(to_weights + at, by_weight, mask=live)
            if DIMS == 3:
                tl.store(to_locations + at * 3, by_x * w * sx, mask=live)
                tl.store(to_locations + at * 3 + 1, by_y * w * sy, mask=live)
                tl.store(to_locations + at * 3 + 2, by_z * w * sz, mask=live)
            else:
                tl.store(to_locations + at * 2, by_z * w * sz, mask=live)
                tl.store(to_locations + at * 2 + 1, by_y * w * sy, mask=live)
    if not BACK:
        tl.store(out + row[:, None] * channels + c[None, :], total, mask=live[:, None] & wide[None, :])


@triton.jit
def negative_focal(
    logits, columns, slope, partial, count, classes, gamma,
    WEIGHTED: tl.constexpr, SQUARE: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    """Value and slope of p ** gamma * softplus(z) in one pass over the logits."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < count
    z = tl.load(logits + i, mask=inside, other=0).to(ACC)
    e = tl.exp(-tl.abs(z))
    p = tl.where(z >= 0, 1 / (1 + e), e / (1 + e))
    error = tl.where(z >= 0, z, 0.0) + tl.log(1 + e)
    weight = p * p if SQUARE else tl.exp(gamma * tl.log(p))
    if WEIGHTED:
        weight *= tl.load(columns + i % classes, mask=inside, other=0).to(ACC)
    weight = tl.where(inside, weight, 0.0)
    tl.store(slope + i, weight * (gamma * (1 - p) * error + p), mask=inside)
    tl.store(partial + tl.program_id(0), tl.sum(weight * error, 0))
