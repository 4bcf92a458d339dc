"""Procedural street scenes: a road with what stands and moves along it, as analytic solids."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
from scipy.spatial import KDTree

from occstream.sharding.exactmath import cos, cos_sin, sin
from occstream.sharding.schema import OCC3D
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
    ground_height,
)

ID = {name: i for i, name in enumerate(OCC3D.classes)}
VERSION = 2  # of the generator: another number, other scenes
CELL = 0.4  # meters of the ground raster
MARGIN = 70.0  # meters around the drive
SURFACES = ("driveable_surface", "other_flat", "sidewalk", "terrain")  # numbers in the ground raster; 4 is a marking


@dataclass
class Part:
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
        parts: its solids.
        s, l, yaw: place along and across the road, meters, and heading relative to it, radians.
        speed: meters per second along its heading.
        size: (length, width, height) of its box; None: it gets no box.
    """

    name: str
    parts: list[Part]
    s: float
    l: float
    yaw: float = 0.0
    speed: float = 0.0
    size: tuple[float, float, float] | None = None


@dataclass
class World:
    """A scene before any sensor looks at it."""

    number: int
    road: Road
    speed: float
    actors: list[Actor]
    height: np.ndarray
    ground: np.ndarray
    raster: np.ndarray
    ground_colors: np.ndarray
    light: np.ndarray
    noise: float
    exposure: float
    weather: str
    attributes: dict = field(default_factory=dict)

    def ego(self, time: float) -> np.ndarray:
        """Ego -> world at a time, (4, 4): on the road's right lane, pitched and rolled with the ground."""
        x, y, yaw = self.road.at(20.0 + self.speed * time, -1.75)
        return self._pose(x, y, yaw)

    def heading(self, time: float) -> float:
        """Of the ego vehicle, radians from the world's x axis."""
        return self.road.at(20.0 + self.speed * time, -1.75)[2]

    def place(self, actor: Actor, time: float) -> tuple[float, float, float]:
        """World x, y and heading of an actor at a time."""
        c, s = cos_sin(actor.yaw)
        x, y, yaw = self.road.at(actor.s + actor.speed * time * c, actor.l + actor.speed * time * s)
        return x, y, yaw + actor.yaw

    def elevation(self, x: float, y: float) -> float:
        x0, y0, cell = self.raster
        return float(ground_height(self.height, x0, y0, cell, x, y))

    def _pose(self, x: float, y: float, yaw: float) -> np.ndarray:
        c, s = cos_sin(yaw)
        z = self.elevation(x, y)
        rise = (self.elevation(x + 1.5 * c, y + 1.5 * s) - self.elevation(x - 1.5 * c, y - 1.5 * s)) / 3
        tilt = (self.elevation(x - 0.8 * s, y + 0.8 * c) - self.elevation(x + 0.8 * s, y - 0.8 * c)) / 1.6
        forward = _unit(np.array([c, s, rise]))
        left = np.array([-s, c, tilt])
        left = _unit(left - forward * _dot(left, forward))
        pose = np.eye(4)
        pose[:3, 0], pose[:3, 1], pose[:3, 2], pose[:3, 3] = forward, left, np.cross(forward, left), (x, y, z)
        return pose


class Road:
    """Center line as points every half meter, from s = -90 m."""

    def __init__(self, rng: np.random.Generator, length: float) -> None:
        self.step, self.start = 0.5, -90.0
        s = np.arange(self.start, length + 90.0, self.step)
        bend = rng.choice([0.0, 0.006, 0.018], p=[0.3, 0.4, 0.3])
        waves = sum(_normal(rng) * sin(s / rng.uniform(18, 60) + rng.uniform(0, 6.3)) for _ in range(3))
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


def _normal(rng: np.random.Generator) -> float:
    """One of ``normals``, finer: the sum of twelve uniform numbers."""
    return math.fsum(rng.random(12)) - 6


def _dot(a: np.ndarray, b: np.ndarray) -> float:
    return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]


def _unit(vector: np.ndarray) -> np.ndarray:
    return vector / math.sqrt(_dot(vector, vector))


