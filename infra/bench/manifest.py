"""``python -m infra.bench.manifest [SCENES …]``: how long the manifest of so many scenes takes to open, and what memory.

The manifests have names as UUIDs, attributes as PhysicalAI-AV has them, 40 frames a scene, ten scenes a shard and three groups.
Each is opened in a process of its own, which then plans the first batch of an epoch for one of 4,096 ranks.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
import uuid
from pathlib import Path

import numpy as np

from occstream.sharding.entries import SceneTable, ShardTable
from occstream.sharding.grid import get_grid
from occstream.sharding.manifest import Manifest
from occstream.sharding.order import Order, by_scenes, training_batches
from occstream.sharding.schema import get_taxonomy

FRAMES, PER_SHARD, GROUPS = 40, 10, ("cameras", "lidar", "labels")


def make(folder: str, scenes: int) -> None:
    """Publishes a manifest; there are no shards."""
    rng = np.random.default_rng(0)
    texts = np.array([str(uuid.UUID(bytes=rng.bytes(16))) for _ in range(scenes)], "S36")
    shares = rng.integers(0, 300, (scenes, 3))
    attributes = [
        {
            "country": "Germany", "month": int(row[0]) % 12 + 1, "hour_of_day": int(row[1]) % 24, "revision": "0" * 40,
            "platform_class": "hyperion_8", "egomotion": "egomotion.offline",
            "rectified": {"front": row[0] / 1e4, "left": row[1] / 1e4, "right": row[2] / 1e4},
        }
        for row in shares
    ]  # fmt: skip
    numbers = np.arange(-(-scenes // PER_SHARD))
    count = len(numbers) * len(GROUPS)
    shards = ShardTable(
        GROUPS,
        group=np.tile(np.arange(len(GROUPS)), len(numbers)),
        number=np.repeat(numbers, len(GROUPS)),
        size=rng.integers(1 << 28, 1 << 30, count),
        sha256=rng.integers(0, 256, (count, 32)).astype(np.uint8),
    )
    table = SceneTable(texts, np.full(scenes, FRAMES), np.arange(scenes) // PER_SHARD, attributes)
    taxonomy = get_taxonomy("occ3d")
    about = ("bench", get_grid("occ3d"), "occ3d", taxonomy.classes, "native", GROUPS)
    Manifest(folder, *about, table, shards, arrays=True).publish()


def peak() -> float:
    """The most memory that this process had, in MB. (``getrusage`` would count what its parent had.)"""
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) * 1024 / 1e6


def measure(folder: str) -> dict[str, float]:
    """Seconds to open and to plan, and the most memory that this process had after each, in MB."""
    found, began = {"imports_mb": peak()}, time.perf_counter()
    manifest = Manifest.load(folder)
    found |= {"open_s": time.perf_counter() - began, "open_mb": peak()}
    began, table = time.perf_counter(), manifest.scenes
    key = by_scenes(table.names(), table.frames.tolist())
    found |= {"identity_s": time.perf_counter() - began}
    began = time.perf_counter()
    order = Order(key, np.arange(len(table)), table.frames, 0, shards=table.shards, lanes=4096)
    next(training_batches(order, 4096, 0, 4096))
    return found | {"plan_s": time.perf_counter() - began, "plan_mb": peak()}


def main(counts: list[int]) -> None:
    for count in counts:
        with tempfile.TemporaryDirectory() as folder:
            make(folder, count)
            files = {path.name[:9]: round(path.stat().st_size / 1e6, 1) for path in Path(folder).iterdir()}
            runs = [
                json.loads(subprocess.check_output([sys.executable, "-m", "infra.bench.manifest", "open", folder]))
                for _ in range(3)
            ]
            best = {name: round(min(run[name] for run in runs), 3) for name in runs[0]}
            print(json.dumps({"scenes": count, "files_mb": files, **best}))


if __name__ == "__main__":
    if sys.argv[1:2] == ["open"]:
        print(json.dumps(measure(sys.argv[2])))
    else:
        main([int(a) for a in sys.argv[1:]] or [306_152, 1_000_000])
