"""Binary, semantic and depth losses (B2S, Sec. 3.3), fp32: sums over valid elements and what they are divided by."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from occstream.models import kernels
from occstream.models.autograd import Context
from occstream.models.batch import Batch, Cameras, OccOutputs, Occupancy, pool_binary
from occstream.models.layers import full_precision, row
from occstream.sharding.schema import IGNORE


@dataclass
class LossConfig:
    """Weights and forms; defaults are ours where the paper is silent."""

    binary_weight: float = 1.0
    """Weight of the binary cross-entropy on B'. 0 in fine-tuning: semantic labels alone (data S)."""
    semantic_weight: float = 1.0
    """Weight of the focal loss on B''."""
    depth_weight: float = 0.0
    """Weight of the depth loss on LiDAR points (the competing pre-training of Fig. 7; BEVDepth has 3, COTR 0.05). Needs
    the lidar group and a lifting model."""
    kind: Literal["sigmoid_focal", "softmax_focal"] = "sigmoid_focal"
    """One sigmoid per class with free = no class, or a softmax over the classes (free has the fixed logit 0)."""
    gamma: float = 2.0
    """Focusing of the focal loss."""
    alpha: float = 0.25
    """Weight of positives in the sigmoid focal loss (negatives get 1 - alpha)."""
    normalizer: Literal["occupied", "valid"] = "occupied"
    """The focal loss is divided by the number of occupied voxels, or of all valid ones."""
    replay_normalizer: Literal["own", "joint"] = "own"
    """What the binary and depth losses of replayed frames are divided by: their own number of valid voxels or points, so that
    replay leaves the weight of the semantic frames' losses as it is; or joint: one mean over both kinds of frames, in which
    replaying as many frames halves it."""
    class_weights: tuple[float, ...] | None = None
    """One weight per class: of its sigmoid, or of the voxels that are labeled so (softmax; then free comes last). None:
    all 1."""

    def __post_init__(self) -> None:
        for name in ("binary_weight", "semantic_weight", "depth_weight", "gamma"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}, must not be negative")
        if not self.binary_weight and not self.semantic_weight and not self.depth_weight:
            raise ValueError("binary_weight, semantic_weight and depth_weight are all 0: there is nothing to learn")


def sums(outputs: OccOutputs, batch: Batch, config: LossConfig) -> dict[str, Tensor]:
    """Sums of losses over a micro-batch, by term: ``binary`` and ``semantic`` where the network has these outputs, ``depth``
    where it is asked for, ``selected`` (refined voxels) where there is a sparse transformer.

    Args:
        outputs: of the network.
        batch: with the labels; 255 in ``semantic`` and False in ``binary_valid`` are left out.

    Raises:
        ValueError: a depth loss of a model without depth, or class weights that do not fit the classes.
    """
    found: dict[str, Tensor] = {}
    roles = _roles(outputs, batch, config)
    with full_precision(batch.device):
        if outputs.binary_logits is not None:
            errors = binary_errors(outputs.binary_logits, batch)
            found |= {f"binary{role}": errors[frames].sum() for role, frames in roles.items()}
        if outputs.semantic_logits is not None:
            found["semantic"] = _semantic(outputs.semantic_logits.float(), batch, config)
        if config.depth_weight:
            found |= {f"depth{role}": _depth(outputs, batch, frames) for role, frames in roles.items()}
        if outputs.selected is not None:
            found["selected"] = outputs.selected.sum()
    return found


def counts(outputs: OccOutputs, batch: Batch, config: LossConfig) -> dict[str, Tensor]:
    """What ``sums`` are divided by, from the labels alone, by term.

    Args:
        outputs: of any of the step's micro-batches: which parts there are, and their grids.
    """
    found: dict[str, Tensor] = {}
    labels, roles = batch.part(Occupancy), _roles(outputs, batch, config)
    if outputs.binary_logits is not None:
        valid = binary_valid(outputs.binary_logits.shape[1:], batch)
        found |= {f"binary{role}": valid[frames].sum() for role, frames in roles.items()}
    if outputs.semantic_logits is not None:
        valid = labels.classes() != IGNORE
        occupied = labels.classes() < outputs.semantic_logits.shape[1]
        found["semantic"] = (valid & occupied if config.normalizer == "occupied" else valid).sum()
    if config.depth_weight:
        known = _known_depth(outputs, batch)[1]
        found |= {f"depth{role}": known[frames].sum() for role, frames in roles.items()}
    if outputs.selected is not None:
        found["selected"] = torch.full((), batch.labeled, device=batch.device)
    return found


