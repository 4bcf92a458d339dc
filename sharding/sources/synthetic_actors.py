"""What stands and moves along a synthetic road, as analytic solids."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from occstream.sharding.sources.synthetic_rays import (
    BOX,
    CONE,
    CYLINDER,
    ELLIPSOID,
    FACADE,
    FOLIAGE,
    PLAIN,
    ROUGH,
    STRIPES,
    VEHICLE,
)
from occstream.sharding.sources.synthetic_road import Road, normal, normals


@dataclass
class Solid:
    """One solid of an object, in the object's frame (x forward, origin on the ground at its center)."""

    kind: float
    center: tuple[float, float, float]
    half: tuple[float, float, float]
    color: tuple[float, float, float]
    texture: int = PLAIN


@dataclass
class Actor:
    """One object. Movers follow the road (``along`` speed) or a straight line.

    Attributes:
        name: class name (Occ3D), or czone_sign.
        solids: what it is made of.
        s, l, yaw: place along and across the road, meters, and heading relative to it, radians.
        speed: meters per second along its heading.
        size: (length, width, height) of its box; None: it gets no box.
    """

    name: str
    solids: list[Solid]
    s: float
    l: float
    yaw: float = 0.0
    speed: float = 0.0
    size: tuple[float, float, float] | None = None


def _tint(rng: np.random.Generator, *choices: tuple[float, float, float]) -> tuple[float, float, float]:
    base = np.array(choices[rng.integers(len(choices))])
    return tuple(np.clip(base * rng.uniform(0.75, 1.2) + 0.03 * normals(rng, 3), 0.02, 1.0))


def place_static(rng: np.random.Generator, road: Road, length: float, style: str) -> list[Actor]:
    """Buildings, walls, trees, poles, signs, cones, barriers and odd things."""
    found: list[Actor] = []
    for side in (-1, 1):
        found += _fronts(rng, road, length, side, style=style)
        s = -60.0
        while s < length + 60:
            s += rng.uniform(4, 14)
            if not road.near_crossing(s, 1.5):
                found.append(_by_the_road(rng, road, s, side))
    if rng.random() < 0.4:
        found += _roadworks(rng, road, length)
    return found


def _fronts(rng: np.random.Generator, road: Road, length: float, side: int, *, style: str) -> list[Actor]:
    """Buildings and walls along one side."""
    found, s = [], -70.0
    density = {"urban": 0.85, "suburb": 0.55, "rural": 0.12}[style]
    border = road.half_width + road.verge + road.walk
    while s < length + 70:
        wide = rng.uniform(7, 22)
        if rng.random() < density and not road.near_crossing(s + wide / 2, wide / 2 + 2):
            deep = rng.uniform(5, 10)
            high = rng.uniform(6, 16) if style == "urban" else rng.uniform(3, 7)
            color = _tint(
                rng, (0.7, 0.62, 0.5), (0.55, 0.35, 0.28), (0.62, 0.62, 0.6), (0.8, 0.78, 0.7), (0.4, 0.42, 0.45)
            )
            gap = rng.uniform(0.3, 3.0 if style == "urban" else 9.0)
            solid = Solid(BOX, (0, 0, high / 2 - 0.5), (wide / 2, deep / 2, high / 2 + 0.5), color, FACADE)
            found.append(Actor("manmade", [solid], s + wide / 2, side * (border + gap + deep / 2)))
        elif rng.random() < 0.4 and not road.near_crossing(s + wide / 2, wide / 2 + 1):
            high = rng.uniform(0.7, 2.2)
            color = _tint(rng, (0.5, 0.45, 0.4), (0.35, 0.25, 0.18), (0.65, 0.65, 0.63))
            solid = Solid(BOX, (0, 0, high / 2), (wide / 2, 0.12, high / 2), color, ROUGH)
            found.append(Actor("manmade", [solid], s + wide / 2, side * (border + rng.uniform(0.2, 1.5))))
        s += wide + rng.uniform(0.5, 7)
    return found


