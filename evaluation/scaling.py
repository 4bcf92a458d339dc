"""Scaling laws: fits with intervals, predictions that can fail, and what pre-training is worth in labels.

Two laws in the number of scenes n: ``log`` a + b log(1 + n / n0), and ``power`` a - b (1 + n / n0)^-c. Given n0 (and c) both
are linear, so a grid over these with least squares for the rest finds the best fit for certain. Intervals are those of the
profile likelihood: every value for which the best fit that has it is not worse than the F-distribution allows. With a
handful of seeds they cover what they promise, which resampling the seeds does not (see the tests).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

import numpy as np
from scipy import stats

from occstream.evaluation.differences import LEVEL

Law = Literal["log", "power"]
Scenes = TypeVar("Scenes", int, float)  # how many
EXPONENTS = np.concatenate([np.linspace(0.02, 1.0, 50), np.linspace(1.05, 3.0, 40)])


class NotFitted(ValueError):
    """A law cannot be fitted to these points; says why."""


@dataclass(frozen=True)
class Fit:
    """A fitted law.

    Attributes:
        law: which.
        a, b, n0, c: its parameters; c is None for the logarithm.
        c_interval: 95 % interval of the exponent, or None.
        sd: spread of single runs about the curve.
        points: sizes and values it was fitted to.
    """

    law: Law
    a: float
    b: float
    n0: float
    c: float | None
    c_interval: tuple[float, float] | None
    sd: float
    points: tuple[tuple[float, float], ...]

    def __call__(self, n: float | np.ndarray) -> np.ndarray | np.float64:
        """Value at n scenes (scalar or array)."""
        return self.a + self.b * _basis(self.law, np.asarray(n, float), self.n0, self.c)

    def interval(self, n: float, of_run: bool = False) -> tuple[float, float]:
        """95 % interval of the curve at n scenes, or of a single run there."""
        sizes, values = (np.array(v) for v in zip(*self.points))
        return _profile(self.law, sizes, values).interval(n, of_run)

    def formula(self) -> str:
        """For people."""
        if self.c_interval is None:
            return f"{self.a:.2f} + {self.b:.2f} log(1 + n / {self.n0:.3g})"
        low, high = self.c_interval
        return f"{self.a:.2f} - {-self.b:.2f} (1 + n / {self.n0:.3g})^-{self.c:.2f}, exponent {low:.2f} to {high:.2f}"


def _basis(law: Law, n: np.ndarray, n0: float | np.ndarray, c: float | np.ndarray | None) -> np.ndarray:
    if law == "log":
        return np.log1p(n / n0)
    assert c is not None, "a power law has an exponent"
    return (1 + n / n0) ** (-c)


class _Profile:
    """Least squares for every (n0, c) of a grid."""

    def __init__(self, law: Law, sizes: np.ndarray, values: np.ndarray) -> None:
        self.law: Law = law
        self.sizes, self.values = sizes, values
        positive = sizes[sizes > 0]
        scales = np.geomspace(positive.min() / 20, positive.max() * 5, 60)
        exponents = EXPONENTS if law == "power" else np.array([1.0])
        self.n0, self.c = (g.ravel() for g in np.meshgrid(scales, exponents, indexing="ij"))
        x = _basis(law, sizes[None], self.n0[:, None], self.c[:, None])
        self.mean_x, self.mean_y = x.mean(1), values.mean()
        centred = x - self.mean_x[:, None]
        self.spread = np.maximum((centred**2).sum(1), 1e-300)
        self.b = centred @ (values - self.mean_y) / self.spread
        self.error = np.maximum(((values - self.mean_y) ** 2).sum() - self.b**2 * self.spread, 0)
        self.best = int(self.error.argmin())
        self.freedom = len(values) - (3 if law == "log" else 4)
        # Not below rounding, or points that lie exactly on a law would have an empty interval.
        self.least = max(self.error[self.best], 1e-12 * max(1.0, self.mean_y**2))
        self.limit = self.least * (1 + stats.f.ppf(LEVEL, 1, self.freedom) / self.freedom)

    @property
    def sd(self) -> float:
        return math.sqrt(self.least / self.freedom)

    def exponent(self) -> tuple[float, float]:
        inside = self.c[self.error <= self.limit]
        return float(inside.min()), float(inside.max())

    def interval(self, n: float, of_run: bool) -> tuple[float, float]:
        x = _basis(self.law, np.array(n, float), self.n0, self.c)
        middle = self.mean_y + self.b * (x - self.mean_x)
        lever = 1 / len(self.values) + (x - self.mean_x) ** 2 / self.spread + of_run
        room = self.limit - self.error
        half = np.sqrt(np.maximum(lever * room, 0))
        inside = room >= 0
        return float((middle - half)[inside].min()), float((middle + half)[inside].max())


def _profile(law: Law, sizes: np.ndarray, values: np.ndarray) -> _Profile:
    return _cached(law, tuple(sizes.tolist()), tuple(values.tolist()))


@functools.lru_cache(maxsize=8)
def _cached(law: Law, sizes: tuple, values: tuple) -> _Profile:
    return _Profile(law, np.array(sizes), np.array(values))


def fit(points: Mapping[Scenes, Sequence[float]], law: Law) -> Fit:
    """Fits a law.

    Args:
        points: values of the seeds by number of scenes; 0 scenes may be among them.
        law: which.

    Raises:
        NotFitted: too few sizes or seeds, or the seeds of a size differ more than the sizes do.
    """
    sizes = np.array([n for n, v in points.items() for _ in v], float)
    values = np.array([y for v in points.values() for y in v], float)
    need = 3 if law == "log" else 4
    distinct = len(set(sizes.tolist()))
    if distinct < need:
        raise NotFitted(f"{distinct} sizes; the {law} law needs at least {need} (and more to be judged)")
    if len(values) < distinct + 2:
        raise NotFitted(f"{len(values)} runs at {distinct} sizes: too few seeds to know the spread; train more seeds")
    groups = [np.array(v, float) for v in points.values()]
    within = sum(((g - g.mean()) ** 2).sum() for g in groups) / (len(values) - distinct)
    between = sum(len(g) * (g.mean() - values.mean()) ** 2 for g in groups) / (distinct - 1)
    if within > 0 and stats.f.sf(between / within, distinct - 1, len(values) - distinct) > 1 - LEVEL:
        effect = max(g.mean() for g in groups) - min(g.mean() for g in groups)
        raise NotFitted(
            f"the spread over seeds (sd {math.sqrt(within):.2f}) is too large for the effect of the scenes "
            f"({effect:.2f} between the best and the worst size); train more seeds or more sizes"
        )
    found = _profile(law, sizes, values)
    at, b = found.best, float(found.b[found.best])
    return Fit(
        law=law,
        a=float(found.mean_y - b * found.mean_x[at]),
        b=b,
        n0=float(found.n0[at]),
        c=float(found.c[at]) if law == "power" else None,
        c_interval=found.exponent() if law == "power" else None,
        sd=found.sd,
        points=tuple(zip(sizes.tolist(), values.tolist())),
    )


@dataclass(frozen=True)
class Prediction:
    """What a law that had not seen the largest size said about it.

    Attributes:
        n: that size. predicted: by the law. interval: of the mean of as many runs. actual: their mean.
    """

    law: Law
    n: float
    predicted: float
    interval: tuple[float, float]
    actual: float

    @property
    def error(self) -> float:
        return self.predicted - self.actual

    def sentence(self) -> str:
        low, high = self.interval
        verdict = "inside" if low <= self.actual <= high else "OUTSIDE"
        return (
            f"{self.law} law fitted to the smaller sizes predicts {self.predicted:.2f} at {self.n:g} scenes "
            f"(95 % {low:.2f} to {high:.2f}); it was {self.actual:.2f}: error {self.error:+.2f}, {verdict}"
        )


def predict_largest(points: Mapping[Scenes, Sequence[float]], law: Law) -> Prediction:
    """Leaves out the largest size and predicts it. Raises NotFitted as ``fit``."""
    largest = max(points)
    made = fit({n: v for n, v in points.items() if n != largest}, law)
    low, high = made.interval(largest)
    actual = float(np.mean(points[largest]))
    # The mean of the runs there has a spread of its own.
    margin = made.sd / math.sqrt(len(points[largest])) * stats.t.ppf((1 + LEVEL) / 2, max(1, len(made.points) - 3))
    middle = float(made(largest))
    wide = (middle - math.hypot(middle - low, margin), middle + math.hypot(high - middle, margin))
    return Prediction(law, largest, middle, wide, actual)


@dataclass(frozen=True)
class Worth:
    """How many labeled scenes a score is worth.

    Attributes:
        scenes: on the curve of labels alone; inf above its end, 0 below its beginning.
        interval: 95 %, by resampling the seeds of both.
        ends: smallest and largest number of labeled scenes of the curve.
    """

    scenes: float
    interval: tuple[float, float]
    ends: tuple[float, float]

    def sentence(self) -> str:
        return (
            f"worth {self._number(self.scenes)} labeled scenes (95 % {' to '.join(map(self._number, self.interval))})"
        )

    def _number(self, value: float) -> str:
        if math.isinf(value):
            return f"more than {self.ends[1]:g}"
        return f"less than {self.ends[0]:g}" if value <= 0 else f"{value:.1f}"


def worth_in_labels(curve: Mapping[Scenes, Sequence[float]], scores: Sequence[float], draws: int = 2000) -> Worth:
    """Labeled scenes without pre-training that give the same score.

    Args:
        curve: scores of the seeds by number of labeled scenes, without pre-training.
        scores: of the seeds with pre-training.
        draws: of the bootstrap.

    Raises:
        NotFitted: the curve has fewer than two sizes, or does not rise by more than the seeds differ.
    """
    if len(curve) < 2:
        raise NotFitted("labeled scenes without pre-training at one size only; add a label_curve to the study")
    ends = [np.array(curve[n], float) for n in (min(curve), max(curve))]
    rise = ends[1].mean() - ends[0].mean()
    if min(map(len, ends)) < 2 or not rise > 0 or not _differ(*ends):
        raise NotFitted(
            f"from {min(curve):g} to {max(curve):g} labeled scenes the score changes by {rise:+.2f}, not more than its "
            "spread over seeds: nothing can be read off such a curve; train longer, or take more seeds"
        )
    sizes = np.array(sorted(curve), float)
    rng = np.random.default_rng(0)

    def read(means: np.ndarray, score: float) -> float:
        means = np.maximum.accumulate(means)  # more labels do no harm
        if score > means[-1]:
            return math.inf
        if score < means[0]:
            return 0.0
        return float(np.exp(np.interp(score, means, np.log(sizes))))

    groups = [np.array(curve[n], float) for n in sorted(curve)]
    own = np.array(scores, float)
    again = lambda v: v[rng.integers(len(v), size=len(v))].mean()  # noqa: E731
    drawn = [read(np.array([again(g) for g in groups]), again(own)) for _ in range(draws)]
    low, high = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], method="nearest")
    worth = read(np.array([g.mean() for g in groups]), own.mean())
    return Worth(worth, (float(low), float(high)), (float(sizes[0]), float(sizes[-1])))


def _differ(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether two means are further apart than their seeds explain (Welch)."""
    _, p = np.asarray(stats.ttest_ind(a, b, equal_var=False))
    return not p > 1 - LEVEL


def mean_interval(values: Sequence[float]) -> tuple[float, float]:
    """95 % interval of the mean (Student); NaN below two values."""
    known = np.array(values, float)
    if len(known) < 2:
        return math.nan, math.nan
    half = stats.t.ppf((1 + LEVEL) / 2, len(known) - 1) * known.std(ddof=1) / math.sqrt(len(known))
    return float(known.mean() - half), float(known.mean() + half)
