"""Compiled loops for the CPU behind ``lift.voxel_pool`` and ``attention.sample``, which are their reference.

Used where ``kernels.use(True)`` (``train.kernels``) asks for them. They keep no product and no gathered row, so that memory is
read once. Sums run in one written order, in the type of their inputs: no result depends on the vector width of the CPU.
"""

from __future__ import annotations

import numba
import numpy as np
import torch
from torch import Tensor

from occstream.models.autograd import Context
from occstream.sharding.grid import VoxelGrid


def places(points: Tensor, grid: VoxelGrid) -> Tensor:
    """Flat voxel of each point of a batch.

    Args:
        points: (B, …, 3) meters in the grid's frame, fp32.

    Returns:
        (B, …) int64 over the batch's voxels laid end to end; -1: outside of the grid.
    """
    found = torch.empty(points.shape[:-1], dtype=torch.int64)
    lower, voxel = (np.array(side, np.float32) for side in (grid.lower, grid.voxel))
    _places(
        points.detach().reshape(len(points), -1, 3).numpy(),
        lower,
        voxel,
        np.array(grid.shape),
        found.view(len(points), -1).numpy(),
    )
    return found


def pool(depth: Tensor, context: Tensor, voxel: Tensor, size: int) -> Tensor:
    """``kernels.pool``: the same arguments and result."""
    return _Pool.apply(depth.contiguous(), context.contiguous(), voxel.contiguous(), size)


def sample(values: Tensor, locations: Tensor, weights: Tensor, counts: list[int]) -> Tensor:
    """``attention.sample``: the same arguments and result."""
    heads = weights.shape[1]
    spatial = values.shape[2:] if values.dim() == 5 else (1, *values.shape[2:])
    values = values.to(locations.dtype)
    last = values.reshape(len(values), heads, -1, *spatial).permute(0, 3, 4, 5, 1, 2).contiguous()
    found = _Sample.apply(last, locations.contiguous(), weights.contiguous(), np.array(counts))
    return found.flatten(1)


