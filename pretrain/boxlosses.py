"""Losses of a detector that says boxes by queries: each true box is assigned to one query, all others have none (PanoOcc,
Sec. 3.6; DETR, Carion et al., ECCV 2020, Sec. 3.1; settings of BEVFormer). fp32: sums, and what they are divided by."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from occstream.models.batch import Boxes
from occstream.models.detr import Queried, encode
from occstream.models.layers import full_precision, row
from occstream.pretrain.losses import sigmoid_focal_sum
from occstream.sharding.grid import VoxelGrid


@dataclass
class BoxLossConfig:
    """Losses of boxes, each the sum over the layers of the head, divided by the number of true boxes."""

    class_weight: float = 2.0
    """Weight of the focal loss of classes, and of its cost in the assignment."""
    box_weight: float = 0.25
    """Weight of the L1 loss of codes in meters, logarithms, sine and cosine, and of this distance in the assignment."""
    velocity_weight: float = 0.2
    """Weight of velocities (m/s) within the L1 loss. The assignment does not look at them; unknown ones are not learned."""
    gamma: float = 2.0
    """Focusing of the focal loss."""
    alpha: float = 0.25
    """Weight of positives in the focal loss (negatives get 1 - alpha)."""

    def __post_init__(self) -> None:
        for name in ("class_weight", "box_weight", "velocity_weight", "gamma"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}, must not be negative")
        if not self.class_weight and not self.box_weight:
            raise ValueError("class_weight and box_weight are both 0: there is nothing to learn")
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha is {self.alpha}, must be within 0..1")


class BoxLosses:
    """Sums of losses of boxes and their counts.

    Args:
        grid: over which the head looks for boxes; those whose center is beyond it in x or y are not learned.
        classes: number of the head's classes; boxes of other ids are not learned.
        queries: of the head. Of more boxes in one frame, those that fit worst are not learned.
        config: weights.
    """

    def __init__(self, grid: VoxelGrid, classes: int, queries: int, config: BoxLossConfig) -> None:
        self.grid, self.classes, self.queries, self.config = grid, classes, queries, config

    def learned(self, boxes: Boxes) -> Tensor:
        """(n,) bool: boxes that can be learned."""
        rows = boxes.boxes.float()
        lower, upper = (row(rows, corner[:2]) for corner in (self.grid.lower, self.grid.upper))
        inside = ((rows[:, :2] >= lower) & (rows[:, :2] < upper)).all(1)
        return inside & rows.isfinite().all(1) & (rows[:, 3:6] > 0).all(1) & (boxes.classes < self.classes)

    def counts(self, boxes: Boxes) -> dict[str, Tensor]:
        """What ``sums`` are divided by, of the labels alone."""
        keep = self.learned(boxes)
        each = torch.zeros_like(boxes.counts).index_add_(0, boxes.owners(), keep.to(boxes.counts.dtype))
        total = each.clamp_max(self.queries).sum()
        return {"box_class": total, "box": total}

    @property
    def weights(self) -> dict[str, float]:
        """Of the terms of ``sums``."""
        return {"box_class": self.config.class_weight, "box": self.config.box_weight}

    def sums(self, outputs: Queried, boxes: Boxes) -> dict[str, Tensor]:
        """Sums of losses over layers by the names of ``counts``. Without labeled frames, or boxes, they are in the graph all the
        same.

        Args:
            outputs: of at least as many frames as are labeled, which come first.
            boxes: of S labeled frames.
        """
        size = len(boxes.counts)
        if not size:  # its losses are 0, yet every parameter took part
            return {
                name: torch.nan_to_num(part, 0.0, 0.0, 0.0).sum() * 0.0
                for name, part in (("box_class", outputs.logits), ("box", outputs.codes))
            }
        with full_precision(boxes.boxes.device):
            logits, codes = outputs.logits[:, :size].float(), outputs.codes[:, :size].float()
            keep = self.learned(boxes)
            truth = encode(boxes.boxes[keep].float(), boxes.velocity[keep].float())
            classes, owners = boxes.classes[keep].long(), boxes.owners()[keep]
            places, chosen = self.assign(Queried(logits, codes), classes, truth, owners)
            labels = torch.full(logits.shape[:3], self.classes, dtype=torch.int64, device=logits.device).flatten()
            labels[places] = classes[chosen]
            config = self.config
            targets: list[tuple[Tensor, Tensor | None]] = [(labels, None)]
            focal = sigmoid_focal_sum(logits.flatten(0, 2), targets, config.gamma, config.alpha, occupied=[len(places)])
            found, goal = codes.flatten(0, 2)[places], truth[chosen]
            goal = torch.where(goal.isfinite(), goal, found.detach())
            errors = (found - goal).abs()
            return {
                "box_class": focal,
                "box": errors[:, :8].sum() + config.velocity_weight * errors[:, 8:].sum(),
            }

    @torch.no_grad()
    def assign(self, outputs: Queried, classes: Tensor, truth: Tensor, owners: Tensor) -> tuple[Tensor, Tensor]:
        """Which query learns which box: on every layer of every frame the assignment that costs least.

        Args:
            outputs: of S frames, float32.
            classes, truth, owners: (n,) int64, (n, 10) and (n,) int64 frame of the boxes, frame after frame.

        Returns:
            (m,) int64 rows among the L * S * Q queries, and the boxes that they learn.
        """
        logits, codes = outputs
        frames, queries = logits.shape[1:3]
        places, chosen, first = [], [], 0
        for frame, count in enumerate(torch.bincount(owners, minlength=frames).tolist()):
            mine = slice(first, first + count)
            cost = self.cost(logits[:, frame], codes[:, frame], classes[mine], truth[mine])
            for layer, table in enumerate(cost.cpu().numpy() if count else ()):
                query, box = linear_sum_assignment(table)
                places.append((layer * frames + frame) * queries + query)
                chosen.append(first + box)
            first += count
        rows = [np.concatenate([*parts, np.zeros(0, np.int64)]).astype(np.int64) for parts in (places, chosen)]
        taken, box = (torch.from_numpy(part).to(logits.device) for part in rows)
        return taken, box

    def cost(self, logits: Tensor, codes: Tensor, classes: Tensor, truth: Tensor) -> Tensor:
        """(L, Q, n) float32 what each query costs for each box: weighted focal cost of the class plus weighted L1 distance of the
        code without velocity. Where it is not a number, as of a network whose loss is not either, it is large."""
        config = self.config
        distance = torch.cdist(codes[..., :8], truth[:, :8].expand(len(codes), -1, -1).contiguous(), p=1)
        of_class = focal_cost(logits, config.gamma, config.alpha)[..., classes]
        cost = config.class_weight * of_class + config.box_weight * distance
        return torch.nan_to_num(cost, 1e6, 1e6, -1e6)


def focal_cost(logits: Tensor, gamma: float = 2.0, alpha: float = 0.25) -> Tensor:
    """How the focal loss of a class changes when a query that says this of it gets it as its target; elementwise."""
    p = logits.sigmoid()
    return alpha * (1 - p) ** gamma * F.softplus(-logits) - (1 - alpha) * p**gamma * F.softplus(logits)
