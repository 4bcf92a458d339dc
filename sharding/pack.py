"""Raw scenes -> shards -> manifest: plan, write, resume, publish; verify; inspect.

A shard is built in a local temporary file and published under its name whole, with its record (index and hashes) after
it; the manifest comes last. What is published and intact is skipped on a rerun. The bytes depend on the source and the
settings alone: not on the number of workers, on kills or on reruns.
"""

from __future__ import annotations

import hashlib
import io
import json
import multiprocessing
import tarfile
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from occstream.sharding import storage
from occstream.sharding.codec import FORMAT_VERSION, GROUPS, canonical_json, encode
from occstream.sharding.grid import VoxelGrid
from occstream.sharding.manifest import Manifest, SceneEntry, ShardEntry, shard_path
from occstream.sharding.schema import Scene, Source, Taxonomy, check_scene_name
from occstream.sharding.stream import ShardReader

HEADER = "__header__/header.json"  # webdataset skips members below a folder named __…__


class LabelStep(Protocol):
    """Makes labels: a picklable callable with a version that goes into the manifest."""

    version: str

    def __call__(self, scene: Scene) -> Scene: ...


@dataclass(frozen=True)
class Job:
    """Everything that the bytes of the shards depend on, beside the scenes."""

    source: Source
    url: str
    groups: tuple[str, ...]
    grid: VoxelGrid | None
    label: LabelStep | None

    @property
    def taxonomy(self) -> Taxonomy:
        return self.source.taxonomy

    @property
    def labels(self) -> str:
        if "labels" not in self.groups:
            return ""
        return self.label.version if self.label else "native"

    def header(self, group: str) -> dict:
        """Content of a shard's header member."""
        return {
            "format": FORMAT_VERSION,
            "group": group,
            "source": self.source.name,
            "grid": self.grid.to_dict() if self.grid and group == "labels" else None,
            "taxonomy": self.taxonomy.name,
            "classes": list(self.taxonomy.classes),
            "labels": self.labels if group == "labels" else "",
        }

    def digest(self, scenes: Sequence[str]) -> str:
        """Tells whether a published shard was made from the same source, settings and scenes."""
        parts = [repr(self.source), sorted(self.groups), list(scenes), [self.header(g) for g in self.groups]]
        return hashlib.blake2b(canonical_json(parts), digest_size=16).hexdigest()


def pack(
    source: Source,
    url: str,
    *,
    groups: Sequence[str] = GROUPS,
    grid: VoxelGrid | None = None,
    label: LabelStep | None = None,
    scenes_per_shard: int = 1,
    workers: int = 1,
    progress: Callable[[int, int, str], None] | None = None,
) -> Manifest:
    """Packs all scenes of a source.

    Args:
        source: picklable if ``workers`` > 1.
        url: root of the data set: a folder, ``file://`` or ``s3://``.
        groups: which to write.
        grid: of the labels.
        label: makes the labels of a scene; None takes what the source brings.
        scenes_per_shard: scenes in one tar.
        workers: processes.
        progress: called with (shards done, shards in all, a text).

    Returns:
        The published manifest.

    Raises:
        ValueError: the first scene that fails, by name; shards that are done stay and are skipped on a rerun.
    """
    groups = tuple(g for g in GROUPS if g in groups) + tuple(g for g in groups if g not in GROUPS)
    unknown = [g for g in groups if g not in GROUPS]
    if unknown or not groups:
        raise ValueError(
            f"unknown group {unknown[0]!r}; choose from {', '.join(GROUPS)}" if unknown else "no groups given"
        )
    if scenes_per_shard < 1 or workers < 1:
        raise ValueError(f"scenes per shard ({scenes_per_shard}) and workers ({workers}) must be at least 1")
    grid = grid or source.grid
    if "labels" in groups and label is None:
        if source.grid is None:
            raise ValueError(f"source {source.name!r} brings no labels; make them with --labels lidar")
        if grid is None or not source.grid.same_voxels(grid):
            raise ValueError(f"source {source.name!r} brings labels on grid {source.grid.name!r}, not {grid.name!r}")
    names = source.scene_names()
    if not names:
        raise ValueError(f"source {source.name!r} has no scenes")
    for name in names:
        check_scene_name(name)
    if len(set(names)) != len(names):
        raise ValueError(f"source {source.name!r} names a scene twice")
    job = Job(source, url, groups, grid, label)
    plan = [names[i : i + scenes_per_shard] for i in range(0, len(names), scenes_per_shard)]
    records: dict[int, list[dict]] = {}
    frames = 0
    for number, made in _build_all(job, plan, workers):
        records[number] = made
        frames += sum(s["frames"] for s in made[0]["scenes"])
        if progress:
            progress(len(records), len(plan), f"shards, {frames} frames")
    scenes, shards = [], []
    for number in range(len(plan)):
        for s in records[number][0]["scenes"]:
            scenes.append(SceneEntry(s["name"], s["frames"], number, s["attributes"]))
        for record in records[number]:
            shards.append(ShardEntry(record["group"], number, record["size"], record["sha256"]))
    manifest = Manifest(
        url=url,
        source=source.name,
        grid=grid if "labels" in groups else None,
        taxonomy=job.taxonomy.name,
        classes=job.taxonomy.classes,
        labels=job.labels,
        groups=groups,
        scenes=tuple(scenes),
        shards=tuple(shards),
    )
    manifest.publish()
    return manifest


