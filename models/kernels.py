"""Triton kernels behind the functions of ``lift``, ``attention`` and ``losses``, which are their reference; and which kernels
a process uses: these for CUDA tensors, or those of ``cpukernels`` for tensors of the CPU.

Off unless ``use`` turns them on (``train.kernels``). These accumulate in fp32, or in fp64 for fp64
input: the tests compare them so with the reference, through Triton's interpreter where there is no GPU. Triton itself is
imported at the first use: the package works without it.
"""

from __future__ import annotations

import functools
from types import ModuleType, SimpleNamespace
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from occstream.models.autograd import Context

if TYPE_CHECKING:
    import triton.language as tl

_wanted: Literal["", "cuda", "cpu"] = ""


def use(wanted: bool, device: str = "cuda") -> None:
    """Turns kernels on or off for this process: those for tensors of ``device`` (cuda or cpu), and no others.

    Raises:
        ImportError: Triton is missing and its kernels are wanted.
    """
    global _wanted
    if wanted and device == "cuda":
        _kernels()
    _wanted = ("cuda" if device == "cuda" else "cpu") if wanted else ""


def wanted_for(tensor: Tensor) -> bool:
    """Whether a function should run its Triton kernel."""
    return _wanted == "cuda" and tensor.is_cuda


def compiled_for(tensor: Tensor) -> ModuleType | None:
    """``cpukernels``, if a function should run its loop in place of the reference."""
    if _wanted != "cpu" or tensor.device.type != "cpu":
        return None
    from occstream.models import cpukernels  # numba takes a while, and few processes need it

    return cpukernels


@functools.cache
def _kernels() -> SimpleNamespace:
    import triton
    import triton.language as tl

    from occstream.models import tritonkernels

    return SimpleNamespace(
        pool_forward=tritonkernels.pool_forward,
        pool_backward=tritonkernels.pool_backward,
        sample=tritonkernels.sample,
        negative_focal=tritonkernels.negative_focal,
        power=triton.next_power_of_2,
        acc={torch.float64: tl.float64},
        fp32=tl.float32,
    )


def _accumulator(k: SimpleNamespace, tensor: Tensor) -> tl.dtype:
    return k.acc.get(tensor.dtype, k.fp32)


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


class _Pool(torch.autograd.Function):
    @staticmethod
    def forward(  # noqa: PLR0917
        ctx: Context, depth: Tensor, context: Tensor, voxel: Tensor, size: int
    ) -> Tensor:
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
    def backward(ctx: Context, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
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
    def forward(  # noqa: PLR0917
        ctx: Context, values: Tensor, locations: Tensor, weights: Tensor, owner: Tensor
    ) -> Tensor:
        out = torch.empty(*weights.shape[:2], values.shape[-1], device=values.device, dtype=_wide(values))
        _launch(values, owner, locations, weights, out=out)
        ctx.save_for_backward(values, locations, weights, owner)
        return out

    @staticmethod
    def backward(ctx: Context, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        values, locations, weights, owner = ctx.saved_tensors
        # Atomic additions: in a type that keeps small ones.
        to_values = torch.zeros(values.shape, device=values.device, dtype=_wide(values))
        to_locations, to_weights = torch.empty_like(locations), torch.empty_like(weights)
        _launch(values, owner, locations, weights, grad=grad.contiguous(), back=(to_values, to_locations, to_weights))
        return to_values.to(values.dtype), to_locations, to_weights, None


def _launch(
    values: Tensor,
    owner: Tensor,
    locations: Tensor,
    weights: Tensor,
    *,
    out: Tensor | None = None,
    grad: Tensor | None = None,
    back: tuple[Tensor, Tensor, Tensor] | tuple[None, None, None] = (None, None, None),
) -> None:
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
