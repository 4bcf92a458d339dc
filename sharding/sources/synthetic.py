"""Procedural street scenes, the embedded default: cameras, LiDAR, boxes and exact occupancy, ray-cast from solids.

Every scene is a pure function of (generator version, seed, number): any machine makes the same scenes in any order, to the
last bit, because nothing here goes through BLAS or a function that the CPU chooses (see ``exactmath`` and ``poses``).
Road users stand still while a key-frame is captured; the ego vehicle does not, so each camera has its own ego pose.
The ego frame lies on the ground below the rear axle.
"""

from __future__ import annotations

import math
import re
from dataclasses import MISSING, dataclass, fields
from functools import lru_cache
from typing import Literal

import numpy as np
import simplejpeg

from occstream.sharding.exactmath import cos, cos_sin, sin
from occstream.sharding.grid import VoxelGrid, get_grid
from occstream.sharding.poses import apply, compose, inverse, rotate
from occstream.sharding.schema import (
    OCC3D,
    OCC3D_TO_OPENSCENE,
    Boxes,
    Camera,
    Frame,
    Labels,
    LidarSweep,
    Scene,
    Taxonomy,
    get_taxonomy,
)
from occstream.sharding.sources import synthetic_rays as rays
from occstream.sharding.sources.synthetic_road import normals
from occstream.sharding.sources.synthetic_world import SURFACES, VERSION, World, build_world
from occstream.sharding.voxelrays import mark_free

PERIOD = 0.5  # seconds between key-frames
START = 1_500_000_000_000_000  # microseconds
CAMERA_RANGE, LIDAR_RANGE, BOX_RANGE = 110.0, 70.0, 60.0
BINS = 4.0  # meters of the cells that rays walk through
AZIMUTHS = 1084  # LiDAR firings per turn
Hits = tuple[
    np.ndarray, np.ndarray, np.ndarray, np.ndarray
]  # distance, what, normal and point, see ``synthetic_rays.cast``
LIDAR_AT = (0.94, 0.0, 1.84)
VFOV = (-30.0, 10.0)  # degrees, of the LiDAR


@dataclass(frozen=True)
class _Mount:
    """One camera of a rig: where it sits (meters, degrees to the left), its focal length in pixels, its delay."""

    name: str
    at: tuple[float, float, float]
    yaw: float
    focal: float
    delay: float


@dataclass(frozen=True)
class _Rig:
    width: int
    height: int
    mounts: tuple[_Mount, ...]


# Places, focal lengths and image sizes are rounded from the two data sets' public calibrations.
RIGS = {
    "nuscenes": _Rig(
        1600,
        900,
        (
            _Mount("CAM_FRONT", (1.70, 0.02, 1.51), 0.0, 1266.0, -0.035),
            _Mount("CAM_FRONT_RIGHT", (1.55, -0.49, 1.50), -56.0, 1260.0, -0.028),
            _Mount("CAM_BACK_RIGHT", (1.01, -0.48, 1.56), -110.0, 1260.0, -0.020),
            _Mount("CAM_BACK", (0.03, 0.0, 1.58), 180.0, 809.0, -0.010),
            _Mount("CAM_BACK_LEFT", (1.04, 0.48, 1.56), 108.0, 1257.0, -0.001),
            _Mount("CAM_FRONT_LEFT", (1.52, 0.49, 1.51), 55.0, 1272.0, -0.043),
        ),
    ),
    "nuplan": _Rig(
        1920,
        1080,
        (
            _Mount("CAM_F0", (1.66, -0.01, 1.60), 0.0, 1545.0, 0.0),
            _Mount("CAM_L0", (1.60, 0.12, 1.60), 55.0, 1545.0, -0.008),
            _Mount("CAM_R0", (1.60, -0.14, 1.60), -55.0, 1545.0, 0.008),
            _Mount("CAM_L1", (0.95, 0.50, 1.60), 105.0, 1545.0, -0.020),
            _Mount("CAM_R1", (0.95, -0.52, 1.60), -105.0, 1545.0, 0.020),
            _Mount("CAM_L2", (0.20, 0.45, 1.60), 148.0, 1545.0, -0.035),
            _Mount("CAM_R2", (0.20, -0.47, 1.60), -148.0, 1545.0, 0.035),
            _Mount("CAM_B0", (-0.30, 0.0, 1.60), 180.0, 1545.0, 0.045),
        ),
    ),
}

