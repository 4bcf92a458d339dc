"""How cameras map rays to pixels: the lenses that raw data sets have. Shards hold none of them but the pinhole.

Pixels are (N, 2) float64 u, v; the center of the top-left pixel is (0, 0). Rays are (N, 3) float64 in camera axes (x
right, y down, z forward), of any length when they come in and of unit length when they go out. Lenses are values: equal
calibrations are equal and hash alike, so maps made from them can be kept.

Only elementwise sums, products and square roots are used, and angles made from them: products of matrices and the C library's
sines differ in their last bits between CPUs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import numpy as np

from occstream.sharding.exactmath import angle, cos, cos_sin, sin

NEWTON = 12  # steps at most when a lens is inverted


class Lens(Protocol):
    """What ``prepare.rectify`` needs of a lens.

    Attributes:
        width, height: pixels of the image.
    """

    @property
    def width(self) -> int: ...

    @property
    def height(self) -> int: ...

    def rays(self, pixels: np.ndarray) -> np.ndarray:
        """(N, 3) unit rays of pixels."""
        ...

    def pixels(self, rays: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(N, 2) pixels of rays; (N,) bool, True where the lens sees the ray and its pixel lies in the image."""
        ...

    @property
    def center(self) -> tuple[float, float]:
        """Pixel of the optical axis."""
        ...

    @property
    def focal(self) -> tuple[float, float]:
        """Pixels per radian at the optical axis, by image axis: the focal lengths of the pinhole that fits there."""
        ...


