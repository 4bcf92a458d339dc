"""Losses of a segmentor of LiDAR points: weighted cross-entropy and Lovász-softmax, sums and what they are divided by."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from occstream.models.batch import Batch, PointLabels
from occstream.pretrain.lovasz import lovasz_counts, lovasz_softmax, weighted_count, weighted_cross_entropy
from occstream.sharding.schema import IGNORE


@dataclass
class PointLossConfig:
    """Weights of the losses of points."""

    cross_entropy: float = 1.0
    """Weight of the cross-entropy."""
    lovasz: float = 1.0
    """Weight of the Lovász loss: of each frame, over the classes that it has."""
    class_weights: tuple[float, ...] | None = None
    """Weight in the cross-entropy of each class that is learned, in their order; None: all 1."""

    def __post_init__(self) -> None:
        if self.cross_entropy < 0 or self.lovasz < 0 or not self.cross_entropy + self.lovasz:
            raise ValueError(
                f"cross_entropy is {self.cross_entropy} and lovasz {self.lovasz}, must not be negative, nor both be 0"
            )

    def weights(self) -> Mapping[str, float]:
        """Of the terms of ``point_sums``."""
        return {"points": self.cross_entropy, "lovasz": self.lovasz}


def point_counts(batch: Batch, classes: int, config: PointLossConfig, *, first: int = 0) -> dict[str, Tensor]:
    """What ``point_sums`` are divided by, of the labels alone: the sum of the weights of known points, and the number of frames
    that have any.

    Args:
        batch: with ``point_labels``.
        classes: K.
        first: classes below it are not learned (noise in nuScenes-lidarseg: 1).
    """
    labels = _labels(batch, first)
    frames = labels.split(batch.part(PointLabels).counts.tolist())
    known = [lovasz_counts(part, range(classes - first)) for part in frames]
    return {
        "points": weighted_count(labels, classes - first, config.class_weights),
        "lovasz": torch.stack(known).sum() if known else torch.zeros((), device=batch.device),
    }


def point_sums(logits: Tensor, batch: Batch, config: PointLossConfig, *, first: int = 0) -> dict[str, Tensor]:
    """Sums of losses by term: of known points, and of frames. Without labeled points they are 0, but in the graph.

    Args:
        logits: (N, K) of points, those of labeled frames first.
        batch, first: as of ``point_counts``.

    Raises:
        ValueError: class weights that do not fit the classes, or fewer logits than labels.
    """
    labels = _labels(batch, first)
    if len(logits) < len(labels):
        raise ValueError(f"{len(labels)} labels for {len(logits)} points")
    logits = logits[: len(labels), first:].float()
    sizes = batch.part(PointLabels).counts.tolist()
    frames = zip(logits.softmax(1).split(sizes), labels.split(sizes))
    found = [lovasz_softmax(probabilities, part) for probabilities, part in frames]
    return {
        "points": weighted_cross_entropy(logits, labels, config.class_weights),
        "lovasz": torch.stack(found).sum() if found else logits.sum() * 0.0,
    }


def _labels(batch: Batch, first: int) -> Tensor:
    """(n,) int64 of labeled points, counted from ``first`` on."""
    labels = batch.part(PointLabels).classes.long()
    return torch.where((labels == IGNORE) | (labels < first), IGNORE, labels - first)
