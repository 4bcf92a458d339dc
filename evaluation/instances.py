"""Instances of voxels and points: from predicted boxes (PanoOcc, Sec. 3.6, the refine module), and from true ones.

Boxes are (n, 7) center x, y, z; length, width, height; yaw, in the frame of the grid or the points. Ids of instances are 1, 2, …
within a frame; 0 is no instance. Panoptic labels are class * 1000 + id, as Panoptic nuScenes has them.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
from scipy import ndimage

from occstream.evaluation.panoptic import PER_CLASS, join_labels
from occstream.sharding.exactmath import cos_sin
from occstream.sharding.grid import VoxelGrid
from occstream.sharding.schema import IGNORE, Taxonomy

GROWN = 0.2
"""Meters by which a box grows to each side for what has its class and lies in no box; for voxels at least as far as their centers
can be from what they touch."""


@dataclass
class RefineConfig:
    """How boxes give instances to voxels or points that a network predicts."""

    threshold: float = 0.8
    """Boxes with a score above it claim what is in them. ``score_at_precision_80`` of an evaluation is the score from which
    80 % of them are right: on raw scores of a detector of queries few pass 0.8."""
    overlap: float = 0.5
    """A box of whose claim surer boxes have taken a larger share gets nothing."""
    claims: Literal["things", "class"] = "things"
    """What a box claims: all things, which take its class (the paper), but for those in or beside a box of the class that is
    predicted for them; or only those predicted as its class."""
    leftover: Literal["components", "nearest", "one"] = "components"
    """Instances of things that no box claims: connected components of a class (26 neighbors); that of the nearest center of its
    class seen from above, within ``reach``; or none, which is one segment a class."""
    reach: float = 2.0
    """Meters, for ``leftover`` nearest."""

    def __post_init__(self) -> None:
        for name in ("threshold", "overlap"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}, must be within 0..1")
        if self.reach <= 0:
            raise ValueError(f"reach is {self.reach}, must be positive")


class Segments(NamedTuple):
    """Classes (uint8) and instances (uint16) of voxels or points, and rows of the boxes that became instances 1, 2, …."""

    classes: np.ndarray
    instances: np.ndarray
    kept: np.ndarray


class FoundBoxes(NamedTuple):
    """Boxes of one frame: (n, 7); (n,) class ids of the taxonomy of what they claim; (n,) scores."""

    boxes: np.ndarray
    classes: np.ndarray
    scores: np.ndarray


def in_box(points: np.ndarray, box: np.ndarray, grow: float | Sequence[float] = 0.0) -> np.ndarray:
    """(N,) bool: points (N, 3) in a box (7,), faces included, that is larger by ``grow`` meters to each side.

    Args:
        points: meters.
        box: in their frame.
        grow: one number, or three: sizes of the voxels whose centers the points are. Then what touches the box counts, at least
            ``GROWN``.
    """
    x, y, z, *half = np.asarray(box, np.float64)[:6] / [1, 1, 1, 2, 2, 2]
    cosine, sine = cos_sin(float(box[6]))
    if isinstance(grow, (int, float)):
        half = [size + grow for size in half]
    else:
        c, s, (a, b, up) = abs(cosine), abs(sine), (size / 2 for size in grow)
        half = [size + max(GROWN, more) for size, more in zip(half, (a * c + b * s, a * s + b * c, up))]
    found = np.zeros(len(points), bool)
    near = np.flatnonzero(np.abs(points[:, 0] - x) <= half[0] + half[1])
    dx, dy, dz = (points[near, axis].astype(np.float64) - at for axis, at in enumerate((x, y, z)))
    along, across = dx * cosine + dy * sine, dy * cosine - dx * sine
    inside = (np.abs(along) <= half[0]) & (np.abs(across) <= half[1]) & (np.abs(dz) <= half[2])
    found[near[inside]] = True
    return found


class _Elements(NamedTuple):
    """What may become part of an instance: (M, 3) meters, (M, 3) int64 cells for components, (M,) uint8 classes, (M,) bool
    whether they are things already; others are only known to be occupied. ``floor``: meters above a box's bottom below which
    those are not claimed: they may be the ground. ``grow``: as of ``in_box``."""

    xyz: np.ndarray
    cells: np.ndarray
    classes: np.ndarray
    thing: np.ndarray
    floor: float
    grow: float | Sequence[float]


def refine_voxels(
    semantic: np.ndarray,
    found: FoundBoxes,
    grid: VoxelGrid,
    *,
    taxonomy: Taxonomy,
    things: Collection[int],
    config: RefineConfig,
    occupied: np.ndarray | None = None,
) -> Segments:
    """Classes and instances of voxels that a network predicts, by its boxes. What is predicted as stuff stays stuff.

    Args:
        semantic: (X, Y, Z) integers, predicted classes or free.
        found: its boxes.
        grid: of the voxels; boxes are in its frame.
        taxonomy: of the classes.
        things: ids of countable classes.
        config: see there.
        occupied: (X, Y, Z) bool, what another head says is occupied: boxes claim such voxels also where the class is free, but
            for the lowest layer in a box, which may be the ground.

    Returns:
        Arrays (X, Y, Z).
    """
    flat = np.asarray(semantic).reshape(-1)
    thing = np.isin(flat, list(things))
    taken = thing if occupied is None else thing | (occupied.reshape(-1) & (flat == taxonomy.free_id))
    place = np.flatnonzero(taken)
    cells = np.stack(np.unravel_index(place, grid.shape), 1)
    elements = _Elements(grid.centers(cells), cells, flat[place], thing[place], grid.voxel[2], grid.voxel)
    segments = _refine(elements, found, config)
    classes, instances = flat.astype(np.uint8), np.zeros(flat.size, np.uint16)
    classes[place], instances[place] = segments.classes, segments.instances
    return Segments(classes.reshape(grid.shape), instances.reshape(grid.shape), segments.kept)


def refine_points(
    xyz: np.ndarray,
    classes: np.ndarray,
    found: FoundBoxes,
    *,
    things: Collection[int],
    config: RefineConfig,
    cell: float = 0.5,
) -> Segments:
    """Classes and instances of points that a network predicts, by its boxes, as ``refine_voxels``.

    Args:
        xyz: (N, 3) meters, in the frame of the boxes.
        classes: (N,) integers, predicted.
        found, things, config: as of ``refine_voxels``.
        cell: meters; points whose cells of this size touch are connected.

    Returns:
        Arrays (N,).
    """
    thing = np.isin(classes, list(things))
    place, whole = np.flatnonzero(thing), np.asarray(classes).astype(np.uint8)
    cells = np.floor(np.asarray(xyz, np.float64)[place] / cell).astype(np.int64)
    elements = _Elements(xyz[place], cells, whole[place], np.ones(len(place), bool), 0.0, GROWN)
    segments, instances = _refine(elements, found, config), np.zeros(len(whole), np.uint16)
    whole[place], instances[place] = segments.classes, segments.instances
    return Segments(whole, instances, segments.kept)


def _refine(elements: _Elements, found: FoundBoxes, config: RefineConfig) -> Segments:
    classes, ids = elements.classes.astype(np.uint8), np.zeros(len(elements.xyz), np.uint16)
    sure = np.flatnonzero(found.scores > config.threshold)
    order = sure[np.argsort(-found.scores[sure], kind="stable")]
    agreed = np.zeros(len(ids), bool)
    for number in order.tolist():
        agreed |= in_box(elements.xyz, found.boxes[number], elements.grow) & (elements.classes == found.classes[number])
    kept: list[int] = []
    for number in order.tolist():
        mine = in_box(elements.xyz, found.boxes[number])
        box, kind = found.boxes[number], found.classes[number]
        same = elements.classes == kind
        mine &= same if config.claims == "class" else same | ~agreed
        if elements.floor:
            mine &= elements.thing | (elements.xyz[:, 2] >= box[2] - box[5] / 2 + elements.floor)
        size, free = int(mine.sum()), mine & (ids == 0)
        if not free.any() or (size - free.sum()) / size > config.overlap or len(kept) == PER_CLASS - 1:
            continue
        kept.append(number)
        classes[free], ids[free] = kind, len(kept)
    for rank, number in enumerate(kept, 1):  # what has the box's class and lies just beside it
        beside = (ids == 0) & (elements.classes == found.classes[number])
        beside[beside] = in_box(elements.xyz[beside], found.boxes[number], elements.grow)
        ids[beside] = rank
    rest = np.flatnonzero((ids == 0) & elements.thing)
    if config.leftover == "nearest":
        ids[rest] = _nearest(elements.xyz[rest], classes[rest], found, kept, reach=config.reach)
    elif config.leftover == "components":
        ids[rest] = _components(elements.cells[rest], classes[rest], len(kept))
    classes[(ids == 0) & ~elements.thing] = elements.classes[(ids == 0) & ~elements.thing]
    return Segments(classes, ids, np.array(kept, np.int64))


def _nearest(xyz: np.ndarray, classes: np.ndarray, found: FoundBoxes, kept: list[int], *, reach: float) -> np.ndarray:
    """(M,) ids: of the instance of one's class whose center is nearest along x and y, within ``reach``; else 0."""
    ids = np.zeros(len(xyz), np.uint16)
    for kind in np.unique(classes):
        rivals = [rank for rank, number in enumerate(kept, 1) if found.classes[number] == kind]
        if not rivals:
            continue
        centers = np.asarray(found.boxes, np.float64)[[kept[rank - 1] for rank in rivals], :2]
        mine = classes == kind
        distance = ((xyz[mine, None, :2] - centers) ** 2).sum(-1)
        best = distance.argmin(1)
        ids[mine] = np.where(distance.min(1) <= reach**2, np.array(rivals, np.uint16)[best], 0)
    return ids


