"""The transformer of B2S (SPEC A.5, A.8): one layer, used on every voxel of the compact volume (dense) and on the voxels
that are taken for occupied (sparse). Shape legend: see ``batch``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from occstream.models.attention import ImageAttention, VolumeAttention
from occstream.models.batch import OccBatch
from occstream.models.layers import AxialEmbedding, checkpointed
from occstream.models.lift import project
from occstream.sharding.grid import VoxelGrid

if TYPE_CHECKING:
    from occstream.models.b2s import B2SConfig


class TransformerLayer(nn.Module):
    """Self-attention to a volume, image cross-attention, feed-forward; post-norm (SPEC A.5, A.8)."""

    def __init__(self, c: B2SConfig):
        super().__init__()
        width = c.attention_channels
        self.volume = VolumeAttention(width, c.heads, c.self_points, c.dropout)
        self.images = ImageAttention(width, c.feature_channels, c.heads, c.cross_points, c.dropout)
        self.ffn = nn.Sequential(
            nn.Linear(width, c.ffn_channels),
            nn.ReLU(),
            nn.Dropout(c.dropout),
            nn.Linear(c.ffn_channels, width),
            nn.Dropout(c.dropout),
        )
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3))

    def forward(self, x: Tensor, position: Tensor, references, volume, pixels, visible, features) -> Tensor:
        """Refines tokens.

        Args:
            x, position: (B, Q, C) tokens and their position embedding.
            references: (B, Q, 3) in 0..1 of ``volume``.
            volume: (B, C, X, Y, Z) that the self-attention samples.
            pixels, visible: of ``views_of``.
            features: (B, V, C_f, h, w).
        """
        x = self.norms[0](x + self.volume(x + position, references, volume))
        x = self.norms[1](x + self.images(x + position, pixels, visible, features))
        return self.norms[2](x + self.ffn(x))


class VoxelTokens(nn.Module):
    """Where the voxels of a grid are: position embedding, reference points, pixels.

    Args:
        grid: whose voxels are the tokens, ego frame.
        channels: of the embedding.
        image_size: (H, W) of the network's input.
    """

    def __init__(self, grid: VoxelGrid, channels: int, image_size: tuple[int, int]):
        super().__init__()
        self.shape, self.image_size = grid.shape, image_size
        centers = torch.tensor(grid.centers().reshape(-1, 3), dtype=torch.float32)
        self.register_buffer("centers", centers, persistent=False)
        self.embedding = AxialEmbedding(grid.shape, channels)

    def places(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Flat voxel index (B, Q) -> position embedding (B, Q, C), references (B, Q, 3) in 0..1 over the grid."""
        steps = torch.stack(torch.unravel_index(index, self.shape), -1)
        return self.embedding(steps), (steps + 0.5) / steps.new_tensor(self.shape)

    def views(self, index: Tensor, used: Tensor, batch: OccBatch) -> tuple[Tensor, Tensor]:
        """Where the cameras see voxels.

        Args:
            index: (B, Q) flat voxel index.
            used: (B or 1, Q) bool; the others are seen by none.

        Returns:
            pixels: (B, V, Q, 2) of (u / W, v / H); 0 where not visible.
            visible: (B, V, Q) bool: in front of the camera and in its image (SPEC A.5).
        """
        pixels, depth = project(self.centers[index], batch)
        height, width = self.image_size
        pixels = pixels / pixels.new_tensor([width, height])
        visible = (depth > 1e-5) & ((pixels > 0) & (pixels < 1)).all(-1) & used.unsqueeze(1)
        return torch.where(visible.unsqueeze(-1), pixels, pixels.new_zeros(())), visible


class DenseTransformer(nn.Module):
    """Layers over every voxel of the compact volume, added to it (SPEC A.5: 2 or 3 of BEVFormer, 1 of the LS baseline).

    Args:
        c: settings.
        grid: of the compact volume.
        image_size: (H, W) of the network's input.
        layers: how many.
    """

    def __init__(self, c: B2SConfig, grid: VoxelGrid, image_size: tuple[int, int], layers: int):
        super().__init__()
        self.checkpointing = c.checkpointing
        self.tokens = VoxelTokens(grid, c.attention_channels, image_size)
        self.into = nn.Linear(c.compact_channels, c.attention_channels)
        self.layers = nn.ModuleList(TransformerLayer(c) for _ in range(layers))
        self.out = nn.Linear(c.attention_channels, c.compact_channels)

    def forward(self, volume: Tensor, features: Tensor, batch: OccBatch) -> Tensor:
        """volume (B, C, X, Y, Z), features (B, V, C_f, h, w) -> (B, C, X, Y, Z)."""
        size = len(volume)
        index = torch.arange(volume[0, 0].numel(), device=volume.device).expand(size, -1)
        position, references = self.tokens.places(index)
        pixels, visible = self.tokens.views(index, index[:1] >= 0, batch)
        x = self.into(volume.flatten(2).mT)
        for layer in self.layers:
            sampled = x.mT.unflatten(2, volume.shape[2:])
            x = checkpointed(
                layer, x, position, references, sampled, pixels, visible, features, when=self.checkpointing
            )
        return volume + self.out(x).mT.unflatten(2, volume.shape[2:])
