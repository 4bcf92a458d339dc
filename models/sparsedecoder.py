"""Occupancy sparsify: a coarse-to-fine decoder that prunes empty voxels after each level (PanoOcc, Sec. 3.5).

Each level makes the children of the voxels that are left, asks of each child whether it is occupied, and goes on with the
best. Kernels are as large as their strides: children do not overlap, nothing spreads to voxels that were pruned, and a
voxel's features do not depend on which others are left (the paper's larger kernels dilate what they then prune again). So
the work grows with what is occupied, not with the grid, and with nothing pruned it is a dense decoder of such kernels.

Pruned voxels are empty. Shape legend: see ``batch``; ``N`` is the number of voxels of all frames here.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from occstream.models.batch import pool_binary
from occstream.models.decoding import Decoded, Level, Shape
from occstream.models.layers import checkpointed, full_precision, row
from occstream.models.sparse import Backend, SparseTensor, SubMConv3d

KeepBy = Literal["share", "threshold"]
Selection = Literal["predicted", "union"]


def check_keep(keep: Sequence[float], levels: int, by: KeepBy) -> None:
    """Raises ValueError if there is not one number in 0..1 a level; a share is above 0."""
    if len(keep) != levels:
        raise ValueError(f"keep has {len(keep)} numbers, must have one for each of {levels} levels")
    for number in keep:
        if not 0 <= number <= 1 or (by == "share" and not number):
            wanted = "a share above 0 and up to 1" if by == "share" else "a probability from 0 to 1"
            raise ValueError(f"keep has {number}, must be {wanted}")


def kept_count(share: float, voxels: int) -> int:
    """How many voxels a share of some is, halves rounded up."""
    return math.floor(share * voxels + 0.5)


@dataclass(frozen=True)
class Active:
    """Voxels that are left on one grid.

    Attributes:
        features: (N, C).
        places: (N,) int64, ascending: rows in the batch's voxels laid end to end.
        counts: voxels of each frame.
        shape: (X, Y, Z) of the grid.
    """

    features: Tensor
    places: Tensor
    counts: list[int]
    shape: Shape

    @property
    def indices(self) -> Tensor:
        """(N, 4) int64: frame, x, y, z."""
        found = [self.places]
        for size in reversed(self.shape):
            found[:1] = [torch.div(found[0], size, rounding_mode="floor"), found[0] % size]
        return torch.stack(found, 1)


class Neighbors(nn.Module):
    """What voxels see of the active ones around them: a submanifold convolution of 3 x 3 x 3."""

    gathered_whole = (
        True  # ZeRO-3 finds no tensors in what a sparse convolution gives; in and out of this they are plain
    )

    def __init__(self, channels: int, backend: Backend) -> None:
        super().__init__()
        self.conv, self.norm = SubMConv3d(channels, channels, 3, backend=backend), nn.LayerNorm(channels)

    def forward(self, features: Tensor, indices: Tensor, shape: Shape, frames: int) -> Tensor:
        """(N, C) features at (N, 4) ascending voxels -> (N, C)."""
        # The kernel is the same along all axes, so it does not matter that x comes first.
        voxels = SparseTensor(features, indices.int().contiguous(), shape, frames)
        return F.relu(self.norm(self.conv(voxels).features))


class SparseLevel(nn.Module):
    """Voxels -> their children, of which some are kept.

    Args:
        inputs, outputs: channels of the voxels and of their children.
        stride: children of a voxel along x, y, z.
        keep: share of a frame's children that are kept (at least as many as the labels choose), or the probability from
            which they are.
        by: which of both ``keep`` is.
        submanifold: a residual 3 x 3 x 3 convolution among what is kept. Without it each voxel sees itself alone.
        backend: of that convolution.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        stride: Shape,
        *,
        keep: float,
        by: KeepBy = "share",
        submanifold: bool = False,
        backend: Backend = "torch",
    ) -> None:
        super().__init__()
        self.stride, self.each, self.keep, self.by = stride, math.prod(stride), keep, by
        # No batch norm: what is active differs between frames and between training and use, and a rank may have nothing.
        self.up, self.norm = nn.Linear(inputs, self.each * outputs), nn.LayerNorm(outputs)
        self.score = nn.Linear(outputs, 1)
        self.near = Neighbors(outputs, backend) if submanifold else None

    def shape(self, shape: Shape) -> Shape:
        """(X, Y, Z) of the children's grid."""
        return shape[0] * self.stride[0], shape[1] * self.stride[1], shape[2] * self.stride[2]

    def forward(self, x: Active, truth: Tensor | None) -> tuple[Active, Level]:
        """Goes one level down.

        Args:
            x: voxels.
            truth: bool on the children's grid (B, X, Y, Z): those that are kept in any case; or None.

        Returns:
            The kept children, and what was said of all children.
        """
        shape = self.shape(x.shape)
        children = F.relu(self.norm(self.up(x.features).view(-1, *self.norm.normalized_shape)))
        places, order = self._places(x, shape).sort()
        with full_precision(children.device):
            logits = self.score(children.to(self.score.weight.dtype)).squeeze(1)[order]
        wanted = None if truth is None else truth.flatten()[places]
        chosen, kept = self._choose(logits.detach(), wanted, [n * self.each for n in x.counts])
        gates = logits[chosen].sigmoid().to(children.dtype)
        left = Active(children[order[chosen]] * gates[:, None], places[chosen], kept, shape)
        if self.near is not None:
            features = left.features + self.near(left.features, left.indices, shape, len(kept))
            left = dataclasses.replace(left, features=features)
        return left, Level(logits, places, shape, row(places, kept))

    def _places(self, x: Active, shape: Shape) -> Tensor:
        """(N children,) int64: rows of the children in the batch's voxels laid end to end, parent after parent."""
        steps = torch.cartesian_prod(*(torch.arange(n, device=x.places.device) for n in self.stride))
        frame, *at = x.indices.unsqueeze(1).unbind(2)
        cx, cy, cz = (first * n + step for first, n, step in zip(at, self.stride, steps.unbind(1)))
        return (((frame * shape[0] + cx) * shape[1] + cy) * shape[2] + cz).flatten()

    def _choose(self, scores: Tensor, wanted: Tensor | None, counts: list[int]) -> tuple[Tensor, list[int]]:
        """Rows of what is kept, ascending, and how many of each frame. Of equal scores the voxel that comes first is kept.
        What the labels want comes before all else, and within the share if it fits."""
        if wanted is not None:
            scores = scores.masked_fill(wanted, math.inf)
        frames = scores.split(counts)
        least = [0] * len(counts)
        if self.by == "threshold":
            above = torch.stack([(f.sigmoid() >= self.keep).sum() for f in frames])
            kept: list[int] = above.tolist()
        else:
            kept = [kept_count(self.keep, n) for n in counts]
            if wanted is not None:
                least = torch.stack([part.sum() for part in wanted.split(counts)]).tolist()
        kept = [max(a, b) for a, b in zip(kept, least)]
        first, chosen = 0, []
        for scored, count in zip(frames, kept):
            if count < len(scored):
                best = scored.sort(descending=True, stable=True).indices[:count].sort().values
            else:
                best = torch.arange(len(scored), device=scored.device)
            chosen.append(best + first)
            first += len(scored)
        return torch.cat(chosen), kept


