"""The loss of a level counts what it looked at, by labels pooled to its grid; what can be kept is said."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from occstream.models.batch import Occupancy, pool_binary
from occstream.models.decoding import Level
from occstream.pretrain import levels
from occstream.pretrain.levels import keep_notes, level_counts, level_sums
from occstream.pretrain.losses import sigmoid_focal
from occstream.sharding.schema import Labels

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


def test_roles_have_sums_and_counts_of_their_own():
    labels, fine = occupancy(), Level(torch.randn(2 * 48), None, GRID)
    both, roles = {"@main": slice(0, 1), "@replay": slice(1, None)}, slice(None)
    sums, counts = level_sums([fine], labels, 2.0, 0.25, roles=both), level_counts([fine], labels, roles=both)
    assert list(sums) == list(counts) == ["occupied@main1", "occupied@replay1"]
    one, all_of_it = level_sums([fine], labels, 2.0, 0.25), level_counts([fine], labels, roles={"": roles})
    torch.testing.assert_close(sum(sums.values()), one["occupied@1"])
    assert sum(counts.values()) == all_of_it["occupied@1"]
    alone = Occupancy(labels.binary[1:], labels.binary_valid[1:])
    expected = level_sums([Level(fine.logits[48:], None, GRID)], alone, 2.0, 0.25)["occupied@1"]
    torch.testing.assert_close(sums["occupied@replay1"], expected)
    assert counts["occupied@main1"] == (labels.binary & labels.binary_valid)[0].sum()


def test_a_level_that_looked_at_nothing_stays_in_the_graph():
    logits = torch.zeros(0, requires_grad=True)
    level_sums([Level(logits, torch.zeros(0, dtype=torch.long), COARSE)], occupancy(), 2.0, 0.25)[
        "occupied@1"
    ].backward()
    assert logits.grad is not None


class Reader:
    """Four frames of two scenes, of which the labels do not know a half."""

    def __init__(self, manifest, groups, cache):
        assert groups == ("labels",)

    def frame(self, scene, index):
        g = np.random.default_rng(2 * scene + index)
        known = np.zeros(GRID, bool)
        known[:2] = True
        return SimpleNamespace(labels=Labels(g.random(GRID) < 0.4, mask_lidar=known))

    def close(self):
        pass


def test_shares_are_those_of_what_the_labels_know(monkeypatch):
    monkeypatch.setattr(levels, "ShardReader", Reader)
    manifest: Any = SimpleNamespace(scenes=[SimpleNamespace(frames=2)] * 2, label_group="labels", url="/nowhere")
    shares = levels.occupied_shares(manifest, [0, 1], [COARSE, GRID])
    assert shares.shape == (4, 2)
    occupied = Reader(None, ("labels",), None).frame(1, 1).labels.binary
    occupied[2:] = False
    blocks = occupied.reshape(2, 2, 3, 2, 1, 2).any((1, 3, 5))
    np.testing.assert_allclose(shares[-1], [blocks.mean(), occupied.mean()], rtol=1e-6)
    assert len(levels.occupied_shares(manifest, [1], [GRID], frames=1)) == 1
    everything = levels.occupied_shares(manifest, [0, 1], [GRID], mask="none")
    assert everything[-1] == pytest.approx(Reader(None, ("labels",), None).frame(1, 1).labels.binary.mean())


SHAPES = [(50, 50, 16), (100, 100, 16), (200, 200, 32)]


def test_what_a_share_can_hold_is_said():
    """The paper's 5 % hold surfaces; of labels of whole bodies they hold about 63 %."""
    solid = np.array([[0.139, 0.120, 0.079]])
    told, warned = keep_notes("data", solid, SHAPES, (0.2, 0.5, 0.5))
    assert told == (
        "data: labels of 1 frames occupy (and model.keep keeps) 13.9 % of 50x50x16 (20.0 %), 12.0 % of 100x100x16 (10.0 %), "
        "7.9 % of 200x200x32 (5.0 %)"
    )
    assert "at most 63 % of what they call occupied at level 3" in warned
    assert "model.keep=[0.14, 0.86, 0.66] holds all" in warned
    assert len(keep_notes("data", solid, SHAPES, (0.14, 0.86, 0.66))) == 1
    assert len(keep_notes("data", np.array([[0.049, 0.021, 0.0047]]), SHAPES, (0.2, 0.5, 0.5))) == 1


@pytest.mark.parametrize("seed", range(5))
def test_what_is_proposed_holds_all(seed):
    rng = np.random.default_rng(seed)
    shares = rng.random((3, 3)) * rng.random()
    proposed = keep_notes("data", shares, SHAPES, (0.001, 0.001, 0.001))[1].partition("keep=[")[2].partition("]")[0]
    keep = [float(n) for n in proposed.split(", ")]
    assert all(0 < n <= 1 for n in keep)
    if max(keep) < 1:
        assert len(keep_notes("data", shares, SHAPES, keep)) == 1


def test_labels_that_call_nothing_occupied_need_nothing():
    assert len(keep_notes("data", np.zeros((2, 3)), SHAPES, (0.1, 0.1, 0.1))) == 1
    assert keep_notes("data", np.zeros((0, 3)), SHAPES, (0.1, 0.1, 0.1)) == []
