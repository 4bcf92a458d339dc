"""A tiny hand-made source: every frame's content tells which frame it is."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import simplejpeg

from occstream.sharding.grid import VoxelGrid
from occstream.sharding.schema import OCC3D, Boxes, Camera, Frame, Labels, LidarSweep, Scene, Taxonomy

GRID = VoxelGrid("toy", (-4, -4, -1), (4, 4, 1), (1, 1, 1))


def toy_frame(scene: str, index: int, seed: int = 0) -> Frame:
    rng = np.random.default_rng([seed, index, *scene.encode()])
    pose = np.eye(4)
    pose[:3, 3] = rng.normal(size=3) * 100
    jpeg = simplejpeg.encode_jpeg(rng.integers(0, 255, (16, 24, 3), np.uint8), 90)
    later = pose.copy()
    later[0, 3] += 0.25
    intrinsics = np.array([[20.0, 0, 11.5], [0, 20, 7.5], [0, 0, 1]])
    camera = Camera(jpeg, 24, 16, intrinsics, np.eye(4), later, 10**15 + index)
    n = int(rng.integers(0, 50))
    sweep = LidarSweep(
        xyz=rng.normal(size=(n, 3)).astype(np.float32),
        sensor_to_ego=np.eye(4),
        ego_to_global=pose,
        timestamp=10**15 + index,
        intensity=rng.random(n).astype(np.float32),
        ring=rng.integers(0, 32, n).astype(np.uint8),
    )
    semantic = rng.integers(0, 18, GRID.shape).astype(np.uint8)
    labels = Labels(semantic != 17, semantic, rng.random(GRID.shape) > 0.5)
    velocity = np.array([[1, 2], [np.nan] * 2], np.float32)
    boxes = Boxes(rng.normal(size=(2, 7)).astype(np.float32), ["car", "bus"], ["a", "b"], velocity)
    return Frame(scene, index, f"token-{index}", 10**15 + index, pose, {"CAM_A": camera}, sweep, [], boxes, labels)


@dataclass(frozen=True)
class ToySource:
    counts: tuple[int, ...] = (3, 5, 2, 4)
    name: str = "toy"

    @property
    def taxonomy(self) -> Taxonomy:
        return OCC3D

    @property
    def grid(self) -> VoxelGrid:
        return GRID

    def scene_names(self) -> list[str]:
        return [f"toy-{i}" for i in range(len(self.counts))]

    def load(self, name: str) -> Scene:
        return Scene(name, [toy_frame(name, i) for i in range(self.counts[int(name.split("-")[1])])], {"town": "here"})
