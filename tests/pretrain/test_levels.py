"""The loss of a level counts what it looked at, by labels pooled to its grid."""

from __future__ import annotations

import torch

from occstream.models.batch import Occupancy, pool_binary
from occstream.models.decoding import Level
from occstream.pretrain.levels import level_counts, level_sums
from occstream.pretrain.losses import sigmoid_focal

GRID, COARSE = (4, 6, 2), (2, 3, 1)


def occupancy():
    g = torch.Generator().manual_seed(0)
    known = torch.rand(2, *GRID, generator=g) < 0.9
    known[0, :2, :2] = False  # a coarse voxel of which nothing is known
    return Occupancy(torch.rand(2, *GRID, generator=g) < 0.15, known)


def test_each_level_has_the_focal_loss_of_its_voxels():
    labels, places = occupancy(), torch.tensor([0, 2, 3, 7, 11])
    coarse = Level(torch.randn(5), places, COARSE)
    fine = Level(torch.randn(2 * 48), None, GRID)
    sums, counts = level_sums([coarse, fine], labels, 2.0, 0.25), level_counts([coarse, fine], labels)
    assert list(sums) == list(counts) == ["occupied@1", "occupied@2"]
    target, known = (part.flatten() for part in pool_binary(labels.binary, labels.binary_valid, COARSE))
    assert not known[0]
    used = known[places]
    expected = sigmoid_focal(coarse.logits, target[places].float(), 2.0, 0.25)[used].sum()
    torch.testing.assert_close(sums["occupied@1"], expected)
    errors = sigmoid_focal(fine.logits, labels.binary.flatten().float(), 2.0, 0.25)
    torch.testing.assert_close(sums["occupied@2"], errors[labels.binary_valid.flatten()].sum())
    assert counts["occupied@1"] == target.sum()  # also where the level did not look
    assert counts["occupied@2"] == (labels.binary & labels.binary_valid).sum()


def test_a_level_that_looked_at_nothing_stays_in_the_graph():
    logits = torch.zeros(0, requires_grad=True)
    level_sums([Level(logits, torch.zeros(0, dtype=torch.long), COARSE)], occupancy(), 2.0, 0.25)[
        "occupied@1"
    ].backward()
    assert logits.grad is not None