def build_world(seed: int, number: int, duration: float, *, weather: str = "any", style: str = "any") -> World:
    """The scene of a (seed, number): nothing else enters, so any machine makes the same.

    Args:
        duration: seconds that the drive lasts.
        weather: clear, overcast, rain, fog, night, or any.
        style: urban, suburb, rural, or any.
    """
    rng = np.random.Generator(np.random.PCG64([VERSION, seed, number]))
    picked = rng.choice(["clear", "overcast", "rain", "fog", "night"], p=[0.4, 0.25, 0.13, 0.1, 0.12])
    weather = str(picked) if weather == "any" else weather
    picked = rng.choice(["urban", "suburb", "rural"], p=[0.5, 0.35, 0.15])
    style = str(picked) if style == "any" else style
    speed = float(rng.choice([0.0, rng.uniform(2, 8), rng.uniform(6, 14)], p=[0.1, 0.55, 0.35]))
    length = 40.0 + speed * duration
    road = Road(rng, length)
    height, ground, raster = _ground(rng, road, length, style)
    actors = _static(rng, road, length, style) + _traffic(rng, road, length, style, speed=speed)
    colors = np.array([[0.3, 0.3, 0.31], [0.42, 0.4, 0.38], [0.55, 0.53, 0.5], [0.33, 0.42, 0.2], [0.85, 0.85, 0.82]])
    colors *= rng.uniform(0.75, 1.2, (5, 1)) * rng.uniform(0.93, 1.07, (5, 3))
    if rng.random() < 0.2:
        colors[3] = [0.45, 0.38, 0.25]  # dry grass
    sun = _unit(np.array([_normal(rng), _normal(rng), rng.uniform(0.5, 1.6)]))
    # sun strength, ambient, fog, sky r g b, headlights
    looks = {
        "clear": (0.85, 0.4, 0.002, 0.55, 0.72, 0.95, 0.0),
        "overcast": (0.15, 0.75, 0.004, 0.75, 0.77, 0.8, 0.0),
        "rain": (0.08, 0.55, 0.012, 0.55, 0.57, 0.6, 0.05),
        "fog": (0.1, 0.7, 0.03, 0.78, 0.79, 0.8, 0.1),
        "night": (0.03, 0.1, 0.004, 0.03, 0.04, 0.08, 0.9),
    }[weather]
    if weather == "rain":
        colors[[0, 1, 2, 4]] *= 0.7
    world = World(
        number=number,
        road=road,
        speed=speed,
        actors=actors,
        height=height,
        ground=ground,
        raster=raster,
        ground_colors=colors,
        light=np.array([*sun, *looks]),
        noise=float(rng.uniform(0.005, 0.02)) * (2.0 if weather == "night" else 1.0),
        exposure=float(rng.uniform(0.8, 1.2)),
        weather=weather,
        attributes={"weather": weather, "style": style, "speed_mps": round(speed, 2)},
    )
    world.actors = [a for a in actors if not _blocks_road(world, a) and not _meets_ego(world, a, duration)]
    return world


def _blocks_road(world: World, actor: Actor) -> bool:
    """Whether a building or wall reaches into the carriageway: straight solids may, along a curved road."""
    if actor.name != "manmade" or max(actor.parts[0].half[:2]) < 0.5:
        return False
    x, y, yaw = world.place(actor, 0.0)
    (hx, hy, _), (c, s) = actor.parts[0].half, cos_sin(yaw)
    u, v = np.meshgrid(np.arange(-hx, hx + 0.4, 0.4), np.arange(-hy, hy + 0.4, 0.4))
    x0, y0, cell = world.raster
    i = np.clip((x + c * u - s * v - x0) / cell, 0, world.ground.shape[0] - 1).astype(int)
    j = np.clip((y + s * u + c * v - y0) / cell, 0, world.ground.shape[1] - 1).astype(int)
    return bool(np.isin(world.ground[i, j], (0, 4)).any())


def _meets_ego(world: World, actor: Actor, duration: float) -> bool:
    """Whether the drive would lead through the actor."""
    reach = 2.5 + (actor.size[0] / 2 if actor.size else 0.3)
    for time in np.arange(-0.5, duration + 0.25, 0.25):
        pose = world.ego(time)
        x, y, _ = world.place(actor, time)
        away = np.array([x - pose[0, 3], y - pose[1, 3], 0.0])
        ahead, aside = _dot(pose[:3, 0], away), _dot(pose[:3, 1], away)
        # The vehicle's middle is 1.4 m before its rear axle.
        if abs(ahead - 1.4) < reach + 0.5 and abs(aside) < min(reach, 2.2 if actor.size and actor.speed else 1.5):
            return True
    return False


