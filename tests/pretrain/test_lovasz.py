"""Weighted cross-entropy and the Lovász loss, by numbers that were computed by hand and by definition."""

from __future__ import annotations

from itertools import combinations, pairwise

import pytest
import torch

from occstream.pretrain.lovasz import (
    jaccard_steps,
    lovasz_counts,
    lovasz_softmax,
    weighted_count,
    weighted_cross_entropy,
)
from occstream.sharding.schema import IGNORE

# Classes: empty, foreground, background.
LOGITS = torch.tensor([[2.0, 0, 0], [0, 1, 0], [0, 0, 3], [1, 1, 1]])
LABELS = torch.tensor([0, 1, 2, 2], dtype=torch.uint8)
WEIGHTS = (0.01, 2.0, 1.0)


def lovasz_by_definition(errors: torch.Tensor, truth: torch.Tensor) -> float:
    """Integral over thresholds of 1 - IoU of the elements whose error is above (Berman et al., eq. 6 and 7)."""
    values = sorted({0.0, *errors.tolist()})
    total = 0.0
    for low, high in pairwise(values):
        wrong = errors > low
        misses, false = int((wrong & truth).sum()), int((wrong & ~truth).sum())
        total += (high - low) * (1 - (int(truth.sum()) - misses) / (int(truth.sum()) + false))
    return total


def test_weighted_cross_entropy_is_a_sum_of_weights_and_errors():
    total, count = weighted_cross_entropy(LOGITS, LABELS, WEIGHTS), weighted_count(LABELS, 3, WEIGHTS)
    assert float(total / count) == pytest.approx(0.573272, abs=1e-6)
    assert float(total / 4) == pytest.approx(0.574705, abs=1e-6)
    assert float(count) == pytest.approx(4.01)
    plain = weighted_cross_entropy(LOGITS, LABELS) / weighted_count(LABELS, 3)
    assert float(plain) == pytest.approx((0.239545 + 0.551445 + 0.094923 + 1.098612) / 4, abs=1e-6)


def test_ignored_elements_do_not_count():
    logits, labels = torch.cat([LOGITS, torch.full((2, 3), 50.0)]), torch.cat([LABELS, LABELS.new_full((2,), IGNORE)])
    probabilities = logits.softmax(1)
    assert weighted_cross_entropy(logits, labels, WEIGHTS) == weighted_cross_entropy(LOGITS, LABELS, WEIGHTS)
    assert weighted_count(labels, 3, WEIGHTS) == weighted_count(LABELS, 3, WEIGHTS)
    assert weighted_count(labels, 3) == 4
    assert lovasz_softmax(probabilities, labels) == lovasz_softmax(LOGITS.softmax(1), LABELS)


def test_steps_of_a_worked_example():
    steps = jaccard_steps(torch.tensor([False, True, False]))  # errors .6, .2, .1
    assert steps.tolist() == pytest.approx([0.5, 0.5, 0])
    assert float(steps @ torch.tensor([0.6, 0.2, 0.1])) == pytest.approx(0.4)


def test_lovasz_of_a_worked_example():
    probabilities = LOGITS.softmax(1)
    for c, expected in enumerate((0.273174, 0.423883, 0.400172)):
        assert float(lovasz_softmax(probabilities, LABELS, classes=[c])) == pytest.approx(expected, abs=1e-6)
    assert float(lovasz_softmax(probabilities, LABELS, classes=[1, 2])) == pytest.approx(0.412027, abs=1e-6)
    assert float(lovasz_softmax(probabilities, LABELS)) == pytest.approx(0.365743, abs=1e-6)


def test_lovasz_is_the_integral_that_defines_it():
    g = torch.Generator().manual_seed(0)
    for _ in range(20):
        probabilities = torch.rand(30, 4, generator=g).softmax(1)
        labels = torch.randint(0, 3, (30,), generator=g)
        classes = [c for c in range(4) if (labels == c).any()]
        expected = 0.0
        for c in classes:
            errors = torch.where(labels == c, 1 - probabilities[:, c], probabilities[:, c])
            expected += lovasz_by_definition(errors, labels == c)
        assert float(lovasz_softmax(probabilities, labels)) == pytest.approx(expected / len(classes), abs=1e-6)


