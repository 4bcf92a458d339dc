"""Random frames that our metrics and the nuScenes devkit both score: the same for one seed on every machine.

Only uniform numbers, products and sums: their bits depend neither on the CPU nor on the version of NumPy.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

CLASSES = (
    "car", "truck", "bus", "trailer", "construction_vehicle", "pedestrian", "motorcycle", "bicycle", "traffic_cone",
    "barrier",
)  # fmt: skip
ATTRIBUTES = 8
Draw = Callable[[int | tuple[int, ...]], np.ndarray]  # uniform numbers of a shape


def boxes(seed: int = 0, count: int = 200) -> list[dict[str, dict[str, np.ndarray]]]:
    """Frames of ``truth``, ``predicted`` (columns as named below) and ``racks`` (R, 7).

    Predictions are true boxes moved a little or far, missed, doubled, or made up; scores have ties, velocities of the truth
    gaps, and the last class but one never occurs in the truth.
    """
    draw = np.random.Generator(np.random.PCG64(seed)).random
    frames = []
    for _ in range(count):
        n = int(draw() * 40)
        kinds = (draw(n) * len(CLASSES)).astype(np.int64)
        kinds[kinds == 8] = 0
        truth = {
            "boxes": np.concatenate([draw((n, 3)) * [110, 110, 4] - [55, 55, 2], _sizes(draw, n), _yaws(draw, n)], 1),
            "classes": kinds,
            "velocity": np.where(draw((n, 1)) < 0.1, np.nan, draw((n, 2)) * 10 - 5),
            "attributes": np.where(draw(n) < 0.2, -1, (draw(n) * ATTRIBUTES).astype(np.int64)),
            "points": (draw(n) * 10).astype(np.int64),
        }
        seen = np.flatnonzero(draw(n) < 0.8)
        seen = np.concatenate([seen, seen[draw(len(seen)) < 0.2]])
        m, false = len(seen), int(draw() * 15)
        spread = np.where(draw((m, 1)) < 0.5, 0.8, 6.0)
        moved = truth["boxes"][seen] + np.concatenate([(draw((m, 3)) - 0.5) * spread, np.zeros((m, 4))], 1)
        moved[:, 3:6] *= 0.7 + 0.6 * draw((m, 3))
        moved[:, 6] += (draw(m) - 0.5) * np.where(draw(m) < 0.2, 2 * math.pi, 0.5)
        made_up = np.concatenate(
            [draw((false, 3)) * [110, 110, 4] - [55, 55, 2], _sizes(draw, false), _yaws(draw, false)], 1
        )
        velocity = np.nan_to_num(truth["velocity"][seen]) + draw((m, 2)) * 2 - 1
        predicted = {
            "boxes": np.concatenate([moved, made_up]),
            "classes": np.concatenate([np.where(draw(m) < 0.1, 8, kinds[seen]), (draw(false) * 10).astype(np.int64)]),
            "velocity": np.concatenate([velocity, draw((false, 2)) * 10 - 5]),
            "attributes": (draw(m + false) * ATTRIBUTES).astype(np.int64),
            "scores": np.round(draw(m + false) * 50) / 50,  # many ties, and zeros
        }
        racks = np.concatenate([draw((1, 3)) * [80, 80, 0] - [40, 40, 0], [[20, 12, 6]], _yaws(draw, 1)], 1)
        frames.append({"truth": truth, "predicted": predicted, "racks": {"boxes": racks[: int(draw() * 2)]}})
    return frames


def points(seed: int = 0, count: int = 200) -> list[dict[str, np.ndarray]]:
    """Frames of LiDAR points: ``truth`` and ``predicted`` (N,) uint16, class * 1000 + instance, classes 0..16 in the truth
    and 1..16 in predictions; runs of points are segments, small ones among them, and class 14 occurs nowhere."""
    draw = np.random.Generator(np.random.PCG64(1000 + seed)).random
    frames = []
    for _ in range(count):
        lengths = 1 + (draw(30) * np.where(draw(30) < 0.5, 20, 120)).astype(np.int64)
        truth = np.repeat(_labels(draw, 30, 0), lengths)
        predicted = truth.copy()
        for _ in range(12):  # stretches that are called something else
            begin, long = int(draw() * len(truth)), int(draw() * 80)
            predicted[begin : begin + long] = _labels(draw, 1, 1)[0]
        predicted = np.where(predicted < 1000, 1001, predicted)
        frames.append({"truth": truth.astype(np.uint16), "predicted": predicted.astype(np.uint16)})
    return frames


def _labels(draw: Draw, n: int, lowest: int) -> np.ndarray:
    kinds = lowest + (draw(n) * (17 - lowest)).astype(np.int64)
    kinds[kinds == 14] = 15
    return kinds * 1000 + np.where((kinds >= 1) & (kinds <= 10), 1 + (draw(n) * 6).astype(np.int64), 0)


def _sizes(draw: Draw, n: int) -> np.ndarray:
    return 0.5 + draw((n, 3)) * [5, 2, 2]


def _yaws(draw: Draw, n: int) -> np.ndarray:
    return (draw((n, 1)) * 2 - 1) * math.pi