def _build_all(job: Job, plan: list[list[str]], workers: int) -> Iterator[tuple[int, list[dict]]]:
    if workers == 1:
        for number, scenes in enumerate(plan):
            yield number, _build(job, number, scenes)
        return
    # Not fork: the parent may hold threads (fsspec's event loop, numba).
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(workers, len(plan)), context, _adopt, (job,)) as pool:
        futures = {pool.submit(_build_adopted, number, scenes): number for number, scenes in enumerate(plan)}
        try:
            for future, number in futures.items():
                yield number, future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


_adopted: Job  # of a worker process: a source may be large, so it is sent once, not with every shard


def _adopt(job: Job) -> None:
    global _adopted
    _adopted = job


def _build_adopted(number: int, names: Sequence[str]) -> list[dict]:
    return _build(_adopted, number, names)


def _build(job: Job, number: int, names: Sequence[str]) -> list[dict]:
    """Makes (or finds) the tars of one shard number; returns their records, one per group."""
    digest = job.digest(names)
    done = [_published(job, group, number, digest) for group in job.groups]
    if all(done):
        return done
    with tempfile.TemporaryDirectory(prefix="occstream-") as folder:
        writers = {group: _ShardWriter(Path(folder) / f"{group}.tar", job.header(group)) for group in job.groups}
        entries = []
        for name in names:
            try:
                scene = job.source.load(name)
                if job.label:
                    scene = job.label(scene)
                if not scene.frames:
                    raise ValueError("it has no frames")
                for frame in scene.frames:
                    for group, writer in writers.items():
                        writer.add(frame.key, encode(frame, group))
            except Exception as error:
                reason = f"{type(error).__name__}: {error}" if not isinstance(error, ValueError) else str(error)
                raise ValueError(f"scene {name} of {job.source.name}: {reason}") from error
            entries.append({"name": scene.name, "frames": len(scene.frames), "attributes": scene.attributes})
        records = []
        for group, writer in writers.items():
            path, index = writer.close()
            record = {
                "group": group,
                "digest": digest,
                "size": path.stat().st_size,
                "sha256": storage.sha256_file(path),
                "scenes": entries,
                "frames": index,
            }
            url = storage.join(job.url, shard_path(group, number))
            storage.publish(path, url)
            storage.publish(canonical_json(record), url[:-4] + ".json")
            records.append(record)
    return records


def _published(job: Job, group: str, number: int, digest: str) -> dict | None:
    """Record of a shard that is there, whole and made from the same input; else None."""
    url = storage.join(job.url, shard_path(group, number))
    try:
        record = json.loads(storage.read_bytes(url[:-4] + ".json"))
    except (FileNotFoundError, json.JSONDecodeError):
        return None
    intact = record["digest"] == digest and storage.size(url) == record["size"]
    return record if intact else None


