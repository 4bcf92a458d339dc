"""RayIoU: occupancy compared by what simulated LiDAR rays meet, with panoptic quality, a velocity error and a combined score.

Liu et al., "Fully Sparse 3D Occupancy Prediction" (SparseOcc), ECCV 2024, section 4; mAVE and the occupancy score of the
CVPR 2024 challenge on occupancy and flow. A ray hits the first voxel that is not free; its depth is where it leaves that
voxel. A ray is right if its class is, and its depth within 1, 2 or 4 m.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numba
import numpy as np
import torch

from occstream.evaluation.metrics import sum_over_ranks
from occstream.evaluation.panoptic import PanopticMetric
from occstream.sharding.exactmath import cos_sin
from occstream.sharding.grid import VoxelGrid
from occstream.sharding.poses import compose, inverse
from occstream.sharding.schema import IGNORE, Taxonomy

LIMITS = (1.0, 2.0, 4.0)  # meters
VELOCITY_LIMIT = 2.0  # meters; rays that are right to within it have a velocity error
MOVERS = ("car", "truck", "trailer", "bus", "construction_vehicle", "bicycle", "motorcycle", "pedestrian")
ORIGINS = 8  # most of a frame
MIN_RAYS = 10  # of an unmatched segment that counts in RayPQ
_SPEED = float(1 << 24)  # velocity errors are added in units of 1 / _SPEED m/s, see gather.SHARE


def ray_directions() -> np.ndarray:
    """(14040, 3) float32 unit vectors: 39 inclinations from -45 to 12.5 degrees, which become denser toward the horizon as
    rings on the ground are equally spaced, and 360 azimuths of one degree each."""
    pitches = [-math.pi / 2 + math.atan(k) for k in range(1, 11)]
    while pitches[-1] < 0.21:
        pitches.append(pitches[-1] + pitches[9] - pitches[8])
    out = np.empty((len(pitches), 360, 3))
    for i, pitch in enumerate(pitches):
        c, s = cos_sin(pitch)
        for j in range(360):
            x, y = cos_sin(math.radians(j))
            out[i, j] = c * x, c * y, s
    return out.reshape(-1, 3).astype(np.float32)


def ray_origins(lidar_to_global: Sequence[np.ndarray], grid_to_global: np.ndarray, grid: VoxelGrid) -> np.ndarray:
    """(1..8, 3) meters in the grid's frame: where the scene's LiDAR was, evenly chosen among the places that are at least
    1 m within the grid in x and y.

    Args:
        lidar_to_global: (4, 4) of all key-frames of the scene, in time order.
        grid_to_global: (4, 4) of the grid's frame at the key-frame that is evaluated.
        grid: of the labels.
    """
    to_grid = inverse(grid_to_global)
    places = np.array([compose(to_grid, pose)[:3, 3] for pose in lidar_to_global])
    low, high = np.array(grid.lower[:2]) + 1, np.array(grid.upper[:2]) - 1
    places = places[((places[:, :2] > low) & (places[:, :2] < high)).all(1)]
    if len(places) > ORIGINS:
        places = places[np.round(np.linspace(0, len(places) - 1, ORIGINS)).astype(np.int64)]
    return places


@dataclass(frozen=True)
class RayHits:
    """What rays meet.

    Attributes:
        classes: (N,) uint8, ``free`` where nothing was hit.
        depth: (N,) float64 meters to where the ray leaves the voxel it hit, or else the grid; NaN if it never enters.
        voxel: (N,) int64 place of that voxel in C order; of the last one in the grid where nothing was hit.
    """

    classes: np.ndarray
    depth: np.ndarray
    voxel: np.ndarray


def cast(labels: np.ndarray, origins: np.ndarray, grid: VoxelGrid, free: int, *, directions: np.ndarray) -> RayHits:
    """Casts every direction from every origin.

    Args:
        labels: (X, Y, Z) integers; classes below ``free`` stop a ray.
        origins: (A, 3) meters in the grid's frame.
        grid: of the labels.
        free: id of free space.
        directions: (R, 3) unit vectors.

    Returns:
        A * R rays, those of the first origin first.
    """
    lower, size = np.array(grid.lower), np.array(grid.voxel)
    starts = (np.asarray(origins, np.float64).reshape(-1, 3) - lower) / size
    steps = np.asarray(directions).astype(np.float64) / size
    solid = np.ascontiguousarray(np.asarray(labels) < free)
    depth, voxel, hit = _walk(solid, starts, steps)
    classes = np.where(hit, np.asarray(labels).reshape(-1)[voxel], free).astype(np.uint8)
    return RayHits(classes, depth, voxel)


@numba.njit(cache=True, nogil=True)
def _walk(solid: np.ndarray, starts: np.ndarray, steps: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(depth, voxel, hit) of every direction from every origin, in units of the length of a step. Among equal distances to
    the next face z goes before y, and y before x, as the benchmark's own walk has it."""
    nx, ny, nz = solid.shape
    rays = len(steps)
    depth, voxel = np.full(len(starts) * rays, np.nan), np.zeros(len(starts) * rays, np.int64)
    hit = np.zeros(len(starts) * rays, np.bool_)
    for n in range(len(starts) * rays):
        ox, oy, oz = starts[n // rays]
        dx, dy, dz = steps[n % rays]
        x, y, z = int(ox), int(oy), int(oz)  # truncated: a start just below the grid is in it
        sx, sy, sz = 1 if dx > 0 else -1, 1 if dy > 0 else -1, 1 if dz > 0 else -1
        px, py, pz = abs(1 / dx) if dx else np.inf, abs(1 / dy) if dy else np.inf, abs(1 / dz) if dz else np.inf
        tx = (x + (dx > 0) - ox) / dx if dx else np.inf
        ty = (y + (dy > 0) - oy) / dy if dy else np.inf
        tz = (z + (dz > 0) - oz) / dz if dz else np.inf
        while True:
            if (x < 0 and sx < 0) or (y < 0 and sy < 0) or (z < 0 and sz < 0):
                break
            if (x >= nx and sx > 0) or (y >= ny and sy > 0) or (z >= nz and sz > 0):
                break
            if tx < ty and tx < tz:
                t, mx, my, mz = tx, sx, 0, 0
                tx += px
            elif ty < tz:
                t, mx, my, mz = ty, 0, sy, 0
                ty += py
            else:
                t, mx, my, mz = tz, 0, 0, sz
                tz += pz
            if 0 <= x < nx and 0 <= y < ny and 0 <= z < nz:
                depth[n], voxel[n] = t, (x * ny + y) * nz + z
                if solid[x, y, z]:
                    hit[n] = True
                    break
            elif not np.isfinite(t):
                break
            x, y, z = x + mx, y + my, z + mz
    return depth, voxel, hit


class RayMetric:
    """RayIoU over frames; where flow is given mAVE and the occupancy score, where instances are given RayPQ.

    Args:
        taxonomy: of the labels.
        grid: of the labels.
        movers: classes that have a velocity error.
        cache_bytes: memory for what the rays of a frame's truth meet, so that the next evaluation does not cast them again.
    """

    def __init__(
        self, taxonomy: Taxonomy, grid: VoxelGrid, *, movers: Sequence[str] = MOVERS, cache_bytes: int = 256 << 20
    ) -> None:
        self.taxonomy, self.grid, self.directions = taxonomy, grid, ray_directions()
        self.movers = tuple(name for name in movers if name in taxonomy.classes)
        k = taxonomy.num_classes
        # By class: rays of the truth, rays of the prediction, and right ones at each limit.
        self.counts = torch.zeros(k, 2 + len(LIMITS), dtype=torch.int64)
        self.speed = torch.zeros(k, 2, dtype=torch.int64)  # sum of errors (units of 1 / _SPEED m/s), rays
        names = dict(enumerate(taxonomy.classes))
        self.panoptic = [PanopticMetric(names, taxonomy.things, min_points=MIN_RAYS) for _ in LIMITS]
        self._stuff = np.array([name not in taxonomy.things for name in taxonomy.classes] + [True])
        self._truths: dict[str, tuple[np.ndarray, RayHits]] = {}
        self._cache_left = cache_bytes

    def update(
        self,
        labels: np.ndarray,
        truth: np.ndarray,
        origins: np.ndarray,
        *,
        key: str | None = None,
        flow: np.ndarray | None = None,
        true_flow: np.ndarray | None = None,
        instances: np.ndarray | None = None,
        true_instances: np.ndarray | None = None,
    ) -> None:
        """Adds a frame.

        Args:
            labels, truth: (X, Y, Z) integers, classes or ``free_id``; ``IGNORE`` is free.
            origins: (A, 3) meters in the grid's frame, see ``ray_origins``.
            key: of the frame, under which its truth is kept for the next call with the same key and origins.
            flow, true_flow: (X, Y, Z, 2) m/s in the axes of the grid; both or none.
            instances, true_instances: (X, Y, Z) integers, of things; both or none. Stuff is one segment a class.
        """
        for name, array in (("predicted", labels), ("true", truth)):
            if array.shape != self.grid.shape:
                raise ValueError(f"{name} labels are {array.shape}, grid {self.grid.name} is {self.grid.shape}")
            if ((array > self.taxonomy.free_id) & (array != IGNORE)).any() or (array < 0).any():
                raise ValueError(f"{name} labels hold an id outside 0..{self.taxonomy.free_id}")
        origins = np.asarray(origins, np.float64).reshape(-1, 3)
        if not np.isfinite(origins).all():
            raise ValueError(f"origins of rays that are not finite: {origins.tolist()}")
        there = self._true_hits(truth, origins, key)
        found = cast(labels, origins, self.grid, self.taxonomy.free_id, directions=self.directions)
        k = self.taxonomy.num_classes
        keep = there.classes < k
        a, b = found.classes[keep], there.classes[keep]
        apart = abs(found.depth[keep] - there.depth[keep])
        self.counts[:, 0] += _bincount(b, k)
        self.counts[:, 1] += _bincount(a[a < k], k)
        for i, limit in enumerate(LIMITS):
            self.counts[:, 2 + i] += _bincount(a[(a == b) & (apart < limit)], k)
        if flow is not None and true_flow is not None:
            right = (a == b) & (apart < VELOCITY_LIMIT)
            mine, theirs = (
                np.asarray(f, np.float64).reshape(-1, 2)[hits.voxel[keep][right]]
                for f, hits in ((flow, found), (true_flow, there))
            )
            self._add_speed(a[right], mine, theirs)
        if instances is not None and true_instances is not None:
            ids, true_ids = (
                np.where(self._stuff[classes], 0, np.asarray(i).reshape(-1)[hits.voxel[keep]])
                for classes, i, hits in ((a, instances, found), (b, true_instances, there))
            )
            for limit, metric in zip(LIMITS, self.panoptic):
                metric.update(a, ids, b, true_ids, near=apart < limit)

    def _add_speed(self, classes: np.ndarray, mine: np.ndarray, theirs: np.ndarray) -> None:
        error = np.rint(np.sqrt(((mine - theirs) ** 2).sum(-1)) * _SPEED)
        known, k = np.isfinite(error), len(self.speed)
        total = np.zeros(k, np.int64)
        np.add.at(total, classes[known], error[known].astype(np.int64))
        self.speed += torch.stack([torch.from_numpy(total), _bincount(classes[known], k)], 1)

    def _true_hits(self, truth: np.ndarray, origins: np.ndarray, key: str | None) -> RayHits:
        kept = self._truths.get(key) if key is not None else None
        if kept and np.array_equal(kept[0], origins):
            return kept[1]
        hits = cast(truth, origins, self.grid, self.taxonomy.free_id, directions=self.directions)
        size = hits.classes.nbytes + hits.depth.nbytes + hits.voxel.nbytes
        if key is not None and kept is None and size <= self._cache_left:
            self._truths[key] = origins.copy(), hits
            self._cache_left -= size
        return hits

    def reset(self) -> None:
        """Counts from zero again; what is known of the truth stays."""
        for counts in (self.counts, self.speed, *(metric.counts for metric in self.panoptic)):
            counts.zero_()

    def all_reduce(self, device: torch.device | str = "cpu") -> None:
        """Sums over ranks (collective, once); exact, however frames are spread."""
        self.counts, self.speed = (sum_over_ranks(c, device) for c in (self.counts, self.speed))
        for metric in self.panoptic:
            metric.all_reduce(device)

    def result(self) -> dict[str, float]:
        """``RayIoU``: mean over limits and the classes that occur; ``RayIoU/1m`` and so on, ``RayIoU/class``. With flow also
        ``mAVE`` (m/s, over movers with a right ray) and ``OccScore`` = 0.9 RayIoU + 0.1 max(1 - mAVE, 0), with
        instances ``RayPQ`` and ``RayPQ/1m``. NaN where there was nothing to count."""
        true, found, *right = (c.double() for c in self.counts.T)
        iou = torch.stack([r / (true + found - r) for r in right])
        out = {"RayIoU": float(iou.nanmean())}
        out |= {f"RayIoU/{limit:g}m": float(row.nanmean()) for limit, row in zip(LIMITS, iou)}
        out |= {f"RayIoU/{name}": float(iou[:, c].nanmean()) for c, name in enumerate(self.taxonomy.classes)}
        if self.speed[:, 1].any():
            each = self.speed[:, 0].double() / _SPEED / self.speed[:, 1]
            movers = torch.tensor([self.taxonomy.id(name) for name in self.movers], dtype=torch.int64)
            out["mAVE"] = float(each[movers].nanmean())
            out["OccScore"] = 0.9 * out["RayIoU"] + 0.1 * max(1 - out["mAVE"], 0)
            out |= {f"AVE/{name}": float(each[c]) for name, c in zip(self.movers, movers.tolist())}
        if self.panoptic[0].counts.any():
            quality = [float(np.mean(list(m.of_occurring().values()) or math.nan)) for m in self.panoptic]
            out |= {"RayPQ": float(np.mean(quality))} | {f"RayPQ/{d:g}m": q for d, q in zip(LIMITS, quality)}
        return out

    def table(self) -> str:
        """For the terminal."""
        found = self.result()
        means = [n for n in ("RayIoU", *(f"RayIoU/{d:g}m" for d in LIMITS), "RayPQ", "mAVE", "OccScore") if n in found]
        lines = [", ".join(f"{name} {found[name]:.4f}" for name in means)]
        return "\n".join(lines + [f"  {n:<22} {found[f'RayIoU/{n}']:7.4f}" for n in self.taxonomy.classes])


def _bincount(classes: np.ndarray, k: int) -> torch.Tensor:
    return torch.from_numpy(np.bincount(classes, minlength=k)[:k].astype(np.int64))
