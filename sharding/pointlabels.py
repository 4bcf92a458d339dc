"""Voxel labels of one sweep's own points: what benchmarks of points teach a network of voxels (PanoOcc, Sec. 4.2). Labels of a
whole drive are made in ``labels``."""

from __future__ import annotations

from typing import Literal

import numpy as np

from occstream.sharding.grid import VoxelGrid
from occstream.sharding.labels import sweep_to_grid
from occstream.sharding.poses import apply
from occstream.sharding.schema import IGNORE, Frame, Labels, Taxonomy, swept
from occstream.sharding.voxelrays import mark_free

Empty = Literal["rays", "rest", "none"]


def point_labels(frame: Frame, grid: VoxelGrid, taxonomy: Taxonomy, *, empty: Empty = "rays") -> Labels:
    """Labels of the points of a frame's sweep.

    Args:
        frame: with a sweep whose points have classes.
        grid: of the labels, of any size, in the ego or LiDAR frame of the key-frame.
        taxonomy: of the classes.
        empty: voxels without points that are free: those that a ray passed on its way to its return (rays), all (rest), or
            none.

    Returns:
        ``binary``: voxels with points; ``semantic``: the class of most of a voxel's points, of as many the lowest id, points
        without class do not count, and IGNORE where there are no others, or nothing is known; ``mask_lidar``: what is known.

    Raises:
        ValueError: the frame has no sweep, or its points have no classes.
    """
    sweep = swept(frame)
    if sweep.classes is None:
        raise ValueError(f"frame {frame.key}: its LiDAR points have no classes; use data that has them")
    whole = np.isfinite(sweep.xyz).all(1)
    pose = sweep_to_grid(frame, sweep, grid)
    index, inside = grid.to_index(apply(pose, sweep.xyz[whole]))
    place = np.asarray(np.ravel_multi_index(tuple(index[inside].T), grid.shape))
    binary = np.zeros(grid.size, bool)
    binary[place] = True
    semantic = np.full(grid.size, IGNORE, np.uint8)
    known = binary.copy()
    if empty == "rest":
        known[:] = True
    elif empty == "rays":
        passed, to_voxels = np.zeros(grid.shape, bool), pose[:3].copy()
        to_voxels[:, 3] -= grid.lower
        mark_free(passed, sweep.xyz[whole], to_voxels / np.array(grid.voxel)[:, None])
        known |= passed.reshape(-1)
    semantic[known & ~binary] = taxonomy.free_id
    classes = np.asarray(sweep.classes, np.int64)[whole][inside]
    voted = classes < taxonomy.num_classes
    voxels, winners = majority(place[voted], classes[voted])
    semantic[voxels] = winners
    return Labels(binary.reshape(grid.shape), semantic.reshape(grid.shape), known.reshape(grid.shape))


def majority(places: np.ndarray, classes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Places that occur, ascending, and the class that most of the (N,) rows there have: the lowest of those with as many."""
    pairs, counts = np.unique(places * 256 + classes, return_counts=True)
    at, kind = np.divmod(pairs, 256)
    order = np.lexsort((kind, -counts, at))
    found, first = np.unique(at[order], return_index=True)
    return found, np.take(kind, order[first]).astype(np.uint8)
