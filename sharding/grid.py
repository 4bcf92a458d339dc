"""The voxel grid: the only home of ranges, voxel sizes, axis order and frame.

Every voxel array in occstream is indexed ``[x, y, z]`` (C order, so z varies fastest), x forward, y left, z up,
voxel ``(i, j, k)`` covers ``[lower + index * voxel, lower + (index + 1) * voxel)``. The id of free space belongs to the
taxonomy (``Taxonomy.free_id``), because one grid serves several taxonomies.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class VoxelGrid:
    """A box of equal voxels in the frame of one key-frame.

    Attributes:
        name: how recipes, manifests and error messages call it.
        lower, upper: corners of the box, meters, in ``frame``.
        voxel: edge lengths of one voxel, meters.
        frame: ``"ego"`` (vehicle frame at the key-frame) or ``"lidar"`` (LiDAR frame at the key-frame).

    Raises:
        ValueError: the range is not a whole number of voxels, or a value is out of range.
    """

    name: str
    lower: tuple[float, float, float]
    upper: tuple[float, float, float]
    voxel: tuple[float, float, float]
    frame: str = "ego"

    def __post_init__(self) -> None:
        for field in ("lower", "upper", "voxel"):
            value = tuple(float(v) for v in getattr(self, field))
            if len(value) != 3:
                raise ValueError(f"grid {self.name!r}: {field} needs three numbers (x, y, z), got {value}")
            object.__setattr__(self, field, value)
        if self.frame not in ("ego", "lidar"):
            raise ValueError(f"grid {self.name!r}: frame is {self.frame!r}, must be 'ego' or 'lidar'")
        for axis, lo, up, size in zip("xyz", self.lower, self.upper, self.voxel):
            if not all(map(math.isfinite, (lo, up, size))):
                raise ValueError(
                    f"grid {self.name!r}: {axis} range {lo}..{up} m, voxel {size} m: must be finite numbers"
                )
            count = (up - lo) / size if size > 0 else 0
            if count < 1 or abs(count - round(count)) > 1e-4:
                raise ValueError(
                    f"grid {self.name!r}: {axis} range {lo}..{up} m is not a whole number of {size} m voxels "
                    f"({count:.4f}); change the range or the voxel size"
                )

    @property
    def shape(self) -> tuple[int, int, int]:
        """Number of voxels (X, Y, Z)."""
        x, y, z = (round((u - l) / s) for l, u, s in zip(self.lower, self.upper, self.voxel))
        return x, y, z

    @property
    def size(self) -> int:
        """X * Y * Z."""
        return int(np.prod(self.shape))

    def coarsen(self, factor: tuple[int, int, int]) -> VoxelGrid:
        """The same box with voxels ``factor`` times larger per axis (2, 2, 1: half resolution in x and y)."""
        return dataclasses.replace(
            self,
            name=f"{self.name}/{'x'.join(map(str, factor))}",
            voxel=tuple(s * f for s, f in zip(self.voxel, factor)),
        )

    def to_index(self, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Voxel of each point.

        Args:
            points: (..., 3) meters in ``frame``.

        Returns:
            index: (..., 3) int32, only meaningful where ``inside``.
            inside: (...) bool.
        """
        scaled = (np.asarray(points, dtype=np.float64) - self.lower) / self.voxel
        inside = np.all((scaled >= 0) & (scaled < self.shape), axis=-1)
        index = np.floor(np.where(inside[..., None], scaled, 0)).astype(np.int32)
        return index, inside

    def centers(self, index: np.ndarray | None = None) -> np.ndarray:
        """Voxel centers in meters, float64: (X, Y, Z, 3) for the whole grid, or (..., 3) of integer ``index``."""
        if index is None:
            index = np.stack(np.meshgrid(*(np.arange(n) for n in self.shape), indexing="ij"), axis=-1)
        return np.asarray(self.lower) + (np.asarray(index) + 0.5) * self.voxel

    def to_dict(self) -> dict:
        """Plain JSON values; ``from_dict`` reads them back."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()}

    @classmethod
    def from_dict(cls, data: dict) -> VoxelGrid:
        values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in data.items()}
        return cls(**values)

    def same_voxels(self, other: VoxelGrid) -> bool:
        """True if both describe the same voxels in the same frame, whatever their names."""
        values = lambda g: np.array([*g.lower, *g.upper, *g.voxel])  # noqa: E731
        return self.frame == other.frame and np.allclose(values(self), values(other), atol=1e-6)


_PRESETS = [
    # Occ3D-nuScenes and Occ3D-Waymo, OpenScene, OpenOccupancy, SemanticKITTI SSC
    VoxelGrid("occ3d", (-40, -40, -1), (40, 40, 5.4), (0.4, 0.4, 0.4), "ego"),
    # OpenScene's box reaches from 4 m below to 4 m above the rear axle, which is 0.325 m above the road.
    VoxelGrid("openscene", (-50, -50, -3.675), (50, 50, 4.325), (0.5, 0.5, 0.5), "ego"),
    VoxelGrid("openoccupancy", (-51.2, -51.2, -5), (51.2, 51.2, 3), (0.2, 0.2, 0.2), "lidar"),
    VoxelGrid("surroundocc", (-50, -50, -5), (50, 50, 3), (0.5, 0.5, 0.5), "lidar"),
    VoxelGrid("semantickitti", (0, -25.6, -2), (51.2, 25.6, 4.4), (0.2, 0.2, 0.2), "lidar"),
    VoxelGrid("waymo-fine", (-80, -80, -5), (80, 80, 7.8), (0.1, 0.1, 0.2), "ego"),
    # Ours: small enough to train on two CPU cores.
    VoxelGrid("tiny", (-19.2, -19.2, -1), (19.2, 19.2, 5.4), (0.8, 0.8, 0.8), "ego"),
]
GRIDS: dict[str, VoxelGrid] = {g.name: g for g in _PRESETS}


def get_grid(name: str) -> VoxelGrid:
    """Preset by name, or a grid of one's own written as seven or nine numbers and a frame.

    Args:
        name: ``"occ3d"``, …, or ``"-40,-40,-1,40,40,5.4,0.4"`` (lower corner, upper corner, voxel size or three of them),
            optionally with ``,ego`` or ``,lidar`` at the end.

    Raises:
        ValueError: neither; lists the presets.
    """
    if name in GRIDS:
        return GRIDS[name]
    words = name.split(",")
    frame = words.pop() if words[-1] in ("ego", "lidar") else "ego"
    try:
        numbers = [float(w) for w in words]
    except ValueError:
        numbers = []
    if len(numbers) not in (7, 9):
        raise ValueError(
            f"unknown grid {name!r}; presets: {', '.join(GRIDS)}; or seven numbers: lower x,y,z, upper x,y,z, voxel size"
        )
    a, b, c, d, e, f, *voxel = numbers
    x, y, z = voxel if len(voxel) == 3 else voxel * 3
    return VoxelGrid(name, (a, b, c), (d, e, f), (x, y, z), frame)
