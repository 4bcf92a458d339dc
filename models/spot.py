"""SPOT (Yan et al.): pre-training of LiDAR encoders by semantic occupancy.

Voxels of a sweep -> encoder of a voxel detector -> three transposed convolutions -> classes of the label voxels (the paper's
Sec. 3.3.1). The decoder is light, so that what is learned is in the encoder, which goes on to detectors and segmentors. It is
two-dimensional: the layers of a column are channels of its last convolution. With ``target="bev"`` it predicts one class a
column, the other reading of the paper's H x W target.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Literal

import torch
from torch import Tensor, nn

from occstream.models.layers import SyncBatchNorm
from occstream.models.voxelbackbones import STRIDE, Variant, check_points_grid
from occstream.sharding.grid import VoxelGrid
from occstream.sharding.schema import IGNORE


@dataclass
class SpotConfig:
    """Sizes and open points. Defaults are those of the paper's pre-training on Waymo, or ours where it is silent."""

    variant: Variant = "plain"
    """Sparse backbone: plain (SECOND, PV-RCNN) or res (CenterPoint). A checkpoint of one fits no detector of the other."""
    sparse: Literal["auto", "torch", "spconv"] = "auto"
    """What computes sparse convolutions: torch, spconv, or spconv on GPUs where it is installed (auto)."""
    in_features: tuple[str, ...] = ("x", "y", "z", "intensity")
    """Features of a point, averaged in its voxel. The first three are x, y, z."""
    point_range: tuple[float, float, float, float, float, float] = (-75.2, -75.2, -2.0, 75.2, 75.2, 4.0)
    """Box of the points in the frame of the labels: lower x, y, z, upper x, y, z, in meters."""
    voxel: tuple[float, float, float] = (0.1, 0.1, 0.15)
    """Voxel of the points, meters. Detectors need 40 (to 55) voxels in z, and in x and y a multiple of 16."""
    width: int = 16
    """Channels of the encoder's first stage; only 16, the published network, can be handed to detectors."""
    bev_channels: tuple[int, int] = (128, 256)
    """Channels of the two levels of the 2-D backbone."""
    bev_layers: tuple[int, int] = (5, 5)
    """Convolutions in each of its levels, after the first."""
    bev_up: int = 256
    """Channels to which each of its levels is brought."""
    norm_momentum: float = 0.01
    """Share of a batch in the running statistics of the encoder's batch norms. The published 0.01 needs some 500 steps: before,
    a network is evaluated by statistics that it never had in training. Short runs need 0.1."""
    decoder_channels: tuple[int, int, int] = (256, 128, 64)
    """Channels of the decoder's three transposed convolutions."""
    target: Literal["volume", "bev"] = "volume"
    """What is predicted: a class of each voxel, or of each column. The paper's text and figures disagree."""

    def __post_init__(self) -> None:
        if self.variant not in ("plain", "res") or self.target not in ("volume", "bev"):
            raise ValueError(
                f"variant is {self.variant!r} and target {self.target!r}, must be plain or res and volume or bev"
            )
        if self.in_features[:3] != ("x", "y", "z") or len(set(self.in_features)) < len(self.in_features):
            raise ValueError(f"in_features are {self.in_features}, must begin with x, y, z and name each once")
        for f in fields(self):
            value = getattr(self, f.name)
            numbers = [v for v in (value if isinstance(value, tuple) else (value,)) if isinstance(v, (int, float))]
            if f.name != "point_range" and any(v <= 0 for v in numbers):
                raise ValueError(f"{f.name} is {value}, must be positive")
        if self.norm_momentum > 1:
            raise ValueError(f"norm_momentum is {self.norm_momentum}, must be at most 1")
        check_points_grid(self.points_grid().shape)

    def points_grid(self, frame: str = "ego") -> VoxelGrid:
        """Grid of the points. Raises ValueError if the range is not a whole number of voxels."""
        return VoxelGrid("points", self.point_range[:3], self.point_range[3:], self.voxel, frame)


def halvings(points: VoxelGrid, labels: VoxelGrid) -> int:
    """How often (0 to 3 times) the decoder doubles its resolution to reach the label voxels in x and y: as often as is
    possible from maps that are no finer than the encoder's."""
    cell = min(STRIDE * size / label for size, label in zip(points.voxel[:2], labels.voxel[:2]))
    count = min(3, max(0, math.floor(math.log2(cell) + 1e-6)))
    while any(size % 2**count for size in labels.shape[:2]):
        count -= 1
    return count


def interpolation(points: VoxelGrid, coarse: VoxelGrid, axis: int) -> Tensor:
    """Weights (n', n) float32 of linear interpolation along an axis, from the centers of the encoder's cells to those of
    ``coarse``; a part of the unit matrix where the cells agree."""
    cells = points.shape[axis] // STRIDE
    size, target = STRIDE * points.voxel[axis], coarse.shape[axis]
    centers = coarse.lower[axis] + (torch.arange(target, dtype=torch.float64) + 0.5) * coarse.voxel[axis]
    at = ((centers - points.lower[axis]) / size - 0.5).clamp(0, cells - 1)
    # Cells that agree but for rounding are not mixed.
    at = torch.where((at - at.round()).abs() < 1e-6, at.round(), at)
    distance = (at[:, None] - torch.arange(cells, dtype=torch.float64)).abs()
    return (1 - distance).clamp_min(0).float()