# What wins in a voxel that several things touch: the rarer and smaller ones. By Occ3D or OpenScene class name.
_PRIORITY = {
    "driveable_surface": 1, "other_flat": 1, "sidewalk": 1, "terrain": 1, "background": 1, "manmade": 2, "vegetation": 3,
    "others": 4, "generic_object": 4, "bus": 5, "car": 5, "construction_vehicle": 5, "trailer": 5, "truck": 5,
    "vehicle": 5, "czone_sign": 6, "barrier": 6, "traffic_cone": 7, "motorcycle": 8, "bicycle": 8, "pedestrian": 9,
}  # fmt: skip
_REFLECTIVITY = {"driveable_surface": 0.1, "vegetation": 0.35, "terrain": 0.3, "car": 0.5, "traffic_cone": 0.8}


def open_source(
    *,
    scenes: int = 100,
    seed: int = 0,
    first: int = 0,
    frames: int = 8,
    rig: Literal["nuscenes", "nuplan"] = "nuscenes",
    image_size: tuple[int, int] = (128, 352),
    grid: str = "occ3d",
    taxonomy: str = "occ3d",
    beams: int = 32,
    lidar: bool = True,
    sweeps: int = 0,
    weather: Literal["any", "clear", "overcast", "rain", "fog", "night"] = "any",
    style: Literal["any", "urban", "suburb", "rural"] = "any",
    cameras: bool = True,
    vfov: tuple[float, float] = VFOV,
    mount_height: float = LIDAR_AT[2],
    crowd: float = 1.0,
) -> Synthetic:
    """Procedural street scenes.

    Args:
        scenes: how many; numbers ``first`` to ``first + scenes - 1``.
        seed: of the whole set.
        first: number of the first scene, to make one set on several machines.
        frames: key-frames per scene, at 2 Hz.
        rig: six nuScenes-like or eight nuPlan-like cameras.
        image_size: (H, W) pixels; the picture is the rig's, scaled to W, its top cut off.
        grid: preset of the labels, in the ego frame.
        taxonomy: occ3d or openscene.
        beams: of the LiDAR, 2 to 256, evenly spaced in inclination.
        lidar: False leaves the LiDAR and its visibility mask out.
        sweeps: further LiDAR sweeps between two key-frames.
        weather, style: keep to one kind.
        cameras: False leaves the cameras and their visibility mask out and renders nothing; all else is the same.
        vfov: inclination of the lowest and of the highest beam, degrees.
        mount_height: of the LiDAR above the road, meters.
        crowd: factor on the number of pedestrians and two-wheelers, 0 to 20: above 1, others join those that are there at 1.

    Raises:
        ValueError: a value is out of range.
    """
    return Synthetic(
        scenes, seed, first, frames, rig, image_size, get_grid(grid), get_taxonomy(taxonomy), beams, lidar, sweeps,
        weather, style, cameras, vfov, mount_height, crowd,
    )  # fmt: skip


