"""Classes of LiDAR points from the encoder of a voxel detector, so that all of a pre-trained encoder is used.

Each point has the feature of its voxel at full resolution, the bird's-eye view at its place, its height and where it is in its
voxel; a small perceptron makes classes of them (our design: SPOT's own segmentor, Cylinder3D, shares no layer with detectors).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from occstream.models.layers import full_precision, row
from occstream.models.voxelbackbones import STRIDE, VoxelFeatures
from occstream.sharding.grid import VoxelGrid


@dataclass
class SegmentorConfig:
    """Head that classifies points."""

    channels: tuple[int, ...] = (128, 64)
    """Channels of the perceptron's hidden layers."""

    def __post_init__(self) -> None:
        if not self.channels or min(self.channels) < 1:
            raise ValueError(f"channels are {self.channels}, must be at least one number, each positive")


class PointSegmentor(nn.Module):
    """Features of voxels and cells -> classes of points. Memory grows with the number of points times ``channels``: the first
    layer is linear, so its share of the map is computed once a cell and interpolated after that.

    Args:
        voxel_channels: of the voxels' features, the encoder's ``width``.
        map_channels: of its bird's-eye view.
        points: grid of the points.
        num_classes: K.
        config: of the head.
    """

    def __init__(
        self, voxel_channels: int, map_channels: int, points: VoxelGrid, num_classes: int, *, config: SegmentorConfig
    ) -> None:
        super().__init__()
        self.grid = points
        first, *others = config.channels
        self.of_map = nn.Conv2d(map_channels, first, 1, bias=False)
        self.of_point = nn.Linear(voxel_channels + 4, first)
        layers: list[nn.Module] = [nn.LayerNorm(first), nn.ReLU()]
        for width in others:
            layers += [nn.Linear(first, width), nn.LayerNorm(width), nn.ReLU()]
            first = width
        self.classify = nn.Sequential(*layers, nn.Linear(first, num_classes))

    def forward(self, features: VoxelFeatures, xyz: Tensor, frame: Tensor, rows: Tensor) -> Tensor:
        """Logits of all points. A point outside of the grid, or with a value that is not finite, has an answer as well: without
        a voxel's feature, from the nearest place of the map.

        Args:
            features: of ``LidarEncoder``.
            xyz: (N, 3) float32 meters, frame of the grid.
            frame: (N,) int64 place of each point's frame in the batch.
            rows: (N,) int64 voxel of each point, -1 outside; see ``voxels.voxelize``.

        Returns:
            (N, K) float32.
        """
        at = self._places(xyz)
        near = self._interpolate(self.of_map(features.bev), at[:, :2], frame)
        inside = (rows >= 0)[:, None]
        # Voxels may be none at all.
        voxels = torch.cat([features.points, features.points.new_zeros(1, features.points.shape[1])])[rows]
        offset = torch.where(inside, at - at.floor() - 0.5, 0)
        height = 2 * at[:, 2:] / self.grid.shape[2] - 1  # -1..1 within the grid
        own = self.of_point(torch.cat([voxels, height.clamp(-2, 2).to(voxels), offset.to(voxels)], 1))
        return self.classify(own + near.to(own)).float()

    def _places(self, xyz: Tensor) -> Tensor:
        """(N, 3) float64 place of each point in voxels, as ``voxelize`` computes it."""
        wide = xyz.double()
        at = (wide - row(wide, self.grid.lower)) / row(wide, self.grid.voxel)
        return torch.nan_to_num(at, 0.0, 0.0, 0.0)

    def _interpolate(self, x: Tensor, at: Tensor, frame: Tensor) -> Tensor:
        """Map at places, linear between the centers of cells, constant outside of the outer ones.

        Args:
            x: (B, C, Y', X').
            at: (N, 2) x, y in voxels.

        Returns:
            (N, C) float32.
        """
        height, width = x.shape[2:]
        limits = row(at, (width - 1, height - 1))
        at = torch.minimum((at / STRIDE - 0.5).clamp_min(0), limits)
        low = torch.minimum(at.floor(), (limits - 1).clamp_min(0))
        share = at - low
        weights = torch.stack([1 - share, share], 1)  # (N, 2, 2): lower or upper, x or y
        steps = torch.stack([low, torch.minimum(low + 1, limits)], 1).long()
        place = (frame[:, None, None] * height + steps[:, :, 1, None]) * width + steps[:, None, :, 0]
        amount = weights[:, :, 1, None] * weights[:, None, :, 0]  # (N, 2, 2): y, x
        with full_precision(x.device):
            table = x.float().permute(0, 2, 3, 1).flatten(0, 2)
            return F.embedding_bag(place.flatten(1), table, mode="sum", per_sample_weights=amount.flatten(1).float())
