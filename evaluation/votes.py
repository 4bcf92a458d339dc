"""What a frame's vote weighs at each of its voxels: how far its sensor is to be trusted there (OccFiner, Eqs. 10 to 12)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from occstream.evaluation.rules import SHARE_UNIT, VOTE_UNIT, Rule
from occstream.sharding.grid import VoxelGrid
from occstream.sharding.poses import apply, inverse
from occstream.sharding.schema import Camera, Taxonomy

Sensor = Literal["camera", "lidar", "none"]
SENSORS: tuple[Sensor, ...] = ("camera", "lidar", "none")


@dataclass(frozen=True)
class VoteConfig:
    """Settings of the votes.

    Attributes:
        sensor: camera: ``high`` in view and in the box, ``middle`` in view beyond it, ``low`` out of view; lidar: from
            ``most`` at the sensor down to ``least`` at ``reach``, linearly, and ``least`` beyond; none: 1 everywhere.
        high, middle, low, most, least: weights of the paper.
        reach: meters.
        box: meters. On grids that begin at the ego: 0 <= x < box and -box / 2 <= y < box / 2, the whole height; on grids
            around it: -box <= x, y < box. The paper gives its size, not its place.
        empty: share of a voxel's weight that counts where it says free. The paper does not say whether free votes; with 0 the
            occupied only ever grows, with 1 one frame that misses a thing erases it.

    Raises:
        ValueError: a value is out of range.
    """

    sensor: Sensor = "camera"
    high: float = 1.0
    middle: float = 0.1
    low: float = 0.01
    most: float = 10.0
    least: float = 0.1
    reach: float = 51.2
    box: float = 25.6
    empty: float = 0.3

    def __post_init__(self) -> None:
        if self.sensor not in SENSORS:
            raise ValueError(f"sensor {self.sensor!r} is not one of {', '.join(SENSORS)}")
        for name in ("high", "middle", "low", "most", "least"):
            if not 0 <= getattr(self, name) <= 1000:
                raise ValueError(f"vote weight {name} is {getattr(self, name)}, must be 0 to 1000")
        if not (0 < self.reach < 1e6 and 0 < self.box < 1e6):
            raise ValueError(f"reach is {self.reach} and box {self.box}; both must be positive and finite")
        if not 0 <= self.empty <= 1:
            raise ValueError(f"the weight of free is {self.empty}, must be 0 to 1")

    def weights(self, points: np.ndarray, in_view: np.ndarray | bool, forward: bool) -> np.ndarray:
        """(...) float64 weights of votes.

        Args:
            points: (..., 3) meters in the frame of the source's grid.
            in_view: (...) bool.
            forward: whether the grid begins at the ego.
        """
        x, y, z = np.moveaxis(np.asarray(points, np.float64), -1, 0)
        if self.sensor == "none":
            return np.ones(x.shape)
        if self.sensor == "lidar":
            distance = np.sqrt(x * x + y * y + z * z)
            return np.maximum(self.most - distance / self.reach * (self.most - self.least), self.least)
        half = self.box / 2 if forward else self.box
        near = (x < self.box) & (x >= (0 if forward else -self.box)) & (y >= -half) & (y < half)
        return np.where(in_view, np.where(near, self.high, self.middle), self.low)


def voting(config: VoteConfig, grid: VoxelGrid, taxonomy: Taxonomy) -> Rule:
    """The rule of weighted votes on a grid."""
    centers, forward = grid.centers().reshape(-1, 3), grid.lower[0] >= 0
    both = [np.rint(VOTE_UNIT * config.weights(centers, seen, forward)) for seen in (False, True)]
    shares = np.full(taxonomy.num_classes + 1, SHARE_UNIT, np.int64)
    shares[-1] = round(SHARE_UNIT * config.empty)
    return Rule(taxonomy.num_classes, np.stack(both).astype(np.int32), shares, things_of(taxonomy))


def things_of(taxonomy: Taxonomy) -> np.ndarray:
    """(K + 1,) bool: classes that are things; free is none."""
    return np.array([*(name in taxonomy.things for name in taxonomy.classes), False])


def in_frustum(grid: VoxelGrid, grid_to_ego: np.ndarray, cameras: Iterable[Camera]) -> np.ndarray:
    """(X, Y, Z) bool: voxels whose center projects into an image of a camera, whatever stands before it.

    Args:
        grid: of the voxels.
        grid_to_ego: (4, 4) frame of the grid -> ego.
        cameras: with ``sensor_to_ego``; their delay against the key-frame is left aside.
    """
    points = apply(grid_to_ego, grid.centers().reshape(-1, 3))
    seen = np.zeros(len(points), bool)
    for camera in cameras:
        x, y, z = apply(inverse(camera.sensor_to_ego), points).T
        k = np.asarray(camera.intrinsics, np.float64)
        front = z > 0
        depth = np.where(front, z, 1.0)
        u, v = (k[0, 0] * x + k[0, 1] * y) / depth + k[0, 2], k[1, 1] * y / depth + k[1, 2]
        # The center of the first pixel is 0: the image begins half a pixel before.
        seen |= front & (u >= -0.5) & (u < camera.width - 0.5) & (v >= -0.5) & (v < camera.height - 0.5)
    return seen.reshape(grid.shape)
