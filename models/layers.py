"""Blocks that more than one paper uses. Shape legend: see ``batch``."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import TypeVar, TypeVarTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from occstream.models.syncnorm import Recall, count_batch, recomputing, sync_norm, world_size

Result = TypeVar("Result")
Arguments = TypeVarTuple("Arguments")


def full_precision(device: torch.device) -> contextlib.AbstractContextManager:
    """A context without autocast, whatever is on around it. Tensors keep their dtypes: callers widen them."""
    known = torch.amp.is_autocast_available(device.type)
    return torch.autocast(device.type, enabled=False) if known else contextlib.nullcontext()


def row(like: Tensor, values: Sequence[float], dtype: torch.dtype | None = None) -> Tensor:
    """A few numbers as (n,) on the device of ``like`` (and in its dtype, if none is given), by fills: the host would wait for
    a copy of its own memory."""
    return torch.cat([like.new_full((1,), value, dtype=dtype) for value in values])


def checkpointed(work: Callable[[*Arguments], Result], *args: *Arguments, when: bool = True) -> Result:
    """``work(*args)``; where gradients are kept and ``when`` holds, its activations are computed again in the backward
    pass instead of kept. Batch norms below it count a batch once."""
    if not (when and torch.is_grad_enabled()):
        return work(*args)
    return checkpoint(work, *args, use_reentrant=False, context_fn=Recall().contexts)


class SyncBatchNorm(nn.Module):
    """Batch norm over the joint batch of all ranks, for (N, C, …) of any rank, on CPU and CUDA.

    ``torch.nn.SyncBatchNorm`` refuses CPU tensors. Same ``state_dict`` keys as ``nn.BatchNorm2d``.
    Statistics are fp32, centered, and exact for ranks that hold different numbers of samples; see ``syncnorm``. A forward
    that is computed again under ``checkpointed`` uses the statistics of the first: it asks no other rank and counts nothing.
    """

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def __init__(self, channels: int, eps: float = 1e-5, momentum: float = 0.1) -> None:
        super().__init__()
        self.eps, self.momentum = eps, momentum
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))
        self.register_buffer("num_batches_tracked", torch.tensor(0))

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, …) -> the same shape, normalized; in training by the joint batch of all ranks (collective)."""
        if not self.training:
            return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)
        alone = world_size() == 1
        # While it is compiled, whether a forward is a recomputation is not known: it must be one graph for both.
        if alone and not (torch.compiler.is_compiling() or recomputing()):
            self.num_batches_tracked += 1
            mean, var = self.running_mean, self.running_var
            return F.batch_norm(x, mean, var, self.weight, self.bias, True, self.momentum, self.eps)
        if alone:
            mean, var = torch.zeros_like(self.running_mean), torch.zeros_like(self.running_var)
            y = F.batch_norm(x, mean, var, self.weight, self.bias, True, 1.0, self.eps)
        else:
            y, mean, _, var, _ = sync_norm(x, self.weight, self.bias, self.eps)
        with torch.no_grad():
            running = (self.running_mean, self.running_var, self.num_batches_tracked)
            count_batch(*running, mean.detach(), var.detach(), self.momentum)
        return y


def use_sync_batch_norm(module: nn.Module) -> nn.Module:
    """Replaces every torch batch norm below ``module`` by ours, values kept. Raises ValueError for one without momentum."""
    for name, child in module.named_children():
        if isinstance(child, nn.modules.batchnorm._BatchNorm):
            if child.momentum is None:
                raise ValueError(f"batch norm {name!r} averages all batches alike: ours needs a momentum")
            ours = SyncBatchNorm(child.num_features, child.eps, child.momentum)
            ours.load_state_dict(child.state_dict())
            setattr(module, name, ours)
        else:
            use_sync_batch_norm(child)
    return module


def conv_bn(
    dims: int, inputs: int, outputs: int, kernel: int = 3, *, stride: int = 1, dilation: int = 1
) -> nn.Sequential:
    """Convolution, batch norm, ReLU in 2 or 3 dimensions, size kept at stride 1."""
    conv = nn.Conv2d if dims == 2 else nn.Conv3d
    padding = dilation * (kernel // 2)
    return nn.Sequential(
        conv(inputs, outputs, kernel, stride, padding, dilation, bias=False),
        SyncBatchNorm(outputs),
        nn.ReLU(inplace=True),
    )


class _Pointwise:
    """A convolution with a kernel of 1 as one matrix product over all cells: (N, inputs, …) -> (N, outputs, …), channels last in
    memory. The convolution itself, on the CPU, takes the channels to the front first, and whatever follows with them."""

    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, 1)  # pyright: ignore[reportCallIssue] (of the convolution)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.movedim(1, -1), self.weight.flatten(1), self.bias).movedim(-1, 1)