def _components(cells: np.ndarray, classes: np.ndarray, taken: int) -> np.ndarray:
    """(M,) ids after those that are taken: connected components of each class, the largest first; 0 beyond the last id of a
    panoptic label."""
    number, count = np.zeros(len(cells), np.int64), 0
    for kind in np.unique(classes):
        mine = np.flatnonzero(classes == kind)
        low = cells[mine].min(0)
        at = tuple((cells[mine] - low).T)
        there = np.zeros(cells[mine].max(0) - low + 1, bool)
        there[at] = True
        labeled: Any = ndimage.label(there, np.ones((3, 3, 3)))
        labels, parts = labeled
        number[mine] = count + labels[at] - 1
        count += parts
    sizes = np.bincount(number, minlength=count)
    rank = np.empty(count, np.int64)
    rank[np.argsort(-sizes, kind="stable")] = np.arange(1, count + 1)
    ids = taken + rank[number] if count else number
    return np.where(ids < PER_CLASS, ids, 0).astype(np.uint16)


def panoptic_labels(classes: np.ndarray, instances: np.ndarray, things: Collection[int]) -> np.ndarray:
    """uint16 class * 1000 + id in the shape of ``classes``: ids of things; of stuff and free space 0."""
    return join_labels(classes, np.where(np.isin(classes, list(things)), instances, 0))


