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
            sums.append(total)
            counts.append(count)
        everywhere = torch.stack(counts).float()
        if world_size() > 1:
            dist.all_reduce(everywhere)
        binary, *semantic = [s * world_size() / n.clamp_min(1) for s, n in zip(sums, everywhere)]
        loss, parts = config.binary_weight * binary, {"binary": binary.detach()}
        if semantic:
            loss = loss + config.semantic_weight * semantic[0]
            parts["semantic"] = semantic[0].detach()
            chosen = outputs.selected.float()
            parts["selected"] = chosen.mean() if len(chosen) else chosen.sum()
    return loss, parts


def _semantic(logits: Tensor, batch: OccBatch, config: LossConfig) -> tuple[Tensor, Tensor]:
    """Sum of the focal loss and what to divide it by. Without semantic frames both are 0, but in the graph."""
    classes = logits.shape[1]
    if not batch.num_semantic:
        return torch.nan_to_num(logits, 0.0, 0.0, 0.0).sum() * 0.0, logits.new_zeros((), dtype=torch.int64)
    labels = batch.semantic.long()
    valid = labels != IGNORE
    labels = torch.where(valid, labels, classes)
    if config.kind == "sigmoid_focal":
        target = F.one_hot(labels, classes + 1)[..., :classes].movedim(-1, 1).to(logits.dtype)
        values = sigmoid_focal(logits, target, config.gamma, config.alpha).sum(1)
    else:
        values = softmax_focal(torch.cat([logits, logits.new_zeros(logits[:, :1].shape)], 1), labels, config.gamma)
    count = valid & (labels < classes) if config.normaliser == "occupied" else valid
    return torch.where(valid, values, 0.0).sum(), count.sum()


def sigmoid_focal(logits: Tensor, target: Tensor, gamma: float, alpha: float) -> Tensor:
    """Focal loss of independent sigmoids, elementwise; same shape as ``logits`` (SPEC A.9 has check values)."""
    errors = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    p = logits.sigmoid()
    miss = p + target - 2 * p * target  # 1 - probability of the truth
    return (alpha * target + (1 - alpha) * (1 - target)) * miss**gamma * errors


def softmax_focal(logits: Tensor, labels: Tensor, gamma: float) -> Tensor:
    """Focal loss of a softmax: logits (S, K, …), labels (S, …) -> (S, …)."""
    errors = F.cross_entropy(logits, labels, reduction="none")
    return (1 - (-errors).exp()).clamp_min(0) ** gamma * errors
