"""Procedural street scenes: a road with what stands and moves along it, as analytic solids."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np

from occstream.sharding.exactmath import cos_sin, sin
from occstream.sharding.sources.synthetic_actors import Actor, place_static, place_traffic, with_crowd
from occstream.sharding.sources.synthetic_rays import ground_height
from occstream.sharding.sources.synthetic_road import Road, normal

VERSION = 2  # of the generator: another number, other scenes
CELL = 0.4  # meters of the ground raster
MARGIN = 70.0  # meters around the drive
SURFACES = ("driveable_surface", "other_flat", "sidewalk", "terrain")  # numbers in the ground raster; 4 is a marking


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


def _dot(a: np.ndarray, b: np.ndarray) -> float:
    return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]


def _unit(vector: np.ndarray) -> np.ndarray:
    return vector / math.sqrt(_dot(vector, vector))


def build_world(
    seed: int, number: int, duration: float, *, weather: str = "any", style: str = "any", crowd: float = 1.0
) -> World:
    """The scene of a (seed, number): nothing else enters, so any machine makes the same.

    Args:
        duration: seconds that the drive lasts.
        weather: clear, overcast, rain, fog, night, or any.
        style: urban, suburb, rural, or any.
        crowd: factor on pedestrians and two-wheelers, see ``with_crowd``; changes nothing else.
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
    actors = place_static(rng, road, length, style) + place_traffic(rng, road, length, style, speed=speed)
    if crowd != 1:
        apart = np.random.Generator(np.random.PCG64([VERSION, seed, number, 0, 1]))
        actors = with_crowd(apart, actors, road, length=length, style=style, crowd=crowd)
    colors = np.array([[0.3, 0.3, 0.31], [0.42, 0.4, 0.38], [0.55, 0.53, 0.5], [0.33, 0.42, 0.2], [0.85, 0.85, 0.82]])
    colors *= rng.uniform(0.75, 1.2, (5, 1)) * rng.uniform(0.93, 1.07, (5, 3))
    if rng.random() < 0.2:
        colors[3] = [0.45, 0.38, 0.25]  # dry grass
    sun = _unit(np.array([normal(rng), normal(rng), rng.uniform(0.5, 1.6)]))
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
    if actor.name != "manmade" or max(actor.solids[0].half[:2]) < 0.5:
        return False
    x, y, yaw = world.place(actor, 0.0)
    (hx, hy, _), (c, s) = actor.solids[0].half, cos_sin(yaw)
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
