"""Raw scenes -> shards -> manifest: plan, estimate, build, resume, publish, merge.

A shard is built in a local temporary file and published under its name whole, with its record (index and hashes) after
it; the manifest comes last. What is published and intact is skipped on a rerun. The bytes depend on the source and the
settings alone: not on the number of workers or parts, on kills or on reruns.
"""

from __future__ import annotations

import errno
import hashlib
import multiprocessing
import multiprocessing.connection
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Protocol, TypedDict, Unpack

from occstream.sharding import lease, storage, threads
from occstream.sharding.arrays import MOST_LISTED
from occstream.sharding.codec import FORMAT_VERSION, GROUPS, Coding, canonical_json, encode
from occstream.sharding.contract import admit, with_lacking
from occstream.sharding.entries import shard_path
from occstream.sharding.frameclasses import FrameClasses, classes_of
from occstream.sharding.grid import VoxelGrid
from occstream.sharding.manifest import NAME, Manifest
from occstream.sharding.prepare import Images
from occstream.sharding.received import check_manifest, load_json
from occstream.sharding.schema import Frame, Scene, Source, Taxonomy, check_scene_name
from occstream.sharding.shardfile import ShardWriter, publish_shard, read_record

_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
PARTS = "parts"


class LabelStep(Protocol):
    """Makes labels: a picklable callable with a version that goes into the manifest."""

    @property
    def version(self) -> str: ...

    def __call__(self, scene: Scene) -> Scene: ...


class Settings(TypedDict, total=False):
    """What ``pack`` passes on to its ``Job``; see there."""

    groups: tuple[str, ...]
    grid: VoxelGrid | None
    label: LabelStep | None
    images: Images
    coding: Coding
    scenes_per_shard: int


@dataclass(frozen=True)
class Job:
    """Everything besides the scenes that the bytes of the shards depend on; and where they go.

    Args:
        source: picklable if there are several workers.
        url: root of the data set: a folder, ``file://`` or ``s3://``.
        groups: which to write.
        grid: of the labels.
        label: makes the labels of a scene; None takes what the source brings.
        images, coding: see there.
        scenes_per_shard: scenes in one tar.

    Raises:
        ValueError: groups, grid and labels do not fit together.
    """

    source: Source
    url: str
    groups: tuple[str, ...] = GROUPS
    grid: VoxelGrid | None = None
    label: LabelStep | None = None
    images: Images = field(default_factory=Images)
    coding: Coding = field(default_factory=Coding)
    scenes_per_shard: int = 1

    def __post_init__(self) -> None:
        unknown = [g for g in self.groups if g not in GROUPS]
        if unknown or not self.groups:
            what = f"unknown group {unknown[0]!r}" if unknown else "no groups given"
            raise ValueError(f"{what}; choose from {', '.join(GROUPS)}")
        if self.scenes_per_shard < 1:
            raise ValueError(f"scenes per shard ({self.scenes_per_shard}) must be at least 1")
        native, grid = self.source.grid, self.grid or self.source.grid
        if "labels" in self.groups and self.label is None:
            if native is None:
                raise ValueError(f"source {self.source.name!r} brings no labels; make them with --labels lidar")
            if grid is None or not native.same_voxels(grid):
                raise ValueError(
                    f"source {self.source.name!r} brings labels on grid {native.name!r}, not {grid and grid.name!r}; make labels "
                    "on that grid with --labels lidar"
                )
        object.__setattr__(self, "groups", tuple(g for g in GROUPS if g in self.groups))
        object.__setattr__(self, "grid", grid if "labels" in self.groups else None)

    @property
    def taxonomy(self) -> Taxonomy:
        return self.source.taxonomy

    @property
    def labels(self) -> str:
        if "labels" not in self.groups:
            return ""
        return self.label.version if self.label else "native"

    @property
    def convention(self) -> str:
        """Metric convention of the labels, where the source that brings them names one."""
        return getattr(self.source, "convention", "") if self.labels == "native" else ""

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
        images = {k: v for k, v in asdict(self.images).items() if k != "max_black"}  # it refuses, it changes no byte
        settings = [sorted(self.groups), images, asdict(self.coding)]
        content = [repr(self.source), settings, list(scenes), [self.header(g) for g in self.groups]]
        return hashlib.blake2b(canonical_json(content), digest_size=16).hexdigest()

    def plan(self) -> list[list[str]]:
        """Scene names of each shard. Raises ValueError if there are none, or a name is double or cannot be used."""
        names = self.source.scene_names()
        if not names:
            raise ValueError(f"source {self.source.name!r} has no scenes")
        for name in names:
            check_scene_name(name)
        if len(set(names)) != len(names):
            raise ValueError(f"source {self.source.name!r} names a scene twice")
        return [names[i : i + self.scenes_per_shard] for i in range(0, len(names), self.scenes_per_shard)]

    def prepared(self, name: str) -> Scene:
        """A scene as it is packed, but for the images. Raises ValueError that names it if it cannot be."""
        scene = admit(self.source.load(name))
        if not scene.frames:
            raise ValueError("it has no frames")
        scene = self.images.aim(scene)
        if "cameras" in self.groups:
            scene = with_lacking(scene, self.images.cameras)
        return self.label(scene) if self.label else scene

    def members(self, frame: Frame, group: str) -> list[tuple[str, bytes]]:
        """What is written of a frame in a group."""
        return encode(self.images(frame) if group == "cameras" else frame, group, self.coding)