def _by_the_road(rng: np.random.Generator, road: Road, s: float, side: int) -> Actor:
    """A tree, pole, sign, bush or odd thing."""
    border = road.half_width + road.verge + road.walk
    near = side * (road.half_width + rng.uniform(0.5, max(0.8, road.verge + 0.7)))
    what = rng.random()
    if what < 0.4:
        return _tree(rng, s, near if rng.random() < 0.5 else side * (border + rng.uniform(0.5, 12)))
    if what < 0.6:
        high, radius = rng.uniform(4, 8), rng.uniform(0.07, 0.16)
        half = (radius, radius, high / 2)
        solid = Solid(CYLINDER, (0, 0, high / 2), half, _tint(rng, (0.35, 0.36, 0.37)))
        return Actor("manmade", [solid], s, near)
    if what < 0.72:
        return _sign(rng, s, near, side)
    if what < 0.8:
        half = (rng.uniform(0.25, 0.6), rng.uniform(0.2, 0.5), rng.uniform(0.3, 0.6))
        color = _tint(rng, (0.2, 0.3, 0.2), (0.5, 0.2, 0.15), (0.3, 0.3, 0.33), (0.55, 0.45, 0.3))
        return Actor("others", [Solid(BOX, (0, 0, half[2]), half, color, ROUGH)], s, near, rng.uniform(0, 3))
    radius = rng.uniform(0.5, 1.3)
    solid = Solid(ELLIPSOID, (0, 0, radius * 0.5), (radius, radius, radius * 0.8), _green(rng), FOLIAGE)
    return Actor("vegetation", [solid], s, side * (border + rng.uniform(0.3, 4)))


def _green(rng: np.random.Generator) -> tuple[float, float, float]:
    return _tint(rng, (0.2, 0.4, 0.12), (0.28, 0.42, 0.16), (0.4, 0.4, 0.15), (0.5, 0.32, 0.12))


def _tree(rng: np.random.Generator, s: float, l: float) -> Actor:
    trunk, radius = rng.uniform(1.2, 3.0), rng.uniform(0.9, 2.4)
    color, thick = _green(rng), rng.uniform(0.1, 0.3)
    bark = _tint(rng, (0.3, 0.22, 0.15))
    solids = [Solid(CYLINDER, (0, 0, trunk / 2), (thick, thick, trunk / 2), bark, ROUGH)]
    for _ in range(int(rng.integers(1, 4))):
        x, y, z = 0.3 * radius * normals(rng, 3)
        solids.append(
            Solid(
                ELLIPSOID,
                (x, y, trunk + radius * 0.7 + z),
                (radius, radius, radius * rng.uniform(0.7, 1.3)),
                color,
                FOLIAGE,
            )
        )
    return Actor("vegetation", solids, s, l)


def _sign(rng: np.random.Generator, s: float, l: float, side: int, *, name: str = "manmade") -> Actor:
    high = rng.uniform(1.8, 2.6)
    color = (
        _tint(rng, (0.8, 0.1, 0.1), (0.1, 0.25, 0.7), (0.85, 0.75, 0.1))
        if name == "manmade"
        else _tint(rng, (0.95, 0.5, 0.05))
    )
    solids = [
        Solid(CYLINDER, (0, 0, high / 2), (0.05, 0.05, high / 2), (0.5, 0.5, 0.5)),
        Solid(
            BOX,
            (0, 0, high),
            (0.05, rng.uniform(0.3, 0.5), rng.uniform(0.3, 0.5)),
            color,
            PLAIN if name == "manmade" else STRIPES,
        ),
    ]
    return Actor(name, solids, s, l, 0.0 if side < 0 else math.pi)


def _roadworks(rng: np.random.Generator, road: Road, length: float) -> list[Actor]:
    """A closed strip: cones or barriers, a sign, now and then a machine."""
    side, s = int(rng.choice([-1, 1])), rng.uniform(5, length)
    found = [_sign(rng, s - 4, side * (road.half_width - 0.4), side, name="czone_sign")]
    for i in range(int(rng.integers(4, 9))):
        at = s + 2.2 * i
        l = side * (road.half_width - rng.uniform(1.0, 1.4))
        if rng.random() < 0.5:
            solid = Solid(CONE, (0, 0, 0.4), (0.24, 0.24, 0.4), _tint(rng, (0.95, 0.38, 0.08)), STRIPES)
            found.append(Actor("traffic_cone", [solid], at, l))
        else:
            solid = Solid(
                BOX, (0, 0, 0.45), (0.9, 0.2, 0.45), _tint(rng, (0.85, 0.2, 0.12), (0.75, 0.75, 0.72)), STRIPES
            )
            found.append(Actor("barrier", [solid], at, l))
    if rng.random() < 0.6:
        yellow = _tint(rng, (0.9, 0.68, 0.1))
        solids = [
            Solid(BOX, (0, 0, 0.5), (1.9, 1.2, 0.5), (0.15, 0.15, 0.15)),
            Solid(BOX, (-0.3, 0, 1.6), (1.3, 1.1, 0.6), yellow),
            Solid(BOX, (-0.2, 0.3, 2.5), (0.7, 0.6, 0.5), yellow, VEHICLE),
            Solid(BOX, (2.3, -0.3, 2.2), (1.5, 0.2, 0.2), yellow),
        ]
        l = side * (road.half_width + 1.2)
        found.append(Actor("construction_vehicle", solids, s + 9, l, rng.uniform(-0.5, 0.5), 0.0, (6.0, 2.4, 3.0)))
    return found