def binary_errors(logits: Tensor, batch: Batch) -> Tensor:
    """Binary cross-entropy of occupancy, on a grid of its own: logits (B, Xb, Yb, Zb) -> the same shape, float32, 0 where
    nothing is known."""
    labels = batch.part(Occupancy)
    target, valid = pool_binary(labels.binary, labels.binary_valid, logits.shape[1:])
    errors = F.binary_cross_entropy_with_logits(logits.float(), target.float(), reduction="none")
    return torch.where(valid, errors, 0.0)


def binary_valid(shape: Sequence[int], batch: Batch) -> Tensor:
    """Where ``binary_errors`` knows something: (B, *shape) bool."""
    labels = batch.part(Occupancy)
    return pool_binary(labels.binary, labels.binary_valid, shape)[1]


def weights(config: LossConfig) -> dict[str, float | None]:
    """Of the terms of ``sums``; None: only reported."""
    return {
        "binary": config.binary_weight,
        "semantic": config.semantic_weight,
        "depth": config.depth_weight,
        "selected": None,
    }


def _roles(outputs: OccOutputs, batch: Batch, config: LossConfig) -> dict[str, slice]:
    """Frames whose losses have a normalizer of their own, by what their terms' names end with: in fine-tuning the semantic
    frames and the replayed ones, either of which a rank may lack; else all. The same on every rank."""
    if outputs.semantic_logits is None or config.replay_normalizer == "joint":
        return {"": slice(None)}
    return {"@main": slice(0, batch.labeled), "@replay": slice(batch.labeled, None)}


def _semantic(logits: Tensor, batch: Batch, config: LossConfig) -> Tensor:
    """Sum of the focal loss. Without semantic frames it is 0, but in the graph."""
    classes = logits.shape[1]
    if not batch.labeled:
        return torch.nan_to_num(logits, 0.0, 0.0, 0.0).sum() * 0.0
    target = batch.part(Occupancy)
    semantic, soft = target.classes().flatten(), target.soft()
    second = None if soft is None else torch.where(soft[0].flatten() == IGNORE, semantic, soft[0].flatten())
    valid = semantic != IGNORE
    sets = [semantic] if second is None else [semantic, second]
    # The one place where the host waits: how many voxels are known, and how many have a class.
    size, *occupied = torch.stack([valid.sum(), *(((s < classes) & valid).sum() for s in sets)]).tolist()
    index = torch.nonzero_static(valid, size=size).squeeze(1)
    labels = semantic[index].long()  # (N,)
    known = logits.movedim(1, -1).flatten(0, -2)[index]  # (N, K): masks leave a third of the voxels or less
    targets: list[tuple[Tensor, Tensor | None]] = [(labels, None)]
    if soft is not None and second is not None:
        # Two candidates with their probabilities: the loss is linear in the target, so it is that of each, weighted
        # (B2S, App. D).
        first = soft[1].flatten()[index]
        targets = [(labels, first), (second[index].long(), 1 - first)]
    columns = None
    if config.class_weights:
        expected = classes + (config.kind == "softmax_focal")
        if len(config.class_weights) != expected:
            raise ValueError(f"loss.class_weights has {len(config.class_weights)} values, must have {expected}")
        columns = row(known, config.class_weights)
    if config.kind == "sigmoid_focal":
        return sigmoid_focal_sum(known, targets, config.gamma, config.alpha, columns=columns, occupied=occupied)
    wide = torch.cat([known, known.new_zeros(len(known), 1)], 1)
    total = known.new_zeros(())
    for index, weight in targets:
        errors = softmax_focal(wide, index, config.gamma)
        for factor in (weight, columns[index] if columns is not None else None):
            errors = errors * factor if factor is not None else errors
        total = total + errors.sum()
    return total


def _predicted_depth(outputs: OccOutputs) -> tuple[Tensor, Tensor]:
    """Distribution (B, V, D, h, w) and bins (D,)."""
    if outputs.depth is None or outputs.depth_bins is None:
        raise ValueError("loss.depth_weight is set, but this model predicts no depth; use a lifting model (b2s_ls)")
    return outputs.depth, outputs.depth_bins


