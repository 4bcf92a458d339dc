"""Fits find known laws, their intervals cover what they promise, and they refuse what cannot be known."""

import math

import numpy as np
import pytest

from occstream.evaluation.scaling import NotFitted, fit, mean_interval, predict_largest, worth_in_labels

SIZES = (0, 250, 500, 1000, 2000, 4000, 8000)
LAWS = {
    "power": lambda n: 19 - 8 * (1 + n / 400) ** -0.6,
    "log": lambda n: 11 + 1.6 * np.log1p(n / 300),
}


def draw(law, rng, seeds=3, sd=0.3, sizes=SIZES):
    return {n: (LAWS[law](n) + rng.normal(0, sd, seeds)).tolist() for n in sizes}


@pytest.mark.parametrize("law", LAWS)
def test_exact_points_give_the_law_back(law):
    found = fit({n: [LAWS[law](n)] * 2 for n in SIZES}, law)
    grid = np.array([0, 100, 3000, 16000])
    np.testing.assert_allclose(found(grid), LAWS[law](grid), atol=0.05)
    if law == "power":
        assert found.c == pytest.approx(0.6, abs=0.05)


def test_intervals_cover_what_they_promise():
    """200 draws: the exponent, the curve at a size that was measured and at twice the largest, and a held-out size."""
    rng = np.random.default_rng(0)
    hits = {"exponent": 0, "curve": 0, "beyond": 0, "log beyond": 0, "held out": 0}
    for _ in range(200):
        points = draw("power", rng)
        found = fit(points, "power")
        hits["exponent"] += found.c_interval[0] <= 0.6 <= found.c_interval[1]
        for name, n in (("curve", 1000), ("beyond", 16000)):
            low, high = found.interval(n)
            hits[name] += low <= LAWS["power"](n) <= high
        points = draw("log", rng)
        low, high = fit(points, "log").interval(16000)
        hits["log beyond"] += low <= LAWS["log"](16000) <= high
        guess = predict_largest(points, "log")
        hits["held out"] += guess.interval[0] <= guess.actual <= guess.interval[1]
    assert all(0.90 <= count / 200 <= 0.99 for count in hits.values()), hits


def test_resampling_three_seeds_would_promise_too_much():
    """Why intervals are not bootstrapped: the mean of three seeds, resampled, covers far less than 95 %."""
    rng = np.random.default_rng(1)
    bootstrap = student = 0
    for _ in range(400):
        values = rng.normal(0, 1, 3)
        means = values[rng.integers(3, size=(500, 3))].mean(1)
        bootstrap += np.quantile(means, 0.025) <= 0 <= np.quantile(means, 0.975)
        low, high = mean_interval(values)
        student += low <= 0 <= high
    assert bootstrap / 400 < 0.85
    assert 0.92 <= student / 400 <= 0.98


def test_too_few_points_and_too_much_spread_are_refused_in_words():
    rng = np.random.default_rng(2)
    with pytest.raises(NotFitted, match="2 sizes; the log law needs at least 3"):
        fit({0: [1, 2], 10: [3, 4]}, "log")
    with pytest.raises(NotFitted, match="too few seeds"):
        fit({0: [1.0], 10: [2.0], 20: [3.0]}, "log")
    with pytest.raises(NotFitted, match=r"spread over seeds \(sd .*\) is too large"):
        fit({n: rng.normal(10, 1, 3).tolist() for n in SIZES}, "power")
    with pytest.raises(NotFitted, match="one size only"):
        worth_in_labels({6: [1, 2]}, [3])
    for flat in ({6: [8.0, 8.1], 24: [8.05, 8.1]}, {6: [8.0, 8.1], 24: [6.0, 6.1]}):
        with pytest.raises(NotFitted, match="nothing can be read off such a curve"):
            worth_in_labels(flat, [9.0, 9.1])


def test_worth_is_read_off_the_curve_of_labels():
    curve = {6: [8.0, 8.2], 12: [10.0, 10.2], 24: [12.0, 12.2]}
    same = worth_in_labels(curve, [10.1, 10.1])
    assert same.scenes == pytest.approx(12)
    between = worth_in_labels(curve, [11.1, 11.1])
    assert between.scenes == pytest.approx(math.sqrt(12 * 24), rel=1e-6)
    assert between.interval[0] < between.scenes < between.interval[1]
    assert worth_in_labels(curve, [20.0, 20.0]).sentence().startswith("worth more than 24")
    assert "less than 6" in worth_in_labels(curve, [1.0, 1.0]).sentence()
