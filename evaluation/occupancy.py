"""Scores of occupancy: binary, geometric and semantic, by class and by range."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from occstream.evaluation.evaluate import EvalResult
from occstream.evaluation.metrics import CONVENTIONS, RangedCounts, ranges_of, sum_over_ranks
from occstream.models import Batch, OccOutputs
from occstream.models.batch import Occupancy, pool_binary
from occstream.sharding.grid import VoxelGrid
from occstream.sharding.schema import IGNORE, Taxonomy

Head = Literal["sigmoid_focal", "softmax_focal"]
HEADLINE = {"binary_iou": "binary IoU", "iou": "IoU", "miou": "mIoU"}


@dataclass
class OccupancyResult(EvalResult):
    """Scores in percent. ``miou``, ``iou`` and ``per_class`` are None when the network has no semantic part, ``binary_iou``
    when it has no binary head.

    Attributes:
        binary_iou: on the binary head's own grid, labels pooled.
        iou: geometric, of the semantic output. miou: by the convention.
        per_class: IoU by class name; for classes that do not occur NaN, or 0 by the convention.
        ranges: ``binary_iou``, ``iou`` and ``miou`` by range (``metrics.ranges_of``).
        mask, convention: as declared.
        unknown: share (0..1) of the voxels counted that the labels do not know; None for a mask that counts none of them.
    """

    binary_iou: float | None = None
    iou: float | None = None
    miou: float | None = None
    per_class: dict[str, float] = field(default_factory=dict)
    mask: str = "auto"
    convention: str = "occ3d"
    unknown: float | None = None
    ranges: dict[str, dict[str, float]] = field(default_factory=dict)
    headline: ClassVar[Mapping[str, str]] = HEADLINE

    def scores(self) -> dict[str, float]:
        out = {}
        if self.unknown is not None:
            out["unknown_share"] = 100 * self.unknown
        if self.binary_iou is not None:
            out["binary_iou"] = self.binary_iou
        if self.miou is not None:
            out |= {"iou": self.iou, "miou": self.miou}
            out |= {f"class/{name}": value for name, value in self.per_class.items()}
        for name, scores in self.ranges.items():
            out |= {f"range/{name}/{key}": value for key, value in scores.items()}
        return out

    def conditions(self) -> str:
        unknown = f", {100 * self.unknown:.1f} % unknown voxels counted" if self.unknown else ""
        return f"convention {self.convention}, mask {self.mask}{unknown}"


def classify(logits: Tensor, kind: Head = "sigmoid_focal", threshold: float = 0.25) -> Tensor:
    """Class of each voxel.

    Args:
        logits: (S, K, X, Y, Z).
        kind: sigmoid_focal: the best class if its probability is above ``threshold``, else free;
            softmax_focal: free is a class with logit 0.

    Returns:
        (S, X, Y, Z) uint8, K = free.
    """
    best, index = logits.max(1)
    return torch.where(best > free_logit(kind, threshold), index, logits.shape[1]).to(torch.uint8)


def free_logit(kind: Head, threshold: float = 0.25) -> float:
    """The logit that a class must beat not to be free."""
    return 0.0 if kind == "softmax_focal" else float(torch.logit(torch.tensor(threshold)))


class OccupancyMetric:
    """Counts voxels of ``OccOutputs`` against the labels of a batch.

    Args:
        taxonomy: of the labels.
        grid: of the labels, for scores by range; None: without.
        convention: how the benchmark of these labels averages, one of ``metrics.CONVENTIONS``.
        mask, unknown: which mask the labels were made with, and what share of unknown voxels it counts; only reported.
        kind, threshold: how logits become classes.
    """

    def __init__(
        self,
        taxonomy: Taxonomy,
        grid: VoxelGrid | None = None,
        *,
        convention: str = "occ3d",
        mask: str = "auto",
        unknown: float | None = None,
        kind: Head = "sigmoid_focal",
        threshold: float = 0.25,
    ) -> None:
        self.taxonomy, self.grid, self.threshold = taxonomy, grid, threshold
        self.kind: Head = kind
        self.mask, self.unknown, self.convention = mask, unknown, convention
        self.rule = CONVENTIONS[convention]
        self.classes = RangedCounts(taxonomy.num_classes, self.rule, ranges_of(grid) if grid else None)
        self.binary: RangedCounts | None = None
        self.semantic = False
        self.nothing = (
            f"without a single valid voxel (mask {mask}): there is no score; choose other scenes or another eval.mask"
        )

    def update(self, outputs: OccOutputs, batch: Batch) -> int:
        """Counts a batch; returns its number of valid voxels."""
        labels = batch.part(Occupancy)
        if outputs.binary_logits is not None:
            x, y, z = outputs.binary_logits.shape[1:]
            shape = (x, y, z)
            truth, valid = pool_binary(labels.binary, labels.binary_valid, shape)
            ranges = ranges_of(self.grid, shape) if self.grid and not self.binary else None
            self.binary = self.binary or RangedCounts(1, self.rule, ranges)
            self.binary.update((outputs.binary_logits <= 0).byte(), torch.where(valid, (~truth).byte(), IGNORE))
        if outputs.semantic_logits is not None and batch.labeled:
            self.semantic = True
            self.classes.update(classify(outputs.semantic_logits, self.kind, self.threshold), labels.classes())
        return int(labels.binary_valid.sum())

    def all_reduce(self, device: torch.device) -> None:
        """Sums over ranks (collective)."""
        self.classes.all_reduce(device)
        if self.binary:
            self.binary.all_reduce(device)
        self.semantic = bool(sum_over_ranks(torch.tensor([int(self.semantic)]), device).item())

    def result(self) -> OccupancyResult:
        """The scores."""
        result = OccupancyResult(
            frames=0,
            binary_iou=100 * self.binary.matrix().iou() if self.binary else None,
            mask=self.mask,
            unknown=self.unknown,
            convention=self.convention,
        )
        _add_scores(result, self.taxonomy, self.classes if self.semantic else None, self.binary)
        return result


def _add_scores(
    result: OccupancyResult, taxonomy: Taxonomy, confusion: RangedCounts | None, binary: RangedCounts | None
) -> None:
    if confusion:
        matrix = confusion.matrix()
        result.iou, result.miou = 100 * matrix.iou(), 100 * matrix.miou()
        named = list(zip(taxonomy.classes, matrix.class_iou().tolist()))
        result.per_class = {name: 100 * v for name, v in named[matrix.convention.first :]}
    counts = confusion or binary
    for part in counts.ranges.named if counts and counts.ranges else ():
        scores = result.ranges[part] = {}
        if binary and binary.ranges and part in binary.ranges.named:  # its voxels may be too large for a range
            scores["binary_iou"] = 100 * binary.matrix(part).iou()
        if confusion:
            scores |= {"iou": 100 * confusion.matrix(part).iou(), "miou": 100 * confusion.matrix(part).miou()}
