"""Streaming confusion matrices: exact counts, also over ranks and by range, and what benchmarks make of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from occstream.sharding.grid import VoxelGrid
from occstream.sharding.schema import IGNORE


@dataclass(frozen=True)
class Convention:
    """How a benchmark's own script averages; the histogram is the same for all.

    Attributes:
        first: the mean is over the classes from this one on.
        epsilon: in the denominator of a class's IoU. 0: a class that neither truth nor prediction has is NaN and skipped;
            above: it counts as 0.
        geometry_epsilon: likewise of occupied against free.
        drop_first: voxels that are truly of class 0 are left out.
    """

    first: int = 0
    epsilon: float = 0.0
    geometry_epsilon: float = 0.0
    drop_first: bool = False


CONVENTIONS: Mapping[str, Convention] = {
    "occ3d": Convention(),
    "openscene": Convention(epsilon=1e-5, geometry_epsilon=1e-5),
    # Class 0 is noise, which the truth never has. Where a class does not occur its script's mean is NaN: we skip it.
    "openoccupancy": Convention(first=1),
    "semantickitti": Convention(epsilon=1e-15),
    # Its script refuses predictions of class 0 (noise); here they are errors, like those of free.
    "lidarseg": Convention(first=1, drop_first=True),
}


class ConfusionMatrix:
    """Counts over voxels: rows truth, columns prediction, both 0..K-1 and K = free.

    Args:
        num_classes: K.
        convention: of the scores.
    """

    def __init__(self, num_classes: int, convention: Convention = CONVENTIONS["occ3d"]) -> None:
        self.num_classes, self.convention = num_classes, convention
        self.counts = torch.zeros(num_classes + 1, num_classes + 1, dtype=torch.int64)

    def update(self, prediction: Tensor, truth: Tensor, valid: Tensor | None = None) -> None:
        """Adds voxels; where ``truth`` is 255 or ``valid`` is False they are left out.

        Args:
            prediction, truth: integer tensors of one shape.
            valid: bool of the same shape.
        """
        truth = truth if valid is None else torch.where(valid, truth, IGNORE)
        self.counts += _histograms(prediction, truth, None, num_classes=self.num_classes, shells=1)[0]

    def _counted(self) -> Tensor:
        counts = self.counts.double()
        if self.convention.drop_first:
            counts[0] = 0
        return counts

    def class_iou(self) -> Tensor:
        """(K + 1,) float64 IoU of each class and of free; where neither truth nor prediction has one: by the convention."""
        c = self._counted()
        hit = c.diagonal()
        return hit / (c.sum(0) + c.sum(1) - hit + self.convention.epsilon)

    def miou(self) -> float:
        """Mean IoU of the convention's classes, without free; NaN is skipped."""
        return float(self.class_iou()[self.convention.first : self.num_classes].nanmean())

    def iou(self) -> float:
        """Geometric IoU: any class against free; NaN (by the convention 0) if neither truth nor prediction has anything."""
        c = self._counted()
        k = self.num_classes
        return float(c[:k, :k].sum() / (c.sum() - c[k, k] + self.convention.geometry_epsilon))


@dataclass(frozen=True)
class Ranges:
    """A grid by distance from the ego, for scores by range.

    Attributes:
        shell: (X, Y) int64, disjoint shells, numbered.
        shells: how many.
        named: by name of a range, the shells that it is made of.
    """

    shell: Tensor
    shells: int
    named: dict[str, tuple[int, ...]]


def ranges_of(grid: VoxelGrid, shape: tuple[int, int, int] | None = None) -> Ranges:
    """The ranges that benchmarks report for a kind of grid.

    Grids that begin at the ego (SemanticKITTI): 12.8, 25.6 and 51.2 m, nested: 0 <= x < r and |y| <= r / 2. All others: near
    and far, max(|x|, |y|) below 25 m and from there on. Ranges that the grid does not reach are not there.

    Args:
        grid: of the labels.
        shape: of a coarser one over the same box; voxels are sorted by their centers.
    """
    shape = shape or grid.shape
    x, y = (
        torch.tensor(grid.lower[a] + (grid.upper[a] - grid.lower[a]) / shape[a] * (np.arange(shape[a]) + 0.5))
        for a in (0, 1)
    )
    if grid.lower[0] >= 0:
        reach = torch.maximum(x[:, None], 2 * y[None, :].abs())
        limits = (12.8, 25.6, 51.2)
    else:
        reach = torch.maximum(x[:, None].abs(), y[None, :].abs())
        limits = (25.0,)
    shell = torch.bucketize(reach, torch.tensor(limits, dtype=torch.float64), right=True)
    there = sorted(set(shell.flatten().tolist()))
    if len(there) == 1:
        return Ranges(torch.zeros_like(shell), 1, {})
    if len(limits) == 1:
        named = {"near 25 m": (0,), "far 25 m": (1,)}
    else:
        named = {f"{limit:g} m": tuple(range(n + 1)) for n, limit in enumerate(limits) if n <= there[-1]}
    return Ranges(shell, len(limits) + 1, named)


class RangedCounts:
    """Confusion matrices of all ranges from one pass: counts over voxels by shell.

    Args:
        num_classes: K.
        convention: of the scores.
        ranges: None: one part, the whole grid.
    """

    def __init__(self, num_classes: int, convention: Convention, ranges: Ranges | None = None) -> None:
        self.num_classes, self.convention, self.ranges = num_classes, convention, ranges
        n = num_classes + 1
        self.counts = torch.zeros(ranges.shells if ranges else 1, n, n, dtype=torch.int64)

    def update(self, prediction: Tensor, truth: Tensor) -> None:
        """Adds voxels, (S, X, Y, Z) integers; where ``truth`` is 255 they are left out."""
        shell = self.ranges.shell.to(truth.device)[:, :, None].expand(truth.shape) if self.ranges else None
        shells = len(self.counts)
        self.counts += _histograms(prediction, truth, shell, num_classes=self.num_classes, shells=shells)

    def all_reduce(self, device: torch.device | str = "cpu") -> None:
        """Sums the counts over ranks (collective)."""
        self.counts = sum_over_ranks(self.counts, device)

    def matrix(self, part: str | None = None) -> ConfusionMatrix:
        """Of a range, or of everything."""
        matrix = ConfusionMatrix(self.num_classes, self.convention)
        if part is None:
            matrix.counts = self.counts.sum(0)
        else:
            assert self.ranges is not None, "only where there are ranges"
            matrix.counts = self.counts[list(self.ranges.named[part])].sum(0)
        return matrix


def _histograms(prediction: Tensor, truth: Tensor, shell: Tensor | None, *, num_classes: int, shells: int) -> Tensor:
    """(shells, K + 1, K + 1) int64 on the CPU: truth by prediction in each shell."""
    keep, n = truth != IGNORE, num_classes + 1
    index = truth[keep].long() * n + prediction[keep].long()
    if shell is not None:
        index += shell[keep] * (n * n)
    return torch.bincount(index, minlength=shells * n * n).view(shells, n, n).cpu()


def sum_over_ranks(counts: Tensor, device: torch.device | str = "cpu") -> Tensor:
    """Exact sum of an int64 tensor over all ranks (collective); the tensor itself in one process."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return counts
    moved = counts.to(device)
    dist.all_reduce(moved)
    return moved.cpu()
