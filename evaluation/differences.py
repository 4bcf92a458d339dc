"""How far two sets of runs are apart, and whether their seeds explain it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

LEVEL = 0.95
"""Of intervals."""


@dataclass(frozen=True)
class Difference:
    """Mean of b minus mean of a, with Welch's 95 % interval (NaN below two seeds)."""

    mean: float
    low: float
    high: float

    @property
    def verdict(self) -> str:
        if math.isnan(self.low):
            return "one seed: nothing is known about the spread"
        return "beyond the spread of seeds" if self.low > 0 or self.high < 0 else "NOT beyond the spread of seeds"

    def __str__(self) -> str:
        interval = "" if math.isnan(self.low) else f" (95 % {self.low:+.2f} to {self.high:+.2f})"
        return f"{self.mean:+.2f}{interval}: {self.verdict}"


def difference(a: Sequence[float], b: Sequence[float]) -> Difference:
    """How much better b is than a."""
    mean = float(np.mean(b) - np.mean(a))
    if len(a) < 2 or len(b) < 2:
        return Difference(mean, math.nan, math.nan)
    va, vb = np.var(a, ddof=1) / len(a), np.var(b, ddof=1) / len(b)
    if va + vb == 0:
        return Difference(mean, mean, mean)
    freedom = (va + vb) ** 2 / (va**2 / (len(a) - 1) + vb**2 / (len(b) - 1))
    half = float(stats.t.ppf((1 + LEVEL) / 2, freedom) * math.sqrt(va + vb))
    return Difference(mean, mean - half, mean + half)