@dataclass
class Progress:
    """How far a job is; given to the caller's callback after every shard.

    Attributes:
        total, done: shards; ``skipped`` of these were there already.
        frames: in the shards that are done.
        failed: reason by name of the scene.
        seconds: since the job began.
    """

    total: int
    done: int = 0
    skipped: int = 0
    frames: int = 0
    made: int = 0
    failed: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def eta(self) -> float:
        """Seconds that are left at the rate so far; NaN before the first shard is built."""
        built = self.done - self.skipped
        return (self.total - self.done) * self.seconds / built if built else float("nan")


def pack(
    source: Source,
    url: str,
    *,
    workers: int = 1,
    part: tuple[int, int] = (1, 1),
    max_failures: int = 0,
    recheck: bool = False,
    progress: Callable[[Progress], None] | None = None,
    **settings: Unpack[Settings],
) -> Manifest | None:
    """Packs all scenes of a source, or one part of them.

    Args:
        source, url, settings: of ``Job``.
        workers: processes.
        part: (i, n): only every n-th shard, beginning with the i-th (1..n). ``merge`` then publishes the manifest.
        max_failures: number of scenes that may fail and be skipped, named in the manifest.
        recheck: hash what is published before it is skipped; else presence, size and record are enough.
        progress: called after every shard.

    Returns:
        The published manifest; None for one part of several.

    Raises:
        ValueError: what ``Job`` finds wrong, another packer is at work there, or more scenes failed than allowed (by name,
            with reasons); shards that are done stay and are skipped on a rerun.
    """
    if workers < 1:
        raise ValueError(f"workers ({workers}) must be at least 1")
    if not 1 <= part[0] <= part[1]:
        raise ValueError(f"part {part[0]}/{part[1]}: needs i/n with 1 <= i <= n")
    job = Job(source, url, **settings)
    plan = job.plan()
    with lease.only_writer(url, "pack", part):
        return _pack(
            job, plan, workers=workers, part=part, max_failures=max_failures, recheck=recheck, progress=progress
        )


def _pack(
    job: Job,
    plan: list[list[str]],
    *,
    workers: int,
    part: tuple[int, int],
    max_failures: int,
    recheck: bool,
    progress: Callable[[Progress], None] | None,
) -> Manifest | None:
    """``pack``, with nobody else there."""
    mine = range(part[0] - 1, len(plan), part[1])
    state, began = Progress(len(mine)), time.perf_counter()
    shards: dict[int, dict] = {}
    for number, made in _build_all(job, plan, mine, workers=workers, recheck=recheck):
        shards[number] = made
        state.done += 1
        state.skipped += made["skipped"]
        frames = sum(s["frames"] for s in made["scenes"])
        state.frames += frames
        state.made += 0 if made["skipped"] else frames
        state.failed |= made["failed"]
        state.seconds = time.perf_counter() - began
        if progress:
            progress(state)
        if len(state.failed) > max_failures:
            reasons = "; ".join(list(state.failed.values())[:5])
            allowed = f" ({len(state.failed)} failures, {max_failures} allowed)" if max_failures else ""
            raise ValueError(f"{reasons}{allowed}. To pack the others anyway: --max-failures N")
    outcome = {
        "job": job.digest([name for names in plan for name in names]),
        "part": part,
        "description": _describe(job),
        "shards": [{"number": n, **{k: v for k, v in shards[n].items() if k != "skipped"}} for n in mine],
    }
    if part[1] > 1:
        storage.publish(canonical_json(outcome), storage.join(job.url, PARTS, f"{part[0]}-of-{part[1]}.json"))
        return None
    return _publish(job.url, [outcome])