class Pointwise2d(_Pointwise, nn.Conv2d):
    """See ``_Pointwise``; parameters of ``nn.Conv2d(inputs, outputs, 1)``."""


class Pointwise3d(_Pointwise, nn.Conv3d):
    """See ``_Pointwise``; parameters of ``nn.Conv3d(inputs, outputs, 1)``."""


class Merge(nn.Conv3d):
    """``Pointwise3d`` of several volumes side by side, each resized to one shape, without that they are ever side by side: both
    are linear, so each volume is mapped at its own size, and what is resized has the channels of the result."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, 1)

    def forward(self, levels: Sequence[Tensor], shape: tuple[int, int, int]) -> Tensor:
        """Volumes (N, c, x, y, z) whose c add up to the inputs -> (N, outputs, *shape)."""
        columns = self.weight.flatten(1).split([level.shape[1] for level in levels], 1)
        total = None
        for level, weight in zip(levels, columns):
            bias = self.bias if total is None else None
            own = F.linear(level.movedim(1, -1), weight, bias).movedim(-1, 1)
            if own.shape[2:] != shape:
                own = F.interpolate(own, shape, mode="trilinear", align_corners=False)
            total = own if total is None else total + own
        assert total is not None, "an encoder has a level"
        return total


class ResidualBlock(nn.Module):
    """Two 3-convolutions with batch norm and a shortcut, in 2 or 3 dimensions."""

    def __init__(self, dims: int, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        conv = nn.Conv2d if dims == 2 else nn.Conv3d
        self.first = conv_bn(dims, inputs, outputs, stride=stride)
        self.second = nn.Sequential(conv(outputs, outputs, 3, 1, 1, bias=False), SyncBatchNorm(outputs))
        self.shortcut = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(conv(inputs, outputs, 1, stride, bias=False), SyncBatchNorm(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """(N, inputs, …) -> (N, outputs, …), each size divided by the stride and rounded up."""
        return F.relu(self.second(self.first(x)) + self.shortcut(x))


class VolumeEncoder(nn.Module):
    """3-D residual network whose levels are resized to one shape and merged (as COTR).

    Args:
        inputs: channels of the volume.
        channels, blocks, strides: per level.
        outputs: channels of the merged volume.
    """

    def __init__(
        self, inputs: int, channels: Sequence[int], blocks: Sequence[int], strides: Sequence[int], *, outputs: int
    ) -> None:
        super().__init__()
        self.levels = nn.ModuleList()
        for width, count, stride in zip(channels, blocks, strides, strict=True):
            layers = [
                ResidualBlock(3, inputs if i == 0 else width, width, stride if i == 0 else 1) for i in range(count)
            ]
            self.levels.append(nn.Sequential(*layers))
            inputs = width
        self.merge = Merge(sum(channels), outputs)

    def forward(self, x: Tensor, shape: tuple[int, int, int]) -> Tensor:
        """(B, C, X, Y, Z) -> (B, outputs, *shape)."""
        found = []
        for level in self.levels:
            x = level(x)
            found.append(x)
        return self.merge(found, shape)


class AxialEmbedding(nn.Module):
    """Learned position embedding of a voxel: one table per axis, concatenated (96 + 96 + 64 of 256 channels)."""

    def __init__(self, shape: tuple[int, int, int], channels: int) -> None:
        super().__init__()
        plane = channels * 3 // 8
        widths = (plane, plane, channels - 2 * plane)
        tables = [nn.Embedding(n, width) for n, width in zip(shape, widths)]
        for table in tables:
            nn.init.normal_(table.weight, std=0.02)
        self.axes = nn.ModuleList(tables)

    def forward(self, index: Tensor) -> Tensor:
        """(…, 3) integer voxel index -> (…, channels)."""
        return torch.cat([table(index[..., axis]) for axis, table in enumerate(self.axes)], -1)
