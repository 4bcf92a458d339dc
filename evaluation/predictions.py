"""Predictions as labels: what a network says about frames, in the form that shards hold (B2S, App. D)."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Iterator
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from occstream.evaluation.occupancy import Head, free_logit
from occstream.models import Batch
from occstream.models.batch import Occupancy
from occstream.sharding.schema import Labels

Keep = Literal["top1", "top2", "logits", "evidence"]


@torch.no_grad()
def predict(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    keep: Keep = "top1",
    kind: Head = "sigmoid_focal",
    threshold: float = 0.25,
    flips: bool = False,
    occupied: Literal["labels", "predicted"] = "predicted",
) -> Iterator[tuple[str, Labels]]:
    """Labels that a network gives to frames, in the order of the batches.

    Args:
        model: with a semantic part, in evaluation mode.
        batches: not augmented.
        keep: the best class alone (top1); the two best classes and their logits (top2); the logits of all classes; or, beside
            top2, how probably each voxel is occupied (evidence): also those that are predicted to be free.
        kind, threshold: how logits become classes; free takes part with the logit that a class must beat.
        flips: mean of the logits over the scene and its mirror images along x and y (four forwards; the grid must be
            symmetric).
        occupied: voxels that get a class: occupied in the batch's labels, or predicted not to be free.

    Yields:
        Key and labels of each frame: ``binary`` are those voxels, ``semantic`` is free elsewhere.

    Raises:
        ValueError: the network has no semantic part, or evidence is asked for of what the labels say.
    """
    if keep == "evidence" and occupied == "labels":
        raise ValueError("this network takes from the labels which voxels are occupied: it has no evidence to keep")
    mirrors = [(False, False), (True, False), (False, True), (True, True)] if flips else [(False, False)]
    for batch in batches:
        batch = dataclasses.replace(batch.unlabeled(), labeled=batch.size)
        logits = functools.reduce(torch.add, (_logits(model, batch, m) for m in mirrors)) / len(mirrors)
        wide = torch.cat([logits, torch.full_like(logits[:, :1], free_logit(kind, threshold))], 1)
        for index, key in enumerate(batch.keys):
            # A copy: the batch's buffers go back to the readers, these labels are kept.
            truth = batch.part(Occupancy).binary[index].clone() if occupied == "labels" else None
            labels = _labels(wide[index], truth, keep)
            if keep == "evidence":
                labels.evidence = _evidence(wide[index], kind)
            yield key, labels


def _logits(model: nn.Module, batch: Batch, mirror: tuple[bool, bool]) -> Tensor:
    """What the network says about the mirrored scene, mirrored back."""
    logits = model(batch.mirrored(*mirror)).semantic_logits
    if logits is None:
        raise ValueError("this network predicts no classes (pre-training ends at the binary head); fine-tune it")
    return logits.flip(_dims(mirror, 2))


def _dims(mirror: tuple[bool, bool], first: int) -> list[int]:
    return [first + axis for axis, wanted in enumerate(mirror) if wanted]


def _labels(logits: Tensor, truth: Tensor | None, keep: Keep) -> Labels:
    """logits (K + 1, X, Y, Z) with free last; truth (X, Y, Z) bool or None."""
    free = len(logits) - 1
    best = logits.argmax(0)
    binary = truth if truth is not None else best != free
    labels = Labels(
        binary=binary.cpu().numpy(),
        semantic=torch.where(binary, best, free).to(torch.uint8).cpu().numpy(),
    )
    rows = logits.movedim(0, -1)[binary]  # (M, K + 1) in C order
    if keep in ("top2", "evidence"):
        values, ranked = rows.topk(2, dim=1)
        labels.logits, labels.ranked = _half(values), ranked.to(torch.uint8).cpu().numpy()
    elif keep == "logits":
        labels.logits = _half(rows)
    return labels


def _evidence(logits: Tensor, kind: Head) -> np.ndarray:
    """(K + 1, X, Y, Z) logits with free last -> (X, Y, Z) uint8: probability that it is not free, or, where each class has a
    probability of its own, that of the best class."""
    share = 1 - logits.softmax(0)[-1] if kind == "softmax_focal" else logits[:-1].amax(0).sigmoid()
    return (255 * share).round().to(torch.uint8).cpu().numpy()


def _half(values: Tensor) -> np.ndarray:
    return values.clamp(-60000, 60000).to(torch.float16).cpu().numpy()
