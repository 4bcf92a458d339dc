"""Boxes from queries on a map seen from above (PanoOcc, Sec. 3.6): the decoder of BEVFormer (Li et al., ECCV 2022, Sec. 3.5),
after Deformable DETR (Zhu et al., ICLR 2021) and DETR (Carion et al., ECCV 2020).

Learned queries attend to each other and, around a reference point each, to the map; every layer moves the reference points
and says what box is there. No suppression follows: training assigns one query to each box. Shape legend: see ``batch``; ``L``
layers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from occstream.models.attention import MapAttention
from occstream.models.centerpoint import Detections
from occstream.models.layers import full_precision, row
from occstream.sharding.grid import VoxelGrid

CODE = 10
"""Numbers of a box: center x, y; logarithms of width and length; center z; logarithm of the height; sine and cosine of the yaw;
velocity x, y. Meters and m/s in the frame of the labels."""
_LARGEST = 5.0  # logarithm of a size, meters
_INSIDE = 1e-5  # least distance of a reference point from the faces of the box of the grid, of which it is a share


@dataclass
class DetrConfig:
    """Detection head. Defaults are those that BEVFormer published for nuScenes, which PanoOcc takes."""

    queries: int = 900
    """Boxes that the network can say."""
    layers: int = 6
    """Layers of the decoder; each says boxes and has losses of its own."""
    channels: int = 256
    """Of queries and of the map they look at."""
    heads: int = 8
    """Of both attentions."""
    points: int = 4
    """That a head samples around a reference point."""
    ffn_channels: int = 512
    """Of the feed-forward part of a layer."""
    dropout: float = 0.1
    """In attentions and feed-forward parts."""
    most: int = 300
    """Boxes of a frame, the surest pairs of a query and a class. nuScenes takes at most 500."""
    score_threshold: float = 0.0
    """Boxes with a lower score are not said."""
    limits: tuple[float, float, float] = (61.2, 61.2, 10.0)
    """Boxes whose center is further from the ego along x, y or z are not said, meters."""

    def __post_init__(self) -> None:
        for name in ("queries", "layers", "channels", "heads", "points", "ffn_channels", "most"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, must be at least 1")
        if self.channels % self.heads:
            raise ValueError(f"channels is {self.channels}, must be divisible by heads ({self.heads})")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is {self.dropout}, must be at least 0 and below 1")
        if not 0 <= self.score_threshold < 1:
            raise ValueError(f"score_threshold is {self.score_threshold}, must be at least 0 and below 1")
        if any(limit <= 0 for limit in self.limits):
            raise ValueError(f"limits is {list(self.limits)}, must be positive")


class Queried(NamedTuple):
    """What the head says after each layer.

    logits: (L, B, Q, K) float32 of the classes, each a sigmoid of its own. codes: (L, B, Q, 10) float32, see ``CODE``.
    """

    logits: Tensor
    codes: Tensor


def encode(boxes: Tensor, velocity: Tensor) -> Tensor:
    """Codes of boxes.

    Args:
        boxes: (n, 7) center x, y, z; length, width, height; yaw. velocity: (n, 2), NaN where unknown.

    Returns:
        (n, 10), see ``CODE``; NaN where the velocity is.
    """
    x, y, z, length, width, height, yaw = boxes.unbind(1)
    rows = [x, y, width.log(), length.log(), z, height.log(), yaw.sin(), yaw.cos(), *velocity.unbind(1)]
    return torch.stack(rows, 1)


def decode(codes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(n, 7) boxes, yaw in (-pi, pi], and (n, 2) velocities of codes (n, 10), in their dtype."""
    x, y, width, length, z, height, sine, cosine = codes.T[:8]
    sizes = (np.exp(np.clip(size, -_LARGEST, _LARGEST)) for size in (length, width, height))
    yaw = np.arctan2(sine, cosine)
    yaw = np.where(yaw <= -math.pi, -yaw, yaw)
    return np.stack([x, y, z, *sizes, yaw], 1).astype(codes.dtype), codes[:, 8:]


class _SelfAttention(nn.Module):
    """Attention of queries to each other; residual not included. Parameters are those of its linear parts alone: ZeRO-3 gathers
    them where they are called, which ``nn.MultiheadAttention`` does not do."""

    def __init__(self, channels: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.share = heads, dropout
        self.places, self.values = nn.Linear(channels, 2 * channels), nn.Linear(channels, channels)
        self.output, self.dropout = nn.Linear(channels, channels), nn.Dropout(dropout)

    def forward(self, x: Tensor, position: Tensor) -> Tensor:
        """x (B, Q, C), position (Q, C) -> (B, Q, C)."""
        parts = (*self.places(x + position).chunk(2, -1), self.values(x))
        query, key, value = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts)
        share = self.share if self.training else 0.0
        found = F.scaled_dot_product_attention(query, key, value, dropout_p=share)
        return self.dropout(self.output(found.transpose(1, 2).flatten(2)))