def test_at_certain_answers_lovasz_is_one_minus_iou():
    labels = torch.tensor([0, 0, 1, 1, 1])
    for wrong in (set(c) for n in range(6) for c in combinations(range(5), n)):
        answer = torch.tensor([int(l) ^ (i in wrong) for i, l in enumerate(labels)])
        iou = [
            float(((answer == c) & (labels == c)).sum()) / float(((answer == c) | (labels == c)).sum()) for c in (0, 1)
        ]
        loss = lovasz_softmax(torch.nn.functional.one_hot(answer, 2).float(), labels)
        assert float(loss) == pytest.approx(1 - sum(iou) / 2, abs=1e-6)


def test_gradients_are_those_of_differences():
    g = torch.Generator().manual_seed(1)
    logits = torch.randn(12, 3, generator=g, requires_grad=True)
    labels = torch.randint(0, 3, (12,), generator=g)
    loss = lovasz_softmax(logits.softmax(1), labels)
    [gradient] = torch.autograd.grad(loss, logits)
    step = 1e-3
    for i, c in ((0, 0), (3, 1), (7, 2), (11, 0)):
        moved = []
        for sign in (1, -1):
            other = logits.detach().clone()
            other[i, c] += sign * step
            moved.append(lovasz_softmax(other.softmax(1), labels))
        assert float(gradient[i, c]) == pytest.approx(float(moved[0] - moved[1]) / (2 * step), abs=2e-4)


def test_absent_classes_do_not_count_and_without_any_the_loss_is_in_the_graph():
    logits = LOGITS.clone().requires_grad_()
    probabilities = logits.softmax(1)
    only = torch.tensor([0, 0, 2, 2])
    some, both = lovasz_softmax(probabilities, only, classes=[1, 2]), lovasz_softmax(probabilities, only, classes=[2])
    assert some == both
    assert (lovasz_counts(only, [1, 2]), lovasz_counts(only, [1])) == (1, 0)
    for labels in (torch.full((4,), IGNORE), torch.zeros(4, dtype=torch.uint8)):
        loss = lovasz_softmax(probabilities, labels, classes=[1, 2])
        [gradient] = torch.autograd.grad(loss, logits, retain_graph=True)
        assert (float(loss.detach()), float(gradient.abs().max()), float(lovasz_counts(labels, [1, 2]))) == (0, 0, 0)
    nothing = torch.zeros(0, 3, requires_grad=True)
    empty = lovasz_softmax(nothing, LABELS[:0]) + weighted_cross_entropy(nothing, LABELS[:0], WEIGHTS)
    empty.backward()
    assert (float(empty.detach()), float(weighted_count(LABELS[:0], 3, WEIGHTS))) == (0, 0)


def test_a_sample_is_the_generators_and_close_to_the_whole():
    g = torch.Generator().manual_seed(2)
    labels = torch.randint(0, 3, (20_000,), generator=g, dtype=torch.uint8)
    probabilities = (torch.randn(20_000, 3, generator=g) + torch.nn.functional.one_hot(labels.long(), 3)).softmax(1)
    draw = lambda seed, n: lovasz_softmax(  # noqa: E731
        probabilities, labels, sample=n, generator=torch.Generator().manual_seed(seed)
    )
    whole = lovasz_softmax(probabilities, labels)
    assert draw(1, 4000) == draw(1, 4000) != draw(2, 4000)
    assert float(draw(1, 4000)) == pytest.approx(float(whole), abs=0.02)
    assert draw(1, 20_000) == whole
    with pytest.raises(ValueError, match="needs a generator"):
        lovasz_softmax(probabilities, labels, sample=10)


def test_wrong_numbers_of_weights_are_named():
    for call in (lambda w: weighted_cross_entropy(LOGITS, LABELS, w), lambda w: weighted_count(LABELS, 3, w)):
        with pytest.raises(ValueError, match="2 class weights for 3 classes"):
            call((1.0, 2.0))


def test_under_autocast_it_is_the_same():
    with torch.autocast("cpu", torch.bfloat16):
        losses = (
            weighted_cross_entropy(LOGITS, LABELS, WEIGHTS),
            lovasz_softmax(LOGITS.softmax(1), LABELS, classes=[1, 2]),
        )
    assert losses[0] == weighted_cross_entropy(LOGITS, LABELS, WEIGHTS)
    assert losses[1] == lovasz_softmax(LOGITS.softmax(1), LABELS, classes=[1, 2])
