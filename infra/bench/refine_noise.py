"""What refining gains on exact labels of synthetic drives with errors put in: the table of docs/refining.md.

    python infra/bench/refine_noise.py FOLDER [scenes [frames]]

Half of the scenes are held out to measure the tables of confusions; the others are scored. The folder
keeps the data for another run.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import numpy as np
import torch

from occstream.evaluation.bayes import Confusions
from occstream.evaluation.drive import DriveReader
from occstream.evaluation.labelnoise import NoiseConfig, attach_corrupted
from occstream.evaluation.metrics import CONVENTIONS, RangedCounts, ranges_of
from occstream.evaluation.refinement import RefineConfig, SceneRefiner, make_rule, measure
from occstream.evaluation.votes import VoteConfig, in_frustum
from occstream.sharding.grid import get_grid
from occstream.sharding.manifest import Manifest
from occstream.sharding.pack import pack
from occstream.sharding.schema import Camera, labeled
from occstream.sharding.sources import open_source
from occstream.sharding.stream import ShardReader

GRID = get_grid("0,-25.6,-2,51.2,25.6,4.4,0.4")  # SemanticKITTI's box with voxels of 0.4 m
KINDS = {
    "new in every frame": NoiseConfig(),
    "and persistent (12 % lost, 15 % wrong class)": NoiseConfig(always_lost=0.12, always_wrong=0.15),
    "and twice as much": NoiseConfig(always_lost=0.24, always_wrong=0.30),
}


def forward_view() -> np.ndarray:
    """(X, Y, Z) bool: what KITTI's left color camera looks at, 81.6 by 29.3 degrees, 1.65 m above the road."""
    to_ego = np.array([[0, 0, 1, 0.5], [-1, 0, 0, 0], [0, -1, 0, 1.65], [0, 0, 0, 1]], float)
    intrinsics = np.array([[718.856, 0, 620], [0, 718.856, 187.5], [0, 0, 1]])
    return in_frustum(GRID, np.eye(4), [Camera(b"", 1241, 376, intrinsics, to_ego, np.eye(4), 0)])


class Scorer:
    """Scores labels of some scenes of a data set, as read or refined."""

    def __init__(self, url: str, scenes: list[int]) -> None:
        self.base, self.scenes = Manifest.load(url), scenes
        self.truth = {}
        reader = ShardReader(self.base, ("labels",))
        for scene in scenes:
            frames = range(self.base.scenes[scene].frames)
            self.truth[scene] = [labeled(reader.frame(scene, i)).classes().copy() for i in frames]
        reader.close()

    def row(self, words: str, group: str, config: RefineConfig, table: Confusions | None = None) -> None:
        """Prints IoU / mIoU by range, in percent, of a group refined by a rule."""
        began, ranges = time.process_time(), ranges_of(GRID)
        counts = RangedCounts(len(self.base.classes), CONVENTIONS["occ3d"], ranges)
        reader = DriveReader(self.base, group, config.voxels, config.view, tracks=config.movers == "tracks")
        refiner = SceneRefiner(reader, make_rule(config, self.base, table), config)
        for scene in self.scenes:
            for (_, said), true in zip(refiner.frames(scene), self.truth[scene]):
                counts.update(torch.from_numpy(said)[None], torch.from_numpy(true)[None])
        reader.close()
        matrices = [counts.matrix(part) for part in ranges.named]
        words += f", λ {table.exponent:g}" if table else ""
        found = "  ".join(f"{100 * m.iou():5.1f} /{100 * m.miou():5.1f}" for m in matrices)
        print(f"{words:<44} {found}   {time.process_time() - began:5.0f} CPU s", flush=True)


def main() -> None:
    folder = Path(sys.argv[1])
    scenes, frames = (int(v) for v in (*sys.argv[2:], *("6", "40")[len(sys.argv) - 2 :]))
    url = str(folder / "data")
    options = {"scenes": scenes, "frames": frames, "image_size": (16, 16), "lidar": False, "grid": GRID.name}
    pack(open_source("synthetic", options), url, groups=("labels",), grid=GRID, scenes_per_shard=1)
    base = Manifest.load(url)
    held = base.held_out(scenes // 2)
    scorer = Scorer(url, [i for i in range(scenes) if i not in held])
    print(f"{len(scorer.scenes)} scenes scored, {len(held)} held out; IoU / mIoU at {', '.join(ranges_of(GRID).named)}")
    for movers in ("none", "parked", "tracks"):
        scorer.row(f"exact labels, voted, movers {movers}", "labels", RefineConfig(movers=movers))
    for number, (kind, noise) in enumerate(KINDS.items()):
        group = f"pseudo-noise-{number}"
        attach_corrupted(url, group, noise, forward_view())
        print(f"\nerrors {kind}")
        scorer.row("as predicted", group, RefineConfig(window=0))
        table, _ = measure(url, group, held, RefineConfig("bayes"))
        plain, paper = VoteConfig("none", empty=1.0), VoteConfig(empty=1.0)
        scorer.row("majority", group, RefineConfig(votes=plain, movers="none"))
        scorer.row("camera weights (paper), free weighs 1", group, RefineConfig(votes=paper, movers="none"))
        for movers in ("none", "parked", "tracks"):
            scorer.row(f"camera weights, free 0.3, movers {movers}", group, RefineConfig(movers=movers))
        for movers in ("none", "parked", "tracks"):
            scorer.row(f"naive Bayes, movers {movers}", group, RefineConfig("bayes", movers=movers), table)


if __name__ == "__main__":
    main()
