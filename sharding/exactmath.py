"""Sine, cosine, angles, decay and logarithms from sums and products alone, the same to the last bit on every CPU.

The C library and NumPy choose implementations of these functions by the CPU, and their last bits differ. Whatever decides
which voxel a point lies in, or which value a pixel gets, uses these. Numba contracts nothing into fused operations
unless it is asked to.
"""

from __future__ import annotations

from collections.abc import Callable

import numba
import numpy as np

_QUARTER = 1.5707963267341256  # pi / 2 in three parts: the first has 33 bits, so that its multiples are exact
_QUARTER_2 = 6.077100506303966e-11
_QUARTER_3 = 2.0222662487111665e-21


def _elementwise(scalar: Callable[..., float]) -> np.ufunc:
    """What is written for numbers, for arrays of any shape."""
    return numba.vectorize(cache=True)(scalar)


@numba.njit(cache=True, nogil=True)
def cos_sin(angle: float) -> tuple[float, float]:
    """(cosine, sine) of an angle in radians below 1e5, to 2e-16."""
    quarters = np.floor(angle * 0.6366197723675814 + 0.5)
    r = ((angle - quarters * _QUARTER) - quarters * _QUARTER_2) - quarters * _QUARTER_3
    q = r * r
    c, s = 1.0, 1.0
    for n in range(16, 0, -2):  # Taylor: r is at most pi / 4
        c = 1.0 - c * q / (n * (n - 1))
        s = 1.0 - s * q / (n * (n + 1))
    s *= r
    turn = int(quarters) & 3
    if turn == 0:
        return c, s
    if turn == 1:
        return -s, c
    if turn == 2:
        return -c, -s
    return s, -c


@_elementwise
def cos(angle: float) -> float:
    """Cosines of angles in radians, any shape."""
    return cos_sin(angle)[0]


@_elementwise
def sin(angle: float) -> float:
    """Sines of angles in radians, any shape."""
    return cos_sin(angle)[1]


@numba.njit(cache=True, nogil=True)
def angle_of(x: float, y: float) -> float:
    """Angle of a vector from the x axis, radians in -pi..pi; 0 for no vector."""
    length = np.sqrt(x * x + y * y)
    if not length > 0:
        return 0.0
    x, y = x / length, y / length
    along = y / (abs(x) + abs(y))  # of the way around, where the circle is a square
    angle = (along if x >= 0 else (2.0 - along if y >= 0 else -2.0 - along)) * (_QUARTER + _QUARTER_2)
    for _ in range(3):
        c, s = cos_sin(angle)
        d = y * c - x * s
        angle += d * (1.0 + d * d * (1.0 / 6 + d * d * (3.0 / 40)))
    return angle


@_elementwise
def angle(x: float, y: float) -> float:
    """Angles of vectors from the x axis, any shape; see ``angle_of``."""
    return angle_of(x, y)


@numba.njit(cache=True, nogil=True)
def decay(x: float) -> float:
    """exp(-x) for 0 <= x < 100, to 1e-11 of its value."""
    t = -x / 1024
    value = 1.0
    for n in range(8, 0, -1):
        value = 1.0 + value * t / n
    for _ in range(10):
        value *= value
    return value


@_elementwise
def log(x: float) -> float:
    """Natural logarithms of positive numbers, to 1e-15, any shape."""
    exponent = 0
    while x >= 1.4142135623730951:
        x *= 0.5
        exponent += 1
    while x < 0.7071067811865476:
        x *= 2.0
        exponent -= 1
    t = (x - 1.0) / (x + 1.0)  # log x = 2 artanh t, and t is at most 0.172
    q = t * t
    series = 0.0
    for n in range(21, 0, -2):
        series = series * q + 1.0 / n
    return exponent * 0.6931471805599453 + 2.0 * t * series
