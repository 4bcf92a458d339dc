"""Public voxel labels of nuScenes frames: Occ3D, OpenOccupancy, SurroundOcc. All use Occ3D's class ids."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from occstream.sharding.grid import VoxelGrid, get_grid
from occstream.sharding.rawfiles import read_npy, sparse_to_dense
from occstream.sharding.rawtree import Place
from occstream.sharding.schema import IGNORE, OCC3D, Labels


@dataclass(frozen=True)
class LabelSet:
    """Where the labels of a frame lie, and how they are read.

    Attributes:
        grid: of the labels.
        path: of a frame, below the set's root, from scene name, scene token, sample token, LiDAR token, LiDAR file name.
        read: file -> labels.
        root: default, below the root of nuScenes.
        convention: how its benchmark averages; SurroundOcc's as OpenOccupancy's: over classes 1 to 16.
    """

    grid: VoxelGrid
    path: Callable[[str, str, str, str, str], str]
    read: Callable[[Place, VoxelGrid], Labels]
    root: str
    convention: str


def read_occ3d(path: Place, grid: VoxelGrid) -> Labels:
    """``labels.npz``: dense uint8 [x, y, z], 17 = free, and both masks.

    Voxels that nobody saw carry labels all the same, so ``binary`` means something only under the masks.
    """
    arrays = read_npy(path, "labels of a key-frame")
    if not isinstance(arrays, dict) or "semantics" not in arrays or "mask_lidar" not in arrays:
        raise ValueError(f"{path}: not an Occ3D labels.npz (semantics, mask_lidar, mask_camera)")
    for name, value in arrays.items():
        if value.shape != grid.shape or value.dtype.kind not in "iub":
            have = f"shape {value.shape} and type {value.dtype}"
            raise ValueError(f"{path}: {name} has {have}, expected whole numbers of shape {grid.shape}")
    semantic = arrays["semantics"]
    _check_range(path, semantic, OCC3D.free_id)
    camera = arrays.get("mask_camera")
    return Labels(
        semantic != OCC3D.free_id,
        semantic.astype(np.uint8),
        arrays["mask_lidar"] != 0,
        None if camera is None else camera != 0,
    )


def read_openoccupancy(path: Place, grid: VoxelGrid) -> Labels:
    """``.npy`` of rows z, y, x, class (or z, y, x, velocity x3, class); class 0 is noise, unlisted voxels are free, and of
    those listed more than once the most frequent class stays (of equals the smallest), as its loader does."""
    rows = read_npy(path, "labels of a key-frame")
    if not isinstance(rows, np.ndarray) or rows.ndim != 2 or rows.shape[1] not in (4, 7):
        raise ValueError(f"{path}: shape {np.shape(rows)}, expected (N, 4) or (N, 7) with z, y, x first and class last")
    return _sparse(path, rows[:, [2, 1, 0]], rows[:, -1], grid, doubles="most")


def read_surroundocc(path: Place, grid: VoxelGrid) -> Labels:
    """``.npy`` of rows x, y, z, class; class 0 is noise, unlisted voxels are free, and of
    those listed more than once the last class stays, as its loader does."""
    rows = read_npy(path, "labels of a key-frame")
    if not isinstance(rows, np.ndarray) or rows.ndim != 2 or rows.shape[1] != 4:
        raise ValueError(f"{path}: shape {np.shape(rows)}, expected (N, 4) of x, y, z, class")
    return _sparse(path, rows[:, :3], rows[:, 3], grid, doubles="last")


def _sparse(
    path: Place, index: np.ndarray, classes: np.ndarray, grid: VoxelGrid, *, doubles: Literal["last", "most"]
) -> Labels:
    if classes.dtype.kind not in "iuf" or not np.isfinite(classes).all():
        raise ValueError(f"{path}: its classes are not finite numbers; it is damaged or of another format")
    classes = classes.astype(np.int64)
    _check_range(path, classes, OCC3D.num_classes - 1)
    kept = np.where(classes == 0, IGNORE, classes)
    semantic = sparse_to_dense(index, kept, grid.shape, OCC3D.free_id, where=path, doubles=doubles)
    known = semantic != IGNORE  # noise: neither occupied nor free
    return Labels((semantic != OCC3D.free_id) & known, semantic, None if known.all() else known)


def _check_range(path: Place, classes: np.ndarray, highest: int) -> None:
    if classes.size and (classes.max() > highest or classes.min() < 0):
        bad = classes.max() if classes.max() > highest else classes.min()
        raise ValueError(f"{path}: class {bad} is out of range 0..{highest}; another label set?")


LABEL_SETS: Mapping[str, LabelSet] = {
    "occ3d": LabelSet(
        get_grid("occ3d"),
        lambda scene, scene_token, sample, lidar, file: f"{scene}/{sample}/labels.npz",
        read_occ3d,
        "gts",
        "occ3d",
    ),
    "openoccupancy": LabelSet(
        get_grid("openoccupancy"),
        lambda scene, scene_token, sample, lidar, file: f"scene_{scene_token}/occupancy/{lidar}.npy",
        read_openoccupancy,
        "nuScenes-Occupancy",
        "openoccupancy",
    ),
    "surroundocc": LabelSet(
        get_grid("surroundocc"),
        lambda scene, scene_token, sample, lidar, file: f"{file}.npy",
        read_surroundocc,
        "nuscenes_occ/samples",
        "openoccupancy",
    ),
}