def _car(rng: np.random.Generator) -> tuple[str, list[Solid], tuple[float, float, float]]:
    color = _tint(
        rng,
        (0.8, 0.8, 0.8),
        (0.12, 0.12, 0.13),
        (0.45, 0.46, 0.48),
        (0.6, 0.1, 0.1),
        (0.12, 0.2, 0.5),
        (0.85, 0.8, 0.6),
    )
    dark = (0.06, 0.06, 0.07)
    pick = rng.random()
    if pick < 0.72:
        l, w, h = rng.uniform(3.8, 5.0), rng.uniform(1.7, 2.0), rng.uniform(1.4, 1.9)
        solids = [
            Solid(BOX, (0, 0, 0.18), (l / 2 * 0.8, w / 2 * 0.95, 0.18), dark),
            Solid(BOX, (0, 0, 0.62), (l / 2, w / 2, 0.32), color),
            Solid(
                BOX,
                (-0.1 * l, 0, (0.94 + h) / 2),
                (l * rng.uniform(0.24, 0.36), w / 2 * 0.88, (h - 0.94) / 2),
                color,
                VEHICLE,
            ),
        ]
        return "car", solids, (l, w, h)
    if pick < 0.84:
        l, w, h = rng.uniform(6, 9), 2.4, rng.uniform(2.7, 3.5)
        solids = [
            Solid(BOX, (0, 0, 0.4), (l / 2, w / 2 * 0.9, 0.3), dark),
            Solid(BOX, (l / 2 - 0.9, 0, 1.4), (0.9, w / 2, 0.9), color, VEHICLE),
            Solid(
                BOX,
                (-0.9, 0, (0.7 + h) / 2),
                (l / 2 - 0.95, w / 2, (h - 0.7) / 2),
                _tint(rng, (0.85, 0.85, 0.83), (0.3, 0.4, 0.3)),
            ),
        ]
        return "truck", solids, (l, w, h)
    if pick < 0.91:
        l, w, h = rng.uniform(9, 12), 2.5, rng.uniform(3.0, 3.4)
        solids = [
            Solid(
                BOX, (0, 0, 0.9), (l / 2, w / 2, 0.7), _tint(rng, (0.8, 0.15, 0.1), (0.85, 0.8, 0.2), (0.15, 0.4, 0.3))
            ),
            Solid(BOX, (0, 0, (1.6 + h) / 2), (l / 2, w / 2, (h - 1.6) / 2), (0.6, 0.6, 0.58), VEHICLE),
        ]
        return "bus", solids, (l, w, h)
    if pick < 0.95:
        l, w, h = rng.uniform(4, 8), 2.3, rng.uniform(2.2, 3.2)
        solids = [
            Solid(
                BOX,
                (0, 0, (0.6 + h) / 2),
                (l / 2, w / 2, (h - 0.6) / 2),
                _tint(rng, (0.7, 0.7, 0.72), (0.3, 0.35, 0.5)),
                ROUGH,
            ),
            Solid(BOX, (-0.2 * l, 0, 0.35), (0.8, w / 2, 0.3), dark),
        ]
        return "trailer", solids, (l, w, h)
    return _two_wheeler(rng, "motorcycle")


def _two_wheeler(rng: np.random.Generator, name: str) -> tuple[str, list[Solid], tuple[float, float, float]]:
    broad = 0.28 if name == "motorcycle" else 0.14
    frame = _tint(rng, (0.1, 0.1, 0.1), (0.6, 0.1, 0.1), (0.15, 0.25, 0.55))
    solids = [Solid(BOX, (0, 0, 0.5), (0.95, broad, 0.42), frame, ROUGH)]
    if rng.random() < 0.75:
        coat = _tint(rng, (0.15, 0.2, 0.45), (0.6, 0.15, 0.1), (0.2, 0.2, 0.2), (0.75, 0.75, 0.2))
        solids.append(Solid(ELLIPSOID, (-0.1, 0, 1.2), (0.3, 0.26, 0.45), coat))
        solids.append(Solid(ELLIPSOID, (0.0, 0, 1.72), (0.14, 0.13, 0.16), (0.55, 0.42, 0.35)))
    return name, solids, (1.9, 2 * broad + 0.3, 1.85)


