"""What one key-frame is, before and after the shards: ``Scene`` of ``Frame``s, and the taxonomies of their labels.

Conventions, everywhere:

* A pose ``a_to_b`` is a 4x4 float64 matrix that maps homogeneous points of frame a to frame b, meters.
* Frames: *camera* (x right, y down, z forward), *lidar* (as the data set has it), *ego* (x forward, y left, z up,
  of the vehicle at the key-frame, i.e. at ``Frame.timestamp``, unless said otherwise), *global* (fixed in the world).
* The origin of the ego frame is on the road, below the middle of the rear axle: returns from the ground within 10 m lie at
  z = 0 to within 0.15 m. Sources whose data set has it elsewhere convert poses, calibration and boxes, and say in
  ``Scene.attributes["ego_height"]`` how many meters above the road it was.
* Time stamps are integer microseconds.
* Voxel arrays are (X, Y, Z), see ``grid``.
* What a data set lacks is ``None``, never zeros.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import numpy as np

from occstream.sharding.grid import VoxelGrid
from occstream.sharding.lenses import Lens, View
from occstream.sharding.poses import compose, inverse

SCENE_NAME = re.compile(r"[A-Za-z0-9_-]{1,60}")
IGNORE = 255  # semantic id of voxels and points whose class is unknown; never enters a loss or a metric


@dataclass(frozen=True)
class Taxonomy:
    """Class names and what they mean. Ids are 0..K-1 in the order of ``classes``; ``free_id`` is K; ``IGNORE`` is 255.

    Attributes:
        name: how manifests and recipes call it.
        classes: K class names.
        things: names of the countable classes.
        colors: K RGB triples 0..255 for pictures.
    """

    name: str
    # Not in ``repr``: sources that hold a taxonomy are known by theirs, and a set has another order in every process.
    classes: tuple[str, ...] = field(repr=False)
    things: frozenset[str] = field(repr=False)
    colors: tuple[tuple[int, int, int], ...] = field(repr=False)

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    @property
    def free_id(self) -> int:
        return len(self.classes)

    def id(self, name: str) -> int:
        return self.classes.index(name)


# Occ3D-nuScenes: ids 0..16 as in the data set, 17 = free. nuScenes-lidarseg's 16 merged classes have the same ids 1..16.
OCC3D = Taxonomy(
    "occ3d",
    (
        "others", "barrier", "bicycle", "bus", "car", "construction_vehicle", "motorcycle", "pedestrian",
        "traffic_cone", "trailer", "truck", "driveable_surface", "other_flat", "sidewalk", "terrain", "manmade",
        "vegetation",
    ),
    frozenset({"bicycle", "bus", "car", "construction_vehicle", "motorcycle", "pedestrian", "trailer", "truck"}),
    (
        (60, 60, 60), (255, 120, 50), (255, 192, 203), (255, 255, 0), (0, 150, 245), (0, 200, 200), (200, 180, 0),
        (230, 0, 0), (255, 240, 150), (135, 60, 0), (160, 32, 240), (170, 165, 175), (139, 137, 137), (110, 80, 110),
        (150, 200, 80), (205, 170, 125), (0, 150, 0),
    ),
)  # fmt: skip

# The 8 live classes of OpenScene in their order; raw ids are 0, 4, 5, 6, 7, 8, 9, 10 (11 = free).
OPENSCENE = Taxonomy(
    "openscene",
    ("vehicle", "czone_sign", "bicycle", "generic_object", "pedestrian", "traffic_cone", "barrier", "background"),
    frozenset({"vehicle", "bicycle", "pedestrian"}),
    (
        (0, 120, 230), (255, 215, 0), (255, 105, 180), (150, 75, 200), (230, 0, 0), (255, 150, 40), (130, 70, 10),
        (150, 155, 150),
    ),
)  # fmt: skip

# The 19 classes of the semantic scene completion benchmark; ids are the learning map's minus one.
SEMANTICKITTI = Taxonomy(
    "semantickitti",
    (
        "car", "bicycle", "motorcycle", "truck", "other_vehicle", "person", "bicyclist", "motorcyclist", "road", "parking",
        "sidewalk", "other_ground", "building", "fence", "vegetation", "trunk", "terrain", "pole", "traffic_sign",
    ),
    frozenset({
        "car", "bicycle", "motorcycle", "truck", "other_vehicle", "person", "bicyclist", "motorcyclist",
    }),
    (
        (100, 150, 245), (100, 230, 245), (30, 60, 150), (80, 30, 180), (0, 0, 255), (255, 30, 30), (255, 40, 200),
        (150, 30, 90), (255, 0, 255), (255, 150, 255), (75, 0, 75), (175, 0, 75), (255, 200, 0), (255, 120, 50),
        (0, 175, 0), (135, 60, 0), (150, 240, 80), (255, 240, 150), (255, 0, 0),
    ),
)  # fmt: skip

# SSCBench-KITTI-360: 18 classes, ids are its learning map's minus one.
KITTI360 = Taxonomy(
    "kitti360",
    (
        "car", "bicycle", "motorcycle", "truck", "other_vehicle", "person", "road", "parking", "sidewalk", "other_ground",
        "building", "fence", "vegetation", "terrain", "pole", "traffic_sign", "other_structure", "other_object",
    ),
    frozenset({"car", "bicycle", "motorcycle", "truck", "other_vehicle", "person"}),
    (
        (100, 150, 245), (100, 230, 245), (30, 60, 150), (80, 30, 180), (0, 0, 255), (255, 30, 30), (255, 0, 255),
        (255, 150, 255), (75, 0, 75), (175, 0, 75), (255, 200, 0), (255, 120, 50), (0, 175, 0), (150, 240, 80),
        (255, 240, 150), (255, 0, 0), (0, 150, 255), (255, 255, 50),
    ),
)  # fmt: skip

# Occ3D-Waymo.
WAYMO = Taxonomy(
    "waymo",
    (
        "general_object", "vehicle", "pedestrian", "sign", "cyclist", "traffic_light", "pole", "construction_cone",
        "bicycle", "motorcycle", "building", "vegetation", "trunk", "road", "walkable",
    ),
    frozenset({"vehicle", "pedestrian", "cyclist", "bicycle", "motorcycle"}),
    (
        (60, 60, 60), (0, 120, 230), (230, 0, 0), (255, 215, 0), (255, 105, 180), (255, 60, 0), (255, 240, 150),
        (255, 150, 40), (100, 230, 245), (30, 60, 150), (205, 170, 125), (0, 150, 0), (135, 60, 0), (170, 165, 175),
        (110, 80, 110),
    ),
)  # fmt: skip

TAXONOMIES: dict[str, Taxonomy] = {t.name: t for t in (OCC3D, OPENSCENE, SEMANTICKITTI, KITTI360, WAYMO)}

# Occ3D class name -> OpenScene class name, for sources whose native classes are Occ3D's.
OCC3D_TO_OPENSCENE: Mapping[str, str] = {
    "others": "generic_object", "barrier": "barrier", "bicycle": "bicycle", "bus": "vehicle", "car": "vehicle",
    "construction_vehicle": "vehicle", "motorcycle": "bicycle", "pedestrian": "pedestrian",
    "traffic_cone": "traffic_cone", "trailer": "vehicle", "truck": "vehicle", "driveable_surface": "background",
    "other_flat": "background", "sidewalk": "background", "terrain": "background", "manmade": "background",
    "vegetation": "background",
}  # fmt: skip


def get_taxonomy(name: str) -> Taxonomy:
    """Taxonomy by name. Raises ValueError that lists the names."""
    if name not in TAXONOMIES:
        raise ValueError(f"unknown taxonomy {name!r}; known: {', '.join(TAXONOMIES)}")
    return TAXONOMIES[name]


@dataclass
class Camera:
    """One image of a key-frame. In shards every camera is a pinhole: a source whose lens is another one says so in
    ``lens``, and packing resamples the image (``prepare.rectify``).

    Attributes:
        jpeg: the encoded image, as the data set has it or re-encoded at packing; b"" where ``image`` is given.
        width, height: pixels of the image.
        intrinsics: (3, 3) float64, pixels; the center of the top-left pixel is (0, 0).
        sensor_to_ego: camera -> ego at ``timestamp``.
        ego_to_global: ego -> global at *this camera's* ``timestamp`` (not the key-frame's).
        timestamp: microseconds.
        distortion: None. Shards that were packed before lenses were taken out have coefficients here.
        image: (height, width, 3) uint8 RGB of a source that has no JPEG (video frames), else None. Never in shards.
        lens: how the raw image maps rays to pixels, or None for a pinhole with ``intrinsics``. Never in shards.
        views: the pinholes to make of a camera with a lens, all through its optical center; empty: one, with the lens's own
            size, focal length and principal point. Never in shards.
    """

    jpeg: bytes
    width: int
    height: int
    intrinsics: np.ndarray
    sensor_to_ego: np.ndarray
    ego_to_global: np.ndarray
    timestamp: int
    distortion: tuple[float, ...] | None = None
    image: np.ndarray | None = None
    lens: Lens | None = None
    views: tuple[View, ...] = ()


@dataclass
class LidarSweep:
    """One turn of a LiDAR. Its points are where they were at ``timestamp``, where the data set makes that possible: it
    compensated them itself, or gives each point's time and the source calls ``motion.deskew``.

    Attributes:
        xyz: (N, 3) float32, meters, LiDAR frame at ``timestamp``.
        intensity: (N,) float32 in the data set's unit, or None.
        ring: (N,) uint8 beam number, or None.
        time_lag: (N,) float32 seconds from the measurement to ``timestamp`` (positive: measured before it), or None.
        classes: (N,) uint8 ids of the scene's taxonomy, ``IGNORE`` where unknown, or None.
        moving: (N,) bool, True on what was moving when it was measured, or None.
        instances: (N,) uint16 ids of countable objects within the sweep, 0 for none, or None.
        token: the data set's own id of the sweep, which benchmarks of points ask for, or None.
        sensor_to_ego: LiDAR -> ego at ``timestamp``.
        ego_to_global: ego -> global at ``timestamp``.
        timestamp: microseconds.
        lidars: (L, 4) float64 where several LiDARs took the points, else None: the first beam number of each, ascending from
            0, and its origin x, y, z in the LiDAR frame.
    """

    xyz: np.ndarray
    sensor_to_ego: np.ndarray
    ego_to_global: np.ndarray
    timestamp: int
    intensity: np.ndarray | None = None
    ring: np.ndarray | None = None
    time_lag: np.ndarray | None = None
    classes: np.ndarray | None = None
    moving: np.ndarray | None = None
    lidars: np.ndarray | None = None
    instances: np.ndarray | None = None
    token: str | None = None

    def lidar_of_points(self) -> np.ndarray | None:
        """(N,) int64, which of several LiDARs each point is from; None: there is one, or beams have no numbers."""
        if self.lidars is None or self.ring is None:
            return None
        return np.searchsorted(self.lidars[:, 0], self.ring, side="right") - 1


@dataclass
class Boxes:
    """3D boxes of a key-frame.

    Attributes:
        boxes: (N, 7) float32: center x, y, z; length (along the heading), width, height; yaw (rad, counter-clockwise
            about z from x). Meters, ego frame of the key-frame. Boxes are upright in that frame: where the vehicle is
            tilted against the road, they lean by as much; center, sizes and heading are exact.
        names: N class names (of the scene's taxonomy where it has them, else the data set's own).
        track_ids: N identities that persist over the scene.
        velocity: (N, 2) float32 m/s, ego axes, NaN where unknown; or None.
    """

    boxes: np.ndarray
    names: list[str]
    track_ids: list[str]
    velocity: np.ndarray | None = None


@dataclass
class Labels:
    """Voxel labels of a key-frame on the scene's grid; every array is (X, Y, Z).

    Attributes:
        binary: bool, True = occupied. Meaningful where ``mask_lidar`` is True; elsewhere unknown.
        semantic: uint8, class id, ``free_id`` or ``IGNORE``; or None.
        mask_lidar: bool, True = observed (a hit or a free ray passed). None: the data set declares everything known.
        mask_camera: bool, True = observed and in view of a camera; or None.
        flow: (M, 2) float32 m/s in the axes of the grid, one row for each True of ``binary`` in C order; or None.
        logits: (M, k) float16 of a prediction, rows as of ``flow``; or None. Of all classes with free last if ``ranked``
            is None; free has the logit from which a class is preferred to it.
        ranked: (M, k) uint8, the classes that ``logits`` belong to, best first (``free_id`` is one); or None.
        evidence: uint8, probability of a prediction that the voxel is occupied, 255 is 1; or None.
        ego_to_global: (4, 4) float64 meters, pose by which these labels of a drive lie over each other, where their maker has
            corrected the frame's own (height and tilt, by the ground); None: the frame's.
    """

    binary: np.ndarray
    semantic: np.ndarray | None = None
    mask_lidar: np.ndarray | None = None
    mask_camera: np.ndarray | None = None
    flow: np.ndarray | None = None
    logits: np.ndarray | None = None
    ranked: np.ndarray | None = None
    evidence: np.ndarray | None = None
    ego_to_global: np.ndarray | None = None

    def known(self) -> np.ndarray:
        """(X, Y, Z) bool: voxels that the labels say something about; the others are neither occupied nor free."""
        return self.mask_lidar if self.mask_lidar is not None else np.ones(self.binary.shape, bool)

    def classes(self) -> np.ndarray:
        """``semantic`` of labels that must have it. Raises ValueError."""
        if self.semantic is None:
            raise ValueError("these labels are binary, and classes are needed; use labels that have them")
        return self.semantic


@dataclass
class Frame:
    """One key-frame.

    Attributes:
        scene: name of its scene.
        index: 0, 1, … in time order in the scene.
        token: the data set's own id.
        timestamp: microseconds; None where a data set of labels alone has none.
        ego_to_global: ego -> global at ``timestamp`` (the LiDAR's time stamp where there is a LiDAR); None likewise.
        cameras: by the data set's camera name; empty if the frame has none or they were not asked for.
        lidar: the key sweep.
        sweeps: further sweeps since the previous key-frame, oldest first; used to make labels, not written to shards.
        boxes, labels: None if absent.
        label_sets: by group, all labels that a reader was asked for, ``labels`` among them; not written as such.
        window: key-frames around it by offset (-1 is the one before), those that the scene has, where a stream was asked for
            them, with poses of their own; not written to shards.
    """

    scene: str
    index: int
    token: str
    timestamp: int | None
    ego_to_global: np.ndarray | None
    cameras: dict[str, Camera] = field(default_factory=dict)
    lidar: LidarSweep | None = None
    sweeps: list[LidarSweep] = field(default_factory=list)
    boxes: Boxes | None = None
    labels: Labels | None = None
    label_sets: dict[str, Labels] = field(default_factory=dict)
    window: dict[int, Frame] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """Name of the frame in shards, unique in a data set: ``<scene>-<index>``, without dots."""
        return frame_key(self.scene, self.index)


@dataclass
class Scene:
    """One drive of some seconds: the unit that shards, subsets and splits are made of.

    Attributes:
        name: unique in the data set; letters, digits, ``_`` and ``-``.
        frames: in time order.
        attributes: JSON values worth keeping (location, weather, rig, seed…).
    """

    name: str
    frames: Sequence[Frame]
    attributes: dict = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_scene_name(self.name)


# Metric conventions that a label set may name; ``evaluation.metrics`` knows what each means.
CONVENTIONS = ("occ3d", "openscene", "openoccupancy", "semantickitti", "lidarseg")


@dataclass(frozen=True)
class Findings:
    """What a source found when it was opened: printed by jobs, no part of the data (nor of the source's ``repr``).

    Attributes:
        labels: why it brings labels, or why not.
        unused: ground truth that is there and is not read, and how to read it; "": none.
        points: what gives the points classes, where labels may be made from them; "": nothing, such labels are binary.
        mixture: where some scenes would get labels with classes and some without, which, and how to choose; "": none.
        left_out: a line for each kind of thing that it leaves out, with names.
    """

    labels: str = ""
    unused: str = ""
    points: str = ""
    mixture: str = ""
    left_out: tuple[str, ...] = ()


@runtime_checkable
class Source(Protocol):
    """A raw data set. ``occstream.sharding.sources.<name>.open_source(root, **options)`` gives one. It may have ``findings``
    (``Findings``), which jobs print, and ``convention`` (one of ``CONVENTIONS``): how the benchmark of its own labels averages.

    Attributes:
        name: goes into manifests.
        taxonomy: of point classes and semantic labels.
        grid: the grid of the labels that the source itself brings in ``Frame.labels``, or None if it brings none.
    """

    @property
    def name(self) -> str: ...

    @property
    def taxonomy(self) -> Taxonomy: ...

    @property
    def grid(self) -> VoxelGrid | None: ...

    def scene_names(self) -> list[str]:
        """All scenes in a fixed order, without loading them."""
        ...

    def load(self, name: str) -> Scene:
        """One scene, complete. Raises ValueError naming file and remedy if the data is broken or missing."""
        ...


def iter_scenes(source: Source) -> Iterator[Scene]:
    """Scenes of a source one by one, in order."""
    for name in source.scene_names():
        yield source.load(name)


def frame_key(scene: str, index: int) -> str:
    return f"{scene}-{index:04d}"


def check_scene_name(name: str) -> None:
    """Raises ValueError if the name cannot be a part of tar member names and URLs."""
    if not isinstance(name, str) or not SCENE_NAME.fullmatch(name):
        raise ValueError(f"scene name {name!r}: use 1 to 60 letters, digits, '_' and '-' (it names shard members)")


def posed(frame: Frame) -> np.ndarray:
    """``ego_to_global`` of a frame that must have it. Raises ValueError."""
    if frame.ego_to_global is None:
        raise ValueError(f"frame {frame.key} has no ego pose")
    return frame.ego_to_global


def swept(frame: Frame) -> LidarSweep:
    """The key sweep of a frame that must have one. Raises ValueError."""
    if frame.lidar is None:
        raise ValueError(f"frame {frame.key} has no LiDAR sweep")
    return frame.lidar


def labeled(frame: Frame) -> Labels:
    """The labels of a frame that must have them. Raises ValueError."""
    if frame.labels is None:
        raise ValueError(f"frame {frame.key} has no labels")
    return frame.labels


def camera_to_key_ego(frame: Frame, camera: Camera) -> np.ndarray:
    """Camera -> ego at the key-frame, (4, 4) float64, corrected for the time between both."""
    return compose(inverse(posed(frame)), camera.ego_to_global, camera.sensor_to_ego)


def sweep_to_key_ego(frame: Frame, sweep: LidarSweep) -> np.ndarray:
    """LiDAR -> ego at the key-frame, (4, 4) float64."""
    return compose(inverse(posed(frame)), sweep.ego_to_global, sweep.sensor_to_ego)
