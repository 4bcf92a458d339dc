"""Triton kernels behind the functions of ``lift``, ``attention`` and ``losses``, which are their reference.

Off unless ``use(True)`` (``train.kernels``), and used for CUDA tensors alone. They accumulate in fp32, or in fp64 for fp64
input: the tests compare them so with the reference, through Triton's interpreter where there is no GPU. Triton itself is
imported at the first use: the package works without it.
"""

from __future__ import annotations

import functools
from types import SimpleNamespace

import torch
from torch import Tensor

_wanted = False


def use(wanted: bool) -> None:
    """Turns the kernels on or off for this process. Raises ImportError if they are wanted and Triton is missing."""
    global _wanted
    if wanted:
        _kernels()
    _wanted = wanted


def wanted_for(tensor: Tensor) -> bool:
    """Whether a function should run its kernel."""
    return _wanted and tensor.is_cuda


@functools.cache
def _kernels() -> SimpleNamespace:
    import triton
    import triton.language as tl

    @triton.jit
    def pool_forward(
        weight, pixel, context, starts, voxels, out, channels, ACC: tl.constexpr, POINTS: tl.constexpr, CH: tl.constexpr
    ):
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
    ):  # fmt: skip
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
    ):  # fmt: skip
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
    ):  # fmt: skip
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

    return SimpleNamespace(
        pool_forward=pool_forward,
        pool_backward=pool_backward,
        sample=sample,
        negative_focal=negative_focal,
        power=triton.next_power_of_2,
        acc={torch.float64: tl.float64},
        fp32=tl.float32,
    )


def _accumulator(k: SimpleNamespace, tensor: Tensor):
    return k.acc.get(tensor.dtype, k.fp32)


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


class _Pool(torch.autograd.Function):
    @staticmethod
    def forward(ctx, depth: Tensor, context: Tensor, voxel: Tensor, size: int) -> Tensor:
        k = _kernels()
        _, bins, cells = voxel.shape
        channels = context.shape[1]
        flat = voxel.reshape(-1)
        order = (flat >= 0).nonzero().squeeze(1)
        keys, by_voxel = flat[order].sort(stable=True)
        order = order[by_voxel]
        voxels, counts = keys.unique_consecutive(return_counts=True)
        starts = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        pixel = order // (bins * cells) * cells + order % cells
        out = torch.zeros(size, channels, device=depth.device, dtype=_wide(context))
        if len(voxels):
            k.pool_forward[(len(voxels),)](
                depth.reshape(-1)[order], pixel, context, starts, voxels, out, channels,
                ACC=_accumulator(k, context), POINTS=16, CH=k.power(channels),
            )  # fmt: skip
        ctx.save_for_backward(depth, context, voxel)
        return out

    @staticmethod
    def backward(ctx, grad: Tensor):
        k = _kernels()
        depth, context, voxel = ctx.saved_tensors
        n, bins, cells = voxel.shape
        to_depth, to_context = torch.empty_like(depth), torch.empty_like(context)
        k.pool_backward[(n * cells,)](
            grad.contiguous(), depth, context, voxel, to_depth, to_context, context.shape[1], bins, cells,
            ACC=_accumulator(k, context), POINTS=16, CH=k.power(context.shape[1]),
        )  # fmt: skip
        return to_depth, to_context, None, None


def pool(depth: Tensor, context: Tensor, voxel: Tensor, size: int) -> Tensor:
    """Voxel pooling that keeps no product of depth and context, forward or backward; deterministic.

    Args:
        depth: (N, D, P) weights of N images' points.
        context: (N P, C), any floating dtype.
        voxel: (N, D, P) int, -1 outside of the grid.
        size: voxels in all.

    Returns:
        (size, C) fp32, or fp64.
    """
    return _Pool.apply(depth.contiguous(), context.contiguous(), voxel.contiguous(), size)


class _Sample(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values: Tensor, locations: Tensor, weights: Tensor, owner: Tensor) -> Tensor:
        out = torch.empty(*weights.shape[:2], values.shape[-1], device=values.device, dtype=_wide(values))
        _launch(values, owner, locations, weights, out=out)
        ctx.save_for_backward(values, locations, weights, owner)
        return out

    @staticmethod
    def backward(ctx, grad: Tensor):
        values, locations, weights, owner = ctx.saved_tensors
        # Atomic additions: in a type that keeps small ones.
        to_values = torch.zeros(values.shape, device=values.device, dtype=_wide(values))
        to_locations, to_weights = torch.empty_like(locations), torch.empty_like(weights)
        _launch(values, owner, locations, weights, grad=grad.contiguous(), back=(to_values, to_locations, to_weights))
        return to_values.to(values.dtype), to_locations, to_weights, None


def _launch(values, owner, locations, weights, out=None, grad=None, back=(None, None, None)) -> None:
    k = _kernels()
    queries, heads, points = weights.shape
    if not queries:
        return
    x, y, z = values.shape[1:4]
    rows = 16
    k.sample[(-(-queries // rows), heads)](
        values, owner, locations, weights, grad, out, *back, queries, heads, values.shape[-1], x, y, z,
        POINTS=points, DIMS=locations.shape[-1], BACK=out is None, ACC=_accumulator(k, values), ROWS=rows,
        CH=k.power(values.shape[-1]),
    )  # fmt: skip


def sample(values: Tensor, locations: Tensor, weights: Tensor, counts: list[int]) -> Tensor:
    """``attention.sample``: the same arguments and result, all queries in one launch."""
    heads = weights.shape[1]
    spatial = values.shape[2:] if values.dim() == 5 else (1, *values.shape[2:])
    last = values.reshape(len(values), heads, -1, *spatial).permute(0, 3, 4, 5, 1, 2).contiguous()
    # From pinned memory, or the host would wait for the copy.
    each = torch.tensor(counts, pin_memory=values.is_cuda).to(values.device, non_blocking=True)
    owner = torch.arange(len(counts), device=values.device).repeat_interleave(each, output_size=len(weights))
    found = _Sample.apply(last, locations.contiguous(), weights.contiguous(), owner)
    return found.flatten(1)


def negative_focal(logits: Tensor, gamma: float, columns: Tensor | None) -> tuple[Tensor, Tensor]:
    """Sum of columns * p ** gamma * softplus(z) over (N, K) logits, and its slope (N, K)."""
    k = _kernels()
    count, block = logits.numel(), 1024
    slope = torch.empty_like(logits)
    programs = max(1, -(-count // block))
    partial = torch.zeros(programs, device=logits.device, dtype=_wide(logits))
    k.negative_focal[(programs,)](
        logits, columns if columns is not None else logits, slope, partial, count, logits.shape[1], gamma,
        WEIGHTED=columns is not None, SQUARE=gamma == 2, ACC=_accumulator(k, logits), BLOCK=block,
    )  # fmt: skip
    return partial.sum(), slope
