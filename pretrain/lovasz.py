"""Losses of classes that are rare beside others: weighted cross-entropy, and the Lovász extension of the Jaccard loss."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from occstream.models.layers import full_precision, row
from occstream.sharding.schema import IGNORE


def weighted_cross_entropy(
    logits: Tensor, labels: Tensor, weights: Sequence[float] | None = None, *, ignore: int = IGNORE
) -> Tensor:
    """Sum over elements of the softmax cross-entropy times the weight of the true class. Divided by ``weighted_count`` it is
    what torch calls the mean. Without elements it is 0, but in the graph.

    Args:
        logits: (N, K).
        labels: (N,) integers, 0..K-1 or ``ignore``.
        weights: of the K classes; None: all 1.

    Raises:
        ValueError: other than K weights.
    """
    _check_weights(weights, logits.shape[1])
    with full_precision(logits.device):
        wide = logits.float()
        table = None if weights is None else row(wide, weights)
        return F.cross_entropy(wide, labels.long(), table, ignore_index=ignore, reduction="sum")


def weighted_count(
    labels: Tensor, classes: int, weights: Sequence[float] | None = None, *, ignore: int = IGNORE
) -> Tensor:
    """Sum of the weights of all elements' true classes, float32; the host does not wait for it.

    Args:
        labels: integers of any shape.
        classes: K.
        weights: of the K classes; None: all 1.
    """
    _check_weights(weights, classes)
    if weights is None:
        return (labels != ignore).sum().float()
    # Exact numbers first: a sum of millions of weights would depend on its order.
    numbers = torch.stack([(labels == c).sum() for c in range(classes)]).double()
    return (numbers * row(numbers, weights)).sum().float()


def lovasz_softmax(
    probabilities: Tensor,
    labels: Tensor,
    *,
    classes: Sequence[int] | None = None,
    ignore: int = IGNORE,
    sample: int = 0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Lovász-softmax loss (Berman et al., CVPR 2018, eq. 8 and 11): the mean over classes that the labels have of the convex
    extension of 1 - IoU. It is a mean of its own of all elements handed in: frames handed in one by one give the same sum
    however they are spread over ranks. Without any such class it is 0, but in the graph.

    Args:
        probabilities: (N, K), of a softmax.
        labels: (N,) integers, 0..K-1 or ``ignore``.
        classes: which ones are averaged, where they are present; None: all. Occupancy pre-training leaves out "empty" (Yan
            et al., SPOT, eq. 4), whose elements still count as errors of the others.
        sample: at most this many elements, drawn evenly among the known ones, are looked at; 0: all. Sorting is what
            takes time. Classes that were not drawn do not count.
        generator: of the draw, on the CPU; needed with ``sample``.

    Raises:
        ValueError: a sample without a generator.
    """
    if sample and generator is None:
        raise ValueError("a sample of the Lovász loss needs a generator that draws it")
    chosen = list(range(probabilities.shape[1])) if classes is None else list(classes)
    with full_precision(probabilities.device):
        known = (labels != ignore).nonzero().squeeze(1)
        if sample and len(known) > sample:
            known = known[torch.randperm(len(known), generator=generator)[:sample].to(known.device)]
        wide, truth = probabilities[known].float(), labels[known]
        present = torch.stack([(truth == c).any() for c in chosen]).tolist() if chosen else []
        found = [_lovasz(wide[:, c], truth == c) for c, there in zip(chosen, present) if there]
        return torch.stack(found).mean() if found else wide.sum() * 0.0


def lovasz_counts(labels: Tensor, classes: Sequence[int]) -> Tensor:
    """Whether a frame has any of the classes that ``lovasz_softmax`` averages (1) or not (0), float32: what the sum of frames'
    losses is divided by."""
    return torch.stack([(labels == c).any() for c in classes]).any().float()


def draw_of(key: str) -> torch.Generator:
    """Generator of the draw that ``lovasz_softmax`` makes for a frame: a function of its key."""
    digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def _lovasz(probability: Tensor, truth: Tensor) -> Tensor:
    """Of one class that is present: (N,) float32, (N,) bool -> scalar."""
    errors = torch.where(truth, 1 - probability, probability)
    errors, order = errors.sort(descending=True, stable=True)
    return torch.dot(errors, jaccard_steps(truth[order]))


def jaccard_steps(truth: Tensor) -> Tensor:
    """By how much 1 - IoU grows when one element more is wrong, the gradient of the extension (Berman et al., alg. 1).

    Args:
        truth: (N,) bool in the order of falling errors, at least one True.

    Returns:
        (N,) float32, sum 1.
    """
    hits = truth.cumsum(0)
    total = hits[-1]
    # In float64: two neighbors differ by about 1 / N.
    loss = 1 - (total - hits).double() / (total + (~truth).cumsum(0)).double()
    return loss.diff(prepend=loss.new_zeros(1)).float()


def _check_weights(weights: Sequence[float] | None, classes: int) -> None:
    if weights is not None and len(weights) != classes:
        raise ValueError(f"{len(weights)} class weights for {classes} classes; give one each")
