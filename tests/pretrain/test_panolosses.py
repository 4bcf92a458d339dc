"""Losses of PanoOcc's voxels, against small numbers by hand."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from occstream.models.batch import Batch, Occupancy
from occstream.models.decoding import Decoded
from occstream.models.panoocc import PanoOutputs
from occstream.pretrain import panolosses
from occstream.pretrain.panolosses import PanoLoss
from occstream.sharding.schema import IGNORE

KIND = {"classes": ("thing", "stuff"), "things": [0]}
FREE = 2


def batch_of(semantic: list[int]) -> Batch:
    """One frame of (1, 2, 2) voxels by class."""
    labels = torch.tensor(semantic, dtype=torch.uint8).view(1, 1, 2, 2)
    known = labels != IGNORE
    occupancy = Occupancy((labels != FREE) & known, known, semantic=labels)
    return Batch(torch.eye(3)[None], 1, ["a"], occupancy=occupancy)


def outputs_of(logits: list[list[float]], things: list[float]) -> PanoOutputs:
    """Logits of both classes for each voxel; a fine grid of two voxels in y, as the mask is on."""
    semantic = torch.tensor(logits, dtype=torch.float32).T.reshape(1, 2, 1, 2, 2)
    decoded = Decoded.dense(torch.zeros(1, 1, 1, 2, 1))
    return PanoOutputs(
        torch.zeros(1, 1, 2, 1), semantic, decoded=decoded, things=torch.tensor(things, dtype=torch.float32)
    )


def both(outputs, batch, loss):
    return panolosses.sums(outputs, batch, loss, **KIND), panolosses.counts(outputs, batch, loss, **KIND)


def test_points_are_learned_by_focal_loss_and_lovasz_where_something_is():
    batch, outputs = batch_of([0, FREE, 1, IGNORE]), outputs_of([[0, 0], [0, 0], [0, math.log(4)], [9, 9]], [0, 0])
    sums, counts = both(outputs, batch, PanoLoss(gamma=2))
    third = (2 / 3) ** 2 * math.log(3)
    assert float(sums["voxel"]) == pytest.approx(2 * third + (1 / 3) ** 2 * math.log(1.5))
    assert int(counts["voxel"]) == 2
    # Occupied voxels alone: errors of thing (2/3, 1/6), of stuff (1/3, 1/3); each class has one of both.
    thing, stuff = 2 / 3, 1 / 3 * 0.5 + 1 / 3 * 0.5
    assert float(sums["lovasz"]) == pytest.approx((thing + stuff) / 2)
    assert int(counts["lovasz"]) == 1


def test_dense_labels_are_learned_by_cross_entropy_and_lovasz_with_free():
    batch, outputs = batch_of([0, FREE, 1, IGNORE]), outputs_of([[0, 0], [0, 0], [0, math.log(4)], [9, 9]], [0, 0])
    loss = PanoLoss(voxels="dense", class_weights={"free": 0.5})
    sums, counts = both(outputs, batch, loss)
    assert float(sums["voxel"]) == pytest.approx(1.5 * math.log(3) + math.log(1.5))
    assert float(counts["voxel"]) == 2.5
    more, _ = both(outputs, batch_of([FREE] * 4), dataclasses.replace(loss, class_weights={}))
    assert float(more["lovasz"]) > 0, "free is a class"
    none, count = both(outputs, batch_of([FREE] * 4), PanoLoss())
    assert float(none["lovasz"]) == int(count["lovasz"]) == 0, "no point is in any voxel"


def test_the_mask_is_learned_where_something_is_known():
    """A voxel of the fine grid is a thing if any label in it is: here the first; the second is not known."""
    batch = batch_of([FREE, 0, IGNORE, IGNORE])
    sums, counts = both(outputs_of([[0, 0]] * 4, [0.0, 3.0]), batch, PanoLoss())
    assert float(sums["thing"]) == pytest.approx(0.25 * 0.25 * math.log(2))
    assert int(counts["thing"]) == 1
    other = batch_of([FREE, 1, FREE, FREE])
    sums, counts = both(outputs_of([[0, 0]] * 4, [0.0, 0.0]), other, PanoLoss(alpha=0.1, gamma=1))
    assert float(sums["thing"]) == pytest.approx(2 * 0.9 * 0.5 * math.log(2))


def test_nothing_to_learn_is_refused():
    with pytest.raises(ValueError, match="are all 0: there is nothing to learn"):
        PanoLoss(voxel_weight=0, lovasz_weight=0, thing_weight=0, binary_weight=0)
    with pytest.raises(ValueError, match="lovasz_sample is -1, must not be negative"):
        PanoLoss(lovasz_sample=-1)
