"""Binary and semantic losses (SPEC A.9), fp32, normalised over all ranks.

DeepSpeed averages gradients over ranks. So that this equals one process with the joint batch, each rank returns
``sum * world / count`` with its own sum and the count of all ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from occstream.models.batch import OccBatch, OccOutputs, pool_binary
from occstream.models.layers import world_size
from occstream.sharding.schema import IGNORE


@dataclass
class LossConfig:
    """Weights and forms; defaults are SPEC A.9's where the paper is silent."""

    binary_weight: float = 1.0
    """Weight of the binary cross-entropy on B'."""
    semantic_weight: float = 1.0
    """Weight of the focal loss on B''."""
    kind: Literal["sigmoid_focal", "softmax_focal"] = "sigmoid_focal"
    """One sigmoid per class with free = no class, or a softmax over the classes (free has the fixed logit 0)."""
    gamma: float = 2.0
    """Focusing of the focal loss."""
    alpha: float = 0.25
    """Weight of positives in the sigmoid focal loss (negatives get 1 - alpha)."""
    normaliser: Literal["occupied", "valid"] = "occupied"
    """The focal loss is divided by the number of occupied voxels, or of all valid ones."""


def occupancy_loss(outputs: OccOutputs, batch: OccBatch, config: LossConfig) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss of a step and its parts.

    Args:
        outputs: of the network.
        batch: with the labels; 255 in ``semantic`` and False in ``binary_valid`` are left out.
        config: weights and forms.

    Returns:
        The rank's loss (its mean over ranks is the loss of the joint batch) and detached parts ``binary`` and, if the
        network has a semantic part, ``semantic`` and ``selected`` (refined voxels per frame).
    """
    with torch.autocast(outputs.binary_logits.device.type, enabled=False):
        logits = outputs.binary_logits.float()
        target, valid = pool_binary(batch.binary, batch.binary_valid, tuple(logits.shape[1:]))
        errors = F.binary_cross_entropy_with_logits(logits, target.float(), reduction="none")
        sums = [torch.where(valid, errors, 0.0).sum()]
        counts = [valid.sum()]
        if outputs.semantic_logits is not None:
            total, count = _semantic(outputs.semantic_logits.float(), batch, config)
            sums += [total, outputs.selected.sum()]
            counts += [count, counts[0].new_tensor(batch.num_semantic)]
        everywhere = torch.stack(counts).float()
        if world_size() > 1:
            dist.all_reduce(everywhere)
        binary, *semantic = [s * world_size() / n.clamp_min(1) for s, n in zip(sums, everywhere)]
        loss, parts = config.binary_weight * binary, {"binary": binary.detach()}
        if semantic:
            loss = loss + config.semantic_weight * semantic[0]
            parts |= {"semantic": semantic[0].detach(), "selected": semantic[1]}
    return loss, parts


def _semantic(logits: Tensor, batch: OccBatch, config: LossConfig) -> tuple[Tensor, Tensor]:
    """Sum of the focal loss and what to divide it by. Without semantic frames both are 0, but in the graph."""
    classes = logits.shape[1]
    if not batch.num_semantic:
        return torch.nan_to_num(logits, 0.0, 0.0, 0.0).sum() * 0.0, logits.new_zeros((), dtype=torch.int64)
    valid = batch.semantic != IGNORE
    labels = batch.semantic[valid].long()  # (N,)
    known = logits.movedim(1, -1)[valid]  # (N, K): masks leave a third of the voxels or less
    if config.kind == "sigmoid_focal":
        total = sigmoid_focal_sum(known, labels, config.gamma, config.alpha)
    else:
        total = softmax_focal(torch.cat([known, known.new_zeros(len(known), 1)], 1), labels, config.gamma).sum()
    count = (labels < classes).sum() if config.normaliser == "occupied" else valid.sum()
    return total, count


def sigmoid_focal_sum(logits: Tensor, labels: Tensor, gamma: float, alpha: float) -> Tensor:
    """Sum of ``sigmoid_focal`` over voxels and classes, in one pass that keeps one tensor: nearly all targets are 0, so
    all are taken as 0, with a gradient in closed form, and the few that are 1 are corrected.

    Args:
        logits: (N, K) float32.
        labels: (N,) int64; K and above: no class.

    Returns:
        Scalar.
    """
    rows = (labels < logits.shape[1]).nonzero().squeeze(1)
    z = logits[rows, labels[rows]]
    positive = alpha * (1 - z.sigmoid()) ** gamma * F.softplus(-z)
    negative = (1 - alpha) * z.sigmoid() ** gamma * F.softplus(z)
    return (1 - alpha) * _NegativeFocal.apply(logits, gamma) + (positive - negative).sum()


class _NegativeFocal(torch.autograd.Function):
    """Sum of p ** gamma * softplus(z), p = sigmoid(z): what the focal loss is where the target is 0."""

    @staticmethod
    def forward(ctx, logits: Tensor, gamma: float) -> Tensor:
        p, error = logits.sigmoid(), F.softplus(logits)
        weight = p * p if gamma == 2 else p**gamma
        total = torch.dot(weight.flatten(), error.flatten())
        # d/dz = weight * (gamma * (1 - p) * error + p)
        ctx.save_for_backward(error.mul_(1 - p).mul_(gamma).add_(p).mul_(weight))
        return total

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        [slope] = ctx.saved_tensors
        return slope * grad, None


def sigmoid_focal(logits: Tensor, target: Tensor, gamma: float, alpha: float) -> Tensor:
    """Focal loss of independent sigmoids, elementwise; same shape as ``logits`` (SPEC A.9 has check values). The
    reference that ``sigmoid_focal_sum`` is tested against."""
    errors = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    p = logits.sigmoid()
    miss = p + target - 2 * p * target  # 1 - probability of the truth
    return (alpha * target + (1 - alpha) * (1 - target)) * miss**gamma * errors


def softmax_focal(logits: Tensor, labels: Tensor, gamma: float) -> Tensor:
    """Focal loss of a softmax: logits (N, K), labels (N,) -> (N,)."""
    errors = F.cross_entropy(logits, labels, reduction="none")
    return (1 - (-errors).exp()).clamp_min(0) ** gamma * errors