def merge(url: str) -> Manifest:
    """Publishes the manifest of a data set whose parts are all packed, and removes what the parts left for it.

    Raises:
        ValueError: parts are missing, or do not belong together.
    """
    names = storage.listing(storage.join(url, PARTS))
    if not names:
        raise ValueError(f"{storage.join(url, PARTS)}: no finished parts there; pack them with --part i/n")
    outcomes = [_outcome(storage.join(url, PARTS, name)) for name in sorted(names)]
    counts = {o["part"][1] for o in outcomes}
    if len(counts) > 1 or len({o["job"] for o in outcomes}) > 1:
        raise ValueError(
            f"{storage.join(url, PARTS)}: parts of different jobs ({', '.join(sorted(names))}): other settings, scenes or "
            "number of parts; remove those of the unwanted job"
        )
    [count] = counts
    missing = sorted({*range(1, count + 1)} - {o["part"][0] for o in outcomes})
    if missing:
        listed = ", ".join(f"{i}/{count}" for i in missing)
        raise ValueError(f"{url}: part {listed} is not finished; run it, then merge")
    manifest = _publish(url, outcomes)
    for name in names:
        storage.remove(storage.join(url, PARTS, name))
    return manifest


def _outcome(where: str) -> dict:
    """What one part left for ``merge``. Raises ValueError if it is not what a part writes."""
    found = load_json(storage.read_bytes(where), where, "rerun the part")
    number, count = found["part"] if isinstance(found.get("part"), list) and len(found["part"]) == 2 else (0, 0)
    whole = type(number) is int and type(count) is int and 1 <= number <= count <= 10**6
    if not whole or not isinstance(found.get("job"), str):
        raise ValueError(f"{where}: is not the record of a job's part; rerun the part")
    return found


def _describe(job: Job) -> dict:
    """What the manifest says about a job besides its scenes and shards."""
    return {
        "source": job.source.name,
        "grid": job.grid.to_dict() if job.grid else None,
        "taxonomy": job.taxonomy.name,
        "classes": list(job.taxonomy.classes),
        "labels": job.labels,
        "groups": list(job.groups),
        **({"convention": job.convention} if job.convention else {}),
    }


def _publish(url: str, outcomes: list[dict]) -> Manifest:
    """Publishes the manifest of what all parts made. Raises ValueError if nothing was, or a shard is gone."""
    try:
        about = outcomes[0]["description"]
        made = sorted((s for o in outcomes for s in o["shards"]), key=lambda s: s["number"])
        content = {
            **about,
            "scenes": [{**scene, "shard": s["number"]} for s in made for scene in s["scenes"]],
            "shards": [
                {"group": g, "number": s["number"], "size": s["size"][g], "sha256": s["sha256"][g]}
                for s in made
                for g in about["groups"]
            ],
            "left_out": [name for s in made for name in sorted(s["failed"])],
        }
        table = _table(made) if "labels" in about["groups"] else None
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{url}: a part is not the record of a job ({type(error).__name__}: {error}); rerun it"
        ) from None
    if not content["scenes"]:
        raise ValueError(f"{url}: every scene failed; nothing was published")
    check_manifest({"fingerprint": "", **content}, storage.join(url, NAME))
    large = len(content["scenes"]) + len(content["shards"]) > MOST_LISTED
    manifest = Manifest.from_content(url, content, arrays=large and not _is_listed(url, content))
    for group in manifest.groups:
        there = storage.listing(storage.join(url, group))
        for shard in manifest.shards.only(group):
            if there.get(Path(shard.path).name) != shard.size:
                raise ValueError(
                    f"{storage.join(url, shard.path)}: is missing or has changed since it was packed; rerun the job"
                )
    if table:
        table.publish(manifest)
    manifest.publish()
    return manifest


def _is_listed(url: str, content: dict) -> bool:
    """Whether the manifest there holds the same, all in JSON, as earlier versions wrote it: its fingerprint stays."""
    try:
        there = Manifest.load(url)
    except ValueError:
        return False
    return not there.arrays and there == Manifest.from_content(url, content)


