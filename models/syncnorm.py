"""Batch norm over the joint batch of all ranks: statistics, their exchange, and the gradient.

Each step is one of torch's fused functions on CUDA and its reference in plain PyTorch elsewhere, with the same arguments.
Statistics of a rank are centered ones (mean and 1 / sqrt(var + eps)) and are joined by Chan's formula: the difference
E[x²] − E[x]² has no digits left where the mean is large against the deviation. What is kept for the backward pass is the
input as it came (bf16 stays bf16) and one row of statistics.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from types import SimpleNamespace

import torch
import torch.distributed as dist
from torch import Tensor

from occstream.models.autograd import Context


def world_size() -> int:
    """Number of ranks; 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def gather(row: Tensor) -> Tensor:
    """(n,) of each rank -> (ranks, n), the same on all (collective)."""
    rows = row.new_empty(world_size() * len(row))
    dist.all_gather_single(rows, row)
    return rows.view(world_size(), -1)


def add_up(values: Tensor) -> Tensor:
    """Sum over ranks, in place (collective)."""
    dist.all_reduce(values)
    return values


# --- recomputation under activation checkpointing ----------------------------------------------------------------------


class Recall:
    """Joint statistics of the norms of a checkpointed call, in the order they ran. Its recomputation takes them from here: it
    asks no other rank, and counts no batch again."""

    def __init__(self) -> None:
        self.kept: list[tuple[Tensor, ...]] = []
        self.at: int | None = None  # None: the first forward, which notes

    def contexts(self) -> tuple[_Within, _Within]:
        """Of the first forward, and of each recomputation (a graph that is kept may be walked twice)."""
        return _Within(self, None), _Within(self, 0)


class _Within(contextlib.AbstractContextManager):
    """May be entered again."""

    def __init__(self, recall: Recall, at: int | None) -> None:
        self.recall, self.at = recall, at

    def __enter__(self) -> None:
        self.before, _here.recall = _current(), self.recall
        self.recall.at = self.at

    def __exit__(self, *exc: object) -> None:
        self.recall.at, _here.recall = None, self.before


# A backward pass recomputes in a thread of its own on CUDA, context and all.
_here = threading.local()


def _current() -> Recall | None:
    return getattr(_here, "recall", None)


def recomputing() -> bool:
    """Whether this thread runs the recomputation of a checkpointed call."""
    recall = _current()
    return recall is not None and recall.at is not None


# --- one step each, in plain PyTorch -----------------------------------------------------------------------------------


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _dims(x: Tensor) -> list[int]:
    return [0, *range(2, x.ndim)]


def _over(row: Tensor, x: Tensor) -> Tensor:
    """(C,) for broadcasting over (N, C, …)."""
    return row.view(1, -1, *[1] * (x.ndim - 2))


