"""Overlap of rotated boxes against another way to compute it."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.spatial import ConvexHull, QhullError

from occstream.models.rotated import corners, rotated_iou, rotated_nms


def random_boxes(n: int, seed: int, spread: float = 3.0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    center = rng.uniform(-spread, spread, (n, 3))
    return np.concatenate([center, rng.uniform(0.3, 5, (n, 3)), rng.uniform(-7, 7, (n, 1))], 1)


def slow_overlap(a: np.ndarray, b: np.ndarray) -> float:
    """Area of the hull of corners within the other box and of crossings of sides."""
    first, second = corners(a[None])[0], corners(b[None])[0]
    found = []
    for mine, other in ((first, b), (second, a)):
        for x, y in mine - other[:2]:
            c, s = np.cos(other[6]), np.sin(other[6])
            if abs(c * x + s * y) <= other[3] / 2 + 1e-12 and abs(c * y - s * x) <= other[4] / 2 + 1e-12:
                found.append((x + other[0], y + other[1]))
    for i in range(4):
        for j in range(4):
            p, q, r, t = first[i], first[(i + 1) % 4], second[j], second[(j + 1) % 4]
            matrix = np.array([q - p, r - t]).T
            if abs(np.linalg.det(matrix)) > 1e-12:
                u, v = np.linalg.solve(matrix, r - p)
                if 0 <= u <= 1 and 0 <= v <= 1:
                    found.append(tuple(p + u * (q - p)))
    try:
        return float(ConvexHull(np.array(found)).volume) if len(found) > 2 else 0.0
    except QhullError:
        return 0.0


def test_overlap_of_random_boxes():
    a, b = random_boxes(300, 0), random_boxes(300, 1)
    found = rotated_iou(a, b)
    for x, y, iou in zip(a, b, found):
        both = slow_overlap(x, y)
        assert iou == pytest.approx(both / (x[3] * x[4] + y[3] * y[4] - both), abs=1e-9)
    assert 0.2 < (found > 0).mean() < 0.9
    np.testing.assert_allclose(rotated_iou(b, a), found, rtol=0, atol=1e-12)


def test_overlap_of_boxes_that_share_sides_or_nothing():
    box = random_boxes(50, 2, spread=60)
    turned, away = box + [0, 0, 9, 0, 0, 0, np.pi], box + [20, 0, 0, 0, 0, 0, 1]
    np.testing.assert_allclose(rotated_iou(box, box), 1, rtol=0, atol=1e-9)
    np.testing.assert_allclose(rotated_iou(box, turned), 1, rtol=0, atol=1e-9)
    assert not rotated_iou(box, away).any()
    half = box * [1, 1, 1, 0.5, 1, 1, 1]
    np.testing.assert_allclose(rotated_iou(box, half), 0.5, rtol=0, atol=1e-9)
    ahead = box.copy()  # touches along one side
    ahead[:, :2] += box[:, 3:4] * np.stack([np.cos(box[:, 6]), np.sin(box[:, 6])], 1)
    np.testing.assert_allclose(rotated_iou(box, ahead), 0, rtol=0, atol=1e-9)
    assert rotated_iou(np.zeros((0, 7)), np.zeros((0, 7))).shape == (0,)
    assert rotated_iou(np.zeros((1, 7)), np.zeros((1, 7))).tolist() == [0]


def test_worked_overlaps():
    square = np.array([[0, 0, 0, 2, 2, 1, 0.0]])
    diamond = np.array([[0, 0, 0, 2, 2, 1, np.pi / 4]])
    both = 8 * (np.sqrt(2) - 1)  # a regular octagon between sides two apart
    assert rotated_iou(square, diamond)[0] == pytest.approx(both / (8 - both))
    cross = np.array([[0, 0, 0, 6, 1, 1, np.pi / 2]])
    assert rotated_iou(np.array([[0, 0, 0, 4, 2, 1, 0.0]]), cross)[0] == pytest.approx(2 / (8 + 6 - 2))


def slow_nms(boxes: np.ndarray, scores: np.ndarray, iou: float) -> list[int]:
    kept: list[int] = []
    for i in sorted(range(len(boxes)), key=lambda i: (-scores[i], i)):
        if all(rotated_iou(boxes[i][None], boxes[j][None])[0] <= iou for j in kept):
            kept.append(i)
    return kept


def test_suppression_is_greedy_and_ties_go_to_the_first():
    boxes = random_boxes(60, 3, spread=6)
    scores = np.round(np.random.default_rng(4).random(60), 1)
    expected = slow_nms(boxes, scores, 0.2)
    assert 5 < len(expected) < 60
    assert rotated_nms(boxes, scores, 0.2, 99).tolist() == expected
    assert rotated_nms(boxes, scores, 0.2, 4).tolist() == expected[:4]
    assert rotated_nms(boxes[:1].repeat(3, 0), np.ones(3), 0.2, 9).tolist() == [0]
    assert rotated_nms(boxes[:0], scores[:0], 0.2, 9).tolist() == []