def _known_depth(outputs: OccOutputs, batch: Batch) -> tuple[Tensor, Tensor]:
    """Bin of the LiDAR's distance (B, V, h, w) int64, and where there is one."""
    _, bins = _predicted_depth(outputs)
    depth = batch.part(Cameras).depth
    if depth is None:
        raise ValueError("loss.depth_weight is set, but the batch has no depth of LiDAR points")
    distances = depth.to(bins.device)  # meters, 0 = none
    index = ((distances - bins[0]) / (bins[1] - bins[0])).floor().long()
    return index, (distances > 0) & (index >= 0) & (index < len(bins))


def _depth(outputs: OccOutputs, batch: Batch, frames: slice) -> Tensor:
    """Sum over frames of the binary cross-entropy of the depth distribution against one-hot LiDAR depth, where there is any."""
    index, known = (part[frames] for part in _known_depth(outputs, batch))
    depth, bins = _predicted_depth(outputs)
    predicted = depth[frames].movedim(2, -1)[known]  # (N, D)
    target = F.one_hot(index[known], len(bins)).float()
    # Clamped: a softmax may round to exactly 0 or 1.
    total = F.binary_cross_entropy(predicted.clamp(1e-7, 1 - 1e-7), target, reduction="sum")
    return total + depth.sum() * 0.0


def sigmoid_focal_sum(
    logits: Tensor,
    targets: Sequence[tuple[Tensor, Tensor | None]],
    gamma: float,
    alpha: float,
    *,
    columns: Tensor | None = None,
    occupied: Sequence[int] | None = None,
) -> Tensor:
    """Sum of ``sigmoid_focal`` over voxels and classes, in one pass that keeps one tensor: nearly all targets are 0, so
    all are taken as 0, with a gradient in closed form, and the few that are not are corrected.

    Args:
        logits: (N, K) float32.
        targets: pairs of labels (N,) int64 (K and above: no class) and their share (N,) of the target, None for all.
        columns: (K,) weight of each class, or None.
        occupied: how many labels of each pair are below K; None: they are counted, for which the host waits.

    Returns:
        Scalar.
    """
    total = (1 - alpha) * _NegativeFocal.apply(logits, gamma, columns)
    for number, (labels, share) in enumerate(targets):
        found = labels < logits.shape[1]
        size = int(found.sum()) if occupied is None else occupied[number]
        rows = torch.nonzero_static(found, size=size).squeeze(1)
        index = labels[rows]
        z = logits[rows, index]
        positive = alpha * (1 - z.sigmoid()) ** gamma * F.softplus(-z)
        change = positive - (1 - alpha) * z.sigmoid() ** gamma * F.softplus(z)
        for factor in (share[rows] if share is not None else None, columns[index] if columns is not None else None):
            change = change * factor if factor is not None else change
        total = total + change.sum()
    return total


class _NegativeFocal(torch.autograd.Function):
    """Sum of columns * p ** gamma * softplus(z), p = sigmoid(z): what the focal loss is where the target is 0."""

    @staticmethod
    def forward(ctx: Context, logits: Tensor, gamma: float, columns: Tensor | None) -> Tensor:
        if kernels.wanted_for(logits):
            total, slope = kernels.negative_focal(logits.contiguous(), gamma, columns)
            ctx.save_for_backward(slope)
            return total
        p, error = logits.sigmoid(), F.softplus(logits)
        weight = p * p if gamma == 2 else p**gamma
        if columns is not None:
            weight *= columns
        total = torch.dot(weight.flatten(), error.flatten())
        # d/dz = weight * (gamma * (1 - p) * error + p)
        ctx.save_for_backward(error.mul_(1 - p).mul_(gamma).add_(p).mul_(weight))
        return total

    @staticmethod
    def backward(ctx: Context, grad: Tensor) -> tuple[Tensor, None, None]:
        [slope] = ctx.saved_tensors
        return slope * grad, None, None


def sigmoid_focal(logits: Tensor, target: Tensor, gamma: float, alpha: float) -> Tensor:
    """Focal loss of independent sigmoids, elementwise; same shape as ``logits``. The
    reference that ``sigmoid_focal_sum`` is tested against."""
    errors = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    p = logits.sigmoid()
    miss = p + target - 2 * p * target  # 1 - probability of the truth
    return (alpha * target + (1 - alpha) * (1 - target)) * miss**gamma * errors


def softmax_focal(logits: Tensor, labels: Tensor, gamma: float) -> Tensor:
    """Focal loss of a softmax: logits (N, K), labels (N,) -> (N,)."""
    errors = F.cross_entropy(logits, labels, reduction="none")
    return (1 - (-errors).exp()).clamp_min(0) ** gamma * errors
