"""Points to voxels."""

from __future__ import annotations

import torch

from occstream.models.sparse import SparseTensor
from occstream.models.voxels import voxelize
from occstream.sharding.grid import VoxelGrid

WAYMO = VoxelGrid("waymo-points", (-75.2, -75.2, -2), (75.2, 75.2, 4), (0.1, 0.1, 0.15))


def voxels(points, dtype=torch.float64, grid=WAYMO, sweep=None):
    points = torch.tensor(points, dtype=dtype)
    return voxelize(points, torch.zeros(len(points)) if sweep is None else torch.tensor(sweep), grid)


def test_voxel_numbers_are_those_of_float64():
    """All four differ if computed in float32, or are on a face."""
    found = voxels([(0.04, 0.06, 0), (-0.01, 0, 0), (75.2, 0, 0), (74, 75.1, 3.99)])
    assert found.rows.tolist() == [1, 0, -1, 2]
    assert found.indices.tolist() == [[0, 13, 752, 751], [0, 13, 752, 752], [0, 39, 1503, 1491]]


def test_float32_points_are_where_float32_says():
    """The nearest float32 below 75.2 m is inside of the box; voxels agree with the grid's own."""
    g = torch.Generator().manual_seed(0)
    points = ((torch.rand(5000, 4, generator=g) - 0.5) * torch.tensor([160, 160, 10, 1])).float()
    points[0] = torch.tensor([75.2, 0, 0, 1])
    found = voxelize(points, torch.zeros(5000, dtype=torch.int64), WAYMO)
    index, inside = WAYMO.to_index(points[:, :3].numpy())
    assert found.rows[0] >= 0
    assert ((found.rows >= 0).numpy() == inside).all()
    assert (found.indices[found.rows[inside]][:, [3, 2, 1]].numpy() == index[inside]).all()


def test_features_are_means_per_voxel_and_sweep():
    found = voxels(
        [(0.01, 0.01, 0, 1.0), (5, 5, 0, 7.0), (0.03, 0.05, 0, 2.0), (0.01, 0.01, 0, 10.0)], sweep=[0, 0, 0, 1]
    )
    assert found.rows.tolist() == [0, 1, 0, 2]
    assert found.features.dtype == torch.float32
    torch.testing.assert_close(found.features[0], torch.tensor([0.02, 0.03, 0, 1.5]))
    assert found.features[[1, 2], 3].tolist() == [7, 10]
    assert found.indices[:, 0].tolist() == [0, 0, 1]
    SparseTensor.of(found.features, found.indices, WAYMO.shape[::-1], 2)


def test_points_that_are_not_numbers_belong_to_no_voxel():
    nan, inf = float("nan"), float("inf")
    found = voxels([(nan, 0, 0, 1), (0, inf, 0, 1), (0, 0, -inf, 1), (0, 0, 0, nan), (0, 0, 0, 1), (0, 0, 4, 1)])
    assert found.rows.tolist() == [-1, -1, -1, -1, 0, -1]
    assert found.features.tolist() == [[0, 0, 0, 1]]


def test_no_points_are_no_voxels():
    for points in (torch.zeros(0, 4), torch.full((3, 4), 100.0)):
        found = voxelize(points, torch.zeros(len(points), dtype=torch.int64), WAYMO)
        assert found.features.shape == (0, 4)
        assert SparseTensor.of(found.features, found.indices, WAYMO.shape[::-1], 2).indices.shape == (0, 4)


def test_a_large_sweep_is_voxelized_the_same_in_any_order():
    g = torch.Generator().manual_seed(0)
    points = torch.randn(200_000, 4, generator=g) * torch.tensor([15, 15, 0.5, 1])
    sweep = torch.zeros(len(points), dtype=torch.int64)
    found = voxelize(points, sweep, WAYMO)
    order = torch.randperm(len(points), generator=g)
    again = voxelize(points[order], sweep, WAYMO)
    assert torch.equal(found.indices, again.indices)
    assert torch.equal(found.rows[order], again.rows)
    assert torch.equal(found.features, again.features)
