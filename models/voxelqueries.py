"""Learned queries on a coarse 3-D grid that look at each other and into the images (PanoOcc, Sec. 3.3 and 3.4). Shape legend:
see ``batch``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from occstream.models.attention import ImageAttention, MapAttention
from occstream.models.backbones import CameraEmbedding
from occstream.models.batch import Batch
from occstream.models.layers import checkpointed
from occstream.models.transformer import Tokens, VoxelTokens, feed_forward
from occstream.sharding.grid import VoxelGrid


class QueryConfig(Protocol):
    """What these modules read of a model's settings; ``PanoOccConfig`` says what each means."""

    channels: int
    layers: int
    self_attentions: int
    heads: int
    self_points: int
    cross_points: int
    references: int
    ffn_channels: int
    dropout: float
    feature_channels: int
    feature_stride: int
    feature_levels: int
    cameras: int
    checkpointing: bool


class VoxelLayer(nn.Module):
    """Self-attention at each height, cross-attention to the images, feed-forward; post-norm (PanoOcc, eq. 1 to 5)."""

    def __init__(self, c: QueryConfig) -> None:
        super().__init__()
        width = c.channels
        self.planes = nn.ModuleList(
            MapAttention(width, c.heads, c.self_points, c.dropout) for _ in range(c.self_attentions)
        )
        self.images = ImageAttention(
            width,
            c.feature_channels,
            c.heads,
            c.cross_points,
            levels=c.feature_levels,
            references=c.references,
            dropout=c.dropout,
        )
        self.ffn = feed_forward(width, c.ffn_channels, c.dropout)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(c.self_attentions + 2))

    def forward(self, x: Tensor, tokens: Tokens, features: Sequence[Tensor], shape: tuple[int, int, int]) -> Tensor:
        """Refines all voxels.

        Args:
            x: (B Z X Y, C) in the order of ``tokens``: height after height of each frame.
            tokens: where they are.
            features: (B, V, C_f, h, w) of each level.
            shape: (X, Y, Z).
        """
        *among, images, last = self.norms
        columns = shape[0] * shape[1]
        for norm, attention in zip(among, self.planes, strict=True):
            maps = x.view(-1, *shape[:2], x.shape[-1]).permute(0, 3, 1, 2)  # each height is a map of its own
            x = norm(x + attention(x + tokens.position, tokens.references[:, :2], maps, [columns] * len(maps)))
        x = images(x + self.images(x + tokens.position, tokens.seen, features))
        return last(x + self.ffn(x))


class ViewEncoder(nn.Module):
    """Image features -> features of the voxels of a coarse grid, of each key-frame by itself.

    Args:
        c: settings.
        grid: of the queries.
        image_size: (H, W) of the network's input.
    """

    order: Tensor

    def __init__(self, c: QueryConfig, grid: VoxelGrid, image_size: tuple[int, int]) -> None:
        super().__init__()
        self.shape, self.checkpointing = grid.shape, c.checkpointing
        self.queries = nn.Parameter(0.02 * torch.randn(*grid.shape, c.channels))
        self.tokens = VoxelTokens(grid, c.channels, image_size, c.feature_stride, references=c.references)
        self.views = CameraEmbedding(c.cameras, c.feature_channels)
        self.scales = nn.Parameter(0.02 * torch.randn(c.feature_levels, c.feature_channels))
        self.layers = nn.ModuleList(VoxelLayer(c) for _ in range(c.layers))
        x, y, z = grid.shape
        order = torch.arange(x * y * z).view(x, y, z).permute(2, 0, 1).flatten()
        self.register_buffer("order", order, persistent=False)

    def forward(self, features: Sequence[Tensor], batch: Batch) -> Tensor:
        """Features (B, V, C_f, h, w) of each level, and where the cameras are -> (B, C, X, Y, Z).

        Raises:
            ValueError: more cameras than there are embeddings for.
        """
        seen = [self.views(level) + scale[:, None, None] for level, scale in zip(features, self.scales, strict=True)]
        b, (x, y, z) = batch.size, self.shape
        tokens = self.tokens.at([self.order] * b, batch)
        found = self.queries.permute(2, 0, 1, 3).reshape(x * y * z, -1).repeat(b, 1)
        for layer in self.layers:
            found = checkpointed(layer, found, tokens, seen, self.shape, when=self.checkpointing)
        return found.view(b, z, x, y, -1).permute(0, 4, 2, 3, 1)