@dataclass(frozen=True, repr=False)
class Synthetic:
    """See ``open_source``. A ``Source``."""

    scenes: int
    seed: int
    first: int
    frames: int
    rig: str
    image_size: tuple[int, int]
    grid: VoxelGrid
    taxonomy: Taxonomy
    beams: int
    lidar: bool
    sweeps: int
    weather: str
    style: str
    cameras: bool = True
    vfov: tuple[float, float] = VFOV
    mount_height: float = LIDAR_AT[2]
    crowd: float = 1.0

    def __post_init__(self) -> None:
        low, up = self.vfov
        grid = f"grid {self.grid.name!r} is in the LiDAR frame; synthetic labels need one in the ego frame, e.g. occ3d"
        for fine, said in (
            (self.scenes >= 1, f"scenes is {self.scenes}, must be at least 1"),
            (self.frames >= 1, f"frames is {self.frames}, must be at least 1"),
            (0 <= self.first <= 999_999, f"first is {self.first}, must be 0 to 999999"),
            (0 <= self.seed < 2**31, f"seed is {self.seed}, must be 0 to 2^31 - 1"),
            (2 <= self.beams <= 256, f"beams is {self.beams}, must be 2 to 256"),
            (-90 < low < up < 90, f"vfov is {self.vfov}, must be lowest and highest inclination, -90 to 90 degrees"),
            (0.1 <= self.mount_height <= 10, f"mount_height is {self.mount_height}, must be 0.1 to 10 meters"),
            (0 <= self.crowd <= 20, f"crowd is {self.crowd}, must be a factor of 0 to 20"),
            (self.sweeps >= 0, f"sweeps is {self.sweeps}, must be at least 0"),
            (self.lidar or self.cameras, "lidar=false and cameras=false leave no sensor; keep one of them"),
            (min(self.image_size) >= 16, f"image_size is {self.image_size}, must be at least 16 x 16 (H, W)"),
            (self.grid.frame == "ego", grid),
        ):
            if not fine:
                raise ValueError(said)

    def __repr__(self) -> str:
        old = {f.name: getattr(self, f.name) for f in fields(self) if f.default is MISSING}
        return f"Synthetic({', '.join(f'{name}={value!r}' for name, value in {**old, **self._changed()}.items())})"

    def _changed(self) -> dict[str, object]:
        """Options that came after the first data sets were packed (those with defaults here), where they change something:
        digests and manifests of sets without them stay as they are."""
        late = {f.name: (getattr(self, f.name), f.default) for f in fields(self) if f.default is not MISSING}
        return {name: value for name, (value, default) in late.items() if value != default}

    @property
    def name(self) -> str:
        return f"synthetic-v{VERSION}"

    def scene_names(self) -> list[str]:
        return [f"{self.name}-s{self.seed}-{self.first + i:06d}" for i in range(self.scenes)]

    def load(self, name: str) -> Scene:
        """One scene. Raises ValueError if the name is not one of ``scene_names``."""
        found = re.fullmatch(rf"{self.name}-s{self.seed}-(\d{{6}})", name)
        if not found or not self.first <= int(found[1]) < self.first + self.scenes:
            raise ValueError(f"no scene {name!r} among {self.scene_names()[0]} … {self.scene_names()[-1]}")
        number = int(found[1])
        world = build_world(
            self.seed, number, self.frames * PERIOD, weather=self.weather, style=self.style, crowd=self.crowd
        )
        frames = [self._frame(world, name, number, i) for i in range(self.frames)]
        options = {"rig": self.rig, "seed": self.seed, "number": number, **self._changed()}
        return Scene(name, frames, {**world.attributes, **options})

    def _frame(self, world: World, name: str, number: int, index: int) -> Frame:
        time = index * PERIOD
        pose, heading = world.ego(time), world.heading(time)
        moment = _Moment(world, time)
        bits = np.random.PCG64([VERSION, self.seed, number, index + 1])
        rng = np.random.Generator(bits)
        cameras, looks = {}, []
        mounts = RIGS[self.rig].mounts
        for mount in mounts if self.cameras else ():
            cameras[mount.name], look = self._shoot(moment, mount, rng)
            looks.append(look)
        if not self.cameras:
            bits.advance(len(mounts) * 3 * math.prod(self.image_size))  # the noise of the images
        sweep, returns = self._sweep(moment, rng) if self.lidar else (None, None)
        extra = []
        if self.lidar:
            for k in range(self.sweeps, 0, -1):
                extra.append(self._sweep(_Moment(world, time - PERIOD * k / (self.sweeps + 1)), rng)[0])
        return Frame(
            scene=name,
            index=index,
            token=f"{name}-{index}",
            timestamp=_stamp(time),
            ego_to_global=pose,
            cameras=cameras,
            lidar=sweep,
            sweeps=extra,
            boxes=self._boxes(world, pose, heading, time),
            labels=self._labels(moment, pose, looks, returns),
        )

    def _shoot(self, moment: _Moment, mount: _Mount, rng: np.random.Generator) -> tuple[Camera, tuple]:
        """A camera, and (origin, points) that it looks at, in the world."""
        (height, width), rig, world = self.image_size, RIGS[self.rig], moment.world
        scale = width / rig.width
        cut = rig.height * scale - height  # bottom-aligned
        # Pixel centers: x' = (x + 1/2) s - 1/2.
        intrinsics = np.array(
            [
                [mount.focal * scale, 0, rig.width / 2 * scale - 0.5],
                [0, mount.focal * scale, rig.height / 2 * scale - 0.5 - cut],
                [0, 0, 1],
            ]
        )
        to_ego = _mount_pose(mount.at, mount.yaw)
        ego = world.ego(moment.time + mount.delay)
        to_world = compose(ego, to_ego)
        directions = rotate(to_world, _pixel_rays(intrinsics.tobytes(), height, width))
        origin = to_world[:3, 3].copy()
        hit = moment.cast(origin, directions, CAMERA_RANGE)
        colors = rays.shade(
            directions,
            *hit,
            moment.colors,
            moment.textures,
            world.ground,
            world.raster,
            world.ground_colors,
            world.light,
            world.number,
        )
        image = colors.reshape(height, width, 3) * np.float32(world.exposure)
        image += normals(rng, *image.shape).astype(np.float32) * np.float32(world.noise)
        image = (np.clip(image, 0, 1) * 255).astype(np.uint8)
        # Every second row and column is dense enough to see every voxel, and four times as fast.
        step = 2 if height * width > 20_000 else 1
        pick = np.arange(height * width).reshape(height, width)[::step, ::step].ravel()
        camera = Camera(
            jpeg=simplejpeg.encode_jpeg(image, quality=90, colorspace="RGB"),
            width=width,
            height=height,
            intrinsics=intrinsics,
            sensor_to_ego=to_ego,
            ego_to_global=ego,
            timestamp=_stamp(moment.time + mount.delay),
        )
        return camera, (origin, origin + directions[pick] * hit[0][pick, None])

    def _sweep(self, moment: _Moment, rng: np.random.Generator) -> tuple[LidarSweep, tuple]:
        """A turn of the LiDAR, compensated to its time stamp, and (origin, returns) in the world."""
        world = moment.world
        ego = world.ego(moment.time)
        to_ego = _mount_pose((*LIDAR_AT[:2], self.mount_height), None)
        to_world = compose(ego, to_ego)
        local = _beam_rays(self.beams, self.vfov)
        directions = rotate(to_world, local)
        origin = to_world[:3, 3].copy()
        reach = LIDAR_RANGE * {"rain": 0.8, "fog": 0.6}.get(world.weather, 1.0)
        distance, what, normal, point = moment.cast(origin, directions, reach)
        facing = np.abs(np.sum(normal * directions, axis=1))
        classes = moment.classes_of(what, point, self.taxonomy)
        strength = np.array([_REFLECTIVITY.get(c, 0.2) for c in OCC3D.classes])[moment.classes_of(what, point, OCC3D)]
        strength *= (0.3 + 0.7 * facing) * rng.uniform(0.7, 1.3, len(facing))
        lost = rng.random(len(facing)) < 0.03 + 0.12 * (distance / LIDAR_RANGE) * (strength < 0.1)
        keep = (what != rays.NOTHING) & ~lost & (distance > 1.0)
        measured = distance[keep] + 0.015 * normals(rng, keep.sum())
        azimuth = np.tile(np.arange(AZIMUTHS), self.beams)[keep]
        sweep = LidarSweep(
            xyz=(local[keep] * measured[:, None]).astype(np.float32),
            sensor_to_ego=to_ego,
            ego_to_global=ego,
            timestamp=_stamp(moment.time),
            intensity=(255 * np.clip(strength[keep], 0, 1)).round().astype(np.float32),
            ring=np.repeat(np.arange(self.beams), AZIMUTHS)[keep].astype(np.uint8),
            time_lag=((AZIMUTHS - 1 - azimuth) / AZIMUTHS * 0.05).astype(np.float32),
            classes=classes[keep],
        )
        return sweep, (origin, origin + directions[keep] * (distance[keep, None] + 1e-3))

    def _boxes(self, world: World, pose: np.ndarray, heading: float, time: float) -> Boxes:
        to_ego, rows, names, tracks, velocity = inverse(pose), [], [], [], []
        for number, actor in enumerate(world.actors):
            if actor.size is None:
                continue
            x, y, yaw = world.place(actor, time)
            center = apply(to_ego, np.array([x, y, world.elevation(x, y) + actor.size[2] / 2]))
            if center[0] ** 2 + center[1] ** 2 > BOX_RANGE**2:
                continue
            turn = yaw - heading
            rows.append((*center, *actor.size, math.remainder(turn, 2 * math.pi)))
            names.append(_class_name(actor.name, self.taxonomy))
            tracks.append(f"{world.number}-{number}")
            velocity.append(tuple(actor.speed * share for share in cos_sin(turn)))
        return Boxes(
            np.array(rows, np.float32).reshape(-1, 7), names, tracks, np.array(velocity, np.float32).reshape(-1, 2)
        )

    def _labels(self, moment: _Moment, pose: np.ndarray, looks: list[tuple], returns: tuple | None) -> Labels:
        grid, taxonomy, world = self.grid, self.taxonomy, moment.world
        semantic = np.full(grid.shape, taxonomy.free_id, np.uint8)
        to_grid = inverse(pose)
        lower, voxel = np.array(grid.lower), np.array(grid.voxel)
        priority = np.zeros(256, np.int8)
        priority[: taxonomy.num_classes] = [_PRIORITY[c] for c in taxonomy.classes]
        rays.voxelize(
            semantic,
            np.full(grid.shape, -1, np.int8),
            pose,
            to_grid,
            lower,
            voxel,
            moment.solids,
            moment.class_table(taxonomy),
            priority,
            world.height,
            _surface_table(taxonomy)[world.ground],
            world.raster,
            max(2, round(max(grid.voxel) / 0.2)),
        )
        binary = semantic != taxonomy.free_id

        def seen(views: list[tuple]) -> np.ndarray:
            """Voxels that a ray passes, and those it ends in: where it grazes something solid it still sees it."""
            passed = np.zeros(grid.shape, bool)
            for origin, points in views:
                ends = (apply(to_grid, points) - lower) / voxel
                start = (apply(to_grid, origin) - lower) / voxel
                pose = np.hstack([np.eye(3), start[:, None]])
                mark_free(passed, (ends - start).astype(np.float32), pose)
                last = np.floor(ends).astype(np.int64)
                passed[tuple(last[((last >= 0) & (last < grid.shape)).all(1)].T)] = True
            return passed

        return Labels(binary, semantic, seen([returns]) if returns else None, seen(looks) if looks else None)