def true_voxel_instances(
    semantic: np.ndarray, boxes: np.ndarray, classes: np.ndarray, grid: VoxelGrid, *, things: Collection[int]
) -> np.ndarray:
    """(X, Y, Z) uint16: of voxels of things, 1 + row of the first box of their class that holds their center, or else the
    first that touches them. 0: none, or no thing.

    Args:
        semantic: (X, Y, Z) true classes.
        boxes, classes: (n, 7) true boxes in the grid's frame, and their ids in the taxonomy.
        grid: of the voxels.
        things: ids of countable classes.
    """
    flat, ids = np.asarray(semantic).reshape(-1), np.zeros(semantic.size, np.uint16)
    place = np.flatnonzero(np.isin(flat, list(things)))
    centers = grid.centers(np.stack(np.unravel_index(place, grid.shape), 1))
    owner, _ = _owners(centers, flat[place], boxes, classes, grow=grid.voxel)
    ids[place] = owner + 1
    return ids.reshape(grid.shape)


def true_point_instances(
    xyz: np.ndarray, classes: np.ndarray, boxes: np.ndarray, box_classes: np.ndarray, *, things: Collection[int]
) -> tuple[np.ndarray, np.ndarray]:
    """Instances of points from true boxes.

    Args:
        xyz, classes: (N, 3) meters and (N,) true classes.
        boxes, box_classes: (n, 7) in the frame of the points, and their ids in the taxonomy.
        things: ids of countable classes.

    Returns:
        (N,) uint16: of points of things, 1 + row of the box of their class that holds them, exactly or else grown by
        ``GROWN``; else 0. (N,) bool: those in two boxes of their class, whose instance nobody knows.
    """
    ids, twice = np.zeros(len(xyz), np.uint16), np.zeros(len(xyz), bool)
    place = np.flatnonzero(np.isin(classes, list(things)))
    owner, several = _owners(np.asarray(xyz)[place], np.asarray(classes)[place], boxes, box_classes, grow=GROWN)
    ids[place], twice[place] = np.where(several, 0, owner + 1), several
    return ids, twice


def _owners(
    xyz: np.ndarray, classes: np.ndarray, boxes: np.ndarray, of_box: np.ndarray, *, grow: float | Sequence[float]
) -> tuple[np.ndarray, np.ndarray]:
    """(M,) int64 the first box of one's class that holds a place, exactly or else grown; -1: none. (M,) bool: several do."""
    owner, several = np.full(len(xyz), -1), np.zeros(len(xyz), bool)
    for more in (0.0, grow):
        left = np.flatnonzero(owner < 0)
        for row, (box, kind) in enumerate(zip(boxes, of_box)):
            mine = left[classes[left] == kind]
            mine = mine[in_box(xyz[mine], box, more)]
            several[mine] |= owner[mine] >= 0
            owner[mine] = np.where(owner[mine] >= 0, owner[mine], row)
    return owner, several


def unknown_things(semantic: np.ndarray, instances: np.ndarray, things: Collection[int]) -> np.ndarray:
    """True classes with ``IGNORE`` where something countable is of no known instance: it can be neither found nor missed."""
    return np.where(np.isin(semantic, list(things)) & (instances == 0), IGNORE, semantic).astype(np.uint8)


def labels_at(volume: np.ndarray, xyz: np.ndarray, grid: VoxelGrid, outside: int) -> np.ndarray:
    """(N,) value of the voxel that each point (N, 3) lies in, ``outside`` beyond the grid."""
    index, inside = grid.to_index(xyz)
    return np.where(inside, volume[tuple(index.T)], np.asarray(outside, volume.dtype))


def taxonomy_ids(names: Sequence[str], taxonomy: Taxonomy) -> np.ndarray:
    """(n,) int64 ids in a taxonomy of classes of boxes, by name; those that it does not have are ``IGNORE``."""
    return np.array([taxonomy.id(n) if n in taxonomy.classes else IGNORE for n in names], np.int64)
