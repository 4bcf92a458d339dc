"""Semantic segmentation of LiDAR points, averaged as nuScenes-lidarseg does (Fong et al., "Panoptic nuScenes", RA-L 2022)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from occstream.evaluation.metrics import CONVENTIONS, ConfusionMatrix, Convention, sum_over_ranks
from occstream.sharding.schema import IGNORE, OCC3D, Taxonomy


def convention_of(taxonomy: Taxonomy) -> Convention:
    """How points of these classes are averaged. Those below its ``first`` are noise: neither learned nor answered."""
    return CONVENTIONS["lidarseg" if taxonomy.name == "occ3d" else "occ3d"]


class PointMetric:
    """IoU of each class, their mean, and their mean by how often the truth has them.

    Points whose truth is unknown do not count. For ``occ3d`` classes the convention is lidarseg's: truth 0 (noise) does not
    count either, the mean is over 1..16, and classes that neither truth nor prediction has are skipped. Answers of "empty"
    or, there, of class 0 are errors; the benchmark refuses a submission that holds one.

    Args:
        taxonomy: of the classes.
    """

    def __init__(self, taxonomy: Taxonomy = OCC3D) -> None:
        self.taxonomy = taxonomy
        self.matrix = ConfusionMatrix(taxonomy.num_classes, convention_of(taxonomy))

    def update(self, classes: Tensor, truth: Tensor) -> None:
        """Adds points.

        Args:
            classes: (N,) predicted ids, 0..K-1, or K for a point that is said to be empty.
            truth: (N,) ids, ``IGNORE`` where unknown.

        Raises:
            ValueError: another id.
        """
        k = self.taxonomy.num_classes
        if classes.shape != truth.shape:
            raise ValueError(f"{classes.numel()} predicted classes for {truth.numel()} points")
        for name, values in (("predicted", classes[truth != IGNORE]), ("true", truth[truth != IGNORE])):
            if values.numel() and not 0 <= int(values.min()) <= int(values.max()) <= k:
                raise ValueError(f"a {name} class is not within 0..{k}: {int(values.min())}..{int(values.max())}")
        self.matrix.update(classes, truth)

    def all_reduce(self, device: torch.device | str = "cpu") -> None:
        """Sums the counts over ranks (collective, once)."""
        self.matrix.counts = sum_over_ranks(self.matrix.counts, device)

    def result(self) -> dict[str, float]:
        """Fractions: ``mIoU``, ``fwIoU`` (weighted by the truth's points), ``accuracy``, ``refused`` (share of answers that
        the benchmark does not accept) and ``IoU/class``; NaN where nothing was there to count."""
        first, k = self.matrix.convention.first, self.taxonomy.num_classes
        counts = self.matrix._counted()
        iou, total, rows = self.matrix.class_iou(), float(counts.sum()), counts.sum(1)
        out = {"mIoU": self.matrix.miou(), "fwIoU": math.nan, "accuracy": math.nan, "refused": math.nan}
        if total:
            out["fwIoU"] = float((rows * iou)[rows > 0].sum() / total)
            out["accuracy"] = float(counts.diagonal().sum() / total)
            out["refused"] = float((counts[:, :first].sum() + counts[:, k].sum()) / total)
        return out | {f"IoU/{name}": float(iou[c]) for c, name in enumerate(self.taxonomy.classes) if c >= first}

    def table(self) -> str:
        """For the terminal."""
        found = self.result()
        lines = [", ".join(f"{name} {found[name]:.4f}" for name in ("mIoU", "fwIoU", "accuracy", "refused"))]
        return "\n".join(lines + [f"  {n[4:]:<22} {v:7.4f}" for n, v in found.items() if n.startswith("IoU/")])
