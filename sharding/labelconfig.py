"""Settings of the labels made from LiDAR. Apart from the labels: the command line shows them without loading NumPy."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class LabelConfig:
    """How labels are made.

    Attributes:
        min_points: number of points that make a voxel occupied.
        dilation: number of voxels by which occupied voxels grow through their faces, into voxels that no ray passed.
        max_range: meters; returns further from their sensor are not used. 0: all.
        box_margin: meters by which boxes are grown when points are assigned to them.
        ray_frames: number of key-frames before and after a frame whose rays determine what is free in it.
        max_rays: approximate maximum number of rays for a frame, besides those of its own sweep, spread evenly over all.
        level: correct height and tilt of the poses by the ground, before anything is gathered (see ``levelling``).
        supported: a voxel that rays passed is free only if the one below it was passed or hit, too; else it is unknown.
            Rays that come in flat pass the upper part of ground voxels for meters before they hit.
        vehicle: (x, y, z low; x, y, z high) meters, ego frame: returns from there are the vehicle itself.

    Raises:
        ValueError: a value is out of range.
    """

    min_points: int = 1
    dilation: int = 0
    max_range: float = 0.0
    box_margin: float = 0.1
    ray_frames: int = 10
    max_rays: int = 400_000
    level: bool = True
    supported: bool = True
    vehicle: tuple[float, float, float, float, float, float] = (-1.2, -1.2, -0.5, 4.0, 1.2, 2.3)

    def __post_init__(self) -> None:
        lowest = {"min_points": 1, "dilation": 0, "max_range": 0, "box_margin": 0, "ray_frames": 0, "max_rays": 0}
        for name, low in lowest.items():
            if not low <= getattr(self, name) < math.inf:
                raise ValueError(f"label setting {name} is {getattr(self, name)}, must be at least {low} and finite")
