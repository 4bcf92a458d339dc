"""The transformer of B2S (Sec. 3.2): one layer, used on every voxel of the compact volume (dense) and on the voxels
that are taken for occupied (sparse). Shape legend: see ``batch``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from occstream.models.attention import ImageAttention, Sightings, VolumeAttention
from occstream.models.batch import Batch
from occstream.models.layers import AxialEmbedding, checkpointed, row
from occstream.models.lift import project
from occstream.sharding.grid import VoxelGrid


class TransformerConfig(Protocol):
    """What these modules read of a model's settings; ``B2SConfig`` says what each means."""

    attention_channels: int
    compact_channels: int
    feature_channels: int
    feature_stride: int
    ffn_channels: int
    heads: int
    self_points: int
    cross_points: int
    dropout: float
    checkpointing: bool


def feed_forward(width: int, hidden: int, dropout: float) -> nn.Sequential:
    """Two layers of a transformer; residual not included."""
    return nn.Sequential(
        nn.Linear(width, hidden), nn.ReLU(), nn.Dropout(dropout), nn.Linear(hidden, width), nn.Dropout(dropout)
    )


class TransformerLayer(nn.Module):
    """Self-attention to a volume, image cross-attention, feed-forward; post-norm (as BEVFormer)."""

    def __init__(self, c: TransformerConfig) -> None:
        super().__init__()
        width = c.attention_channels
        self.volume = VolumeAttention(width, c.heads, c.self_points, c.dropout)
        self.images = ImageAttention(width, c.feature_channels, c.heads, c.cross_points, dropout=c.dropout)
        self.ffn = feed_forward(width, c.ffn_channels, c.dropout)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3))

    def forward(self, x: Tensor, tokens: Tokens, volume: Tensor, features: Tensor) -> Tensor:
        """Refines tokens.

        Args:
            x: (T, C).
            tokens: where they are.
            volume: (B, C, X, Y, Z) that the self-attention samples.
            features: (B, V, C_f, h, w).
        """
        x = self.norms[0](x + self.volume(x + tokens.position, tokens.references, volume, tokens.counts))
        x = self.norms[1](x + self.images(x + tokens.position, tokens.seen, features))
        return self.norms[2](x + self.ffn(x))


@dataclass
class Tokens:
    """Voxels of the frames of a batch as one list, frame after frame: T in all, as many of each frame as it has.

    Attributes:
        place: (T,) row in the batch's voxels laid end to end: frame times voxels of a grid plus flat voxel index.
        counts: tokens of each frame.
        position: (T, C) embedding.
        references: (T, 3) in 0..1 over the grid.
        seen: by which cameras.
    """

    place: Tensor
    counts: list[int]
    position: Tensor
    references: Tensor
    seen: Sightings


class VoxelTokens(nn.Module):
    """Where the voxels of a grid are: position embedding, reference points, pixels.

    Args:
        grid: whose voxels are the tokens, ego frame.
        channels: of the embedding.
        image_size: (H, W) of the network's input.
        stride: pixels between image features; where the image does not divide by it, the last ones reach beyond its end.
        references: points of each voxel that cameras may see, spread evenly over its height.
    """

    centers: Tensor

    def __init__(
        self, grid: VoxelGrid, channels: int, image_size: tuple[int, int], stride: int = 1, *, references: int = 1
    ) -> None:
        super().__init__()
        self.shape, self.image_size = grid.shape, image_size
        self.heights = [grid.voxel[2] * ((i + 0.5) / references - 0.5) for i in range(references)]
        self.covered = [-(-n // stride) * stride for n in image_size]
        centers = torch.tensor(grid.centers().reshape(-1, 3), dtype=torch.float32)
        self.register_buffer("centers", centers, persistent=False)
        self.embedding = AxialEmbedding(grid.shape, channels)

    def at(self, index: list[Tensor], batch: Batch) -> Tokens:
        """Flat voxel indices of each frame of a batch -> tokens."""
        counts = [len(i) for i in index]
        flat = torch.cat(index)
        frame = torch.cat([torch.full_like(voxels, i) for i, voxels in enumerate(index)])
        _, y, z = self.shape
        steps = torch.stack([flat // (y * z), flat // z % y, flat % z], -1)
        return Tokens(
            place=frame * len(self.centers) + flat,
            counts=counts,
            position=self.embedding(steps),
            references=(steps + 0.5) / row(self.centers, self.shape),
            seen=self._sightings(index, batch),
        )

    def _sightings(self, index: list[Tensor], batch: Batch) -> Sightings:
        """Cameras see what is in front of them and in their image."""
        size, covered = row(self.centers, self.image_size[::-1]), row(self.centers, self.covered[::-1])
        projected = project((self._references(i) for i in index), batch)
        pixels, depth = (torch.cat(part, 1) for part in zip(*projected))
        visible = (depth > 1e-5) & ((pixels > 0) & (pixels < size)).all(-1)  # of (V, T references, 2)
        several = len(self.heights)
        each = [v.sum(1) for v in visible.split([several * len(i) for i in index], 1)]
        counts = torch.stack(each, 1).flatten().tolist()
        camera, point = torch.nonzero_static(visible, size=sum(counts)).unbind(1)
        pixel = pixels[camera, point] / covered
        if several == 1:
            return Sightings(point, pixel, counts, visible.sum(0))
        cameras = visible.unflatten(1, (-1, several)).any(2).sum(0)
        token = torch.div(point, several, rounding_mode="floor")
        return Sightings(token, pixel, counts, cameras, point % several)

    def _references(self, voxels: Tensor) -> Tensor:
        """(n references, 3) meters, of the first voxel, then of the second, ..."""
        centers = self.centers[voxels]
        if len(self.heights) == 1:
            return centers
        up = torch.stack([row(centers, [0.0, 0.0, height]) for height in self.heights])
        return (centers[:, None] + up).flatten(0, 1)


class DenseTransformer(nn.Module):
    """Layers over every voxel of the compact volume, added to it (B2S, Sec. 4.1: 2 or 3 of BEVFormer, 1 of the LS baseline).

    Args:
        c: settings.
        grid: of the compact volume.
        image_size: (H, W) of the network's input.
        layers: how many.
    """

    def __init__(self, c: TransformerConfig, grid: VoxelGrid, image_size: tuple[int, int], layers: int) -> None:
        super().__init__()
        self.checkpointing = c.checkpointing
        self.tokens = VoxelTokens(grid, c.attention_channels, image_size, c.feature_stride)
        self.into = nn.Linear(c.compact_channels, c.attention_channels)
        self.layers = nn.ModuleList(TransformerLayer(c) for _ in range(layers))
        self.out = nn.Linear(c.attention_channels, c.compact_channels)

    def forward(self, volume: Tensor, features: Tensor, batch: Batch) -> Tensor:
        """volume (B, C, X, Y, Z), features (B, V, C_f, h, w) -> (B, C, X, Y, Z)."""
        everything = torch.arange(volume[0, 0].numel(), device=volume.device)
        tokens = self.tokens.at([everything] * len(volume), batch)
        x = self.into(volume.flatten(2).mT.flatten(0, 1))
        for layer in self.layers:
            sampled = self._volume(x, volume)
            x = checkpointed(layer, x, tokens, sampled, features, when=self.checkpointing)
        return volume + self._volume(self.out(x), volume)

    @staticmethod
    def _volume(tokens: Tensor, like: Tensor) -> Tensor:
        """(B X Y Z, C) -> (B, C, X, Y, Z)."""
        return tokens.unflatten(0, (len(like), -1)).mT.unflatten(2, like.shape[2:])