def _table(made: list[dict]) -> FrameClasses | None:
    """Classes of all frames; None where shards of an earlier version, which did not note them, were kept."""
    found = [FrameClasses.of_record(shard["classes"]) for shard in made if shard.get("classes")]
    return FrameClasses.joined(found) if len(found) == len(made) else None


@dataclass(frozen=True)
class _Wanted:
    """A shard number to build.

    Attributes:
        names: its scenes.
        published: bytes of its tars that are there, by group.
        recheck: whether their content is read before they are taken for done.
    """

    number: int
    names: Sequence[str]
    published: dict[str, int]
    recheck: bool


def _build_all(
    job: Job, plan: list[list[str]], mine: Sequence[int], *, workers: int, recheck: bool
) -> Iterator[tuple[int, dict]]:
    """Builds shards; yields number and what was made, in any order. Few are under way at a time, so memory is bounded."""
    there = {group: storage.listing(storage.join(job.url, group)) for group in job.groups}

    def wanted(number: int) -> _Wanted:
        published = {g: there[g][n] for g in job.groups if (n := Path(shard_path(g, number)).name) in there[g]}
        return _Wanted(number, plan[number], published, recheck)

    if workers == 1:
        for number in mine:
            yield number, _build(job, wanted(number))
        return
    # Not fork: the parent may hold threads (fsspec's event loop, numba).
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max(1, min(workers, len(mine))), context, _adopt, (job,)) as pool:
        running: dict[Future, int] = {}
        waiting = iter(mine)
        try:
            while True:
                while len(running) < 2 * workers and (number := next(waiting, None)) is not None:
                    running[pool.submit(_build_adopted, wanted(number))] = number
                if not running:
                    return
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    yield running.pop(future), future.result()
        except BrokenProcessPool:
            raise ValueError(
                "a worker process was killed, probably because it ran out of memory: use fewer --workers; finished work is kept"
            ) from None
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


_adopted: Job  # of a worker process: a source may be large, so it is sent once, not with every shard


def _adopt(job: Job) -> None:
    global _adopted
    _adopted = job
    threads.start("parent", _end_with_parent, lambda error: os._exit(1))


def _end_with_parent() -> None:
    """Ends this worker when the packer is gone: one that was killed tells nobody."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        multiprocessing.connection.wait([parent.sentinel])
    os._exit(1)


def _build_adopted(wanted: _Wanted) -> dict:
    return _build(_adopted, wanted)


def _build(job: Job, wanted: _Wanted) -> dict:
    """Makes (or finds) the tars of one shard number; returns its scenes, failures, sizes and hashes by group."""
    try:
        return _build_shard(job, wanted)
    except OSError as error:
        if error.errno not in _DISK_FULL:
            raise
        folder = tempfile.gettempdir()
        free = shutil.disk_usage(folder).free / 2**30
        raise ValueError(
            f"{os.strerror(error.errno)} ({free:.1f} GiB free in {folder}, target {job.url}): set TMPDIR to a larger disk, "
            "use fewer --workers or --scenes-per-shard; finished work is kept"
        ) from None


def _build_shard(job: Job, wanted: _Wanted) -> dict:
    digest = job.digest(wanted.names)
    urls = {group: storage.join(job.url, shard_path(group, wanted.number)) for group in job.groups}
    records = {group: record for group in wanted.published if (record := read_record(urls[group]))}
    if len(records) == len(urls) and all(_is_whole(records[g], url, digest, wanted) for g, url in urls.items()):
        return _summary(list(records.values()), skipped=True)
    if records:
        # It is about to be replaced: from now on a manifest that names it would be wrong.
        storage.remove(storage.join(job.url, NAME))
    with tempfile.TemporaryDirectory(prefix="occstream-") as folder:
        writers = {group: ShardWriter(Path(folder) / f"{group}.tar", job.header(group)) for group in job.groups}
        entries, classes, failed = _write_scenes(job, wanted.names, writers)
        made = []
        for group, writer in writers.items():
            path, index = writer.close()
            replace = group in wanted.published
            about = {"group": group, "digest": digest, "scenes": entries, "failed": failed, "frames": index}
            about |= {"classes": FrameClasses.of_names(classes).to_record()} if group == "labels" else {}
            made.append(publish_shard(urls[group], path, **about, replace=replace))
    return _summary(made, skipped=False)


def _is_whole(record: dict, url: str, digest: str, wanted: _Wanted) -> bool:
    """Whether a published tar is that of this job and all its scenes."""
    if record["digest"] != digest or wanted.published[record["group"]] != record["size"] or record["failed"]:
        return False
    return not wanted.recheck or hashlib.sha256(storage.read_bytes(url)).hexdigest() == record["sha256"]


def _write_scenes(
    job: Job, names: Sequence[str], writers: dict[str, ShardWriter]
) -> tuple[list[dict], list[list[list[str]]], dict[str, str]]:
    """Writes scenes to the tars of all groups. Returns the entries of those that could be packed, the classes that their
    frames hold, and by name why others could not; of these nothing is left in the tars."""
    entries, classes, failed = [], [], {}
    for name in names:
        marks = {group: writer.mark() for group, writer in writers.items()}
        try:
            scene = job.prepared(name)
            for frame in scene.frames:
                for group, writer in writers.items():
                    writer.add(frame.key, job.members(frame, group))
            held = [classes_of(frame, job.taxonomy) for frame in scene.frames] if "labels" in writers else []
        except Exception as error:
            if isinstance(error, OSError) and error.errno in _DISK_FULL:
                raise
            failed[name] = f"scene {name} of {job.source.name}: {_reason(error)}"
            for group, writer in writers.items():
                writer.back_to(marks[group])
            continue
        entries.append({"name": scene.name, "frames": len(scene.frames), "attributes": scene.attributes})
        classes.append(held)
    return entries, classes, failed


def _reason(error: Exception) -> str:
    """Why a scene could not be packed: a source's own words, or another error with its type."""
    return str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"


