"""Boxes seen from above: overlap of rotated rectangles, and suppression of boxes that overlap surer ones."""

from __future__ import annotations

import numpy as np


def corners(boxes: np.ndarray) -> np.ndarray:
    """(N, 7) boxes (center x, y, z, length, width, height, yaw) -> (N, 4, 2) float64 x, y of their corners: front left, rear
    left, rear right, front right, which is counter-clockwise."""
    boxes = np.asarray(boxes, np.float64)
    half = boxes[:, None, 3:5] / 2 * np.array([[1, 1], [-1, 1], [-1, -1], [1, -1]])
    return boxes[:, None, :2] + _turned(half, boxes[:, 6])


def rotated_iou(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Intersection over union of pairs of boxes seen from above, exact: one rectangle is clipped by the sides of the other.

    Args:
        a, b: (N, 7) boxes as of ``corners``, row by row.

    Returns:
        (N,) float64.
    """
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    # In axes of b, about its center: precise wherever they are, and its sides are at plus and minus half its size.
    moved = a - b * [1, 1, 0, 0, 0, 0, 1]
    moved[:, :2] = _turned(moved[:, None, :2], -b[:, 6])[:, 0]
    polygon = corners(moved)
    for axis in (0, 1):
        for sign in (1, -1):
            polygon = _clip(polygon, b[:, 3 + axis, None] / 2 - sign * polygon[..., axis])
    both = _area(polygon)
    return both / np.maximum(a[:, 3] * a[:, 4] + b[:, 3] * b[:, 4] - both, 1e-12)


def rotated_nms(boxes: np.ndarray, scores: np.ndarray, iou: float, most: int) -> np.ndarray:
    """Greedy suppression: the surest box stays, those that overlap it by more than ``iou`` go, and so on.

    Args:
        boxes: (N, 7) as of ``corners``; only x, y, length, width and yaw count.
        scores: (N,); of equal ones the first is taken first.
        iou: from above.
        most: boxes that may stay.

    Returns:
        (n,) int64 places of those that stay, the surest first.
    """
    left, kept = np.argsort(-np.asarray(scores, np.float64), kind="stable"), []
    reach = np.hypot(boxes[:, 3], boxes[:, 4]) / 2
    while len(left) and len(kept) < most:
        best, left = left[0], left[1:]
        kept.append(best)
        distance = np.hypot(*(boxes[left, :2] - boxes[best, :2]).T)
        near = distance < reach[left] + reach[best]
        overlaps = rotated_iou(boxes[left[near]], np.repeat(boxes[best][None], near.sum(), 0)) > iou
        near[near] = overlaps
        left = left[~near]
    return np.array(kept, np.int64)


def _turned(points: np.ndarray, yaw: np.ndarray) -> np.ndarray:
    """(N, k, 2) turned by (N,) radians."""
    cos, sin = np.cos(yaw)[:, None], np.sin(yaw)[:, None]
    x, y = points[..., 0], points[..., 1]
    return np.stack([cos * x - sin * y, sin * x + cos * y], -1)


def _clip(polygons: np.ndarray, distance: np.ndarray) -> np.ndarray:
    """Convex polygons cut by a straight line each (Sutherland and Hodgman).

    Args:
        polygons: (N, k, 2) corners; a corner may be there several times.
        distance: (N, k) signed, of each corner from the line, not negative on the side that stays.

    Returns:
        (N, k', 2); polygons of which nothing stays have all corners at one place.
    """
    following, next_distance = np.roll(polygons, -1, 1), np.roll(distance, -1, 1)
    here, there = distance >= 0, next_distance >= 0
    crossing = here != there
    share = distance / np.where(crossing, distance - next_distance, 1)
    cut = polygons + share[..., None] * (following - polygons)
    # Each side gives its first corner, if that stays, then where it crosses the line, if it does.
    number, size = distance.shape
    slots = np.stack([polygons, cut], 2).reshape(number, 2 * size, 2)
    filled = np.stack([here, crossing], 2).reshape(number, 2 * size)
    count = filled.sum(1)
    order = np.argsort(~filled, 1, kind="stable")[:, : max(1, int(count.max(initial=0)))]
    # Places without a corner repeat the first one, which adds nothing to the area.
    order = np.where(np.arange(order.shape[1]) < count[:, None], order, order[:, :1])
    return np.take_along_axis(slots, order[..., None], 1)


def _area(polygons: np.ndarray) -> np.ndarray:
    """(N, k, 2) counter-clockwise -> (N,)."""
    x, y = np.moveaxis(polygons - polygons[:, :1], -1, 0)
    return np.maximum((x * np.roll(y, -1, 1) - y * np.roll(x, -1, 1)).sum(1) / 2, 0)