def _ground(
    rng: np.random.Generator, road: Road, length: float, style: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    path = [road.at(s, 0.0)[:2] for s in np.arange(0.0, length, 5.0)]
    low, high = np.min(path, 0) - MARGIN, np.max(path, 0) + MARGIN
    shape = np.ceil((high - low) / CELL).astype(int)
    x, y = np.meshgrid(*(low[a] + (np.arange(shape[a]) + 0.5) * CELL for a in range(2)), indexing="ij")
    height = np.zeros(x.shape)
    for _ in range(3):
        a = rng.uniform(0, 2 * math.pi)
        c, s = cos_sin(a)
        height += rng.uniform(0, 0.7) * sin((x * c + y * s) / rng.uniform(14, 40) + rng.uniform(0, 6.3))
    # Coarse coordinates are smooth enough to be interpolated, and the nearest-point search is what costs.
    s, l = (_upsample(v, x.shape) for v in road.coordinates(x[::4, ::4], y[::4, ::4]))
    across = np.abs(l)
    ground = np.full(x.shape, SURFACES.index("terrain"), np.uint8)
    edge = road.half_width
    if style == "urban" and rng.random() < 0.6:
        ground[across > edge + road.verge + road.walk] = SURFACES.index("other_flat")
    walk = (across > edge + road.verge) & (across < edge + road.verge + road.walk)
    if style != "rural":
        ground[walk] = SURFACES.index("sidewalk")
    lots = rng.random(3) < 0.5
    for i in range(3):
        if lots[i] and style != "urban":
            s0, side = rng.uniform(0, length), rng.choice([-1, 1])
            spot = (np.abs(s - s0) < 12) & (side * l > edge + 4) & (side * l < edge + 18)
            ground[spot] = SURFACES.index("other_flat")
    carriage = across < edge
    if not math.isnan(road.crossing):
        carriage |= np.abs(s - road.crossing) < road.crossing_half
    ground[carriage] = SURFACES.index("driveable_surface")
    dashes = (across < 0.12) & (np.mod(s, 6.0) < 3.0)
    lines = np.abs(across - (edge - 0.35)) < 0.1
    marks = (dashes | lines) & carriage
    if not math.isnan(road.crossing):
        near = np.abs(s - road.crossing)
        marks &= near > road.crossing_half + 3
        marks |= (
            (near > road.crossing_half + 0.5)
            & (near < road.crossing_half + 2.8)
            & (np.mod(l, 1.2) < 0.6)
            & (across < edge)
        )
    kerb = np.isin(ground, (SURFACES.index("sidewalk"), SURFACES.index("other_flat")))
    height += 0.14 * kerb + 0.03 * (ground == SURFACES.index("terrain"))
    ground[marks] = 4
    return height, ground, np.array([low[0], low[1], CELL])


def _upsample(values: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    i, j = np.arange(shape[0]) / 4, np.arange(shape[1]) / 4
    i, j = np.minimum(i, values.shape[0] - 1.001), np.minimum(j, values.shape[1] - 1.001)
    a, b = (i % 1)[:, None], (j % 1)[None]
    i, j = i.astype(int)[:, None], j.astype(int)[None]
    top = values[i, j] * (1 - b) + values[i, j + 1] * b
    return top * (1 - a) + (values[i + 1, j] * (1 - b) + values[i + 1, j + 1] * b) * a


def _tint(rng: np.random.Generator, *choices: tuple[float, float, float]) -> tuple[float, float, float]:
    base = np.array(choices[rng.integers(len(choices))])
    return tuple(np.clip(base * rng.uniform(0.75, 1.2) + 0.03 * normals(rng, 3), 0.02, 1.0))


def _static(rng: np.random.Generator, road: Road, length: float, style: str) -> list[Actor]:
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
            part = Part(BOX, (0, 0, high / 2 - 0.5), (wide / 2, deep / 2, high / 2 + 0.5), color, FACADE)
            found.append(Actor("manmade", [part], s + wide / 2, side * (border + gap + deep / 2)))
        elif rng.random() < 0.4 and not road.near_crossing(s + wide / 2, wide / 2 + 1):
            high = rng.uniform(0.7, 2.2)
            color = _tint(rng, (0.5, 0.45, 0.4), (0.35, 0.25, 0.18), (0.65, 0.65, 0.63))
            part = Part(BOX, (0, 0, high / 2), (wide / 2, 0.12, high / 2), color, ROUGH)
            found.append(Actor("manmade", [part], s + wide / 2, side * (border + rng.uniform(0.2, 1.5))))
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
        part = Part(CYLINDER, (0, 0, high / 2), half, _tint(rng, (0.35, 0.36, 0.37)))
        return Actor("manmade", [part], s, near)
    if what < 0.72:
        return _sign(rng, s, near, side)
    if what < 0.8:
        half = (rng.uniform(0.25, 0.6), rng.uniform(0.2, 0.5), rng.uniform(0.3, 0.6))
        color = _tint(rng, (0.2, 0.3, 0.2), (0.5, 0.2, 0.15), (0.3, 0.3, 0.33), (0.55, 0.45, 0.3))
        return Actor("others", [Part(BOX, (0, 0, half[2]), half, color, ROUGH)], s, near, rng.uniform(0, 3))
    radius = rng.uniform(0.5, 1.3)
    part = Part(ELLIPSOID, (0, 0, radius * 0.5), (radius, radius, radius * 0.8), _green(rng), FOLIAGE)
    return Actor("vegetation", [part], s, side * (border + rng.uniform(0.3, 4)))


def _green(rng: np.random.Generator) -> tuple[float, float, float]:
    return _tint(rng, (0.2, 0.4, 0.12), (0.28, 0.42, 0.16), (0.4, 0.4, 0.15), (0.5, 0.32, 0.12))


def _tree(rng: np.random.Generator, s: float, l: float) -> Actor:
    trunk, radius = rng.uniform(1.2, 3.0), rng.uniform(0.9, 2.4)
    color, thick = _green(rng), rng.uniform(0.1, 0.3)
    bark = _tint(rng, (0.3, 0.22, 0.15))
    parts = [Part(CYLINDER, (0, 0, trunk / 2), (thick, thick, trunk / 2), bark, ROUGH)]
    for _ in range(int(rng.integers(1, 4))):
        x, y, z = 0.3 * radius * normals(rng, 3)
        parts.append(
            Part(
                ELLIPSOID,
                (x, y, trunk + radius * 0.7 + z),
                (radius, radius, radius * rng.uniform(0.7, 1.3)),
                color,
                FOLIAGE,
            )
        )
    return Actor("vegetation", parts, s, l)


def _sign(rng: np.random.Generator, s: float, l: float, side: int, *, name: str = "manmade") -> Actor:
    high = rng.uniform(1.8, 2.6)
    color = (
        _tint(rng, (0.8, 0.1, 0.1), (0.1, 0.25, 0.7), (0.85, 0.75, 0.1))
        if name == "manmade"
        else _tint(rng, (0.95, 0.5, 0.05))
    )
    parts = [
        Part(CYLINDER, (0, 0, high / 2), (0.05, 0.05, high / 2), (0.5, 0.5, 0.5)),
        Part(
            BOX,
            (0, 0, high),
            (0.05, rng.uniform(0.3, 0.5), rng.uniform(0.3, 0.5)),
            color,
            PLAIN if name == "manmade" else STRIPES,
        ),
    ]
    return Actor(name, parts, s, l, 0.0 if side < 0 else math.pi)


def _roadworks(rng: np.random.Generator, road: Road, length: float) -> list[Actor]:
    """A closed strip: cones or barriers, a sign, now and then a machine."""
    side, s = int(rng.choice([-1, 1])), rng.uniform(5, length)
    found = [_sign(rng, s - 4, side * (road.half_width - 0.4), side, name="czone_sign")]
    for i in range(int(rng.integers(4, 9))):
        at = s + 2.2 * i
        l = side * (road.half_width - rng.uniform(1.0, 1.4))
        if rng.random() < 0.5:
            part = Part(CONE, (0, 0, 0.4), (0.24, 0.24, 0.4), _tint(rng, (0.95, 0.38, 0.08)), STRIPES)
            found.append(Actor("traffic_cone", [part], at, l))
        else:
            part = Part(BOX, (0, 0, 0.45), (0.9, 0.2, 0.45), _tint(rng, (0.85, 0.2, 0.12), (0.75, 0.75, 0.72)), STRIPES)
            found.append(Actor("barrier", [part], at, l))
    if rng.random() < 0.6:
        yellow = _tint(rng, (0.9, 0.68, 0.1))
        parts = [
            Part(BOX, (0, 0, 0.5), (1.9, 1.2, 0.5), (0.15, 0.15, 0.15)),
            Part(BOX, (-0.3, 0, 1.6), (1.3, 1.1, 0.6), yellow),
            Part(BOX, (-0.2, 0.3, 2.5), (0.7, 0.6, 0.5), yellow, VEHICLE),
            Part(BOX, (2.3, -0.3, 2.2), (1.5, 0.2, 0.2), yellow),
        ]
        l = side * (road.half_width + 1.2)
        found.append(Actor("construction_vehicle", parts, s + 9, l, rng.uniform(-0.5, 0.5), 0.0, (6.0, 2.4, 3.0)))
    return found


def _car(rng: np.random.Generator) -> tuple[str, list[Part], tuple[float, float, float]]:
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
        parts = [
            Part(BOX, (0, 0, 0.18), (l / 2 * 0.8, w / 2 * 0.95, 0.18), dark),
            Part(BOX, (0, 0, 0.62), (l / 2, w / 2, 0.32), color),
            Part(
                BOX,
                (-0.1 * l, 0, (0.94 + h) / 2),
                (l * rng.uniform(0.24, 0.36), w / 2 * 0.88, (h - 0.94) / 2),
                color,
                VEHICLE,
            ),
        ]
        return "car", parts, (l, w, h)
    if pick < 0.84:
        l, w, h = rng.uniform(6, 9), 2.4, rng.uniform(2.7, 3.5)
        parts = [
            Part(BOX, (0, 0, 0.4), (l / 2, w / 2 * 0.9, 0.3), dark),
            Part(BOX, (l / 2 - 0.9, 0, 1.4), (0.9, w / 2, 0.9), color, VEHICLE),
            Part(
                BOX,
                (-0.9, 0, (0.7 + h) / 2),
                (l / 2 - 0.95, w / 2, (h - 0.7) / 2),
                _tint(rng, (0.85, 0.85, 0.83), (0.3, 0.4, 0.3)),
            ),
        ]
        return "truck", parts, (l, w, h)
    if pick < 0.91:
        l, w, h = rng.uniform(9, 12), 2.5, rng.uniform(3.0, 3.4)
        parts = [
            Part(
                BOX, (0, 0, 0.9), (l / 2, w / 2, 0.7), _tint(rng, (0.8, 0.15, 0.1), (0.85, 0.8, 0.2), (0.15, 0.4, 0.3))
            ),
            Part(BOX, (0, 0, (1.6 + h) / 2), (l / 2, w / 2, (h - 1.6) / 2), (0.6, 0.6, 0.58), VEHICLE),
        ]
        return "bus", parts, (l, w, h)
    if pick < 0.95:
        l, w, h = rng.uniform(4, 8), 2.3, rng.uniform(2.2, 3.2)
        parts = [
            Part(
                BOX,
                (0, 0, (0.6 + h) / 2),
                (l / 2, w / 2, (h - 0.6) / 2),
                _tint(rng, (0.7, 0.7, 0.72), (0.3, 0.35, 0.5)),
                ROUGH,
            ),
            Part(BOX, (-0.2 * l, 0, 0.35), (0.8, w / 2, 0.3), dark),
        ]
        return "trailer", parts, (l, w, h)
    return _two_wheeler(rng, "motorcycle")


def _two_wheeler(rng: np.random.Generator, name: str) -> tuple[str, list[Part], tuple[float, float, float]]:
    broad = 0.28 if name == "motorcycle" else 0.14
    frame = _tint(rng, (0.1, 0.1, 0.1), (0.6, 0.1, 0.1), (0.15, 0.25, 0.55))
    parts = [Part(BOX, (0, 0, 0.5), (0.95, broad, 0.42), frame, ROUGH)]
    if rng.random() < 0.75:
        coat = _tint(rng, (0.15, 0.2, 0.45), (0.6, 0.15, 0.1), (0.2, 0.2, 0.2), (0.75, 0.75, 0.2))
        parts.append(Part(ELLIPSOID, (-0.1, 0, 1.2), (0.3, 0.26, 0.45), coat))
        parts.append(Part(ELLIPSOID, (0.0, 0, 1.72), (0.14, 0.13, 0.16), (0.55, 0.42, 0.35)))
    return name, parts, (1.9, 2 * broad + 0.3, 1.85)


def _pedestrian(rng: np.random.Generator) -> tuple[str, list[Part], tuple[float, float, float]]:
    high = rng.uniform(1.5, 1.9)
    coat = _tint(rng, (0.15, 0.18, 0.4), (0.55, 0.12, 0.12), (0.2, 0.2, 0.2), (0.75, 0.7, 0.55), (0.15, 0.4, 0.35))
    parts = [
        Part(CYLINDER, (0, 0, high * 0.24), (0.16, 0.16, high * 0.24), _tint(rng, (0.15, 0.15, 0.2), (0.3, 0.3, 0.45))),
        Part(ELLIPSOID, (0, 0, high * 0.66), (0.2, 0.27, high * 0.23), coat),
        Part(ELLIPSOID, (0, 0, high * 0.93), (0.12, 0.12, 0.14), (0.6, 0.45, 0.37)),
    ]
    return "pedestrian", parts, (0.6, 0.7, high)


def _traffic(rng: np.random.Generator, road: Road, length: float, style: str, *, speed: float) -> list[Actor]:
    """Parked and moving road users."""
    found: list[Actor] = []
    busy = {"urban": 1.0, "suburb": 0.7, "rural": 0.35}[style]
    for side in (-1, 1):
        s = -50.0
        while s < length + 60:  # parked along the kerb
            s += rng.uniform(6, 26) / busy
            if road.half_width > 4.6 and rng.random() < 0.65 and not road.near_crossing(s, 5):
                name, parts, size = _car(rng)
                l = side * (road.half_width - size[1] / 2 - 0.2)
                found.append(Actor(name, parts, s, l, (0.0 if side < 0 else math.pi) + 0.03 * _normal(rng), 0.0, size))
    for direction, l in ((1, -1.75), (-1, 1.75)):
        s = -60.0
        pace = speed if direction > 0 else rng.uniform(2, 12)  # a lane drives together
        while s < length + 90:
            s += rng.uniform(14, 55) / busy
            if rng.random() < 0.8:
                name, parts, size = _car(rng)
                yaw = 0.0 if direction > 0 else math.pi
                found.append(Actor(name, parts, s, l, yaw, pace * rng.uniform(0.85, 1.1), size))
    for _ in range(np.count_nonzero(rng.random(12) < 0.4 * busy)):
        side = int(rng.choice([-1, 1]))
        l = side * (road.half_width + road.verge + rng.uniform(0.2, max(0.4, road.walk)))
        yaw, speed = (0.0 if rng.random() < 0.5 else math.pi), rng.uniform(0, 1.8)
        if rng.random() < 0.15:  # crossing the street
            l, yaw = side * rng.uniform(0.5, road.half_width), -side * math.pi / 2
        name, parts, size = _pedestrian(rng)
        found.append(Actor(name, parts, rng.uniform(-10, length + 40), l, yaw, speed, size))
    for _ in range(np.count_nonzero(rng.random(6) < 0.27 * busy)):
        side = int(rng.choice([-1, 1]))
        name, parts, size = _two_wheeler(rng, "bicycle" if rng.random() < 0.75 else "motorcycle")
        moving = len(parts) > 1
        l = side * (road.half_width - 0.6) if moving else side * (road.half_width + road.verge + 0.3)
        yaw = 0.0 if side < 0 else math.pi
        found.append(
            Actor(name, parts, rng.uniform(0, length + 40), l, yaw, rng.uniform(2, 6) if moving else 0.0, size)
        )
    return found
