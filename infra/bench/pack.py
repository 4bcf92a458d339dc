"""``occstream bench pack``: our speed against what the machine can do, as ratios within one run. Speed is measured here and
nowhere asserted."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import multiprocessing
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import cv2
import numpy as np
import simplejpeg
import zstandard

from occstream.sharding.codec import LIDAR_LEVEL, Coding, encode
from occstream.sharding.grid import VoxelGrid, get_grid
from occstream.sharding.labelconfig import LabelConfig
from occstream.sharding.labels import label_scene
from occstream.sharding.pack import Progress, pack
from occstream.sharding.prepare import Images
from occstream.sharding.schema import OCC3D, Camera, Frame, Labels, LidarSweep, Scene, Taxonomy, swept
from occstream.sharding.sources import open_source

ROOT = Path(__file__).resolve().parents[2]
GRID = "occ3d"
IMAGE = (900, 1600)  # nuScenes' size
QUALITY = 90


@dataclass(frozen=True)
class Recorded:
    """Raw frames as files: what a data set on disk costs to read. ``write`` makes them from synthetic frames."""

    root: Path = field(repr=False)
    scenes: int
    frames: int
    name = "recorded"
    taxonomy: Taxonomy = OCC3D

    @property
    def grid(self) -> VoxelGrid:
        return get_grid(GRID)

    def scene_names(self) -> list[str]:
        return [f"recorded-{i:04d}" for i in range(self.scenes)]

    def files(self, scene: int, index: int) -> Path:
        """Folder of a frame."""
        return self.root / f"{scene:04d}-{index:02d}"

    def load(self, name: str) -> Scene:
        number = int(name.rsplit("-", 1)[1])
        return Scene(name, [self._frame(name, number, i) for i in range(self.frames)])

    def _frame(self, name: str, number: int, index: int) -> Frame:
        folder, pose = self.files(number, index), np.eye(4)
        cameras = {}
        for path in sorted(folder.glob("*.jpg")):
            intrinsics = np.array([[1266.0, 0, 800], [0, 1266, 450], [0, 0, 1]])
            cameras[path.stem] = Camera(path.read_bytes(), IMAGE[1], IMAGE[0], intrinsics, pose, pose, index)
        points = np.fromfile(folder / "points.bin", np.float32).reshape(-1, 4)
        arrays = {n: np.load(folder / f"{n}.npy") for n in ("binary", "semantic", "mask_lidar", "mask_camera")}
        lidar = LidarSweep(points[:, :3].copy(), pose, pose, index, intensity=points[:, 3].copy())
        return Frame(name, index, name, index, pose, cameras, lidar, labels=Labels(**arrays))

    def write(self, variety: int = 4) -> None:
        """Writes the files; ``variety`` frames are rendered, the others are copies of these."""
        options = {"scenes": 1, "frames": variety, "image_size": IMAGE, "grid": GRID}
        made = open_source("synthetic", options)
        rendered = made.load(made.scene_names()[0]).frames
        for scene in range(self.scenes):
            for index in range(self.frames):
                number, folder = scene * self.frames + index, self.files(scene, index)
                if number >= variety:
                    shutil.copytree(self.files(*divmod(number % variety, self.frames)), folder)
                    continue
                folder.mkdir(parents=True)
                frame = rendered[number]
                for name, camera in frame.cameras.items():
                    (folder / f"{name}.jpg").write_bytes(camera.jpeg)
                sweep = swept(frame)
                intensity = np.zeros(len(sweep.xyz)) if sweep.intensity is None else sweep.intensity
                np.hstack([sweep.xyz, intensity[:, None]]).astype(np.float32).tofile(folder / "points.bin")
                for name in ("binary", "semantic", "mask_lidar", "mask_camera"):
                    np.save(folder / f"{name}.npy", getattr(frame.labels, name))
                # What the codec hands to zstd: the limit compresses the same bytes without making them first.
                for group, level in (("lidar", LIDAR_LEVEL), ("labels", 19)):
                    for name, data in encode(frame, group):
                        if name.endswith(".zst"):
                            raw = zstandard.ZstdDecompressor().decompress(data)
                            (folder / f"{name.split('.')[1]}.raw{level}").write_bytes(raw)


def least_work(job: tuple[Recorded, int, int, Path]) -> int:
    """One scene by the least that packing it can cost: read, JPEG work, zstd, hash, write. Returns bytes written."""
    source, scene, short_side, out = job
    digest, target = hashlib.sha256(), out / f"{scene}.bin"
    written = 0
    with target.open("wb") as file:
        for index in range(source.frames):
            for path in source.files(scene, index).iterdir():
                if path.suffix == ".jpg":
                    data = path.read_bytes()
                    data = _shrunk(data, short_side) if short_side else data
                elif path.suffix.startswith(".raw"):
                    data = zstandard.ZstdCompressor(int(path.suffix[4:]), write_checksum=True).compress(
                        path.read_bytes()
                    )
                else:
                    continue
                digest.update(data)
                written += file.write(data)
        os.fsync(file.fileno())
    target.unlink()
    return written


def _shrunk(data: bytes, short_side: int) -> bytes:
    width, height = round(IMAGE[1] * short_side / IMAGE[0]), short_side
    image = simplejpeg.decode_jpeg(data, "BGR", min_width=2 * width, min_height=2 * height)
    image = cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA)
    return simplejpeg.encode_jpeg(image, QUALITY, "BGR", "420")


def _timed(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def bench_pack(scenes: int = 12, frames: int = 4, workers: int = 2, repeats: int = 3) -> dict:
    """Packing against its limit, label generation, and memory over scenes. Prints as it goes; returns the numbers."""
    result: dict = {"workers": workers, "frames": scenes * frames}
    with tempfile.TemporaryDirectory(prefix="occstream-bench-") as folder:
        root = Path(folder)
        source = Recorded(root / "raw", scenes, frames)
        print(
            f"writing {scenes * frames} raw frames (6 images of {IMAGE[1]}x{IMAGE[0]}, LiDAR, labels on {GRID}) …",
            flush=True,
        )
        source.write()
        total = scenes * frames
        raw = sum(p.stat().st_size for p in (root / "raw").rglob("*") if ".raw" not in p.suffix and p.is_file()) / total
        print(f"raw: {raw / 1e3:.0f} kB per frame")
        context = multiprocessing.get_context("spawn")
        for short_side in (0, 450):
            ours, limit, sizes = [], [], {}
            for turn in range(repeats):
                out = root / f"out-{short_side}-{turn}"
                out.mkdir()
                with ProcessPoolExecutor(workers, context) as pool:
                    list(pool.map(_warm, range(2 * workers)))  # interpreters start before the clock does
                    jobs = [(source, s, short_side, out) for s in range(scenes)]
                    limit.append(total / _timed(lambda pool=pool, jobs=jobs: list(pool.map(least_work, jobs))))
                settings = {"images": Images(short_side, QUALITY), "coding": Coding()}
                start = _Start()
                seconds = _timed(
                    lambda out=out, settings=settings, start=start: pack(
                        source, str(out / "set"), workers=workers, progress=start, **settings
                    )
                )
                # The first shard's arrival tells how long the interpreters took to start; both sides are without it.
                ours.append(total / (seconds - start.overhead(seconds, scenes, workers)))
                made = out / "set"
                groups = ("cameras", "lidar", "labels")
                sizes = {g: sum(p.stat().st_size for p in (made / g).glob("*.tar")) / total for g in groups}
                shutil.rmtree(out)
            a, b = statistics.median(ours), statistics.median(limit)
            what = "original images" if not short_side else f"images shrunk to {short_side}"
            listed = ", ".join(f"{g} {size / 1e3:.0f}" for g, size in sizes.items())
            print(
                f"{what:<22} ours {a:6.2f} frames/s, limit {b:6.2f}, ratio {a / b:.2f}   kB per frame: {listed}",
                flush=True,
            )
            result[f"short side {short_side}"] = {"ours": a, "limit": b, "ratio": a / b, "bytes": sizes}
        result |= {"raw bytes": raw, "labels": _bench_labels(), "memory": _bench_memory(root)}
    return result


class _Start:
    """Progress callback that remembers when the first shard was done."""

    def __init__(self) -> None:
        self.first = 0.0

    def __call__(self, state: Progress) -> None:
        self.first = self.first or state.seconds

    def overhead(self, seconds: float, scenes: int, workers: int) -> float:
        """Start of the worker processes: the first shard's time without the time of one shard at the later rate."""
        per_shard = (seconds - self.first) / max(1, scenes - 1) * workers
        return max(0.0, self.first - per_shard)