def _summary(records: list[dict], skipped: bool) -> dict:
    return {
        "scenes": records[0]["scenes"],
        "failed": records[0]["failed"],
        "size": {r["group"]: r["size"] for r in records},
        "sha256": {r["group"]: r["sha256"] for r in records},
        "classes": next((r["classes"] for r in records if "classes" in r), None),
        "skipped": skipped,
    }


@dataclass(frozen=True)
class Estimate:
    """What a job will need, from scenes that were tried.

    Attributes:
        scenes, shards: exact. ``frames``, ``bytes`` by group, ``seconds`` of one worker: extrapolated from ``tried`` scenes
            that could be packed, to as many as can be if ``failed`` (reasons by name) are as frequent among the others.
    """

    scenes: int
    shards: int
    tried: int
    frames: float
    bytes: dict[str, float]
    seconds: float
    failed: dict[str, str]

    @property
    def packable(self) -> float:
        """Scenes that can be packed."""
        return self.scenes * self.tried / (self.tried + len(self.failed))


def estimate(job: Job, tries: int = 3) -> Estimate:
    """Encodes a few scenes, evenly spaced, and extrapolates; writes nothing.

    Where some fail, as those do whose files are not downloaded yet, others are tried until there are enough.

    Raises:
        ValueError: all scenes fail.
    """
    plan = job.plan()
    names = [name for shard in plan for name in shard]
    chosen = sorted({round(i * (len(names) - 1) / max(1, tries - 1)) for i in range(tries)})
    frames, size, tried, seconds, failed = 0, dict.fromkeys(job.groups, 0), 0, [], {}
    for number in [*chosen, *(i for i in range(len(names)) if i not in chosen)]:
        if tried == len(chosen):
            break
        began = time.perf_counter()
        try:
            scene = job.prepared(names[number])
            encoded = {g: [data for f in scene.frames for _, data in job.members(f, g)] for g in job.groups}
        except Exception as problem:
            failed[names[number]] = _reason(problem)
            continue
        for group, members in encoded.items():
            size[group] += sum(1024 + len(data) for data in members)  # a header, and half of two blocks
        frames += len(scene.frames)
        tried += 1
        seconds.append(time.perf_counter() - began)
    if not tried:
        name, reason = next(iter(failed.items()))
        raise ValueError(f"all {len(names)} scenes failed; the first, {name}: {reason}")
    whole = len(names) * tried / (tried + len(failed))
    share = whole / tried
    # The first scene may have compiled code; where there are others, they tell the rate.
    rate = sum(seconds[1:]) / (tried - 1) if tried > 1 else seconds[0]
    return Estimate(
        len(names), len(plan), tried, frames * share, {g: b * share for g, b in size.items()}, rate * whole, failed
    )
