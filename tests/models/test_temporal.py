"""Where features of earlier key-frames come to lie: worked numbers, affine functions, a static world, what is absent."""

from __future__ import annotations

import math

import pytest
import torch

from occstream.models.temporal import TemporalFusion, align
from occstream.sharding.grid import VoxelGrid

COARSE = VoxelGrid("coarse", (-51.2, -51.2, -5), (51.2, 51.2, 3), (2.048, 2.048, 0.5))  # 50 x 50 x 16
ODD = VoxelGrid("odd", (-5, -7, -1), (5, 7, 2), (2, 2, 1))  # 5 x 7 x 3


def pose(x=0.0, y=0.0, z=0.0, turn=0.0) -> torch.Tensor:
    """Past grid -> now."""
    out = torch.eye(4)
    out[0, 0] = out[1, 1] = math.cos(turn)
    out[1, 0], out[0, 1] = math.sin(turn), -math.sin(turn)
    out[:3, 3] = torch.tensor([x, y, z])
    return out


def numbered(axis: int) -> torch.Tensor:
    """(1, 1, 50, 50, 16): each voxel holds its index along an axis, from 1."""
    shape = [1, 1, 1, 1, 1]
    shape[2 + axis] = COARSE.shape[axis]
    return (torch.arange(COARSE.shape[axis]) + 1.0).view(shape).expand(1, 1, *COARSE.shape)


def test_a_vehicle_that_advanced_two_voxels_reads_two_voxels_ahead():
    """A place of now lay further ahead then. The last two cells of the grid were not in it."""
    found = align(numbered(0), pose(x=-4.096)[None], COARSE)[0, 0, :, 25, 8]
    torch.testing.assert_close(found[:48], torch.arange(3.0, 51), atol=1e-3, rtol=0)
    assert found[10].round() == 12 + 1
    assert found[48:].tolist() == [0, 0]


def test_a_vehicle_that_turned_left_has_on_its_right_what_was_ahead():
    """What is at (10, 0) now was at (0, 10) then, on the left."""
    past = torch.zeros(1, 1, *COARSE.shape)
    i, j = (int((v + 51.2) / 2.048) for v in (10.0, 0.1))
    past[0, 0, j, i] = 1  # x 0.1, y 10
    found = align(past, pose(turn=-math.pi / 2)[None], COARSE)[0, 0, :, :, 3]
    # The rotated voxel is one voxel again: (x, y) of now was at (-y, x).
    assert found.gt(0.99).nonzero().tolist() == [[i, 49 - j]]
    assert math.isclose(float(found.sum()), 1, abs_tol=1e-3)


def test_a_vehicle_that_climbed_reads_one_voxel_higher():
    found = align(numbered(2), pose(z=-0.5)[None], COARSE)[0, 0, 25, 25]
    assert found[3].round() == 4 + 1
    assert found[15] == 0


@pytest.mark.parametrize("seed", range(4))
def test_a_volume_of_world_coordinates_still_holds_them(seed):
    """Trilinear interpolation of an affine function is exact where no neighbor lies outside."""
    g = torch.Generator().manual_seed(seed)
    x, y, z, turn = (torch.rand(4, generator=g) - 0.5).tolist()
    motion = pose(4 * x, 4 * y, z, turn=turn)
    centers = torch.tensor(ODD.centers(), dtype=torch.float32)
    back = torch.linalg.inv(motion)
    then = centers @ back[:3, :3].T + back[:3, 3]  # where each current voxel was
    past = (centers @ motion[:3, :3].T + motion[:3, 3]).movedim(-1, 0)  # each past voxel in coordinates of now
    found = align(past[None], motion[None], ODD)[0].movedim(0, -1)
    cell = (then - torch.tensor(ODD.lower)) / torch.tensor(ODD.voxel)
    inside = ((cell >= 0.5) & (cell <= torch.tensor(ODD.shape) - 0.5)).all(-1)
    assert inside.sum() > 5
    torch.testing.assert_close(found[inside], centers[inside], atol=1e-5, rtol=1e-5)


def test_a_static_world_has_the_same_features_wherever_it_was_seen_from():
    """Windows of one world, whole voxels apart: where the earlier one saw it, exactly the same."""
    world = torch.randn(1, 3, 9, 11, 6, generator=torch.Generator().manual_seed(0))
    window = lambda i, j, k: world[:, :, i : i + 5, j : j + 7, k : k + 3]  # noqa: E731
    (now, then) = (2, 1, 1), (0, 3, 2)
    motion = pose(*(-(a - b) * size for a, b, size in zip(now, then, ODD.voxel)))
    found = align(window(*then), motion[None], ODD)
    seen = align(torch.ones(1, 1, *ODD.shape), motion[None], ODD) > 0.5
    assert 0 < int(seen.sum()) < ODD.size
    torch.testing.assert_close(found, torch.where(seen, window(*now), 0.0), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dims", [(2,), (3,), (2, 3)])
def test_alignment_of_a_mirrored_scene_is_mirrored(dims):
    torch.manual_seed(0)
    past, motion = torch.rand(1, 2, 5, 7, 3), pose(1.3, -0.7, 0.2, turn=0.4)
    signs = torch.tensor([-1.0 if 2 in dims else 1, -1.0 if 3 in dims else 1, 1, 1])
    mirrored = align(past.flip(dims), (motion * signs[:, None] * signs)[None], ODD)
    torch.testing.assert_close(mirrored, align(past, motion[None], ODD).flip(dims), atol=1e-5, rtol=1e-5)


def fusion(frames: int) -> TemporalFusion:
    torch.manual_seed(0)
    return TemporalFusion(4, frames, ODD).eval()


def test_an_absent_key_frame_is_told_apart_and_nothing_of_it_is_read():
    model, current = fusion(3), torch.rand(2, 4, *ODD.shape)
    past, motion = torch.rand(2, 2, 4, *ODD.shape), pose(1.0, turn=0.2).repeat(2, 2, 1, 1)
    exists = torch.tensor([[True, True], [True, False]])
    found = model(current, past, motion, exists)
    other, elsewhere = past.clone(), motion.clone()
    other[1, 1], elsewhere[1, 1] = float("nan"), pose(3.0)
    torch.testing.assert_close(model(current, other, elsewhere, exists), found)
    # At first it counts as a repetition of the current features; what is learned then tells it apart from one.
    repeated, still = past.clone(), motion.clone()
    repeated[1, 1], still[1, 1] = current[1], torch.eye(4)
    everything = torch.ones_like(exists)
    torch.testing.assert_close(model(current, repeated, still, everything), found, atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        model.absent[1] += 1
    assert not torch.allclose(model(current, repeated, still, everything)[1], model(current, past, motion, exists)[1])


def test_one_key_frame_needs_no_others():
    model, current = fusion(1), torch.rand(2, 4, *ODD.shape)
    assert model.absent is None
    found = model(current, None, torch.empty(2, 0, 4, 4), torch.empty(2, 0, dtype=torch.bool))
    assert found.shape == current.shape
