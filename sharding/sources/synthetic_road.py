"""The road of a synthetic scene, and random numbers that are the same on every CPU."""

from __future__ import annotations

import math

import numpy as np
from scipy.spatial import KDTree

from occstream.sharding.exactmath import cos, cos_sin, sin


class Road:
    """Center line as points every half meter, from s = -90 m."""

    def __init__(self, rng: np.random.Generator, length: float) -> None:
        self.step, self.start = 0.5, -90.0
        s = np.arange(self.start, length + 90.0, self.step)
        bend = rng.choice([0.0, 0.006, 0.018], p=[0.3, 0.4, 0.3])
        waves = sum(normal(rng) * sin(s / rng.uniform(18, 60) + rng.uniform(0, 6.3)) for _ in range(3))
        self.yaw = rng.uniform(-math.pi, math.pi) + np.cumsum(bend * waves) * self.step
        self.x = rng.uniform(-500, 500) + np.cumsum(cos(self.yaw)) * self.step
        self.y = rng.uniform(-500, 500) + np.cumsum(sin(self.yaw)) * self.step
        self.half_width = float(rng.uniform(3.4, 7.5))
        self.walk = float(rng.uniform(1.6, 4.0))
        self.verge = float(rng.choice([0.0, rng.uniform(1.0, 5.0)]))
        self.crossing = float(rng.uniform(10, length)) if rng.random() < 0.45 else math.nan
        self.crossing_half = float(rng.uniform(3.0, 5.5))

    def at(self, s: float, l: float) -> tuple[float, float, float]:
        """World x, y, heading at ``s`` along and ``l`` to the left."""
        i = min(max((s - self.start) / self.step, 0.0), len(self.x) - 1.001)
        k, f = int(i), i - int(i)
        yaw = self.yaw[k] * (1 - f) + self.yaw[k + 1] * f
        x = self.x[k] * (1 - f) + self.x[k + 1] * f
        y = self.y[k] * (1 - f) + self.y[k + 1] * f
        c, s = cos_sin(yaw)
        return float(x - l * s), float(y + l * c), float(yaw)

    def coordinates(self, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(s, l) of world points."""
        _, k = KDTree(np.stack([self.x, self.y], 1)).query(np.stack([x.ravel(), y.ravel()], 1))
        dx, dy = x.ravel() - self.x[k], y.ravel() - self.y[k]
        c, s = cos(self.yaw[k]), sin(self.yaw[k])
        return (self.start + k * self.step + c * dx + s * dy).reshape(x.shape), (-s * dx + c * dy).reshape(x.shape)

    def near_crossing(self, s: float, margin: float) -> bool:
        return not math.isnan(self.crossing) and abs(s - self.crossing) < self.crossing_half + margin


def normals(rng: np.random.Generator, *shape: int) -> np.ndarray:
    """Random numbers of mean 0 and deviation 1 from the number of bits set among 64: no logarithm, which CPUs round
    differently. float64, in steps of 1/4."""
    return (np.bitwise_count(rng.integers(0, 2**64, shape, np.uint64)).astype(np.float64) - 32) / 4


def normal(rng: np.random.Generator) -> float:
    """One of ``normals``, finer: the sum of twelve uniform numbers."""
    return math.fsum(rng.random(12)) - 6