class SparseDecoder(nn.Module):
    """Levels from coarse to fine, each pruned.

    Args:
        channels: of the coarse features.
        widths: channels of each level.
        factors: by how much each level is finer in x, y and z; (1, 1, 1) keeps the grid.
        keep: of each level, see ``SparseLevel``. The paper keeps 0.2, 0.5 and 0.5 (Sec. 4.5).
        by: what ``keep`` is.
        selection: who chooses in training: the scores alone, or in union with the labels, so that what is occupied is never cut
            off. In use the scores alone do.
        submanifold, backend: see ``SparseLevel``.
        checkpointing: recompute activations in the backward pass.
    """

    def __init__(
        self,
        channels: int,
        widths: Sequence[int],
        factors: Sequence[Shape],
        *,
        keep: Sequence[float],
        by: KeepBy = "share",
        selection: Selection = "union",
        submanifold: bool = False,
        backend: Backend = "torch",
        checkpointing: bool = False,
    ) -> None:
        super().__init__()
        check_keep(keep, len(factors), by)
        self.checkpointing = checkpointing
        self.selection: Selection = selection
        self.levels = nn.ModuleList()
        for width, factor, share in zip(widths, factors, keep, strict=True):
            self.levels.append(
                SparseLevel(channels, width, factor, keep=share, by=by, submanifold=submanifold, backend=backend)
            )
            channels = width

    def forward(self, features: Tensor, truth: Tensor | None = None) -> Decoded:
        """Decodes.

        Args:
            features: (B, C, X, Y, Z).
            truth: (B, X', Y', Z') bool, what the labels call occupied, on the finest grid or any that the levels' divide; None
                where there are no labels. Read in training, where labels choose.

        Returns:
            Features (N, C') of the active voxels. In the graph of its losses are all parameters, also with none active.
        """
        x, y, z = features.shape[2:]
        rows = features.movedim(1, -1).flatten(0, -2)
        places = torch.arange(len(rows), device=rows.device)
        left = Active(rows, places, [x * y * z] * len(features), (x, y, z))
        truth = truth if self.training and self.selection == "union" else None
        levels = []
        for level in self.levels:
            assert isinstance(level, SparseLevel)
            pooled = None if truth is None else pool_binary(truth, truth, level.shape(left.shape))[0]
            left, said = checkpointed(level, left, pooled, when=self.checkpointing)
            levels.append(said)
        return Decoded(left.features, tuple(levels), left.indices, left.shape, len(features))