class _Layer(nn.Module):
    """Self-attention, attention to the map, feed-forward; post-norm."""

    def __init__(self, c: DetrConfig) -> None:
        super().__init__()
        width = c.channels
        self.queries = _SelfAttention(width, c.heads, c.dropout)
        self.map = MapAttention(width, c.heads, c.points, c.dropout)
        self.ffn = nn.Sequential(
            nn.Linear(width, c.ffn_channels),
            nn.ReLU(),
            nn.Dropout(c.dropout),
            nn.Linear(c.ffn_channels, width),
            nn.Dropout(c.dropout),
        )
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3))

    def forward(self, x: Tensor, position: Tensor, references: Tensor, bev: Tensor) -> Tensor:
        """x (B, Q, C), position (Q, C), references (B, Q, 2) in 0..1, map (B, C, X, Y) -> (B, Q, C)."""
        x = self.norms[0](x + self.queries(x, position))
        counts = [x.shape[1]] * len(x)
        seen = self.map((x + position).flatten(0, 1), references.flatten(0, 1), bev, counts)
        x = self.norms[1](x + seen.view_as(x))
        return self.norms[2](x + self.ffn(x))


def _classifier(channels: int, classes: int) -> nn.Sequential:
    """Two hidden layers and logits, which begin at a probability of 0.01 (Lin et al., focal loss)."""
    last = nn.Linear(channels, classes)
    nn.init.constant_(last.bias, -math.log(99))
    hidden = [m for _ in range(2) for m in (nn.Linear(channels, channels), nn.LayerNorm(channels), nn.ReLU())]
    return nn.Sequential(*hidden, last)


def _regressor(channels: int) -> nn.Sequential:
    """Two hidden layers and a code, which begins at its reference point."""
    last = nn.Linear(channels, CODE)
    for weight in last.parameters():
        nn.init.zeros_(weight)
    hidden = [m for _ in range(2) for m in (nn.Linear(channels, channels), nn.ReLU())]
    return nn.Sequential(*hidden, last)


class DetrHead(nn.Module):
    """Map -> boxes.

    Args:
        inputs: channels of the map.
        grid: over whose box the map lies; boxes are in its frame, with centers within it.
        classes: names of the classes to detect, ids are their places.
        config: of the head.

    Raises:
        ValueError: there is no class to detect.
    """

    def __init__(self, inputs: int, grid: VoxelGrid, classes: Sequence[str], config: DetrConfig) -> None:
        super().__init__()
        if not classes:
            raise ValueError("there is no class to detect: the taxonomy has no things")
        self.config, self.classes = config, tuple(classes)
        self.lower = grid.lower
        self.extent = tuple(upper - lower for lower, upper in zip(grid.lower, grid.upper))
        width = config.channels
        self.input = nn.Conv2d(inputs, width, 1)
        self.content, self.position = (nn.Parameter(torch.randn(config.queries, width)) for _ in range(2))
        self.references = nn.Linear(width, 3)
        self.layers = nn.ModuleList(_Layer(config) for _ in range(config.layers))
        self.names = nn.ModuleList(_classifier(width, len(classes)) for _ in self.layers)
        self.boxes = nn.ModuleList(_regressor(width) for _ in self.layers)

    def forward(self, bev: Tensor) -> Queried:
        """(B, inputs, X, Y) -> what each layer says."""
        bev, size = self.input(bev), len(bev)
        position, x = self.position, self.content.expand(size, -1, -1)
        references = self.references(position).float().sigmoid().expand(size, -1, -1)
        logits, codes = [], []
        for layer, names, boxes in zip(self.layers, self.names, self.boxes):
            x = layer(x, position, references[..., :2].contiguous(), bev)
            # Half a meter of 102.4 is less than bf16 can tell.
            with full_precision(bev.device):
                logits.append(names(x.float()))
                code, moved = self._placed(boxes(x.float()), references)
            codes.append(code)
            references = moved.detach()
        return Queried(torch.stack(logits), torch.stack(codes))

    def _placed(self, code: Tensor, references: Tensor) -> tuple[Tensor, Tensor]:
        """Codes whose centers are meters, and the moved reference points (B, Q, 3) in 0..1.

        Args:
            code: (B, Q, 10), centers as offsets from the reference points before the sigmoid.
            references: (B, Q, 3) in 0..1.
        """
        at = torch.stack([code[..., 0], code[..., 1], code[..., 4]], -1)
        moved = (at + references.clamp(_INSIDE, 1 - _INSIDE).logit()).sigmoid()
        x, y, z = (moved * row(moved, self.extent) + row(moved, self.lower)).unbind(-1)
        placed = [x[..., None], y[..., None], code[..., 2:4], z[..., None], code[..., 5:]]
        return torch.cat(placed, -1), moved


@torch.no_grad()
def found_boxes(outputs: Queried, c: DetrConfig) -> list[Detections]:
    """Boxes of each frame, of the last layer. Equal scores are in the order of queries and classes."""
    return [_found(logits, codes, c) for logits, codes in zip(outputs.logits[-1], outputs.codes[-1])]


def _found(logits: Tensor, codes: Tensor, c: DetrConfig) -> Detections:
    scores, place = logits.float().sigmoid().flatten().sort(descending=True, stable=True)
    scores, place = scores[: c.most], place[: c.most]
    rows = codes.float()[place // logits.shape[1]].cpu().numpy()
    boxes, velocity = decode(rows)
    scores, classes = scores.cpu().numpy(), (place % logits.shape[1]).cpu().numpy()
    keep = np.isfinite(rows).all(1) & (scores >= c.score_threshold)
    keep &= (np.abs(boxes[:, :3]) <= np.array(c.limits, np.float32)).all(1)
    return Detections(boxes[keep], velocity[keep], classes[keep], scores[keep])
