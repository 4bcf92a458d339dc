"""Sparse features answer as dense ones do, with zero where they were pruned."""

from __future__ import annotations

import torch

from occstream.models.decoding import Decoded, Level

SHAPE = (5, 7, 3)


def both():
    """Features of two frames, of all voxels and of some: dense ones that are zero elsewhere, and sparse."""
    g = torch.Generator().manual_seed(0)
    active = torch.rand(2, *SHAPE, generator=g) < 0.3
    active[1] = False  # a frame of which nothing is left
    features = torch.randn(2, 4, *SHAPE, generator=g) * active[:, None]
    indices = active.nonzero()
    return Decoded.dense(features), Decoded(features.movedim(1, -1)[active], (), indices, SHAPE, 2), active


def test_volumes_and_views_from_above_agree_with_dense_ones():
    dense, sparse, active = both()
    assert torch.equal(sparse.places, active.flatten().nonzero().squeeze(1))
    assert torch.equal(sparse.rows(), dense.rows()[active.flatten()])
    assert torch.equal(sparse.volume(sparse.rows()), dense.features)
    assert torch.equal(dense.volume(dense.rows()), dense.features)
    torch.testing.assert_close(dense.bev(dense.rows()), dense.features.mean(-1))
    torch.testing.assert_close(sparse.bev(sparse.rows()), dense.features.mean(-1))


def test_pruned_voxels_get_what_empty_ones_have():
    _, sparse, active = both()
    whole = sparse.volume(sparse.rows()[:, :2], torch.tensor([-3.0, 4.0])).movedim(1, -1)
    assert torch.equal(whole[active], sparse.rows()[:, :2])
    assert whole[~active].unique(dim=0).tolist() == [[-3.0, 4.0]]


def test_gradients_reach_active_voxels_alone():
    _, sparse, active = both()
    rows = sparse.rows().requires_grad_()
    weight = torch.randn(2, 4, *SHAPE[:2])
    ((sparse.bev(rows) * weight).sum() + sparse.volume(rows, 1.0).sum()).backward()
    expected = (weight[..., None] / SHAPE[2] + 1).expand(-1, -1, -1, -1, SHAPE[2]).movedim(1, -1)[active]
    torch.testing.assert_close(rows.grad, expected)


def test_labels_are_taken_at_the_voxels_that_a_level_looked_at():
    _, sparse, active = both()
    volume = torch.arange(active.numel()).view(active.shape)
    assert torch.equal(Level(torch.zeros(len(sparse.rows())), sparse.places, SHAPE).at(volume), volume[active])
    assert torch.equal(Level(torch.zeros(active.numel()), None, SHAPE).at(volume), volume.flatten())
