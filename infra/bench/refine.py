"""``occstream bench refine``: CPU seconds and memory of refining a drive, with reading's and writing's share beside them.

One scene of SemanticKITTI's grid (256 x 256 x 32 voxels of 0.2 m), 4.3 m from key-frame to key-frame, so that 23 of the 51
frames of a window of 25 to each side overlap; one thread. Speed is measured here and nowhere asserted.
"""

from __future__ import annotations

import resource
import statistics
import tempfile
from dataclasses import dataclass

import numpy as np

from occstream.evaluation.bayes import Confusions, confusions_of
from occstream.evaluation.drive import DriveReader
from occstream.evaluation.propagate import packed
from occstream.evaluation.refinement import RefineConfig, SceneRefiner, make_rule, refine
from occstream.sharding.grid import VoxelGrid
from occstream.sharding.manifest import Manifest
from occstream.sharding.pack import pack
from occstream.sharding.schema import SEMANTICKITTI, Frame, Labels, Scene, Taxonomy

GRID = VoxelGrid("bench", (0, -25.6, -2), (51.2, 25.6, 4.4), (0.2, 0.2, 0.2))
STEP = 4.3  # meters
ROAD, SIDEWALK, BUILDING, CAR, FREE = (*(SEMANTICKITTI.id(n) for n in ("road", "sidewalk", "building", "car")), 19)
PAPER = 5.96  # seconds a frame on a Core i9-13980HX


@dataclass(frozen=True)
class Drive:
    """Scenes of labels along a street of a formula, with 5 % wrong cubes. A ``Source``."""

    frames: int
    scenes: int = 1
    name: str = "drive"
    taxonomy: Taxonomy = SEMANTICKITTI
    grid: VoxelGrid = GRID

    def scene_names(self) -> list[str]:
        return [f"drive-{i}" for i in range(self.scenes)]

    def load(self, name: str) -> Scene:
        return Scene(name, [self.frame(name, t) for t in range(self.frames)])

    def frame(self, name: str, t: int) -> Frame:
        rng, turn = np.random.default_rng(t), 0.01 * np.sin(t / 5)
        pose = np.eye(4)
        pose[:2, :2] = [[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]]
        pose[0, 3] = STEP * t
        x, y = np.moveaxis(GRID.centers()[:, :, 0, :2] @ pose[:2, :2].T, -1, 0)
        x, z = x + pose[0, 3], GRID.centers()[0, 0, :, 2]
        height = np.where(np.abs(y) > 9, 6.0 * (np.floor(x / 7) % 4 > 0), 0.0)
        car = (np.abs(np.abs(y) - 4.5) < 1) & (x % 11 < 4.5)
        height, kind = np.where(car, 1.5, height), np.where(car, CAR, BUILDING)
        out = np.where(z < height[..., None], kind[..., None], FREE)
        out[:, :, z < 0] = np.where(np.abs(y) < 6, ROAD, SIDEWALK)[..., None]
        cubes = rng.random([n // 8 for n in GRID.shape]) < 0.05
        wrong = np.kron(cubes, np.ones((8, 8, 8), bool))
        out[wrong] = rng.integers(0, 20, wrong.sum())
        view = np.broadcast_to((np.abs(y) < 0.86 * (x - pose[0, 3]))[..., None], out.shape)
        out = out.astype(np.uint8)
        return Frame(name, t, "", t, pose, labels=Labels(out != FREE, out, np.ones(out.shape, bool), view.copy()))


def bench_refine(frames: int = 60, repeats: int = 3) -> dict[str, float]:
    """Prints and returns CPU seconds per frame by rule and kind of work, and the peak of memory in MB."""
    with tempfile.TemporaryDirectory(prefix="occstream-") as folder:
        pack(Drive(frames), folder, groups=("labels",), grid=GRID)
        return _measure(folder, repeats)


def _measure(url: str, repeats: int) -> dict[str, float]:
    base = Manifest.load(url)
    found: dict[str, float] = {}
    print(f"{base.num_frames} frames of {' x '.join(map(str, GRID.shape))} voxels, window 25; CPU seconds per frame")
    for rule in ("votes", "bayes"):
        config = RefineConfig(rule)
        reader = DriveReader(base, "labels")
        table = _table(reader) if rule == "bayes" else None
        next(SceneRefiner(reader, make_rule(config, base, table), config, device="cpu").frames(0))  # compiles
        reader.close()
        runs = [refine(url, "labels", f"pseudo-{rule}-{n}", config, table=table, device="cpu") for n in range(repeats)]
        for name in ("voting", "reading", "writing"):
            found[f"{rule}/{name}"] = statistics.median(getattr(run, name) / base.num_frames for run in runs)
        print(f"  {rule:<6} " + ", ".join(f"{found[f'{rule}/{n}']:.3f} {n}" for n in ("voting", "reading", "writing")))
    found["peak_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(
        f"  peak of memory {found['peak_mb']:,.0f} MB, packing the bench's data included; the paper: {PAPER} s a frame"
    )
    return found


def _table(reader: DriveReader) -> Confusions:
    source, view = reader.read(0, 0)
    if source.semantic is None:
        raise ValueError(f"{reader.manifest.url}: its labels have no classes to refine; bench others")
    said = packed(source.semantic, view)
    return Confusions(confusions_of(said, source.semantic, GRID, len(reader.manifest.classes) + 1), 0.5)
