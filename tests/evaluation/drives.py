"""Drives through a street that a formula describes: labels that are exact, cheap and known everywhere."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import simplejpeg

from occstream.sharding.attach import Sidecar
from occstream.sharding.codec import Coding, encode
from occstream.sharding.grid import VoxelGrid
from occstream.sharding.manifest import Manifest
from occstream.sharding.poses import apply
from occstream.sharding.schema import OCC3D, Boxes, Camera, Frame, Labels, LidarSweep, Scene, Taxonomy
from occstream.sharding.stream import ShardReader

GRID = VoxelGrid("street", (-8, -8, -1), (8, 8, 3), (0.5, 0.5, 0.5))
CAR, ROAD, SIDEWALK, WALL, FREE = (*(OCC3D.id(n) for n in ("car", "driveable_surface", "sidewalk", "manmade")), 17)
SIZE = np.array([4.0, 2.0, 1.5])  # of a car


def solid(points: np.ndarray, cars: list[tuple[float, float]]) -> np.ndarray:
    """(...) uint8 classes at points of the world; cars stand on the road at x, y."""
    x, y, z = np.moveaxis(points, -1, 0)
    out = np.full(x.shape, FREE, np.uint8)
    out[z < 0] = np.where(np.abs(y) < 5, ROAD, SIDEWALK)[z < 0]
    out[(np.abs(y) > 7) & (np.floor(x / 6) % 3 > 0)] = WALL
    for cx, cy in cars:
        out[(np.abs(x - cx) < 2) & (np.abs(y - cy) < 1) & (z >= 0) & (z < 1.5)] = CAR
    return out


@dataclass(frozen=True)
class Street:
    """Scenes in which the ego drives 2 m a frame along a parked car and behind one that drives. A ``Source``.

    With ``rig``, frames have a camera that looks ahead and a LiDAR that is turned to the left, and labels no masks; a grid in
    the LiDAR's frame needs it.
    """

    scenes: int = 2
    frames: int = 6
    grid: VoxelGrid = GRID
    name: str = "street"
    taxonomy: Taxonomy = OCC3D
    offset: tuple[float, float, float] = field(default=(4.5e5, 5.2e6, 70.0))
    rig: bool = False

    def scene_names(self) -> list[str]:
        return [f"street-{i}" for i in range(self.scenes)]

    def load(self, name: str) -> Scene:
        number = int(name.split("-")[1])
        return Scene(name, [self.frame(name, number, t) for t in range(self.frames)])

    def frame(self, name: str, number: int, t: int) -> Frame:
        turn = 0.05 * t * (-1) ** number
        pose = np.eye(4)
        pose[:2, :2] = [[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]]
        pose[:3, 3] = 2.0 * t, -1.5, 0.0
        cars = [(5.0 + number, 3.0), (3.0 * t + 4.0, -1.5)]
        to_ego = np.array([[0, -1, 0, 1.0], [1, 0, 0, 0.2], [0, 0, 1, 0.5], [0, 0, 0, 1]], float)
        grid_pose = pose @ to_ego if self.grid.frame == "lidar" else pose
        labels = solid(apply(grid_pose, self.grid.centers()), cars)
        rows = []
        for x, y in cars:
            place = pose[:3, :3].T @ (np.array([x, y, SIZE[2] / 2]) - pose[:3, 3])
            rows.append([*place, *SIZE, -turn])
        boxes = Boxes(np.array(rows, np.float32), ["car", "car"], ["parked", "driving"])
        placed = pose.copy()
        placed[:3, 3] += self.offset
        view = apply(np.eye(4), self.grid.centers())[..., 0] > 0
        found = Labels(labels != FREE, labels, *((None, None) if self.rig else (np.ones(self.grid.shape, bool), view)))
        out = Frame(name, t, f"{name}-{t}", 10**15 + t * 500_000, placed, boxes=boxes, labels=found)
        if self.rig:
            ahead = np.array([[0, 0, 1, 0], [-1, 0, 0, 0], [0, -1, 0, 1.0], [0, 0, 0, 1]], float)
            jpeg = simplejpeg.encode_jpeg(np.zeros((16, 24, 3), np.uint8))
            intrinsics = np.array([[12.0, 0, 11.5], [0, 12, 7.5], [0, 0, 1]])
            out.cameras = {"CAM_FRONT": Camera(jpeg, 24, 16, intrinsics, ahead, placed, out.timestamp)}
            out.lidar = LidarSweep(np.zeros((1, 3), np.float32), to_ego, placed, out.timestamp)
        return out


def predictions(url: str, group: str, wrong: float = 0.2, seed: int = 0, *, evidence: bool = False) -> Manifest:
    """Attaches labels with a share of wrong voxels, new ones in every frame; with evidence, what is missed is in doubt."""
    base = Manifest.load(url)
    reader = ShardReader(base, ("labels",))
    origin = {"wrong": wrong, "seed": seed}
    sidecar = Sidecar(
        base, group, grid=base.grid, taxonomy=base.taxonomy, classes=base.classes, labels="noise", origin=origin
    )
    numbers = {scene.name: number for number, scene in enumerate(base.scenes)}

    def fill(writer, scenes):
        for scene in scenes:
            for index in range(scene.frames):
                frame = reader.frame(numbers[scene.name], index)
                rng = np.random.default_rng([seed, numbers[scene.name], index])
                true = frame.labels.semantic
                said = true.copy()
                hit = rng.random(said.shape) < wrong
                said[hit] = rng.choice([CAR, ROAD, WALL, FREE], hit.sum())
                frame.labels = Labels(said != FREE, said, frame.labels.mask_lidar, frame.labels.mask_camera)
                if evidence:
                    doubt = np.where(rng.random(said.shape) < 0.8, true != FREE, rng.random(said.shape) < 0.1)
                    frame.labels.evidence = np.where(said == FREE, 100 * doubt, 200).astype(np.uint8)
                frame.boxes = None
                writer.add(frame.key, encode(frame, "labels", Coding(level=1)))

    for number in sorted(sidecar.scenes):
        sidecar.write(number, fill)
    reader.close()
    return sidecar.publish()


def semantics(manifest: Manifest) -> dict[str, np.ndarray]:
    """(X, Y, Z) uint8 by frame key, of the manifest's own labels."""
    reader = ShardReader(manifest, (manifest.label_group,))
    found = {}
    for number, scene in enumerate(manifest.scenes):
        for index in range(scene.frames):
            frame = reader.frame(number, index)
            found[frame.key] = frame.labels.semantic
    reader.close()
    return found
