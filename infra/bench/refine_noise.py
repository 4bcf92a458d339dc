"""What refining gains on exact labels of synthetic drives with errors put in: the table of docs/refining.md.

    python infra/bench/refine_noise.py FOLDER [scenes [frames]]

Half of the scenes are held out to measure the tables of confusions; the others are scored, every second frame. The folder
keeps the data for another run.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import numpy as np
import torch

from occstream.evaluation.drive import label_manifest
from occstream.evaluation.labelnoise import NoiseConfig, attach_corrupted
from occstream.evaluation.metrics import CONVENTIONS, RangedCounts, ranges_of
from occstream.evaluation.refine import RefineConfig, measure, refine
from occstream.evaluation.votes import VoteConfig, in_frustum
from occstream.sharding.grid import get_grid
from occstream.sharding.manifest import Manifest
from occstream.sharding.pack import pack
from occstream.sharding.schema import Camera
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


def scores(url: str, group: str, scenes: list[int], every: int = 2) -> str:
    """IoU / mIoU by range, in percent."""
    base = Manifest.load(url)
    labels = label_manifest(base, group)
    truth, said = ShardReader(base, ("labels",)), ShardReader(labels, (group,))
    ranges = ranges_of(GRID)
    counts = RangedCounts(len(base.classes), CONVENTIONS["occ3d"], ranges)
    for scene in scenes:
        for index in range(0, base.scenes[scene].frames, every):
            pair = (torch.from_numpy(r.frame(scene, index).labels.semantic.copy()) for r in (said, truth))
            counts.update(*(volume[None] for volume in pair))
    matrices = [counts.matrix(part) for part in ranges.parts]
    return "  ".join(f"{100 * m.iou():5.1f} /{100 * m.miou():5.1f}" for m in matrices)


def main() -> None:
    folder = Path(sys.argv[1])
    scenes, frames = (int(v) for v in (*sys.argv[2:], *("6", "40")[len(sys.argv) - 2 :]))
    url = str(folder / "data")
    options = {"scenes": scenes, "frames": frames, "image_size": (16, 16), "lidar": False, "grid": GRID.name}
    pack(open_source("synthetic", options), url, groups=("labels",), grid=GRID, scenes_per_shard=1)
    base = Manifest.load(url)
    held = base.held_out(scenes // 2)
    scored = [i for i in range(scenes) if i not in held]
    print(f"{len(scored)} scenes scored, {len(held)} held out; IoU / mIoU at {', '.join(ranges_of(GRID).parts)}")

    def row(words: str, group: str, began: float) -> None:
        print(f"{words:<44} {scores(url, group, scored)}   {time.process_time() - began:6.0f} CPU s", flush=True)

    for movers in ("none", "parked", "tracks"):
        began, config = time.process_time(), RefineConfig(movers=movers)
        refine(url, "labels", f"pseudo-exact-{movers}", config)
        row(f"exact labels, voted, movers {movers}", f"pseudo-exact-{movers}", began)
    for number, (kind, noise) in enumerate(KINDS.items()):
        group = f"pseudo-noise-{number}"
        attach_corrupted(url, group, noise, forward_view())
        print(f"\nerrors {kind}")
        row("as predicted", group, time.process_time())
        rules = {
            "majority": RefineConfig(votes=VoteConfig("none", empty=1.0), movers="none"),
            "camera weights (paper), free weighs 1": RefineConfig(votes=VoteConfig(empty=1.0), movers="none"),
            "camera weights, free 0.3, movers none": RefineConfig(movers="none"),
            "camera weights, free 0.3, movers parked": RefineConfig(),
            "camera weights, free 0.3, movers tracks": RefineConfig(movers="tracks"),
            "naive Bayes, movers none": RefineConfig("bayes", movers="none"),
            "naive Bayes, movers parked": RefineConfig("bayes"),
            "naive Bayes, movers tracks": RefineConfig("bayes", movers="tracks"),
        }
        table, _ = measure(url, group, held, rules["naive Bayes, movers none"])
        for turn, (words, config) in enumerate(rules.items()):
            began = time.process_time()
            name = f"pseudo-refined-{number}-{turn}"
            refine(url, group, name, config, table=table if config.rule == "bayes" else None)
            words += f", λ {table.exponent:g}" if config.rule == "bayes" else ""
            row(words, name, began)


if __name__ == "__main__":
    main()