def _warm(_: int) -> None:
    time.sleep(0.2)


def _bench_labels() -> dict:
    """Key-frames per second of one core: 200 x 200 x 16, semantic, both masks, 10 sweeps each."""
    made = open_source("synthetic", {"scenes": 1, "frames": 20, "image_size": (64, 176), "beams": 32, "grid": "tiny"})
    scene = made.load(made.scene_names()[0])
    frames = []
    for frame in scene.frames:
        key = swept(frame)
        sweeps = [dataclasses.replace(key, timestamp=key.timestamp - 50_000 * k) for k in range(9, 0, -1)]
        frames.append(dataclasses.replace(frame, sweeps=sweeps, labels=None))
    scene = dataclasses.replace(scene, frames=frames)
    grid = get_grid("openscene")
    label_scene(dataclasses.replace(scene, frames=frames[:2]), grid, OCC3D)  # compiles
    rates = [len(frames) / _timed(lambda: label_scene(scene, grid, OCC3D, LabelConfig())) for _ in range(3)]
    points = int(np.mean([len(f.lidar.xyz) for f in frames]))
    rate = statistics.median(rates)
    print(
        f"labels: {rate:.2f} key-frames/s on one core (200x200x16, both masks, 10 sweeps of {points} points, 6 cameras)"
    )
    return {"frames/s": rate, "points": points}


def _bench_memory(root: Path) -> dict:
    """Peak memory of a packing process after a fifth of its scenes and at the end, in a process of its own."""
    code = "import sys; from infra.bench.pack import memory_probe; memory_probe(sys.argv[1])"
    done = subprocess.run(
        [sys.executable, "-c", code, str(root / "memory")], capture_output=True, text=True, check=True, cwd=ROOT
    )
    found = json.loads(done.stdout.splitlines()[-1])
    few = found["scenes"] // 5
    print(f"memory: peak {found['early']:.0f} MiB after {few} scenes, {found['late']:.0f} MiB after {found['scenes']}")
    return found


def memory_probe(out: str, scenes: int = 60) -> None:
    """Packs small labeled scenes in this process; prints peak memory early and late, as JSON."""
    options = {"scenes": scenes, "frames": 4, "image_size": (64, 176), "grid": "tiny"}
    peaks = []
    pack(
        open_source("synthetic", options),
        out,
        progress=lambda state: peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
    )
    print(json.dumps({"scenes": scenes, "early": peaks[scenes // 5 - 1], "late": peaks[-1]}))
