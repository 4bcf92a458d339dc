"""``occstream bench stream``: this loader, the same decoding from memory, and the peers that are installed.

Every measurement is a process of its own, ``python -m infra.bench.stream LOADER FOLDER WORKERS SKIP``, which prints JSON;
they take turns. All decode the same bytes with the same functions into batches of the same arrays.
"""

from __future__ import annotations

import importlib
import itertools
import json
import math
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from infra.bench import peers
from infra.bench.samples import BATCH, FIELDS, GROUPS, IMAGE, Repeated, fill
from occstream.sharding.codec import decode
from occstream.sharding.manifest import Manifest
from occstream.sharding.order import Order, by_scenes, training_batches
from occstream.sharding.pack import pack
from occstream.sharding.sources import open_source
from occstream.sharding.stream import ShardReader, Stream, tar_members

ROOT = Path(__file__).resolve().parents[2]


def ours(folder: Path, workers: int, skip: int) -> Iterator:
    manifest = Manifest.load(str(folder / "ours"))
    order = _order(manifest)
    batches = itertools.islice(training_batches(order, BATCH, 0, 1, offset=skip), (manifest.num_frames - skip) // BATCH)
    work = lambda frame, epoch, views: fill(frame, views)  # noqa: E731
    with Stream(ShardReader(manifest, GROUPS), batches, FIELDS, work, capacity=BATCH, threads=workers) as stream:
        for got in stream:
            yield got.arrays


def _order(manifest: Manifest) -> Order:
    shards = [s.shard for s in manifest.scenes]
    frames = [s.frames for s in manifest.scenes]
    identity = by_scenes([s.name for s in manifest.scenes], frames)
    return Order(identity, range(len(shards)), frames, 0, shards=shards, lanes=BATCH)


def memory(folder: Path, workers: int, skip: int) -> Iterator:
    """The ideal: bytes in memory, no container, one thread, buffers that are there."""
    held = _held(folder)
    buffers = {name: np.empty((BATCH, *f.shape), f.dtype) for name, f in FIELDS.items()}
    views = [{name: b[i] for name, b in buffers.items()} for i in range(BATCH)]
    yield None  # the clock starts after loading
    for start in range(skip, len(held) - BATCH + 1, BATCH):
        for i in range(BATCH):
            fill(decode(held[start + i]), views[i])
        yield buffers


def _held(folder: Path) -> list[list[dict[str, bytes]]]:
    """Members of all samples by group, in memory."""
    manifest = Manifest.load(str(folder / "ours"))
    reader = ShardReader(manifest, GROUPS)
    return [
        [tar_members(reader.raw(g, s, i), f"{e.name}-{i:04d}") for g in GROUPS]
        for s, e in enumerate(manifest.scenes)
        for i in range(e.frames)
    ]


LOADERS: dict[str, Callable[[Path, int, int], Iterator]] = {"ours": ours, "memory": memory, **peers.LOADERS}


def installed(name: str) -> bool:
    """Whether a loader can run here."""
    return name not in peers.LOADERS or peers.installed(name)


def prepare(folder: Path, scenes: int, variety: int = 10, per_tar: int = 50) -> dict[str, float]:
    """Writes the samples in every form; returns bytes per sample on disk by loader."""
    made = open_source("synthetic", {"scenes": 1, "frames": variety, "image_size": IMAGE, "grid": "occ3d"})
    frames = tuple(made.load(made.scene_names()[0]).frames)
    pack(Repeated(frames, scenes), str(folder / "ours"), scenes_per_shard=5)
    manifest = Manifest.load(str(folder / "ours"))
    reader = ShardReader(manifest, GROUPS)
    samples = []
    for number, entry in enumerate(manifest.scenes):
        for index in range(entry.frames):
            key = f"{entry.name}-{index:04d}"
            parts = {g: tar_members(reader.raw(g, number, index), key) for g in GROUPS}
            samples.append((key, {f"{g}.{k}": v for g, part in parts.items() for k, v in part.items()}))
    reader.close()
    peers.write(folder, samples, per_tar)
    where = {"ours": "ours", **peers.FOLDERS}
    size = {k: sum(p.stat().st_size for p in (folder / v).rglob("*") if p.is_file()) for k, v in where.items()}
    return {k: v / len(samples) for k, v in size.items() if v and installed(k)}


def measure(name: str, folder: Path, workers: int, skip: int = 0) -> dict:
    """One pass (or the rest of one) by a loader, in this process."""
    before = time.process_time()
    began = time.perf_counter()
    first, count = 0.0, 0
    for batch in LOADERS[name](folder, workers, skip):
        if batch is None:  # what went before is not measured
            before, began = time.process_time(), time.perf_counter()
            continue
        count += BATCH
        first = first or time.perf_counter() - began
    wall = time.perf_counter() - began
    children = resource.getrusage(resource.RUSAGE_CHILDREN)  # worker processes, which have ended
    cpu = time.process_time() - before + children.ru_utime + children.ru_stime
    return {"samples/s": count / wall, "cpu_ms": 1e3 * cpu / count, "first_s": first, "peak_mib": resident("VmHWM")}


def resident(field: str = "VmRSS") -> float:
    """MiB of this process's memory, now or at its peak (``VmHWM``; ``ru_maxrss`` would begin with the parent's)."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) / 1024


def flat(folder: Path, epochs: int = 5) -> dict:
    """Memory after each of several passes by one stream."""
    manifest = Manifest.load(str(folder / "ours"))
    count, levels = manifest.num_frames // BATCH, []
    batches = training_batches(_order(manifest), BATCH, 0, 1)
    reader = ShardReader(manifest, GROUPS)
    work = lambda frame, epoch, views: fill(frame, views)  # noqa: E731
    with Stream(reader, batches, FIELDS, work, capacity=BATCH, threads=2) as stream:
        for _ in range(epochs):
            for _ in range(count):
                next(stream)
            levels.append(resident())
    return {"mib": levels}


def in_turns(folder: Path, rounds: int = 60, batches: int = 5) -> dict:
    """CPU time of every loader without threads or workers, a few batches each in turn in one process: what else the machine
    does meets all of them alike. As ratios to bare decoding."""
    streams = {n: _endless(n, folder) for n in LOADERS if installed(n)}
    taken: dict[str, list[float]] = {n: [] for n in streams}
    for number in range(-rounds // 6, rounds):
        for name, stream in streams.items():
            before = time.process_time()
            for _ in range(batches):
                next(stream)
            if number >= 0:  # those before are for warming up
                taken[name].append(time.process_time() - before)
    return {n: sum(t) / sum(taken["memory"]) for n, t in taken.items()}


def threads_in_turns(folder: Path, threads: int = 2, rounds: int = 12, samples: int = 60) -> float:
    """CPU time of short passes with reader threads, as a ratio to as many threads that decode from memory, in turns."""
    held = _held(folder)
    samples = min(samples, len(held))
    buffers = [{name: np.empty(f.shape, f.dtype) for name, f in FIELDS.items()} for _ in range(threads)]

    def bare(pool: ThreadPoolExecutor) -> None:
        work = lambda t: [fill(decode(held[i]), buffers[t]) for i in range(t, samples, threads)]  # noqa: E731
        list(pool.map(work, range(threads)))

    mine, ideal = [], []
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(rounds + 1):
            began = time.process_time()
            bare(pool)
            between = time.process_time()
            for _ in ours(folder, threads, len(held) - samples):
                pass
            mine, ideal = [*mine, time.process_time() - between], [*ideal, between - began]
    return sum(mine[1:]) / sum(ideal[1:])  # the first turn is for warming up


def _endless(name: str, folder: Path) -> Iterator:
    while True:
        yield from (batch for batch in LOADERS[name](folder, 0, 0) if batch is not None)


def bench_stream(scenes: int = 30, repeats: int = 3, files: Sequence[Path] = ()) -> dict:
    """Prints a table and returns its numbers; ``files``: JPEGs of 900 x 1600 for its last part."""
    result: dict = {}
    with tempfile.TemporaryDirectory(prefix="occstream-bench-") as name:
        folder = Path(name)
        print(
            f"packing {scenes * 10} samples (6 images of {IMAGE[1]}x{IMAGE[0]}, LiDAR, labels on occ3d) …", flush=True
        )
        disk = prepare(folder, scenes, per_tar=min(50, scenes * 5))  # webdataset needs a tar for each worker
        names = [n for n in LOADERS if installed(n)]
        cases = [(n, w, s) for n in names for w in ((0,) if n == "memory" else (0, 2)) for s in (0, scenes * 5)]
        cases = [c for c in cases if not (c[0] == "memory" and c[2])]
        runs: dict[tuple, list[dict]] = {c: [] for c in cases}
        for turn in range(repeats):
            for case in cases[turn % len(cases) :] + cases[: turn % len(cases)]:
                runs[case].append(_process(case, folder))
        # Other load on the machine only ever adds: the least disturbed run of each says what it costs.
        ratios = [_process(("in turns", 0, 0), folder) for _ in range(repeats)]
        threaded = [_process(("threads in turns", 2, 0), folder)["ours"] for _ in range(repeats)]
        ideal = min(r["cpu_ms"] for r in runs["memory", 0, 0])
        print(
            f"best of {repeats} runs each, and x memory: CPU time over that of bare decoding, alternately within one process, "
            "with workers of separate runs; other loaders decode with our functions, 'webdataset, Pillow' as it does by itself"
        )
        head = f"{'loader':<17} {'threads':>7} {'samples/s':>10} {'CPU ms':>8} {'x memory':>9} {'first s':>8} {'resume s':>9}"
        print(f"{head} {'peak MiB':>9} {'kB/sample':>10}")
        for n, w, s in cases:
            if s:
                continue
            resumed = min(r["first_s"] for r in runs[n, w, scenes * 5]) if n != "memory" else float("nan")
            row = {k: min(r[k] for r in runs[n, w, s]) for k in ("cpu_ms", "first_s", "peak_mib")}
            row["x memory"] = row["cpu_ms"] / ideal if w else statistics.median(r[n] for r in ratios)
            if w and n == "ours":
                row["x memory"] = statistics.median(threaded)
            row |= {"samples/s": max(r["samples/s"] for r in runs[n, w, s]), "resume_s": resumed}
            result[f"{n}-{w}"] = row | {"bytes": disk.get(n)}
            kept = f"{disk[n] / 1e3:>10.0f}" if n in disk else f"{'-':>10}"
            print(
                f"{n:<17} {w:>7} {row['samples/s']:>10.1f} {row['cpu_ms']:>8.2f} {row['x memory']:>9.2f} "
                f"{row['first_s']:>8.3f} {resumed:>9.3f} {row['peak_mib']:>9.0f} {kept}"
            )
        levels = result["memory"] = _process(("flat", 0, 0), folder)["mib"]
        print(f"memory after each of {len(levels)} epochs, 2 threads: {', '.join(f'{v:.1f}' for v in levels)} MiB")
    result["full size"] = _bench_full_size(files)
    return result


def _process(case: tuple[str, int, int], folder: Path) -> dict:
    command = [sys.executable, "-m", "infra.bench.stream", case[0], str(folder), str(case[1]), str(case[2])]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"})
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr[-1500:]}")
    return json.loads(done.stdout.splitlines()[-1])


def _bench_full_size(files: Sequence[Path]) -> dict:
    """900 x 1600 JPEGs trained at 256 x 704, in one thread: our augmentation against full decodes and resizes.

    Args:
        files: of that size; none: a rendered one.
    """
    import io

    import cv2
    from PIL import Image

    from occstream.pretrain.augment import warp_jpeg

    if files:
        jpegs = [f.read_bytes() for f in files]
    else:
        options = {"scenes": 1, "frames": 1, "image_size": (900, 1600), "lidar": False, "grid": "tiny"}
        made = open_source("synthetic", options)
        jpegs = [made.load(made.scene_names()[0]).frames[0].cameras["CAM_FRONT"].jpeg]
    scale = IMAGE[1] / 1600
    affine = np.array([[scale, 0, (scale - 1) / 2], [0, scale, (scale - 1) / 2 + IMAGE[0] - round(900 * scale)]])
    out, size = np.empty((3, *IMAGE), np.uint8), (IMAGE[1], round(900 * scale))

    def pillow(jpeg: bytes) -> np.ndarray:
        return np.asarray(Image.open(io.BytesIO(jpeg)).convert("RGB").resize(size, Image.Resampling.BILINEAR))[
            -IMAGE[0] :
        ]

    def opencv(jpeg: bytes, how: int) -> np.ndarray:
        image = np.asarray(cv2.imdecode(np.frombuffer(jpeg, np.uint8), cv2.IMREAD_COLOR))
        return cv2.resize(image, size, interpolation=how)[-IMAGE[0] :]

    ways = {
        "ours": lambda jpeg: warp_jpeg(jpeg, (1600, 900), affine, out),
        "Pillow": pillow,
        "OpenCV, INTER_AREA": lambda jpeg: opencv(jpeg, cv2.INTER_AREA),
        "OpenCV, INTER_LINEAR (aliases)": lambda jpeg: opencv(jpeg, cv2.INTER_LINEAR),
    }
    found = dict.fromkeys(ways, 0.0)
    for jpeg in jpegs:
        best = dict.fromkeys(ways, math.inf)
        for _ in range(max(5, 60 // len(jpegs))):
            for name, work in ways.items():
                began = time.perf_counter()
                work(jpeg)
                best[name] = min(best[name], time.perf_counter() - began)
        found = {name: ms + best[name] * 1e3 / len(jpegs) for name, ms in found.items()}
    kilobytes = sum(map(len, jpegs)) / len(jpegs) / 1e3
    print(
        f"900x1600 ({len(jpegs)} of {kilobytes:.0f} kB) trained at 256x704, ms per image: ours {found['ours']:.2f}; "
        "decoded at full size and resized:"
    )
    print("; ".join(f"{n} {t:.2f} ({t / found['ours']:.2f} x)" for n, t in found.items() if n != "ours"))
    return found


if __name__ == "__main__":
    loader, place, workers, skip = sys.argv[1:]
    for module in ("torch", peers.MODULES.get(loader, "json")):
        importlib.import_module(module)  # outside the clock
    if loader == "flat":
        print(json.dumps(flat(Path(place))))
    elif loader == "in turns":
        print(json.dumps(in_turns(Path(place))))
    elif loader == "threads in turns":
        print(json.dumps({"ours": threads_in_turns(Path(place), int(workers))}))
    else:
        print(json.dumps(measure(loader, Path(place), int(workers), int(skip))))
