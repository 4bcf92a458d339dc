"""How sure predictions are."""

import numpy as np
import pytest

from occstream.sharding.doubts import doubts
from occstream.sharding.schema import IGNORE, Labels


def labels(logits, ranked=None) -> Labels:
    binary = np.zeros((2, 2, 1), bool)
    binary.flat[: len(logits)] = True
    return Labels(binary, binary.astype(np.uint8), logits=np.float16(logits), ranked=ranked)


def test_shares_are_those_of_a_softmax_of_two():
    apart = np.float16(np.linspace(0, 8, 4))
    second, sure = doubts(labels(np.stack([apart, 0 * apart], 1), np.tile(np.uint8([3, 5]), (4, 1))))
    assert second.reshape(-1).tolist() == [5] * 4
    want = 255 / (1 + np.exp(-apart.astype(float)))
    assert np.abs(sure.reshape(-1) - want).max() <= 0.5 + 1e-6
    assert sure.min() == 128, "the first never loses its lead"


def test_logits_of_all_classes_give_the_two_best():
    second, sure = doubts(labels([[0.0, 4.0, 3.0], [1.0, 1.0, -5.0]]))
    assert second.reshape(-1).tolist() == [2, 1, IGNORE, IGNORE]
    assert sure.reshape(-1).tolist() == [186, 128, 255, 255]


def test_hard_labels_say_so():
    with pytest.raises(ValueError, match="has no second classes; predict with --keep top2"):
        doubts(Labels(np.zeros((1, 1, 1), bool)))
