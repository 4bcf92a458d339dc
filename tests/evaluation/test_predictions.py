"""Predictions as labels: what is kept of the logits, and mirror images."""

import numpy as np
import pytest
import torch
from torch import nn

from occstream.evaluation.occupancy import classify
from occstream.evaluation.predictions import predict
from occstream.models import OccOutputs
from occstream.pretrain.augment import two_best
from tests.models.helpers import make_batch


class Fixed(nn.Module):
    """Logits that depend on where a voxel is in the unmirrored scene."""

    def __init__(self, logits):
        super().__init__()
        self.logits = logits

    def forward(self, batch):
        flips = [2 + axis for axis in (0, 1) if float(batch.scene_aug[0, axis, axis]) < 0]
        return OccOutputs(None, self.logits.flip(flips))


@pytest.fixture
def logits():
    return torch.randn(2, 17, 16, 16, 4, generator=torch.Generator().manual_seed(0)) * 3 - 4


@pytest.mark.parametrize("kind", ["sigmoid_focal", "softmax_focal"])
@pytest.mark.parametrize("occupied", ["labels", "predicted"])
def test_top1_is_the_class_of_the_evaluation_where_voxels_are_occupied(logits, kind, occupied):
    batch = make_batch(2, 0, augment=False)
    want = classify(logits, kind).numpy()
    for index, (key, labels) in enumerate(predict(Fixed(logits), [batch], kind=kind, occupied=occupied)):
        assert key == f"k{index}"
        binary = batch.occupancy.binary[index].numpy() if occupied == "labels" else want[index] != 17
        assert (labels.binary == binary).all()
        assert (labels.semantic == np.where(binary, want[index], 17)).all()
        assert labels.logits is None


def test_two_best_are_the_same_from_top2_and_from_all_logits(logits):
    batch = make_batch(2, 0, augment=False)
    kept = [
        [labels for _, labels in predict(Fixed(logits), [batch], keep=keep, occupied="labels")]
        for keep in ("top2", "logits")
    ]
    for two, every in zip(*kept):
        count = int(two.binary.sum())
        assert two.logits.shape == two.ranked.shape == (count, 2)
        assert every.logits.shape == (count, 18)
        assert (two.semantic[two.binary] == two.ranked[:, 0]).all()
        assert (two.ranked == 17).any(), "free takes part"
        for a, b in zip(two_best(two), two_best(every)):
            np.testing.assert_allclose(a, b, atol=2e-3)
        confidence = two_best(two)[1]
        assert (confidence[two.binary] >= 0.5).all()
        assert (confidence[~two.binary] == 1).all()


def test_soft_label_of_the_specification():
    batch = make_batch(1, 0, augment=False)
    batch.occupancy.binary[...] = False
    batch.occupancy.binary[0, 3, 4, 1] = True
    logits = torch.full((1, 17, 16, 16, 4), -9.0)
    logits[0, 5, 3, 4, 1], logits[0, 2, 3, 4, 1] = 2.0, 1.0
    [(_, labels)] = predict(Fixed(logits), [batch], keep="top2", occupied="labels")
    second, confidence = two_best(labels)
    assert (labels.semantic[3, 4, 1], second[3, 4, 1]) == (5, 2)
    assert confidence[3, 4, 1] == pytest.approx(0.731059, abs=1e-6)


@pytest.mark.parametrize("kind", ["sigmoid_focal", "softmax_focal"])
def test_evidence_tells_a_narrow_free_from_a_plain_one(logits, kind):
    batch = make_batch(2, 0, augment=False)
    logits[0, :, 0, 0, 0] = -20.0
    found = [labels for _, labels in predict(Fixed(logits), [batch], keep="evidence", kind=kind)]
    wide = torch.cat([logits, torch.zeros_like(logits[:, :1])], 1)
    want = logits.sigmoid().amax(1) if kind == "sigmoid_focal" else 1 - wide.softmax(1)[:, -1]
    for labels, share in zip(found, want):
        assert np.abs(labels.evidence / 255 - share.numpy()).max() <= 0.5 / 255 + 1e-6
        assert labels.ranked.shape == (int(labels.binary.sum()), 2), "as with top2"
    assert found[0].evidence[0, 0, 0] == 0
    assert len(np.unique(found[0].evidence[~found[0].binary])) > 20
    with pytest.raises(ValueError, match="it has no evidence to keep"):
        next(predict(Fixed(logits), [batch], keep="evidence", occupied="labels"))


def test_mirror_images_are_brought_back_before_they_are_averaged(logits):
    batch = make_batch(2, 0, augment=False)
    plain = [labels.semantic for _, labels in predict(Fixed(logits), [batch])]
    flipped = [labels.semantic for _, labels in predict(Fixed(logits), [batch], flips=True)]
    assert all((a == b).all() for a, b in zip(plain, flipped))
    twice = batch.mirrored(True, False).mirrored(True, False)
    torch.testing.assert_close(twice.scene_aug, batch.scene_aug)
    assert (twice.occupancy.binary == batch.occupancy.binary).all()


def test_a_pretraining_network_cannot_label():
    class Binary(nn.Module):
        def forward(self, batch):
            return OccOutputs(torch.zeros(2, 8, 8, 4))

    with pytest.raises(ValueError, match="predicts no classes"):
        next(predict(Binary(), [make_batch(2, 0)]))