@dataclass(frozen=True)
class Pinhole:
    """No distortion: pixel = focal * (x, y) / z + center."""

    width: int
    height: int
    focal: tuple[float, float]
    center: tuple[float, float]

    def rays(self, pixels: np.ndarray) -> np.ndarray:
        """(N, 3) unit rays of pixels."""
        return _unit((np.asarray(pixels, np.float64) - self.center) / self.focal)

    def pixels(self, rays: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(N, 2) pixels of rays; (N,) bool which are seen."""
        flat, before = _flat(rays)
        return _placed(self, flat, before)


@dataclass(frozen=True)
class BrownConrady:
    """OpenCV's model: radial ``k1 k2 k3`` (over ``k4 k5 k6``) and tangential ``p1 p2``, on the plane z = 1.

    The radial polynomial turns back at some radius; rays beyond it fall onto the image a second time, and are not seen.

    Attributes:
        coefficients: k1, k2, p1, p2 and, where given, k3, k4, k5, k6 (OpenCV's order).

    Raises:
        ValueError: not 4, 5 or 8 coefficients.
    """

    width: int
    height: int
    focal: tuple[float, float]
    center: tuple[float, float]
    coefficients: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.coefficients) not in (4, 5, 8):
            raise ValueError(
                f"{len(self.coefficients)} coefficients of distortion: give 4, 5 or 8 (k1 k2 p1 p2 k3 k4 k5 k6)"
            )

    def rays(self, pixels: np.ndarray) -> np.ndarray:
        """(N, 3) unit rays of pixels. NaN where the lens leads no ray to a pixel."""
        wanted = (np.asarray(pixels, np.float64) - self.center) / self.focal
        flat = wanted.copy()
        for _ in range(NEWTON):
            # Newton's method on both coordinates, with the derivatives of the radial part alone: the tangential one is small.
            square = flat[:, 0] ** 2 + flat[:, 1] ** 2
            scale, slope = self._radial(square)
            missing = wanted - self._bent(flat)
            # Inverse of scale * I + 2 slope * flat flatT, by Sherman and Morrison.
            along = missing[:, 0] * flat[:, 0] + missing[:, 1] * flat[:, 1]
            with np.errstate(divide="ignore", invalid="ignore"):
                flat = (
                    flat
                    + (missing - flat * (2 * slope * along / (scale + 2 * slope * square))[:, None]) / scale[:, None]
                )
        lost = ~(
            (np.abs(self._bent(flat) - wanted) < 1e-9).all(1) & (flat[:, 0] ** 2 + flat[:, 1] ** 2 <= self.reach**2)
        )
        flat[lost] = np.nan
        return _unit(flat)

    def pixels(self, rays: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(N, 2) pixels of rays; (N,) bool which are seen."""
        flat, before = _flat(rays)
        near = flat[:, 0] ** 2 + flat[:, 1] ** 2 <= self.reach**2
        return _placed(self, self._bent(flat), before & near)

    @property
    def reach(self) -> float:
        """Largest radius on the plane z = 1 up to which the image grows with the radius."""
        return _reach(self)

    def _radial(self, square: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Radial factor and its derivative by the square of the radius."""
        k1, k2, _, _, k3, k4, k5, k6 = (*self.coefficients, *[0.0] * (8 - len(self.coefficients)))
        top = 1 + square * (k1 + square * (k2 + square * k3))
        low = 1 + square * (k4 + square * (k5 + square * k6))
        top_slope = k1 + square * (2 * k2 + square * (3 * k3))
        low_slope = k4 + square * (2 * k5 + square * (3 * k6))
        return top / low, (top_slope * low - top * low_slope) / (low * low)

    def _bent(self, flat: np.ndarray) -> np.ndarray:
        """(N, 2) on the plane z = 1: where the lens puts a straight ray."""
        x, y = flat[:, 0], flat[:, 1]
        square = x * x + y * y
        scale, _ = self._radial(square)
        p1, p2 = self.coefficients[2:4]
        return np.stack(
            [
                x * scale + 2 * p1 * (x * y) + p2 * (square + 2 * x * x),
                y * scale + p1 * (square + 2 * y * y) + 2 * p2 * (x * y),
            ],
            1,
        )


@lru_cache(maxsize=256)
def _reach(lens: BrownConrady) -> float:
    radius = np.arange(0, 20, 0.001)
    scale, slope = lens._radial(radius * radius)
    back = np.flatnonzero(~(scale + 2 * slope * radius * radius > 0))  # derivative of radius * scale
    return float(radius[back[0] - 1]) if len(back) else 20.0


@dataclass(frozen=True)
class FTheta:
    """A polynomial between the angle from the optical axis (radians) and the distance from its pixel (pixels).

    pixel = center + A (x, y) / rho * f(theta), with rho = sqrt(x² + y²), theta = atan2(rho, z), A = [[c, d], [e, 1]].

    Attributes:
        forward: coefficients of f, angle to distance, lowest power first; or None.
        backward: coefficients of its inverse, distance to angle; or None. If both are given, ``forward`` is the model.
        max_angle: radians, below pi; rays further out are not seen.
        linear: c, d, e.

    Raises:
        ValueError: neither polynomial is given, or the angle is out of range.
    """

    width: int
    height: int
    center: tuple[float, float]
    forward: tuple[float, ...] | None
    backward: tuple[float, ...] | None
    max_angle: float
    linear: tuple[float, float, float] = (1.0, 0.0, 0.0)

    def __post_init__(self) -> None:
        if not (self.forward or self.backward):
            raise ValueError("an f-theta lens needs one of its polynomials, angle to pixels or pixels to angle")
        if not 0 < self.max_angle < np.pi:
            raise ValueError(f"the largest angle of an f-theta lens is {self.max_angle} rad, must be between 0 and pi")

    @property
    def focal(self) -> tuple[float, float]:
        """Pixels per radian at the optical axis."""
        slope = self._powers[1] if self.forward else 1 / self._powers[1]
        return slope * self.linear[0], slope

    @property
    def _powers(self) -> tuple[float, ...]:
        """Of the polynomial that is the model: from angle to distance where ``forward`` is given."""
        return self.forward or self.backward or ()

    def rays(self, pixels: np.ndarray) -> np.ndarray:
        """(N, 3) unit rays of pixels. NaN where the lens leads no ray to a pixel."""
        c, d, e = self.linear
        off = np.asarray(pixels, np.float64) - self.center
        x, y = (off[:, 0] - d * off[:, 1]) / (c - d * e), (c * off[:, 1] - e * off[:, 0]) / (c - d * e)
        far = np.sqrt(x * x + y * y)
        theta = (
            _solve(self._powers, far, far / self.focal[1], self.max_angle) if self.forward else _poly(self._powers, far)
        )
        return _from_angle(x, y, far, np.where(theta <= self.max_angle, theta, np.nan))

    def pixels(self, rays: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(N, 2) pixels of rays; (N,) bool which are seen."""
        x, y, rho, theta = _angles(rays)
        seen = theta <= self.max_angle
        theta = np.minimum(theta, self.max_angle)
        if self.forward:
            far = _poly(self._powers, theta)
        else:
            limit = float(np.hypot(self.width, self.height)) * 2
            far = _solve(self._powers, theta, theta * self.focal[1], limit)
        with np.errstate(divide="ignore", invalid="ignore"):
            x, y = np.where(rho > 0, x / rho, 0) * far, np.where(rho > 0, y / rho, 0) * far
        c, d, e = self.linear
        at = np.stack([self.center[0] + c * x + d * y, self.center[1] + e * x + y], 1)
        return at, seen & _inside(self, at)


@dataclass(frozen=True)
class KannalaBrandt:
    """OpenCV's fisheye: distance on the plane = theta (1 + k1 theta² + k2 theta⁴ + k3 theta⁶ + k4 theta⁸).

    Attributes:
        coefficients: k1 to k4.
        max_angle: radians; rays further out are not seen.

    Raises:
        ValueError: not four coefficients, or the angle is out of range.
    """

    width: int
    height: int
    focal: tuple[float, float]
    center: tuple[float, float]
    coefficients: tuple[float, float, float, float]
    max_angle: float = 1.9

    def __post_init__(self) -> None:
        if len(self.coefficients) != 4:
            raise ValueError(f"{len(self.coefficients)} coefficients of a fisheye: give 4 (k1 k2 k3 k4)")
        if not 0 < self.max_angle < np.pi:
            raise ValueError(f"the largest angle of a fisheye is {self.max_angle} rad, must be between 0 and pi")

    @property
    def _powers(self) -> tuple[float, ...]:
        k1, k2, k3, k4 = self.coefficients
        return 0.0, 1.0, 0.0, k1, 0.0, k2, 0.0, k3, 0.0, k4

    @property
    def reach(self) -> float:
        """Largest angle up to which the image grows with the angle, at most ``max_angle``."""
        return _turning(self._powers, self.max_angle)

    def rays(self, pixels: np.ndarray) -> np.ndarray:
        """(N, 3) unit rays of pixels. NaN where the lens leads no ray to a pixel."""
        flat = (np.asarray(pixels, np.float64) - self.center) / self.focal
        far = np.sqrt(flat[:, 0] ** 2 + flat[:, 1] ** 2)
        return _from_angle(flat[:, 0], flat[:, 1], far, _solve(self._powers, far, far, self.reach))

    def pixels(self, rays: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(N, 2) pixels of rays; (N,) bool which are seen."""
        x, y, rho, theta = _angles(rays)
        far = _poly(self._powers, np.minimum(theta, self.reach))
        with np.errstate(divide="ignore", invalid="ignore"):
            flat = np.stack([np.where(rho > 0, x / rho, 0) * far, np.where(rho > 0, y / rho, 0) * far], 1)
        return _placed(self, flat, theta <= self.reach)


@dataclass(frozen=True)
class View:
    """A virtual pinhole through the optical center of a camera, turned about it: exact at every depth.

    Attributes:
        width, height: pixels.
        focal, center: pixels, by image axis.
        yaw, pitch: degrees from the camera's axis to the left and upward.
        name: appended to the camera's name; "" keeps it.
    """

    width: int
    height: int
    focal: tuple[float, float]
    center: tuple[float, float]
    yaw: float = 0.0
    pitch: float = 0.0
    name: str = ""

    @property
    def intrinsics(self) -> np.ndarray:
        """(3, 3) float64."""
        return np.array([[self.focal[0], 0, self.center[0]], [0, self.focal[1], self.center[1]], [0, 0, 1.0]])

    @property
    def to_camera(self) -> np.ndarray:
        """(3, 3) float64: axes of the view -> axes of the camera."""
        yaw, pitch = math.radians(self.yaw), math.radians(self.pitch)
        (cy, sy), (cp, sp) = cos_sin(yaw), cos_sin(pitch)
        return np.array([[cy, 0, sy], [-sp * sy, cp, sp * cy], [-sy * cp, -sp, cy * cp]]).T  # right, down, forward

    def rays(self) -> np.ndarray:
        """(height * width, 3) float64 rays of its pixels, row by row, in the axes of the camera."""
        u, v = np.meshgrid(np.arange(self.width), np.arange(self.height))
        x, y = (u.ravel() - self.center[0]) / self.focal[0], (v.ravel() - self.center[1]) / self.focal[1]
        turn = self.to_camera
        return np.stack([x * turn[i, 0] + y * turn[i, 1] + turn[i, 2] for i in range(3)], 1)


def default_view(lens: Lens) -> View:
    """The pinhole that equals a lens at its optical axis: same size, focal length and principal point."""
    return View(lens.width, lens.height, lens.focal, lens.center)


def lens_of(width: int, height: int, intrinsics: np.ndarray, distortion: np.ndarray | None) -> Lens | None:
    """The lens of a calibration in OpenCV's terms; None if it is a pinhole (no coefficients, or all are zero).

    Args:
        width, height: pixels of the image.
        intrinsics: (3, 3), pixels.
        distortion: k1 k2 p1 p2 and, where given, k3 and k4 k5 k6; or None.

    Raises:
        ValueError: the number of coefficients is none of these, or one is not finite.
    """
    values = () if distortion is None else tuple(float(v) for v in np.ravel(distortion))
    if not np.isfinite(values).all():
        raise ValueError(f"coefficients of distortion are not finite: {values}")
    if not any(values):
        return None
    k = np.asarray(intrinsics, np.float64)
    focal, center = (float(k[0, 0]), float(k[1, 1])), (float(k[0, 2]), float(k[1, 2]))
    return BrownConrady(width, height, focal, center, values)


def _unit(flat: np.ndarray) -> np.ndarray:
    length = np.sqrt(flat[:, 0] ** 2 + flat[:, 1] ** 2 + 1)
    return np.stack([flat[:, 0] / length, flat[:, 1] / length, 1 / length], 1)


def _flat(rays: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rays on the plane z = 1, and which point forward."""
    rays = np.asarray(rays, np.float64)
    before = rays[:, 2] > 0
    return rays[:, :2] / np.where(before, rays[:, 2], 1)[:, None], before


def _placed(lens: Lens, flat: np.ndarray, seen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    at = flat * lens.focal + lens.center
    return at, seen & _inside(lens, at)


def _inside(lens: Lens, at: np.ndarray) -> np.ndarray:
    """Within the outermost pixels' edges, where the image still has a value to give."""
    return (at >= -0.5).all(1) & (at[:, 0] <= lens.width - 0.5) & (at[:, 1] <= lens.height - 0.5)


def _angles(rays: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """x, y, distance from the axis and angle to it. The arc tangent is exact near the axis, the arc cosine is not."""
    x, y, z = np.asarray(rays, np.float64).T
    rho = np.sqrt(x * x + y * y)
    return x, y, rho, angle(z, rho)


def _from_angle(x: np.ndarray, y: np.ndarray, far: np.ndarray, theta: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore", invalid="ignore"):
        side = np.where(far > 0, sin(theta) / far, 0)
        return np.stack([x * side, y * side, cos(theta)], 1)


def _poly(powers: tuple[float, ...], at: np.ndarray) -> np.ndarray:
    value = np.zeros_like(at)
    for power in reversed(powers):
        value = value * at + power
    return value


def _solve(powers: tuple[float, ...], wanted: np.ndarray, start: np.ndarray, limit: float) -> np.ndarray:
    """Where a polynomial that grows from 0 to ``limit`` has a value; NaN where it has not."""
    slope = tuple(i * p for i, p in enumerate(powers))[1:]
    at = np.clip(start, 0, limit)
    for _ in range(NEWTON):
        with np.errstate(divide="ignore", invalid="ignore"):
            at = np.clip(at - (_poly(powers, at) - wanted) / _poly(slope, at), 0, limit)
    return np.where(np.abs(_poly(powers, at) - wanted) < 1e-9 * np.maximum(1, np.abs(wanted)), at, np.nan)


@lru_cache(maxsize=256)
def _turning(powers: tuple[float, ...], limit: float) -> float:
    at = np.append(np.arange(0, limit, 0.001), limit)
    back = np.flatnonzero(~(_poly(tuple(i * p for i, p in enumerate(powers))[1:], at) > 0))
    return float(at[max(0, back[0] - 1)]) if len(back) else limit