class _Moment:
    """All solids of a world at one time, binned for ray casting."""

    def __init__(self, world: World, time: float) -> None:
        self.world, self.time = world, time
        ego = world.ego(time)[:2, 3]
        rows, colors, textures, names = [], [], [], []
        for actor in world.actors:
            x, y, yaw = world.place(actor, time)
            if (x - ego[0]) ** 2 + (y - ego[1]) ** 2 > (CAMERA_RANGE + 15) ** 2:
                continue
            z, (c, s) = world.elevation(x, y), cos_sin(yaw)
            for solid in actor.solids:
                px, py, pz = solid.center
                rows.append((solid.kind, x + c * px - s * py, y + s * px + c * py, z + pz, *solid.half, c, s))
                colors.append(solid.color)
                textures.append(solid.texture)
                names.append(actor.name)
        self.solids = np.array(rows, np.float64).reshape(-1, 9)
        self.colors = np.array(colors, np.float64).reshape(-1, 3)
        self.textures = np.array(textures, np.int64)
        self.names = names
        cells = 2 * math.ceil((CAMERA_RANGE + 20) / BINS)
        low = ego - cells / 2 * BINS
        self.bins = np.array([low[0], low[1], BINS, cells, cells])
        self.starts, self.items = rays.bin_solids(self.solids, low[0], low[1], BINS, cells, cells)

    def cast(self, origin: np.ndarray, directions: np.ndarray, reach: float) -> Hits:
        """``synthetic_rays.cast`` of rays from one point."""
        world = self.world
        return rays.cast(
            origin, directions, self.solids, self.starts, self.items, self.bins, world.height, world.raster, reach
        )

    def class_table(self, taxonomy: Taxonomy) -> np.ndarray:
        """(solids,) uint8 class ids."""
        return np.array([taxonomy.id(_class_name(n, taxonomy)) for n in self.names], np.uint8)

    def classes_of(self, what: np.ndarray, point: np.ndarray, taxonomy: Taxonomy) -> np.ndarray:
        """(N,) uint8 class of what rays hit; meaningless where they hit nothing."""
        world = self.world
        x0, y0, cell = world.raster
        i = np.clip((point[:, 0] - x0) / cell, 0, world.ground.shape[0] - 1).astype(int)
        j = np.clip((point[:, 1] - y0) / cell, 0, world.ground.shape[1] - 1).astype(int)
        surface = _surface_table(taxonomy)
        solids = np.append(self.class_table(taxonomy), np.uint8(0))
        return np.where(what == rays.GROUND, surface[world.ground[i, j]], solids[np.maximum(what, -1)])


