"""Lifting, projecting and pooling: exact against slow references, on a grid whose axes all differ."""

import dataclasses

import pytest
import torch

from occstream.models.lift import camera_vector, frustum, inverse, project, unproject, voxel_pool
from occstream.sharding.grid import VoxelGrid
from tests.models.helpers import make_batch

ODD = VoxelGrid("odd", (-5, -7, -1), (5, 7, 2), (2, 2, 1))  # 5 x 7 x 3


@pytest.mark.parametrize("seed", range(4))
def test_a_pixel_lifted_and_projected_comes_back(seed):
    batch = make_batch(2, 1, views=4, seed=seed)
    depths = torch.tensor([0.5, 3.0, 11.0, 47.0])
    points = frustum((32, 64), (5, 9), depths)
    lifted = unproject(points, batch)  # (B, V, D, h, w, 3)
    for view in range(4):
        projected = project(lifted[:, view].reshape(2, -1, 3), batch)
        pixels, depth = (torch.stack(part) for part in zip(*projected))
        wanted = points.reshape(-1, 3)
        torch.testing.assert_close(pixels[:, view], wanted[:, :2].expand(2, -1, 2), atol=1e-3, rtol=0)
        torch.testing.assert_close(depth[:, view], wanted[:, 2].expand(2, -1), atol=1e-4, rtol=1e-5)


def test_frustum_spreads_over_the_whole_image_ends_included():
    points = frustum((32, 64), (2, 3), torch.tensor([4.0]))
    assert points[0, :, :, 0].tolist() == [[0, 31.5, 63], [0, 31.5, 63]]
    assert points[0, :, :, 1].tolist() == [[0, 0, 0], [31, 31, 31]]


def test_inverse_is_that_of_float64():
    matrices = torch.randn(50, 3, 3, generator=torch.Generator().manual_seed(0)) * torch.tensor([1000.0, 1, 1])
    torch.testing.assert_close(inverse(matrices), torch.linalg.inv(matrices.double()).float(), atol=0, rtol=1e-6)


def test_camera_vector_has_27_numbers():
    assert camera_vector(make_batch(2, 1, views=3)).shape == (2, 3, 27)


@pytest.mark.parametrize("seed", range(3))
def test_pooling_equals_a_loop_and_so_do_its_gradients(seed):
    g = torch.Generator().manual_seed(seed)
    b, v, d, c, h, w = 2, 3, 4, 5, 2, 3
    depth = torch.rand(b, v, d, h, w, generator=g, dtype=torch.float64).float().requires_grad_()
    context = torch.rand(b, v, c, h, w, generator=g).requires_grad_()
    points = (torch.rand(b, v, d, h, w, 3, generator=g) - 0.5) * torch.tensor([14.0, 18.0, 6.0])
    pooled = voxel_pool(depth, context, points, ODD)
    assert pooled.shape == (b, c, 5, 7, 3)
    slow = torch.zeros(b, c, 5, 7, 3)
    for bi in range(b):
        for vi in range(v):
            for di in range(d):
                for y in range(h):
                    for x in range(w):
                        p = points[bi, vi, di, y, x].tolist()
                        i = [int((p[a] - ODD.lower[a]) // ODD.voxel[a]) for a in range(3)]
                        if all(0 <= i[a] < ODD.shape[a] for a in range(3)):
                            slow[bi, :, i[0], i[1], i[2]] = (
                                slow[bi, :, i[0], i[1], i[2]] + depth[bi, vi, di, y, x] * context[bi, vi, :, y, x]
                            )
    torch.testing.assert_close(pooled, slow)
    weight = torch.rand(pooled.shape, generator=g)
    fast = torch.autograd.grad((pooled * weight).sum(), (depth, context), retain_graph=True)
    for a, b in zip(fast, torch.autograd.grad((slow * weight).sum(), (depth, context))):
        torch.testing.assert_close(a, b)


def test_mirroring_the_scene_mirrors_the_volume():
    """``scene_aug`` is all that a flip needs: the pooled volume comes out reversed along that axis."""
    batch = make_batch(1, 0, views=3, augment=False, seed=5)
    points = frustum((32, 64), (4, 8), torch.arange(1.0, 7.0))
    depth, context = torch.rand(1, 3, 6, 4, 8), torch.rand(1, 3, 2, 4, 8)
    plain = voxel_pool(depth, context, unproject(points, batch), ODD)
    for axis in (0, 1):
        aug = torch.eye(3)
        aug[axis, axis] = -1
        mirrored = voxel_pool(depth, context, unproject(points, dataclasses.replace(batch, scene_aug=aug[None])), ODD)
        torch.testing.assert_close(mirrored, plain.flip(2 + axis))
