"""Deformable attention in a volume and in images (SPEC A.5, J.3, J.4), plain PyTorch."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from occstream.models import kernels


def sample_volume(values: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
    """Weighted trilinear samples of a dense volume (SPEC J.3).

    Args:
        values: (B, C, X, Y, Z), C divisible by the heads.
        locations: (B, Q, heads, points, 3) as (x, y, z) in 0..1 over the volume; voxel i's centre is (i + 0.5) / X.
        weights: (B, Q, heads, points).

    Returns:
        (B, Q, C); samples outside the volume count as 0.
    """
    if kernels.wanted_for(values):
        return kernels.sample(values, locations, weights)
    b, q, heads, points, _ = locations.shape
    volume = values.reshape(b * heads, values.shape[1] // heads, *values.shape[2:])
    # grid_sample wants the last axis of the tensor first: (z, y, x) for (X, Y, Z).
    grid = (2 * locations - 1).flip(-1).permute(0, 2, 1, 3, 4).reshape(b * heads, q, points, 1, 3)
    sampled = F.grid_sample(volume, grid.to(volume.dtype), align_corners=False).squeeze(-1)
    mixed = (sampled * weights.permute(0, 2, 1, 3).reshape(b * heads, 1, q, points)).sum(-1)
    return mixed.view(b, -1, q).mT


def sample_images(values: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
    """Weighted bilinear samples of feature maps.

    Args:
        values: (N, C, h, w).
        locations: (N, L, heads, points, 2) as (u, v) in 0..1.
        weights: (N, L, heads, points).

    Returns:
        (N, L, C).
    """
    if kernels.wanted_for(values):
        return kernels.sample(values, locations, weights)
    n, length, heads, points, _ = locations.shape
    maps = values.reshape(n * heads, values.shape[1] // heads, *values.shape[2:])
    grid = (2 * locations - 1).permute(0, 2, 1, 3, 4).reshape(n * heads, length, points, 2)
    sampled = F.grid_sample(maps, grid.to(maps.dtype), align_corners=False)
    mixed = (sampled * weights.permute(0, 2, 1, 3).reshape(n * heads, 1, length, points)).sum(-1)
    return mixed.view(n, -1, length).mT


def _ring_bias(heads: int, points: int, dims: int) -> Tensor:
    """Offset biases of Deformable DETR: each head looks in its own direction, point k at distance k + 1."""
    angle = torch.arange(heads) * (2 * math.pi / heads)
    ring = torch.stack([angle.cos(), angle.sin()], -1)
    ring = ring / ring.abs().amax(-1, keepdim=True)
    if dims == 3:
        # No third direction in a ring: heads alternate between level, up and down.
        ring = torch.cat([ring, torch.tensor([0.0, 1.0, -1.0])[torch.arange(heads) % 3].unsqueeze(-1)], -1)
    return (ring[:, None] * torch.arange(1, points + 1)[None, :, None]).flatten()


class _Sampling(nn.Module):
    """Offsets and softmax weights from queries."""

    def __init__(self, channels: int, heads: int, points: int, dims: int):
        super().__init__()
        if channels % heads:
            raise ValueError(f"attention width {channels} does not divide by {heads} heads")
        self.heads, self.points, self.dims = heads, points, dims
        self.offsets = nn.Linear(channels, heads * points * dims)
        self.weights = nn.Linear(channels, heads * points)
        nn.init.zeros_(self.offsets.weight)
        with torch.no_grad():
            self.offsets.bias.copy_(_ring_bias(heads, points, dims))
        nn.init.zeros_(self.weights.weight)
        nn.init.zeros_(self.weights.bias)

    def forward(self, queries: Tensor) -> tuple[Tensor, Tensor]:
        """(…, C) -> offsets (…, heads, points, dims) in cells of what is sampled, weights (…, heads, points); fp32."""
        offsets = self.offsets(queries).float().unflatten(-1, (self.heads, self.points, self.dims))
        return offsets, self.weights(queries).float().unflatten(-1, (self.heads, self.points)).softmax(-1)


class VolumeAttention(nn.Module):
    """Deformable attention of tokens to a dense volume (J.3); residual not included."""

    def __init__(self, channels: int, heads: int = 8, points: int = 4, dropout: float = 0.1):
        super().__init__()
        self.sampling = _Sampling(channels, heads, points, 3)
        self.value, self.output = nn.Conv3d(channels, channels, 1), nn.Linear(channels, channels)
        self.dropout = nn.Dropout(dropout)

    def forward(self, queries: Tensor, references: Tensor, volume: Tensor) -> Tensor:
        """queries (B, Q, C), references (B, Q, 3) in 0..1, volume (B, C, X, Y, Z) -> (B, Q, C)."""
        offsets, weights = self.sampling(queries)
        cells = offsets.new_tensor(volume.shape[2:])
        locations = references[:, :, None, None].float() + offsets / cells
        return self.dropout(self.output(sample_volume(self.value(volume), locations, weights)))


class ImageAttention(nn.Module):
    """Deformable attention of tokens to the images that see them (J.4); residual not included.

    Queries are compacted per batch element *and* camera; the result is averaged over the cameras that see a query.
    """

    def __init__(self, channels: int, features: int, heads: int = 8, points: int = 8, dropout: float = 0.1):
        super().__init__()
        self.sampling = _Sampling(channels, heads, points, 2)
        self.value, self.output = nn.Conv2d(features, channels, 1), nn.Linear(channels, channels)
        self.dropout = nn.Dropout(dropout)

    def forward(self, queries: Tensor, pixels: Tensor, visible: Tensor, features: Tensor) -> Tensor:
        """Attends.

        Args:
            queries: (B, Q, C).
            pixels: (B, V, Q, 2) reference (u / W, v / H) in 0..1.
            visible: (B, V, Q) bool.
            features: (B, V, C_f, h, w).

        Returns:
            (B, Q, C); zero before the output projection for queries that no camera sees.
        """
        b, v, q = visible.shape
        offsets, weights = self.sampling(queries)
        values = self.value(features.flatten(0, 1))
        cells = offsets.new_tensor([features.shape[-1], features.shape[-2]])
        # slots (B V, L): the visible queries of each image first, in their order; L is the longest list.
        counts = visible.sum(-1).flatten()
        length = max(1, int(counts.max()))
        slots = visible.flatten(0, 1).to(torch.uint8).sort(dim=-1, descending=True, stable=True).indices[:, :length]
        used = torch.arange(length, device=slots.device) < counts.unsqueeze(1)
        element = torch.arange(b, device=slots.device).repeat_interleave(v).unsqueeze(1)
        reference = pixels.flatten(0, 1).gather(1, slots.unsqueeze(-1).expand(-1, -1, 2)).float()
        locations = reference[:, :, None, None] + offsets[element, slots] / cells
        sampled = sample_images(values, locations, weights[element, slots]) * used.unsqueeze(-1)
        total = sampled.new_zeros(b * q, sampled.shape[-1])
        total = total.index_add(0, (element * q + slots).flatten(), sampled.flatten(0, 1))
        hits = visible.sum(1).clamp_min(1).unsqueeze(-1)
        return self.dropout(self.output(total.view(b, q, -1) / hits))