class _ShardWriter:
    """Writes one tar; the bytes depend on the members alone."""

    def __init__(self, path: Path, header: dict):
        self.path, self.index = path, []
        self._file = path.open("wb")
        self._tar = tarfile.open(fileobj=self._file, mode="w", format=tarfile.USTAR_FORMAT)  # noqa: SIM115
        self._write(HEADER, canonical_json(header))

    def add(self, key: str, members: list[tuple[str, bytes]]) -> None:
        start = self._file.tell()
        for name, data in members:
            self._write(name, data)
        self.index.append([key, start, self._file.tell() - start])

    def close(self) -> tuple[Path, list]:
        self._tar.close()
        self._file.close()
        return self.path, self.index

    def _write(self, name: str, data: bytes) -> None:
        if len(name) > 100:
            raise ValueError(
                f"member name {name!r} is longer than 100 characters; shorten the scene's or camera's name"
            )
        info = tarfile.TarInfo(name)  # its defaults: mtime 0, uid 0, mode 0644
        info.size = len(data)
        self._tar.addfile(info, io.BytesIO(data))


def verify(url: str, cache: storage.ShardCache | None = None) -> list[str]:
    """Checks sizes and hashes of all shards and decodes every frame.

    Returns:
        One line for each problem, naming shard or frame; empty if the data set is intact.
    """
    manifest = Manifest.load(url)
    problems = []
    bad: set[int] = set()
    for shard in manifest.shards:
        where = storage.join(url, shard.path)
        try:
            data = storage.read_bytes(where)
        except FileNotFoundError:
            problems.append(f"{where}: missing")
            bad.add(shard.number)
            continue
        if len(data) != shard.size:
            problems.append(f"{where}: {len(data)} bytes, the manifest says {shard.size}")
            bad.add(shard.number)
        elif hashlib.sha256(data).hexdigest() != shard.sha256:
            problems.append(f"{where}: content differs from the manifest's SHA-256")
            bad.add(shard.number)
    reader = ShardReader(manifest, manifest.groups, cache)
    for number, scene in enumerate(manifest.scenes):
        if scene.shard in bad:
            continue
        for index in range(scene.frames):
            try:
                frame = reader.frame(number, index)
                if (frame.scene, frame.index) != (scene.name, index):
                    raise ValueError(f"holds {frame.key} instead of frame {index} of {scene.name}")
            except (ValueError, FileNotFoundError) as error:
                problems.append(str(error))
    reader.close()
    return problems


def inspect(url: str) -> str:
    """What a data set holds, as text for the terminal."""
    manifest = Manifest.load(url)
    frames = manifest.num_frames
    grid = manifest.grid
    lines = [
        f"data set     {url}",
        f"fingerprint  {manifest.fingerprint}",
        f"source       {manifest.source}; labels {manifest.labels or 'none'}, taxonomy {manifest.taxonomy} "
        f"({len(manifest.classes)} classes)",
        f"grid         {grid.name} {'x'.join(map(str, grid.shape))} voxels of {grid.voxel} m from {grid.lower}, "
        f"{grid.frame} frame"
        if grid
        else "grid         none",
        f"scenes       {len(manifest.scenes)} with {frames} frames",
        "",
        f"{'group':<10} {'shards':>6} {'MB':>10} {'kB/frame':>9}",
    ]
    for group in manifest.groups:
        sizes = [s.size for s in manifest.shards if s.group == group]
        lines.append(f"{group:<10} {len(sizes):>6} {sum(sizes) / 1e6:>10.2f} {sum(sizes) / 1e3 / max(1, frames):>9.1f}")
    lines += ["", f"{'scene':<32} {'frames':>6} {'shard':>6}  cameras  points  occupied"]
    reader = ShardReader(manifest, manifest.groups)
    for number, scene in enumerate(manifest.scenes[:20]):
        first = reader.frame(number, 0)
        cameras = str(len(first.cameras)) if "cameras" in manifest.groups else "-"
        points = str(len(first.lidar.xyz)) if first.lidar else "-"
        classes = "+classes" if first.lidar and first.lidar.classes is not None else ""
        occupied = str(int(first.labels.binary.sum())) if first.labels else "-"
        lines.append(
            f"{scene.name:<32} {scene.frames:>6} {scene.shard:>6}  {cameras:>7}  {points}{classes}  {occupied}"
        )
    reader.close()
    if len(manifest.scenes) > 20:
        lines.append(f"… and {len(manifest.scenes) - 20} more scenes (columns on the right: first frame of each)")
    return "\n".join(lines)