def _pedestrian(rng: np.random.Generator) -> tuple[str, list[Solid], tuple[float, float, float]]:
    high = rng.uniform(1.5, 1.9)
    coat = _tint(rng, (0.15, 0.18, 0.4), (0.55, 0.12, 0.12), (0.2, 0.2, 0.2), (0.75, 0.7, 0.55), (0.15, 0.4, 0.35))
    solids = [
        Solid(
            CYLINDER, (0, 0, high * 0.24), (0.16, 0.16, high * 0.24), _tint(rng, (0.15, 0.15, 0.2), (0.3, 0.3, 0.45))
        ),
        Solid(ELLIPSOID, (0, 0, high * 0.66), (0.2, 0.27, high * 0.23), coat),
        Solid(ELLIPSOID, (0, 0, high * 0.93), (0.12, 0.12, 0.14), (0.6, 0.45, 0.37)),
    ]
    return "pedestrian", solids, (0.6, 0.7, high)


def place_traffic(rng: np.random.Generator, road: Road, length: float, style: str, *, speed: float) -> list[Actor]:
    """Parked and moving road users."""
    found: list[Actor] = []
    busy = _BUSY[style]
    for side in (-1, 1):
        s = -50.0
        while s < length + 60:  # parked along the kerb
            s += rng.uniform(6, 26) / busy
            if road.half_width > 4.6 and rng.random() < 0.65 and not road.near_crossing(s, 5):
                name, solids, size = _car(rng)
                l = side * (road.half_width - size[1] / 2 - 0.2)
                found.append(Actor(name, solids, s, l, (0.0 if side < 0 else math.pi) + 0.03 * normal(rng), 0.0, size))
    for direction, l in ((1, -1.75), (-1, 1.75)):
        s = -60.0
        pace = speed if direction > 0 else rng.uniform(2, 12)  # a lane drives together
        while s < length + 90:
            s += rng.uniform(14, 55) / busy
            if rng.random() < 0.8:
                name, solids, size = _car(rng)
                yaw = 0.0 if direction > 0 else math.pi
                found.append(Actor(name, solids, s, l, yaw, pace * rng.uniform(0.85, 1.1), size))
    for make, most, share in _ROADSIDE:
        found += [make(rng, road, length) for _ in range(np.count_nonzero(rng.random(most) < share * busy))]
    return found


def _walker(rng: np.random.Generator, road: Road, length: float) -> Actor:
    """A pedestrian beside the street, or crossing it."""
    side = int(rng.choice([-1, 1]))
    l = side * (road.half_width + road.verge + rng.uniform(0.2, max(0.4, road.walk)))
    yaw, speed = (0.0 if rng.random() < 0.5 else math.pi), rng.uniform(0, 1.8)
    if rng.random() < 0.15:  # crossing the street
        l, yaw = side * rng.uniform(0.5, road.half_width), -side * math.pi / 2
    name, solids, size = _pedestrian(rng)
    return Actor(name, solids, rng.uniform(-10, length + 40), l, yaw, speed, size)


def _rider(rng: np.random.Generator, road: Road, length: float) -> Actor:
    """A bicycle or motorcycle at the edge of the street, or one that is parked."""
    side = int(rng.choice([-1, 1]))
    name, solids, size = _two_wheeler(rng, "bicycle" if rng.random() < 0.75 else "motorcycle")
    moving = len(solids) > 1
    l = side * (road.half_width - 0.6) if moving else side * (road.half_width + road.verge + 0.3)
    yaw = 0.0 if side < 0 else math.pi
    return Actor(name, solids, rng.uniform(0, length + 40), l, yaw, rng.uniform(2, 6) if moving else 0.0, size)


_BUSY = {"urban": 1.0, "suburb": 0.7, "rural": 0.35}
_ROADSIDE = ((_walker, 12, 0.4), (_rider, 6, 0.27))  # what there may be, how often at most, chance of each


def with_crowd(
    rng: np.random.Generator, actors: list[Actor], road: Road, *, length: float, style: str, crowd: float
) -> list[Actor]:
    """The actors with another number of pedestrians and two-wheelers: below 1, each stays with that chance; above 1,
    others join them at the roadside, ``crowd - 1`` times the number expected there."""
    if crowd < 1:
        thinned = ("pedestrian", "bicycle", "motorcycle")
        return [a for a in actors if a.name not in thinned or rng.random() < crowd]
    found = list(actors)
    for make, most, share in _ROADSIDE:
        expected = (crowd - 1) * most * share * _BUSY[style]
        trials = math.ceil((crowd - 1) * most)
        for _ in range(np.count_nonzero(rng.random(trials) * trials < expected)):
            tries = [make(rng, road, length) for _ in range(8)]
            found += [a for a in tries if _stands_free(a, found)][:1]
    return found


def _stands_free(actor: Actor, others: list[Actor]) -> bool:
    """Whether an actor is clear of the others' boxes when the scene begins."""
    for other in others:
        if actor.size and other.size:
            along, across = ((a + b) / 2 for a, b in zip(actor.size[:2], other.size[:2]))
            if abs(actor.s - other.s) < along and abs(actor.l - other.l) < across:
                return False
    return True