def stats(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(N, C, …) -> mean and 1 / sqrt(biased variance + eps) of each channel."""
    var, mean = torch.var_mean(_wide(x), _dims(x), correction=0)
    return mean, torch.rsqrt(var + eps)


def join(
    x: Tensor,
    means: Tensor,
    invstds: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    momentum: float,
    eps: float,
    counts: Tensor,
) -> tuple[Tensor, Tensor]:
    """Statistics of ranks -> those of the joint batch, which are also averaged into the running ones (unbiased variance).

    Args:
        means, invstds: (ranks, C). counts: (ranks,) elements per channel.
    """
    n, mu = counts.double().unsqueeze(1), means.double()
    total = n.sum()
    mean = (n * mu).sum(0) / total
    squares = (n * (invstds.double() ** -2 - eps).clamp_min(0) + n * (mu - mean) ** 2).sum(0)
    running_mean.lerp_(mean.to(running_mean.dtype), momentum)
    running_var.lerp_((squares / (total - 1).clamp_min(1)).to(running_var.dtype), momentum)
    return mean.to(means.dtype), torch.rsqrt(squares / total + eps).to(means.dtype)


def elementwise(x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, invstd: Tensor, eps: float) -> Tensor:
    """(x - mean) * scale + bias in the dtype of ``x``."""
    centered = _wide(x) - _over(mean, x)
    return centered.mul_(_over(invstd * weight, x)).add_(_over(bias, x)).to(x.dtype)


def backward_sums(
    grad: Tensor, x: Tensor, mean: Tensor, invstd: Tensor, weight: Tensor, *wanted: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """This rank's sums of the gradient and of the gradient times (x - mean); gradients of weight and bias."""
    g = _wide(grad)
    by_center = (g * (_wide(x) - _over(mean, x))).sum(_dims(x))
    total = g.sum(_dims(x))
    return total, by_center, by_center * invstd, total.clone()


def backward_elementwise(
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    invstd: Tensor,
    weight: Tensor,
    total: Tensor,
    by_center: Tensor,
    counts: Tensor,
) -> Tensor:
    """Gradient of ``x`` from the sums over all ranks; counts (ranks,) int32."""
    n = counts.sum()
    slope = (by_center / n) * invstd * invstd
    g = _wide(grad) - _over(total / n, x) - (_wide(x) - _over(mean, x)).mul_(_over(slope, x))
    return g.mul_(_over(invstd * weight, x)).to(x.dtype)


PLAIN = SimpleNamespace(
    stats=stats,
    join=join,
    elementwise=elementwise,
    backward_sums=backward_sums,
    backward_elementwise=backward_elementwise,
)
FUSED = SimpleNamespace(
    stats=torch.batch_norm_stats,
    join=torch.batch_norm_gather_stats_with_counts,
    elementwise=torch.batch_norm_elemt,
    backward_sums=torch.batch_norm_backward_reduce,
    backward_elementwise=torch.batch_norm_backward_elemt,
)


def steps_for(x: Tensor) -> SimpleNamespace:
    """The functions of each step for a tensor's device: ``FUSED`` on CUDA, else ``PLAIN``."""
    return FUSED if x.is_cuda else PLAIN


def joins_for(x: Tensor) -> Callable[..., tuple[Tensor, Tensor]]:
    """How statistics of ranks that hold as much as ``x``, or up to twice of it, are joined. The fused function adds up their
    counts as int32, which ends at 2**31: a full grid of 640,000 voxels reaches it with 420 ranks of 8 frames."""
    return steps_for(x).join if world_size() * x.numel() // x.shape[1] < 2**30 else join


# --- opaque to torch.compile: collectives and recall happen when they run, not when they are traced ---------------------


@torch.library.custom_op("occstream::sync_norm", mutates_args=())
def sync_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Normalizes by the joint batch (collective, except in recomputation).

    Returns:
        y as ``x``; mean, 1 / sqrt(var + eps) and unbiased variance (C,); elements of each rank (ranks,) int32.
    """
    steps, recall = steps_for(x), _current()
    x = _dense(x)
    if recall is not None and recall.at is not None:
        mean, invstd, unbiased, counts = (t.clone() for t in recall.kept[recall.at])
        recall.at += 1
    else:
        mean, invstd = steps.stats(x, eps)
        # A fill, not a copy of a Python number: the host waits for none of this.
        rows = gather(torch.cat([mean, invstd, mean.new_full((1,), x.numel() // x.shape[1])]))
        width, counts = x.shape[1], rows[:, -1].contiguous()
        means, invstds = rows[:, :width].contiguous(), rows[:, width:-1].contiguous()
        _, unbiased = moments = torch.zeros_like(mean), torch.zeros_like(mean)
        mean, invstd = joins_for(x)(x, means, invstds, *moments, 1.0, eps, counts)
        counts = counts.to(torch.int32)
        if recall is not None:
            recall.kept.append(tuple(t.detach().clone() for t in (mean, invstd, unbiased, counts)))
    return steps.elementwise(x, weight, bias, mean, invstd, eps), mean, invstd, unbiased, counts


@sync_norm.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    row = torch.empty_like(weight)
    counts = weight.new_empty(world_size(), dtype=torch.int32)
    return torch.empty_like(_dense(x)), row, torch.empty_like(row), torch.empty_like(row), counts


@torch.library.custom_op("occstream::sync_norm_backward", mutates_args=())
def sync_norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor, mean: Tensor, invstd: Tensor, counts: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias; those of weight and bias are this rank's own (collective)."""
    steps = steps_for(x)
    x = _dense(x)
    # The fused functions want both in one order of memory.
    grad = grad.contiguous(memory_format=torch.channels_last if _channels_last(x) else torch.contiguous_format)
    total, by_center, to_weight, to_bias = steps.backward_sums(grad, x, mean, invstd, weight, True, True, True)
    total, by_center = add_up(torch.cat([total, by_center])).chunk(2)
    to_x = steps.backward_elementwise(grad, x, mean, invstd, weight, total.contiguous(), by_center.contiguous(), counts)
    return to_x, to_weight.to(weight.dtype), to_bias.to(weight.dtype)


@sync_norm_backward.register_fake
def _(
    grad: Tensor, x: Tensor, weight: Tensor, mean: Tensor, invstd: Tensor, counts: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(_dense(x)), torch.empty_like(weight), torch.empty_like(weight)


def _keep(
    ctx: Context,
    inputs: tuple[Tensor, Tensor, Tensor, float],
    output: tuple[Tensor, Tensor, Tensor, Tensor, Tensor],
) -> None:
    x, weight, _, _ = inputs
    _, mean, invstd, _, counts = output
    ctx.save_for_backward(x, weight, mean, invstd, counts)


def _back(ctx: Context, grad: Tensor, *_: Tensor | None) -> tuple[Tensor, Tensor, Tensor, None]:
    x, weight, mean, invstd, counts = ctx.saved_tensors
    return *sync_norm_backward(grad, x, weight, mean, invstd, counts), None


sync_norm.register_autograd(_back, setup_context=_keep)


@torch.library.custom_op("occstream::count_batch", mutates_args=("running_mean", "running_var", "batches"))
def count_batch(
    running_mean: Tensor, running_var: Tensor, batches: Tensor, mean: Tensor, unbiased: Tensor, momentum: float
) -> None:
    """Averages a batch's statistics into the running ones; nothing in recomputation."""
    if not recomputing():
        running_mean.lerp_(mean.to(running_mean.dtype), momentum)
        running_var.lerp_(unbiased.to(running_var.dtype), momentum)
        batches += 1


@count_batch.register_fake
def _(
    running_mean: Tensor, running_var: Tensor, batches: Tensor, mean: Tensor, unbiased: Tensor, momentum: float
) -> None:
    return None


def _channels_last(x: Tensor) -> bool:
    return x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


def _dense(x: Tensor) -> Tensor:
    """The same in an order that the fused functions read: (N, C, …) or channels last."""
    return x if _channels_last(x) else x.contiguous()