def column_classes(labels: Tensor, priority: Tensor) -> Tensor:
    """Labels of target ``bev``: of each column the known class of highest priority, of equal ones the first id.

    Args:
        labels: (B, X, Y, Z) uint8, ``IGNORE`` where unknown.
        priority: (K + 1,) integers, for example 2 for foreground, 1 for other classes, 0 for free.

    Returns:
        (B, X, Y) uint8; ``IGNORE`` for columns without a known voxel.
    """
    table = priority.new_full((256,), -1, dtype=torch.int32)
    table[: len(priority)] = priority.to(torch.int32) * 256 + 255
    table[: len(priority)] -= torch.arange(len(priority), dtype=torch.int32, device=table.device)
    best = table[labels.long()].amax(-1)
    return torch.where(best < 0, IGNORE, 255 - best % 256).to(torch.uint8)


class MapToLabels(nn.Module):
    """Brings the encoder's map to the label box: cut out where cells agree, else interpolated at their centers."""

    along_x: Tensor
    along_y: Tensor

    def __init__(self, points: VoxelGrid, coarse: VoxelGrid) -> None:
        super().__init__()
        along_x, along_y = (interpolation(points, coarse, axis) for axis in (0, 1))
        self.cut = None
        if all(bool(((m == 0) | (m == 1)).all()) and _consecutive(m) for m in (along_x, along_y)):
            self.cut = tuple((int(m[0].argmax()), len(m)) for m in (along_y, along_x))
        else:
            self.register_buffer("along_x", along_x, persistent=False)
            self.register_buffer("along_y", along_y, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, Y', X')."""
        if self.cut is not None:
            (y, height), (left, width) = self.cut
            return x[:, :, y : y + height, left : left + width]
        along_y, along_x = self.along_y.to(x.dtype), self.along_x.to(x.dtype)
        return torch.matmul(torch.matmul(along_y, x), along_x.t())


def _consecutive(weights: Tensor) -> bool:
    return bool((weights.argmax(1).diff() == 1).all())


class OccupancyDecoder(nn.Module):
    """Map of cells -> classes of label voxels or columns.

    Args:
        inputs: channels of the map.
        channels: of the three transposed convolutions.
        halvings: how many of them double the resolution.
        classes: K + 1.
        layers: voxels of a column, or 1.
    """

    def __init__(
        self, inputs: int, channels: tuple[int, int, int], halvings: int, *, classes: int, layers: int
    ) -> None:
        super().__init__()
        self.classes, self.layers = classes, layers
        steps: list[nn.Module] = []
        for i, width in enumerate(channels):
            stride = 2 if i < halvings else 1
            steps += [
                nn.ConvTranspose2d(inputs, width, 3, stride, 1, stride - 1, bias=False),
                SyncBatchNorm(width),
                nn.ReLU(inplace=True),
            ]
            inputs = width
        self.up = nn.Sequential(*steps)
        self.head = nn.Conv2d(inputs, classes * layers, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs, Y', X') -> (B, classes, X, Y, layers)."""
        logits = self.head(self.up(x)).unflatten(1, (self.classes, self.layers))
        return logits.permute(0, 1, 4, 3, 2)


class OccupancyHead(nn.Module):
    """The part of the pre-training network after the encoder, left behind in fine-tuning.

    Args:
        inputs: channels of the encoder's map.
        labels: grid of the labels; it must lie within ``config.point_range`` in x and y.
        num_classes: K, without free; 1 for binary occupancy.

    Raises:
        ValueError: the label grid does not lie within the points.
    """

    def __init__(self, config: SpotConfig, inputs: int, labels: VoxelGrid, num_classes: int) -> None:
        super().__init__()
        points = config.points_grid(labels.frame)
        for axis, name in enumerate("xy"):
            if labels.lower[axis] < points.lower[axis] - 1e-6 or labels.upper[axis] > points.upper[axis] + 1e-6:
                raise ValueError(
                    f"labels of grid {labels.name!r} reach from {labels.lower[axis]:g} to {labels.upper[axis]:g} m in "
                    f"{name}, points from {points.lower[axis]:g} to {points.upper[axis]:g} m: widen point_range"
                )
        doublings = halvings(points, labels)
        self.to_labels = MapToLabels(points, labels.coarsen((2**doublings, 2**doublings, 1)))
        layers = labels.shape[2] if config.target == "volume" else 1
        self.decoder = OccupancyDecoder(
            inputs, config.decoder_channels, halvings=doublings, classes=num_classes + 1, layers=layers
        )

    def forward(self, bev: Tensor) -> Tensor:
        """(B, inputs, H, W) -> logits (B, K + 1, X, Y, Z) of the label grid, free the last; Z is 1 for target ``bev``."""
        return self.decoder(self.to_labels(bev))