def _class_name(name: str, taxonomy: Taxonomy) -> str:
    """Name of what a world is made of in a taxonomy. Occ3D has no signs of construction zones."""
    if name == "czone_sign":
        return "czone_sign" if taxonomy.name == "openscene" else "manmade"
    return OCC3D_TO_OPENSCENE[name] if taxonomy.name == "openscene" else name


def _surface_table(taxonomy: Taxonomy) -> np.ndarray:
    """(5,) uint8 class id by number in the ground raster; markings belong to the carriageway."""
    return np.array([taxonomy.id(_class_name(n, taxonomy)) for n in (*SURFACES, SURFACES[0])], np.uint8)


def _stamp(time: float) -> int:
    return START + round(time * 1e6)


def _mount_pose(at: tuple[float, float, float], yaw: float | None) -> np.ndarray:
    """Sensor -> ego. A camera (x right, y down, z forward) turned left by ``yaw`` degrees; None: axes of the ego."""
    pose = np.eye(4)
    pose[:3, 3] = at
    if yaw is not None:
        c, s = cos_sin(math.radians(yaw))
        pose[:3, :3] = np.array([[s, 0, c], [-c, 0, s], [0, -1, 0]])
    return pose


@lru_cache(maxsize=16)
def _pixel_rays(intrinsics: bytes, height: int, width: int) -> np.ndarray:
    """(H * W, 3) unit vectors of all pixels, camera frame."""
    k = np.frombuffer(intrinsics).reshape(3, 3)
    v, u = np.meshgrid(np.arange(height), np.arange(width), indexing="ij")
    out = np.stack([(u - k[0, 2]) / k[0, 0], (v - k[1, 2]) / k[1, 1], np.ones(u.shape)], -1).reshape(-1, 3)
    return out / np.sqrt((out**2).sum(1, keepdims=True))


@lru_cache(maxsize=4)
def _beam_rays(beams: int, vfov: tuple[float, float]) -> np.ndarray:
    """(beams * AZIMUTHS, 3) unit vectors, lowest beam first."""
    up = np.radians(np.linspace(*vfov, beams))[:, None]
    around = np.radians(np.arange(AZIMUTHS) * 360 / AZIMUTHS)[None]
    axes = (cos(up) * cos(around), cos(up) * sin(around), sin(up) * np.ones_like(around))
    return np.stack(axes, -1).reshape(-1, 3)
