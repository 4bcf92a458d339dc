"""Streaming confusion matrices: exact counts, also over ranks (SPEC section F)."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from occstream.sharding.schema import IGNORE


class ConfusionMatrix:
    """Counts over voxels: rows truth, columns prediction, both 0..K-1 and K = free.

    Args:
        num_classes: K.
    """

    def __init__(self, num_classes: int):
        self.num_classes = num_classes
        self.counts = torch.zeros(num_classes + 1, num_classes + 1, dtype=torch.int64)

    def update(self, prediction: Tensor, truth: Tensor, valid: Tensor | None = None) -> None:
        """Adds voxels; where ``truth`` is 255 or ``valid`` is False they are left out.

        Args:
            prediction, truth: integer tensors of one shape.
            valid: bool of the same shape.
        """
        keep = truth != IGNORE
        if valid is not None:
            keep = keep & valid
        n = self.num_classes + 1
        index = truth[keep].long() * n + prediction[keep].long()
        self.counts += torch.bincount(index, minlength=n * n).view(n, n).cpu()

    def all_reduce(self, device: torch.device | str = "cpu") -> None:
        """Sums the counts over ranks (collective)."""
        self.counts = sum_over_ranks(self.counts, device)

    def class_iou(self) -> Tensor:
        """(K + 1,) float64 IoU of each class and of free; NaN for classes that neither truth nor prediction has."""
        c = self.counts.double()
        hit = c.diagonal()
        return hit / (c.sum(0) + c.sum(1) - hit)

    def miou(self, classes: list[int] | None = None) -> float:
        """Mean IoU without free, NaN skipped (SPEC F.1): over ``classes``, or all."""
        found = self.class_iou()[: self.num_classes]
        return float(found[classes if classes is not None else slice(None)].nanmean())

    def iou(self) -> float:
        """Geometric IoU: any class against free."""
        c = self.counts.double()
        k = self.num_classes
        return float(c[:k, :k].sum() / (c.sum() - c[k, k]))


@dataclass
class BinaryCounts:
    """Occupied against free: exact integer counts."""

    counts: Tensor = field(default_factory=lambda: torch.zeros(3, dtype=torch.int64))

    def update(self, prediction: Tensor, truth: Tensor, valid: Tensor) -> None:
        """Bool tensors of one shape."""
        both = (prediction & truth & valid).sum()
        extra = (prediction & ~truth & valid).sum()
        lost = (~prediction & truth & valid).sum()
        self.counts += torch.stack([both, extra, lost]).cpu()

    def all_reduce(self, device: torch.device | str = "cpu") -> None:
        """Sums the counts over ranks (collective)."""
        self.counts = sum_over_ranks(self.counts, device)

    def iou(self) -> float:
        """NaN if there is nothing occupied in truth or prediction."""
        return float(self.counts[0].double() / self.counts.sum())


def sum_over_ranks(counts: Tensor, device: torch.device | str = "cpu") -> Tensor:
    """Exact sum of an int64 tensor over all ranks (collective); the tensor itself in one process."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return counts
    moved = counts.to(device)
    dist.all_reduce(moved)
    return moved.cpu()
