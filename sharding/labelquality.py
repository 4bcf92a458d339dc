"""How good generated labels are, measured by sweeps that were left out when they were made.

A sweep that took no part is a test: its returns should lie in occupied voxels, and its rays should cross none before
they end. The baseline is what a single sweep gives: the nearest one that was kept, voxelized.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from occstream.sharding.grid import VoxelGrid
from occstream.sharding.labelconfig import LabelConfig
from occstream.sharding.labels import label_scene, sweep_to_grid, usable_returns
from occstream.sharding.levelling import level
from occstream.sharding.schema import Frame, LidarSweep, Scene, Taxonomy, labeled, posed, swept
from occstream.sharding.voxelrays import crossings

SLACK = 1.0  # meters before its end in which a ray may touch what it hits


@dataclass
class Score:
    """Counts over held-out sweeps.

    Attributes:
        returns: inside the grid; ``hits`` of them in occupied voxels, ``unknown`` in unseen ones.
        rays: that enter the grid; ``crossing`` of them pass an occupied voxel more than ``SLACK`` before they end. A ray
            that comes in flat over the road passes the road's own voxels for meters, so this is never near zero.
        passed: voxels that the rays pass, once for each ray; ``wrong`` of these are occupied.
    """

    returns: int = 0
    hits: int = 0
    unknown: int = 0
    rays: int = 0
    crossing: int = 0
    passed: int = 0
    wrong: int = 0

    @property
    def hit_share(self) -> float:
        return self.hits / max(1, self.returns)

    @property
    def free_share(self) -> float:
        """Of the returns: something is where the labels say that nothing is."""
        return (self.returns - self.hits - self.unknown) / max(1, self.returns)

    @property
    def crossing_share(self) -> float:
        return self.crossing / max(1, self.rays)

    @property
    def wrong_share(self) -> float:
        return self.wrong / max(1, self.passed)


@dataclass
class Quality:
    """Scores of the labels and of the single-sweep baseline; IoU against exact truth where the source brings it.

    Attributes:
        truth: (intersection, union) of occupied voxels within what was observed, of labels and of the baseline.
    """

    labels: Score = field(default_factory=Score)
    single: Score = field(default_factory=Score)
    truth: np.ndarray = field(default_factory=lambda: np.zeros((2, 2), np.int64))
    sweeps: int = 0

    def add(self, other: Quality) -> None:
        """Adds the counts of another scene."""
        for mine, its in ((self.labels, other.labels), (self.single, other.single)):
            for f in dataclasses.fields(Score):
                setattr(mine, f.name, getattr(mine, f.name) + getattr(its, f.name))
        self.truth = self.truth + other.truth
        self.sweeps += other.sweeps

    def table(self) -> str:
        """For the terminal."""
        lines = [
            f"{self.sweeps} sweeps left out",
            f"{'':<28} {'aggregated':>12} {'single sweep':>12}",
            f"{'returns in occupied voxels':<28} {_percent(self.labels.hit_share)} {_percent(self.single.hit_share)}",
            f"{'returns in free voxels':<28} {_percent(self.labels.free_share)} {'-':>12}",
            f"{'returns in unseen voxels':<28} {_percent(self.labels.unknown / max(1, self.labels.returns))} {'-':>12}",
            f"{'rays that cross occupied':<28} {_percent(self.labels.crossing_share)} {_percent(self.single.crossing_share)}",
            f"{'passed voxels occupied':<28} {_percent(self.labels.wrong_share)} {_percent(self.single.wrong_share)}",
        ]
        if self.truth[0, 1]:
            shares = [_percent(i / max(1, u)) for i, u in self.truth]
            lines.append(f"{'IoU with exact truth':<28} {shares[0]} {shares[1]}")
        return "\n".join(lines)


def _percent(share: float) -> str:
    return f"{100 * share:>10.2f} %"


def measure(scene: Scene, grid: VoxelGrid, taxonomy: Taxonomy, config: LabelConfig, *, every: int = 4) -> Quality:
    """Leaves every n-th key sweep out of the aggregation and tests the labels of its frame with it.

    Args:
        scene: at least two frames with LiDAR. If its frames bring labels, these are taken as exact truth.
        every: of n consecutive key-frames one is left out; each takes its turn, so labels are made n times.

    Raises:
        ValueError: fewer than two frames, or ``every`` below 2.
    """
    count = len(scene.frames)
    if count < 2 or every < 2:
        raise ValueError(f"scene {scene.name}: needs at least 2 frames (has {count}) and every >= 2 (is {every})")
    if config.level:  # poses are an input: corrected with all sweeps, as in a real run
        scene, config = level(scene), dataclasses.replace(config, level=False)
    every = min(every, count)
    quality = Quality()
    for turn in range(every):
        held = range(turn, count, every)
        frames = [
            dataclasses.replace(f, lidar=_emptied(swept(f))) if i in held else f for i, f in enumerate(scene.frames)
        ]
        made = label_scene(dataclasses.replace(scene, frames=frames), grid, taxonomy, config)
        for i in held:
            original = scene.frames[i]
            near = min(
                (s for j, f in enumerate(frames) if j not in held for s in (*f.sweeps, swept(f))), key=_from(original)
            )
            index, inside = grid.to_index(usable_returns(near, sweep_to_grid(original, near, grid), config)[0])
            single = np.zeros(grid.shape, bool)
            single[tuple(index[inside].T)] = True
            labels = labeled(made.frames[i])
            observed = labels.known()
            _score(quality.labels, original, labels.binary, observed=observed, grid=grid, config=config)
            _score(quality.single, original, single, observed=None, grid=grid, config=config)
            quality.sweeps += 1
            if original.labels is not None:
                truth = original.labels.binary
                for row, found in enumerate((labels.binary, single)):
                    quality.truth[row] += [
                        (found & truth & observed).sum(), ((found | truth) & observed).sum()
                    ]  # fmt: skip
    return quality


def _from(frame: Frame) -> Callable[[LidarSweep], float]:
    """Distance of a sweep from a frame: in time, or in place where there is no time."""
    time = frame.timestamp
    if time is None:
        place = posed(frame)[:3, 3]
        return lambda sweep: float(np.linalg.norm(sweep.ego_to_global[:3, 3] - place))
    return lambda sweep: abs(sweep.timestamp - time)


def _score(
    score: Score,
    frame: Frame,
    occupied: np.ndarray,
    *,
    observed: np.ndarray | None,
    grid: VoxelGrid,
    config: LabelConfig,
) -> None:
    sweep = swept(frame)
    pose = sweep_to_grid(frame, sweep, grid)
    ends = usable_returns(sweep, pose, config)[0].astype(np.float64)
    index, inside = grid.to_index(ends)
    at = tuple(index[inside].T)
    score.returns += int(inside.sum())
    score.hits += int(occupied[at].sum())
    if observed is not None:
        score.unknown += int((~observed[at]).sum())
    lower, voxel = np.array(grid.lower), np.array(grid.voxel)
    origin = (pose[:3, 3] - lower) / voxel
    ends = (ends - lower) / voxel
    found = crossings(occupied, origin, ends, SLACK / min(grid.voxel))
    score.rays += int((found[:, 0] > 0).sum())
    score.crossing += int((found[:, 1] > 0).sum())
    score.passed += int(found[:, 0].sum())
    score.wrong += int(found[:, 1].sum())


def _emptied(sweep: LidarSweep) -> LidarSweep:
    names = ("xyz", "intensity", "ring", "time_lag", "classes", "moving")
    return dataclasses.replace(sweep, **{n: v[:0] for n in names if (v := getattr(sweep, n)) is not None})
