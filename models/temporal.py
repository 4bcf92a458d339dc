"""Voxel features of earlier key-frames, moved to where they are now and fused with the current ones (PanoOcc, Sec. 3.4). Shape
legend: see ``batch``; ``F`` is the number of key-frames, the current one first."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from occstream.models.attention import sample
from occstream.models.layers import ResidualBlock, full_precision, row
from occstream.models.lift import inverse
from occstream.sharding.grid import VoxelGrid


def align(past: Tensor, past_to_current: Tensor, grid: VoxelGrid) -> Tensor:
    """Features at the voxels of the current grid, trilinear in those of an earlier one; zeros outside of it (PanoOcc, eq. 6 and
    7). What moved by itself is where it was.

    Args:
        past: (N, C, X, Y, Z).
        past_to_current: (N, 4, 4) float32 rigid: frame of the grid then -> now, meters.
        grid: of both.

    Returns:
        (N, C, X, Y, Z) float32.
    """
    n, _, *shape = past.shape
    with full_precision(past.device):
        back = inverse(past_to_current[:, :3, :3])  # (N, 3, 3)
        places = (_centers(grid, past_to_current) - past_to_current[:, None, :3, 3]) @ back.mT
        places = (places - row(places, grid.lower)) / row(places, [b - a for a, b in zip(grid.lower, grid.upper)])
    places = places.reshape(-1, 1, 1, 3)
    found = sample(past, places, torch.ones_like(places[..., 0]), [places.shape[0] // n] * n)
    return found.view(n, *shape, -1).movedim(-1, 1)


def _centers(grid: VoxelGrid, like: Tensor) -> Tensor:
    """(X Y Z, 3) float32 centers of voxels, meters, computed where they are needed."""
    steps = [
        grid.lower[axis] + (torch.arange(n, device=like.device, dtype=like.dtype) + 0.5) * grid.voxel[axis]
        for axis, n in enumerate(grid.shape)
    ]
    return torch.stack(torch.meshgrid(*steps, indexing="ij"), -1).view(-1, 3)


class TemporalFusion(nn.Module):
    """Residual 3-D convolutions over the current features and the aligned ones of earlier key-frames.

    A key-frame that is absent has a copy of the current features in its place, plus what was learned for that place: so the
    network knows of it, and what stands still is not mistaken for what was seen to stand still.

    Args:
        channels: C.
        frames: F.
        grid: of the features.
        blocks: residual blocks; the first one takes all key-frames.
    """

    def __init__(self, channels: int, frames: int, grid: VoxelGrid, blocks: int = 1) -> None:
        super().__init__()
        self.grid = grid
        self.absent = nn.Parameter(torch.zeros(frames - 1, channels)) if frames > 1 else None
        self.blocks = nn.Sequential(
            *(ResidualBlock(3, (frames if i == 0 else 1) * channels, channels) for i in range(blocks))
        )

    def forward(self, current: Tensor, past: Tensor | None, past_to_current: Tensor, exists: Tensor) -> Tensor:
        """Fuses.

        Args:
            current: (B, C, X, Y, Z).
            past: (B, F - 1, C, X, Y, Z) of the grids then, the latest first; None where F is 1.
            past_to_current: (B, F - 1, 4, 4) as of ``align``.
            exists: (B, F - 1) bool; False: the scene has no such key-frame, and nothing of it is read.

        Returns:
            (B, C, X, Y, Z).
        """
        if past is None or self.absent is None:
            return self.blocks(current)
        b, f = past.shape[:2]
        aligned = align(past.flatten(0, 1), past_to_current.flatten(0, 1), self.grid).unflatten(0, (b, f))
        instead = current.unsqueeze(1) + self.absent[..., None, None, None]
        there = exists[..., None, None, None, None]
        shown = torch.where(there, aligned, instead.to(aligned.dtype))
        return self.blocks(torch.cat([current.unsqueeze(1).to(shown.dtype), shown], 1).flatten(1, 2))
