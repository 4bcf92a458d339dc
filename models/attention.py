"""Deformable attention in a volume and in images (B2S, Sec. 3.2), plain PyTorch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from occstream.models import kernels
from occstream.models.layers import Pointwise2d, Pointwise3d, full_precision, row


def sample(values: Tensor, locations: Tensor, weights: Tensor, counts: list[int]) -> Tensor:
    """Weighted linear samples of volumes or maps, as many of each as it has queries: nothing is padded.

    Args:
        values: (N, C, X, Y, Z) or (N, C, h, w), C divisible by the heads.
        locations: (T, heads, points, 3) as (x, y, z), or (T, heads, points, 2) as (u, v), in 0..1 over the volume or map;
            cell i's center is (i + 0.5) / X. fp32: bf16 knows 256 places in 0..1.
        weights: (T, heads, points) fp32.
        counts: queries of each of the N, which follow each other; T in all.

    Returns:
        (T, C); samples outside count as 0. Summed and returned in fp32 whatever the values are (fp64 if everything is), so
        that the kernels change neither results nor gradients.
    """
    for tensor in (locations, weights):
        assert tensor.dtype in (torch.float32, torch.float64), f"sampling in {tensor.dtype}, must be float32"
    if kernels.wanted_for(values):
        return kernels.sample(values, locations, weights, counts)
    if compiled := kernels.compiled_for(values):
        return compiled.sample(values, locations, weights, counts)
    heads = weights.shape[1]
    # grid_sample wants the last axis of the tensor first: (z, y, x) for (X, Y, Z), but (u, v) for (h, w).
    values = values.to(locations.dtype)
    grid = 2 * locations - 1
    grid = (grid.flip(-1) if values.dim() == 5 else grid).transpose(0, 1)
    grid = grid.unsqueeze(3) if values.dim() == 5 else grid
    maps = values.unflatten(1, (heads, -1)).unbind()
    found = []
    for one, places, weight in zip(maps, grid.split(counts, 1), weights.transpose(0, 1).split(counts, 1)):
        sampled = F.grid_sample(one, places, align_corners=False).flatten(3)  # (heads, C / heads, t, points)
        found.append((sampled * weight.unsqueeze(1)).sum(-1).flatten(0, 1).mT)
    return torch.cat(found)


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
    """Offsets and softmax weights from queries. Points may come in groups, each with the same places at first."""

    def __init__(self, channels: int, heads: int, points: int, dims: int, *, groups: int = 1) -> None:
        super().__init__()
        if channels % heads:
            raise ValueError(f"attention width {channels} does not divide by {heads} heads")
        self.heads, self.points, self.dims = heads, groups * points, dims
        self.offsets = nn.Linear(channels, heads * groups * points * dims)
        self.weights = nn.Linear(channels, heads * groups * points)
        nn.init.zeros_(self.offsets.weight)
        with torch.no_grad():
            ring = _ring_bias(heads, points, dims).view(heads, 1, -1)
            self.offsets.bias.copy_(ring.expand(heads, groups, -1).flatten())
        nn.init.zeros_(self.weights.weight)
        nn.init.zeros_(self.weights.bias)

    def forward(self, queries: Tensor) -> tuple[Tensor, Tensor]:
        """(…, C) -> offsets (…, heads, points, dims) in cells of what is sampled, weights (…, heads, points); fp32."""
        with full_precision(queries.device):
            queries = queries.float()
            offsets = self.offsets(queries).unflatten(-1, (self.heads, self.points, self.dims))
            return offsets, self.weights(queries).unflatten(-1, (self.heads, self.points)).softmax(-1)


class VolumeAttention(nn.Module):
    """Deformable attention of tokens to a dense volume; residual not included."""

    def __init__(self, channels: int, heads: int = 8, points: int = 4, dropout: float = 0.1) -> None:
        super().__init__()
        self.sampling = _Sampling(channels, heads, points, 3)
        self.value, self.output = Pointwise3d(channels, channels), nn.Linear(channels, channels)
        self.dropout = nn.Dropout(dropout)

    def forward(self, queries: Tensor, references: Tensor, volume: Tensor, counts: list[int]) -> Tensor:
        """queries (T, C), references (T, 3) in 0..1, volume (B, C, X, Y, Z), queries of each of the B -> (T, C)."""
        offsets, weights = self.sampling(queries)
        cells = row(offsets, volume.shape[2:])
        locations = references[:, None, None] + offsets / cells
        return self.dropout(self.output(sample(self.value(volume), locations, weights, counts)))


class MapAttention(nn.Module):
    """Deformable attention of queries to a map seen from above; residual not included."""

    def __init__(self, channels: int, heads: int = 8, points: int = 4, dropout: float = 0.1) -> None:
        super().__init__()
        self.sampling = _Sampling(channels, heads, points, 2)
        self.value, self.output = nn.Conv2d(channels, channels, 1), nn.Linear(channels, channels)
        self.dropout = nn.Dropout(dropout)

    def forward(self, queries: Tensor, references: Tensor, bev: Tensor, counts: list[int]) -> Tensor:
        """queries (T, C), references (T, 2) as (x, y) in 0..1, map (B, C, X, Y), queries of each of the B -> (T, C)."""
        offsets, weights = self.sampling(queries)
        locations = references[:, None, None] + offsets / row(offsets, bev.shape[2:])
        # To ``sample`` a map has rows and columns: x is along its rows.
        return self.dropout(self.output(sample(self.value(bev), locations.flip(-1), weights, counts)))


@dataclass
class Sightings:
    """Which tokens which images see, image after image: P pairs.

    Attributes:
        token: (P,) its number.
        pixel: (P, 2) of (u, v) over the pixels that the image features cover, in 0..1: feature i of n at (i + 0.5) / n.
        counts: pairs of each image, of all frames' first cameras, then all frames' second ones, ...
        cameras: (T,) how many see each token.
        reference: (P,) which of a token's reference points is seen; None where tokens have one.
    """

    token: Tensor
    pixel: Tensor
    counts: list[int]
    cameras: Tensor
    reference: Tensor | None = None


class ImageAttention(nn.Module):
    """Deformable attention of tokens to the images that see them; residual not included.

    Only pairs of a token and an image that sees it are computed; the result is averaged over the cameras that do.

    Args:
        channels: of queries. features: of images.
        points: around each reference point, in each level.
        levels: of the image features.
        references: points of each token that are projected.
    """

    def __init__(
        self,
        channels: int,
        features: int,
        heads: int = 8,
        points: int = 8,
        *,
        levels: int = 1,
        references: int = 1,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        self.levels, self.references = levels, references
        self.sampling = _Sampling(channels, heads, points, 2, groups=levels * references)
        self.value, self.output = Pointwise2d(features, channels), nn.Linear(channels, channels)
        self.dropout = nn.Dropout(dropout)

    def forward(self, queries: Tensor, seen: Sightings, features: Tensor | Sequence[Tensor]) -> Tensor:
        """Attends.

        Args:
            queries: (T, C).
            seen: which images see them; pixels are over the first level.
            features: (B, V, C_f, h, w), or of each level, each half as fine as the one before. Samples of all levels, and of
                all reference points, are added up.

        Returns:
            (T, C); zero before the output projection for queries that no camera sees.
        """
        maps = [features] if isinstance(features, Tensor) else list(features)
        offsets, weights = (self._of_pairs(part, seen) for part in self.sampling(queries))
        finest, total = maps[0].shape[-2:], None
        for level, values in enumerate(maps):
            values = self.value(values.transpose(0, 1).flatten(0, 1))
            h, w = values.shape[-2:]
            pixel = seen.pixel
            if level:  # the last row and column of a level may reach further beyond the image than those of the first
                pixel = pixel * row(pixel, [finest[1] / (w * 2**level), finest[0] / (h * 2**level)])
            locations = pixel[:, None, None] + offsets[:, :, level] / row(offsets, [w, h])
            sampled = sample(values, locations, weights[:, :, level], seen.counts)
            total = sampled if total is None else total + sampled
        assert total is not None, "there is at least one level"
        summed = total.new_zeros(len(queries), total.shape[-1]).index_add(0, seen.token, total)
        return self.dropout(self.output(summed / seen.cameras.clamp_min(1).unsqueeze(-1)))

    def _of_pairs(self, sampling: Tensor, seen: Sightings) -> Tensor:
        """(T, heads, references levels points, …) of tokens -> (P, heads, levels, points, …) of pairs."""
        each = sampling.unflatten(2, (self.references, self.levels, -1))
        if seen.reference is None:
            return each[:, :, 0][seen.token]
        return each.transpose(1, 2)[seen.token, seen.reference]
