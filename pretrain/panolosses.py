"""Losses of PanoOcc's voxels (Sec. 3.6), fp32: sums over what is known and what they are divided by.

Terms: ``binary`` (occupied or not, of all frames, a normalizer for each role), ``occupied`` (the same at each level of a decoder
that prunes), and of semantic frames ``voxel`` (their class),
``lovasz`` and ``thing`` (thing or not).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from occstream.models.batch import Batch, Occupancy, pool_binary
from occstream.models.layers import full_precision, row
from occstream.models.panoocc import PanoOutputs
from occstream.pretrain.levels import level_counts, level_sums
from occstream.pretrain.losses import binary_errors, binary_valid, sigmoid_focal_sum, softmax_focal
from occstream.pretrain.lovasz import draw_of, lovasz_counts, lovasz_softmax, weighted_count, weighted_cross_entropy
from occstream.sharding.schema import IGNORE

TERMS = ("binary", "occupied", "voxel", "lovasz", "thing")


@dataclass
class PanoLoss:
    """Weights and forms of the losses; defaults are the paper's (Table 12), or ours where it is silent."""

    voxels: Literal["points", "dense"] = "points"
    """How classes of voxels are learned. points, for labels made from LiDAR points: focal loss of all known voxels, divided by
    the occupied ones, and Lovász loss of the occupied ones. dense, for labels of every visible voxel: mean cross-entropy, and
    Lovász loss of all known voxels, with free."""
    voxel_weight: float = 10.0
    """Weight of the focal loss or cross-entropy."""
    lovasz_weight: float = 10.0
    """Weight of the Lovász loss, the mean of frames' own over the classes that a frame has."""
    lovasz_sample: int = 0
    """Voxels of a frame that the Lovász loss looks at; 0: all. The draw is a function of the frame's key."""
    thing_weight: float = 5.0
    """Weight of the focal loss of the mask of thing voxels, divided by their number."""
    binary_weight: float = 1.0
    """Weight of the binary cross-entropy of the fine grid, of all frames: pre-training and its replay (B2S), not PanoOcc's."""
    occupied_weight: float = 1.0
    """Weight of the focal loss of each level of a sparse decoder (``model.decoder``), of all frames: whether a voxel is occupied,
    divided by the occupied ones."""
    gamma: float = 2.0
    """Focusing of the focal losses."""
    alpha: float = 0.25
    """Weight of thing voxels in the loss of the mask, and of occupied ones in the sparse decoder's; others get 1 - alpha."""
    class_weights: dict[str, float] = field(default_factory=dict)
    """Weights of classes in the focal loss or cross-entropy, for example ``loss.class_weights.free=0.5``; 1 where nothing is
    said."""

    def __post_init__(self) -> None:
        names = ("voxel_weight", "lovasz_weight", "thing_weight", "binary_weight")
        for name in (*names, "occupied_weight", "gamma", "lovasz_sample"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}, must not be negative")
        if not any(getattr(self, name) for name in names):
            raise ValueError(f"{', '.join(names)} are all 0: there is nothing to learn")

    def weights_of(self, classes: Sequence[str]) -> tuple[float, ...] | None:
        """Of each class, free last; None: all 1."""
        return tuple(self.class_weights.get(name, 1.0) for name in (*classes, "free")) if self.class_weights else None


def counts(
    outputs: PanoOutputs, batch: Batch, loss: PanoLoss, *, classes: Sequence[str], things: Sequence[int]
) -> dict[str, Tensor]:
    """What ``sums`` are divided by, from the labels alone.

    Args:
        outputs: of any of the step's micro-batches: which parts there are, and their grids.
        classes: names of the K classes.
        things: ids of those that are things.
    """
    assert outputs.binary_logits is not None, "the network has a binary head"
    valid = binary_valid(outputs.binary_logits.shape[1:], batch)
    roles = _roles(outputs, batch)
    found = {f"binary{role}": valid[frames].sum() for role, frames in roles.items()}
    found |= level_counts(outputs.levels, batch.part(Occupancy), roles=roles)
    if outputs.semantic_logits is None or outputs.decoded is None:
        return found
    labels, k = _classes(batch), len(classes)
    nothing = torch.zeros((), device=batch.device)
    if loss.voxels == "points":
        found["voxel"] = (labels < k).sum()
    else:
        found["voxel"] = nothing + weighted_count(labels, k + 1, loss.weights_of(classes))
    learned = range(k if loss.voxels == "points" else k + 1)
    found["lovasz"] = sum((lovasz_counts(frame, learned) for frame in labels), nothing)
    found["thing"] = _things(labels, things, outputs.decoded.shape)[0].sum()
    return found


