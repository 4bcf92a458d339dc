"""Errors put into labels that are exact, to test refiners where the truth is known: a stand-in for an on-board network.

Space is divided into cubes. In each, what is occupied may be lost, get another class, or swell by a voxel into the free
around it. Errors grow with distance, and more where no camera looks. They are new in every frame, or *persistent*: tied to
the place in the world and equal in all frames, like those of a network that has never seen such a thing.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from occstream.sharding.attach import Sidecar
from occstream.sharding.codec import Coding, encode
from occstream.sharding.entries import SceneEntry
from occstream.sharding.grid import VoxelGrid
from occstream.sharding.labels import labels_to_global
from occstream.sharding.manifest import Author, Manifest
from occstream.sharding.poses import apply
from occstream.sharding.schema import IGNORE, Frame, Labels, get_taxonomy, labeled
from occstream.sharding.shardfile import ShardWriter
from occstream.sharding.stream import ShardReader

_MIX = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True)
class NoiseConfig:
    """Settings. Shares are those of cubes.

    Attributes:
        lost, wrong, swollen: shares at the ego, new in every frame.
        far: shares are this many times larger at 51.2 m (linear in between, beyond it constant; never above 95 %).
        out_of_view: shares are this many times larger where no camera looks.
        always_lost, always_wrong: shares of cubes of the world in which every frame errs alike.
        cube: edge in meters.
        seed: of all.
    """

    lost: float = 0.2
    wrong: float = 0.1
    swollen: float = 0.2
    far: float = 2.5
    out_of_view: float = 2.0
    always_lost: float = 0.0
    always_wrong: float = 0.0
    cube: float = 1.6
    seed: int = 0


def uniform(keys: np.ndarray, seed: int) -> np.ndarray:
    """(...) float64 in 0..1 that depend on whole numbers (..., n) and a seed alone."""
    with np.errstate(over="ignore"):
        state = np.full(keys.shape[:-1], seed, np.uint64)
        for part in np.moveaxis(keys.astype(np.int64).astype(np.uint64), -1, 0):
            state = (state ^ part) * _MIX
            state ^= state >> np.uint64(29)
            state = (state + _MIX) * np.uint64(0xBF58476D1CE4E5B9)
            state ^= state >> np.uint64(32)
    return (state >> np.uint64(11)) * 2.0**-53


def corrupted(
    frame: Frame, grid: VoxelGrid, num_classes: int, in_view: np.ndarray, *, number: int, config: NoiseConfig
) -> np.ndarray:
    """(X, Y, Z) uint8 labels of a frame with errors.

    Args:
        frame: with classes and pose.
        grid: of its labels.
        num_classes: K; free is K.
        in_view: (X, Y, Z) bool.
        number: of the scene.
        config: settings.
    """
    centers, exact = grid.centers(), labeled(frame).classes()
    x, y, _ = np.moveaxis(centers, -1, 0)
    grows = 1 + (config.far - 1) * np.minimum(np.sqrt(x * x + y * y) / 51.2, 1)
    grows = grows * np.where(in_view, 1, config.out_of_view)
    own = _cubes(centers, config.cube, number, frame.index)
    world = _cubes(apply(labels_to_global(frame, labeled(frame), grid), centers), config.cube, number, -1)

    def hit(cubes: np.ndarray, share: np.ndarray | float, kind: int) -> np.ndarray:
        return uniform(cubes, config.seed * 16 + kind) < np.minimum(share, 0.95)

    def other(cubes: np.ndarray, kind: int) -> np.ndarray:
        return (uniform(cubes, config.seed * 16 + kind) * num_classes).astype(np.uint8)

    solid = exact < num_classes
    out = exact.copy()
    near = ndimage.grey_dilation(np.where(solid, exact + 1, 0), footprint=ndimage.generate_binary_structure(3, 1))
    grown = ~solid & (near > 0) & (exact != IGNORE) & hit(own, config.swollen * grows, 0)
    out[grown] = near[grown] - 1
    for cubes, lost, wrong, kind in (
        (own, config.lost * grows, config.wrong * grows, 1),
        (world, config.always_lost, config.always_wrong, 4),
    ):
        solid = out < num_classes
        swap = solid & hit(cubes, wrong, kind)
        out[swap] = other(cubes, kind + 1)[swap]
        out[solid & hit(cubes, lost, kind + 2)] = num_classes
    return out


def _cubes(points: np.ndarray, edge: float, *numbers: int) -> np.ndarray:
    """(..., 3 + n) whole numbers: the cube that a point lies in, and others for all."""
    index = np.floor(points / edge).astype(np.int64)
    return np.concatenate([index, np.broadcast_to(np.array(numbers), (*index.shape[:-1], len(numbers)))], -1)


def attach_corrupted(
    url: str, name: str, config: NoiseConfig, in_view: np.ndarray | None = None, *, level: int = 3
) -> Manifest:
    """Attaches a set's own labels with errors, as if a network had predicted them.

    Args:
        url: a packed data set with exact labels and poses.
        name: of the new group, ``pseudo-…``.
        config: settings.
        in_view: (X, Y, Z) bool, what a camera looks at in every frame, which becomes ``mask_camera``; None: the labels' own.
        level: of zstd.

    Returns:
        The manifest with these labels.
    """
    base = Manifest.load(url)
    free = get_taxonomy(base.taxonomy).num_classes
    reader = ShardReader(base, ("labels",))
    numbers = {scene.name: number for number, scene in enumerate(base.scenes)}
    view = "own" if in_view is None else int(np.count_nonzero(in_view))
    origin = {"noise": {k: getattr(config, k) for k in config.__dataclass_fields__}, "view": view}
    sidecar = Sidecar(
        base,
        name,
        grid=base.label_grid,
        taxonomy=base.taxonomy,
        classes=base.classes,
        labels="exact labels with errors",
        origin=origin,
        author=Author("noise", frozenset()),
    )

    def fill(writer: ShardWriter, scenes: list[SceneEntry]) -> None:
        for scene in scenes:
            for index in range(scene.frames):
                frame = reader.frame(numbers[scene.name], index)
                own = labeled(frame)
                view = own.mask_camera if in_view is None else in_view
                view = np.ones(own.binary.shape, bool) if view is None else view
                said = corrupted(frame, base.label_grid, free, view, number=numbers[scene.name], config=config)
                frame.labels = Labels(said < free, said, own.mask_lidar, view, ego_to_global=own.ego_to_global)
                frame.boxes = None
                writer.add(frame.key, encode(frame, "labels", Coding(level=level)))

    for number in sorted(sidecar.scenes):
        sidecar.write(number, fill)
    reader.close()
    made = sidecar.publish()
    assert made is not None, "all of its tars are written"
    return made