class _Pool(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Context, depth: Tensor, context: Tensor, voxel: Tensor, size: int) -> Tensor:
        out = context.new_zeros(size, context.shape[1])
        _pool(*(t.detach().numpy() for t in (depth, context, voxel, out)))
        ctx.save_for_backward(depth, context, voxel)
        return out

    @staticmethod
    def backward(ctx: Context, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        depth, context, voxel = ctx.saved_tensors
        to_depth, to_context = torch.zeros_like(depth), torch.zeros_like(context)
        _pool_back(*(t.detach().numpy() for t in (grad.contiguous(), depth, context, voxel, to_depth, to_context)))
        return to_depth, to_context, None, None


class _Sample(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Context, values: Tensor, locations: Tensor, weights: Tensor, counts: np.ndarray) -> Tensor:
        out = values.new_zeros(*weights.shape[:2], values.shape[-1])
        _sample(*_flat(values, locations, weights), counts, out.flatten(0, 1).numpy())
        ctx.save_for_backward(values, locations, weights)
        ctx.counts = counts
        return out

    @staticmethod
    def backward(ctx: Context, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        inputs = ctx.saved_tensors
        values, locations, weights = (torch.zeros_like(t) for t in inputs)
        back = _flat(values, locations, weights)
        _sample_back(grad.contiguous().flatten(0, 1).numpy(), *_flat(*inputs), ctx.counts, back[0], *back[2:])
        return values, locations, weights, None


def _flat(values: Tensor, locations: Tensor, weights: Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Views of what ``_sample`` takes: values, shape (X, Y, Z, heads), locations, weights."""
    views = (values.detach().flatten(0, 4), locations.detach().flatten(0, 1), weights.detach().flatten(0, 1))
    rows, places, shares = (t.numpy() for t in views)
    return rows, np.array(values.shape[1:5]), places, shares


# Compiled functions take all arguments by position (numba knows no keyword-only ones).


@numba.njit(cache=True, nogil=True)
def _places(points, lower, voxel, shape, out) -> None:
    """(B, N, 3), (3,), (3,), (3,) -> (B, N)."""
    one = np.float32(0)
    for b in range(points.shape[0]):
        for i in range(points.shape[1]):
            flat = 0
            inside = True
            for axis in range(3):
                step = np.floor((points[b, i, axis] - lower[axis]) / voxel[axis])
                # Not a number is nowhere.
                if step >= one and step < shape[axis]:
                    flat = flat * shape[axis] + np.int64(step)
                else:
                    inside = False
            out[b, i] = flat + b * shape[0] * shape[1] * shape[2] if inside else -1


@numba.njit(cache=True, nogil=True)
def _pool(depth, context, voxel, out) -> None:
    """(N, D, P), (N P, C), (N, D, P) -> adds to (size, C)."""
    images, bins, cells = depth.shape
    channels = context.shape[1]
    for n in range(images):
        for d in range(bins):
            for p in range(cells):
                v = voxel[n, d, p]
                if v < 0:
                    continue
                weight = depth[n, d, p]
                for c in range(channels):
                    out[v, c] += weight * context[n * cells + p, c]


@numba.njit(cache=True, nogil=True)
def _pool_back(grad, depth, context, voxel, to_depth, to_context) -> None:
    """(size, C) and the inputs of ``_pool`` -> gradients of depth and context."""
    images, bins, cells = depth.shape
    channels = context.shape[1]
    product = np.empty(channels, grad.dtype)
    for n in range(images):
        for d in range(bins):
            for p in range(cells):
                v = voxel[n, d, p]
                if v < 0:
                    continue
                weight = depth[n, d, p]
                # Apart from the sum, whose order no CPU may choose: these loops become vector instructions.
                for c in range(channels):
                    product[c] = grad[v, c] * context[n * cells + p, c]
                for c in range(channels):
                    to_context[n * cells + p, c] += weight * grad[v, c]
                total = product[0]
                for c in range(1, channels):
                    total += product[c]
                to_depth[n, d, p] = total


@numba.njit(cache=True, nogil=True, inline="always")
def _lower(place, size, half) -> tuple[np.int64, float]:
    """Number of the cell whose center is the last one not above a place in 0..1, and how far beyond it the place is, in cells;
    -2 for what is nowhere near (or not a number): no index could hold it. Size and half have the type to compute in."""
    at = place * size - half
    low = np.floor(at)
    return (np.int64(low), at - low) if low >= -1 and low < size else (np.int64(-2), at)


@numba.njit(cache=True, nogil=True)
def _sample(values, shape, locations, weights, counts, out) -> None:
    """Adds linear samples.

    Args:
        values: (N X Y Z heads, C).
        shape: (X, Y, Z); for maps (1, h, w).
        locations: (T heads, points, dims) as (x, y, z) or (u, v).
        weights: (T heads, points).
        counts: (N,) of the T.
        out: (T heads, C).
    """
    nx, ny, nz, heads = shape[0], shape[1], shape[2], shape[3]
    channels, dims = values.shape[1], locations.shape[2]
    zero, half, one = weights.dtype.type(0), weights.dtype.type(0.5), weights.dtype.type(1)
    wide, high, deep = weights.dtype.type(nx), weights.dtype.type(ny), weights.dtype.type(nz)
    query = 0
    for n in range(counts.shape[0]):
        for _ in range(counts[n] * heads):
            head = query % heads
            for k in range(weights.shape[1]):
                place = locations[query, k]
                x, sx = _lower(place[0], wide, half) if dims == 3 else (0, zero)
                y, sy = _lower(place[1], high, half)
                z, sz = _lower(place[2], deep, half) if dims == 3 else _lower(place[0], deep, half)
                if x < -1 or y < -1 or z < -1:
                    continue
                for i in range(max(x, 0), min(x + dims - 1, nx)):
                    px = weights[query, k] * (sx if i > x else one - sx)
                    for j in range(max(y, 0), min(y + 2, ny)):
                        py = px * (sy if j > y else one - sy)
                        for l in range(max(z, 0), min(z + 2, nz)):
                            part = py * (sz if l > z else one - sz)
                            row = (((n * nx + i) * ny + j) * nz + l) * heads + head
                            for c in range(channels):
                                out[query, c] += part * values[row, c]
            query += 1


@numba.njit(cache=True, nogil=True)
def _sample_back(
    grad,
    values,
    shape,
    locations,
    weights,
    counts,
    to_values,
    to_locations,
    to_weights,
) -> None:
    """Gradient (T heads, C) of the samples and the inputs of ``_sample`` -> adds to the gradients of its values, locations
    and weights."""
    nx, ny, nz, heads = shape[0], shape[1], shape[2], shape[3]
    channels, dims = values.shape[1], locations.shape[2]
    zero, half, one = weights.dtype.type(0), weights.dtype.type(0.5), weights.dtype.type(1)
    wide, high, deep = weights.dtype.type(nx), weights.dtype.type(ny), weights.dtype.type(nz)
    query = 0
    for n in range(counts.shape[0]):
        for _ in range(counts[n] * heads):
            head = query % heads
            for k in range(weights.shape[1]):
                place, weight = locations[query, k], weights[query, k]
                x, sx = _lower(place[0], wide, half) if dims == 3 else (0, zero)
                y, sy = _lower(place[1], high, half)
                z, sz = _lower(place[2], deep, half) if dims == 3 else _lower(place[0], deep, half)
                if x < -1 or y < -1 or z < -1:
                    continue
                total, dx, dy, dz = zero, zero, zero, zero
                for i in range(max(x, 0), min(x + dims - 1, nx)):
                    px, turn = (sx, one) if i > x else (one - sx, -one)
                    for j in range(max(y, 0), min(y + 2, ny)):
                        py, tury = (sy, one) if j > y else (one - sy, -one)
                        for l in range(max(z, 0), min(z + 2, nz)):
                            pz, turz = (sz, one) if l > z else (one - sz, -one)
                            row = (((n * nx + i) * ny + j) * nz + l) * heads + head
                            part = px * py * pz * weight
                            dot = zero
                            for c in range(channels):
                                dot += grad[query, c] * values[row, c]
                            for c in range(channels):
                                to_values[row, c] += part * grad[query, c]
                            total += px * py * pz * dot
                            dx += turn * py * pz * dot
                            dy += px * tury * pz * dot
                            dz += px * py * turz * dot
                to_weights[query, k] = total
                if dims == 3:
                    to_locations[query, k, 0] = dx * weight * wide
                to_locations[query, k, 1] = dy * weight * high
                to_locations[query, k, 2 if dims == 3 else 0] = dz * weight * deep
            query += 1
