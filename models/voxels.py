"""Points of LiDAR sweeps -> sparse voxels."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from occstream.models.layers import row
from occstream.models.sparse import key_indices, order_keys
from occstream.sharding.grid import VoxelGrid


class Voxels(NamedTuple):
    """Of all sweeps of a batch, in ascending order.

    features: (M, C) float32, the mean over the points of a voxel. indices: (M, 4) int32: batch, z, y, x.
    rows: (N,) int64, the voxel of each point; -1 for points outside of the grid or with a value that is not finite.
    """

    features: Tensor
    indices: Tensor
    rows: Tensor


def voxelize(points: Tensor, sweep: Tensor, grid: VoxelGrid) -> Voxels:
    """Mean feature of the points in each voxel.

    Voxels are half-open boxes and their numbers are computed in float64: in float32, points within micrometers of a face
    would change sides. Means are sums in float64 over the points of a voxel in the given order.

    Args:
        points: (N, 3 + d) float32 or float64: x, y, z in meters in the frame of ``grid``, then any features.
        sweep: (N,) integers, the place of each point's sweep in the batch.
        grid: the box; its shape is (X, Y, Z).
    """
    wide = points.double()
    scaled = (wide[:, :3] - row(wide, grid.lower)) / row(wide, grid.voxel)
    inside = ((scaled >= 0) & (scaled < row(wide, grid.shape)) & wide.isfinite().all(1, keepdim=True)).all(1)
    kept = inside.nonzero().squeeze(1)
    x, y, z = scaled[kept].floor().long().unbind(1)
    width, depth, height = grid.shape
    shape = (height, depth, width)
    keys, order = torch.sort(order_keys(torch.stack([sweep[kept].long(), z, y, x], 1), shape), stable=True)
    found, voxel, counts = torch.unique_consecutive(keys, return_inverse=True, return_counts=True)
    rows = points.new_full((len(points),), -1, dtype=torch.int64)
    rows[kept[order]] = voxel
    means = wide.new_zeros(0, wide.shape[1])
    if len(found):
        means = torch.segment_reduce(wide[kept[order]], "sum", lengths=counts, axis=0) / counts[:, None]
    return Voxels(means.float(), key_indices(found, shape), rows)