def sums(
    outputs: PanoOutputs, batch: Batch, loss: PanoLoss, *, classes: Sequence[str], things: Sequence[int]
) -> dict[str, Tensor]:
    """Sums of losses over a micro-batch, by term; arguments as of ``counts``."""
    assert outputs.binary_logits is not None, "the network has a binary head"
    with full_precision(batch.device):
        errors = binary_errors(outputs.binary_logits, batch)
        roles = _roles(outputs, batch)
        found = {f"binary{role}": errors[frames].sum() for role, frames in roles.items()}
        found |= level_sums(outputs.levels, batch.part(Occupancy), loss.gamma, loss.alpha, roles=roles)
        if outputs.semantic_logits is None or outputs.decoded is None or outputs.things is None:
            return found
        labels = _classes(batch)
        if not batch.labeled:  # every parameter takes part, and nothing is known
            labels = labels.new_full((1, *outputs.semantic_logits.shape[2:]), IGNORE)
        thing, known = (outputs.decoded.at(v) for v in _things(labels, things, outputs.decoded.shape))
        logits, absent = outputs.things[known].unsqueeze(1), (~thing[known]).long()
        found["thing"] = sigmoid_focal_sum(logits, [(absent, None)], loss.gamma, loss.alpha)
        weights = loss.weights_of(classes)
        for index, (frame, truth) in enumerate(zip(outputs.semantic_logits, labels)):
            key = batch.keys[index] if batch.keys else ""
            for name, value in _of_frame(frame, truth, loss, weights=weights, key=key).items():
                found[name] = found.get(name, 0.0) + value
    return found


def _of_frame(
    logits: Tensor, truth: Tensor, loss: PanoLoss, *, weights: Sequence[float] | None, key: str
) -> dict[str, Tensor]:
    """(K, X, Y, Z) logits and (X, Y, Z) classes -> sums of one frame."""
    flat, k = truth.flatten(), len(logits)
    known = (flat != IGNORE).nonzero().squeeze(1)
    wide, truth = logits.movedim(0, -1).flatten(0, -2)[known].float(), flat[known].long()
    wide = torch.cat([wide, wide.new_zeros(len(wide), 1)], 1)
    if loss.voxels == "points":
        errors = softmax_focal(wide, truth, loss.gamma)
        voxel = (errors if weights is None else errors * row(errors, weights)[truth]).sum()
        shown = (truth < k).nonzero().squeeze(1)
        wide, truth, learned = wide[shown], truth[shown], range(k)
    else:
        voxel, learned = weighted_cross_entropy(wide, truth, weights), range(k + 1)
    lovasz = lovasz_softmax(wide.softmax(1), truth, classes=learned, sample=loss.lovasz_sample, generator=draw_of(key))
    return {"voxel": voxel, "lovasz": lovasz}


def _roles(outputs: PanoOutputs, batch: Batch) -> dict[str, slice]:
    """Frames whose binary losses have a normalizer of their own: in fine-tuning semantic and replayed ones. The same on every
    rank."""
    if outputs.decoded is None:
        return {"": slice(None)}
    return {"@main": slice(0, batch.labeled), "@replay": slice(batch.labeled, None)}


def _classes(batch: Batch) -> Tensor:
    """(S, X, Y, Z) uint8 class, free last, or 255."""
    labels = batch.part(Occupancy)
    return labels.classes() if batch.labeled else labels.binary[:0].to(torch.uint8)


def _things(labels: Tensor, things: Sequence[int], shape: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
    """(S, *shape) bool: voxels in which any label is of a thing, and those with any label."""
    found = functools.reduce(
        torch.logical_or, (labels == c for c in things), torch.zeros_like(labels, dtype=torch.bool)
    )
    return pool_binary(found, labels != IGNORE, shape)
