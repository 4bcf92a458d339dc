"""What a decoder makes of coarse voxel features, dense or sparse alike: heads need not know which one it was.

Shape legend: see ``batch``; ``N`` is the number of active voxels of all frames here.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from occstream.models.layers import SyncBatchNorm, checkpointed

Shape = tuple[int, int, int]


@dataclass(frozen=True)
class Level:
    """What a decoder takes for occupied on one of its grids.

    Attributes:
        logits: (N,) float32 of the voxels that it looked at; > 0 is occupied.
        places: (N,) int64, ascending: their rows in the batch's voxels laid end to end (frame times voxels of the grid plus
            flat voxel index). None: all voxels, N = B X Y Z.
        shape: (X, Y, Z) of the grid.
        kept: (B,) int64, how many of them went on, of each frame; None: all.
    """

    logits: Tensor
    places: Tensor | None
    shape: Shape
    kept: Tensor | None = None

    def at(self, volume: Tensor) -> Tensor:
        """(B, X, Y, Z) of anything -> (N,) at the voxels that have a logit."""
        flat = volume.reshape(-1)
        return flat if self.places is None else flat[self.places]


@dataclass(frozen=True)
class Decoded:
    """Features on a decoder's finest grid. What was pruned is empty.

    Attributes:
        features: (B, C, X, Y, Z) of all voxels, or (N, C) of the active ones.
        levels: what was taken for occupied, from coarse to fine; empty for a decoder that does not ask.
        indices: (N, 4) int64 of the active voxels, ascending: frame, x, y, z. None: all voxels are.
        shape: (X, Y, Z) of the grid.
        frames: B.
    """

    features: Tensor
    levels: tuple[Level, ...]
    indices: Tensor | None
    shape: Shape
    frames: int

    @classmethod
    def dense(cls, features: Tensor, levels: Sequence[Level] = ()) -> Decoded:
        """Of a decoder that prunes nothing.

        Args:
            features: (B, C, X, Y, Z).
        """
        x, y, z = features.shape[2:]
        return cls(features, tuple(levels), None, (x, y, z), len(features))

    @property
    def places(self) -> Tensor | None:
        """(N,) int64, ascending: rows of the active voxels in the batch's voxels laid end to end; None: all are active."""
        if self.indices is None:
            return None
        b, x, y, z = self.indices.unbind(1)
        return ((b * self.shape[0] + x) * self.shape[1] + y) * self.shape[2] + z

    def first(self, frames: int, *, detached: bool = False) -> Decoded:
        """Of the first frames, with all levels; ``detached`` from the graph where asked."""
        features, indices = self.features.detach() if detached else self.features, self.indices
        if indices is None:
            return dataclasses.replace(self, features=features[:frames], frames=frames)
        count = int((indices[:, 0] < frames).sum())
        return dataclasses.replace(self, features=features[:count], indices=indices[:count], frames=frames)

    def at(self, volume: Tensor) -> Tensor:
        """(B, X, Y, Z) of anything -> (N,), in the order of ``rows``."""
        flat, places = volume.reshape(-1), self.places
        return flat if places is None else flat[places]

    def rows(self) -> Tensor:
        """(N, C) features of the active voxels, frame after frame, in ascending order of x, y, z."""
        return self.features if self.indices is not None else self.features.movedim(1, -1).flatten(0, -2)

    def volume(self, values: Tensor, empty: Tensor | float = 0.0) -> Tensor:
        """Values of the active voxels on the whole grid.

        Args:
            values: (N, K), in the order of ``rows``.
            empty: what pruned voxels have: one number, or (K,).

        Returns:
            (B, K, X, Y, Z), channels last in memory.
        """
        places = self.places
        if places is None:
            return values.unflatten(0, (self.frames, *self.shape)).movedim(-1, 1)
        fill = torch.as_tensor(empty, dtype=values.dtype, device=values.device)
        whole = fill.expand(self.frames * math.prod(self.shape), values.shape[1]).clone()
        return whole.index_copy(0, places, values).unflatten(0, (self.frames, *self.shape)).movedim(-1, 1)

    def bev(self, values: Tensor) -> Tensor:
        """Means over height, in which pruned voxels count as zero (PanoOcc, Sec. 3.6): what is above a cell is added up and
        divided by Z, however many of its voxels are active.

        Args:
            values: (N, K), in the order of ``rows``.

        Returns:
            (B, K, X, Y) float32.
        """
        x, y, z = self.shape
        values, places = values.float(), self.places
        if places is None:
            return values.unflatten(0, (self.frames, x, y, z)).mean(3).movedim(-1, 1)
        total = values.new_zeros(self.frames * x * y, values.shape[1])
        column = torch.div(places, z, rounding_mode="floor")
        return (total.index_add(0, column, values) / z).unflatten(0, (self.frames, x, y)).movedim(-1, 1)


class DenseDecoder(nn.Module):
    """Deconvolutions with batch norm and ReLU, coarse to fine, of every voxel (PanoOcc, Sec. 3.5).

    Kernels overlap in the plane and do not in height, where there are few voxels. A level that keeps its size in x and y is a
    convolution of 5 x 5 there.

    Args:
        channels: of the coarse features.
        widths: channels of each level.
        factors: by how much each level is finer in x, y and z.
        checkpointing: recompute activations in the backward pass.
    """

    def __init__(
        self, channels: int, widths: Sequence[int], factors: Sequence[Shape], *, checkpointing: bool = False
    ) -> None:
        super().__init__()
        self.checkpointing, levels = checkpointing, []
        for width, factor in zip(widths, factors, strict=True):
            plane = [_overlapping(f) for f in factor[:2]]
            kernel, padding = zip(*plane, (factor[2], 0))
            up = nn.ConvTranspose3d(channels, width, kernel, factor, padding, bias=False)
            levels.append(nn.Sequential(up, SyncBatchNorm(width), nn.ReLU(inplace=True)))
            channels = width
        self.levels = nn.ModuleList(levels)

    def forward(self, features: Tensor, truth: Tensor | None = None) -> Decoded:
        """Decodes.

        Args:
            features: (B, C, X, Y, Z).
            truth: what is occupied; not needed.
        """
        for level in self.levels:
            features = checkpointed(level, features, when=self.checkpointing)
        return Decoded.dense(features)


def _overlapping(factor: int) -> tuple[int, int]:
    """Kernel and padding of a transposed convolution that makes an axis ``factor`` times as long, and reaches its neighbors."""
    if factor == 1:
        return 5, 2
    return (2 * factor, factor // 2) if factor % 2 == 0 else (3 * factor, factor)
