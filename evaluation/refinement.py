"""Refined labels of a data set: every frame of a drive votes on its neighbors (OccFiner, Sec. III-C), scene by scene."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from occstream.evaluation.bayes import (
    BINS,
    EXTRA,
    Confusions,
    best_exponent,
    confusions_by_exponent,
    confusions_of,
    naive_bayes,
    scores_by_exponent,
)
from occstream.evaluation.drive import BoxMotion, DriveReader, Source, Volumes, Votes, label_manifest
from occstream.evaluation.propagate import Device, evidence, overlapping, pull, pull_maps
from occstream.evaluation.rules import Rule
from occstream.evaluation.votes import VoteConfig, voting
from occstream.sharding.attach import Sidecar
from occstream.sharding.codec import Coding, encode
from occstream.sharding.entries import SceneEntry
from occstream.sharding.manifest import Manifest
from occstream.sharding.poses import inverse
from occstream.sharding.schema import IGNORE, Labels, get_taxonomy
from occstream.sharding.shardfile import ShardWriter
from occstream.sharding.stream import ShardReader

VERSION = 1  # of the method: another number, other labels
Movers = Literal["parked", "tracks", "none"]
MOVERS: tuple[Movers, ...] = ("parked", "tracks", "none")
LEVEL = 12  # of zstd: 19 takes six times as long, half of what refining takes, and saves a tenth of the bytes
SAMPLED = 20_000  # voxels of a frame, and
EVERY = 4  # frames of a scene, by which λ is fitted


@dataclass(frozen=True)
class RefineConfig:
    """Settings.

    Attributes:
        rule: votes, or bayes with a table of confusions.
        window: key-frames before and after each one that vote in it.
        movers: parked: things of other frames count where at least half of the frames in view of a voxel call it a thing, and
            elsewhere the frame's own things stay; tracks: what lies in a tracked box votes in the box's frame; none: as if
            everything stood still.
        votes: of the weighted votes.
        voxels: all that a frame labels vote, or only those that its labels' mask knows.
        soft: a voxel's vote is shared by the two best classes of predictions that have them, as their logits say.
        evidence: bayes: free voxels say how much they are in doubt (predictions with evidence), and the table knows what it
            means.

    Raises:
        ValueError: a value is out of range.
    """

    rule: Literal["votes", "bayes"] = "votes"
    window: int = 25
    movers: Movers = "parked"
    votes: VoteConfig = field(default_factory=VoteConfig)
    voxels: Votes = "all"
    soft: bool = False
    evidence: bool = False

    def __post_init__(self) -> None:
        if self.rule not in ("votes", "bayes"):
            raise ValueError(f"rule {self.rule!r} is neither votes nor bayes")
        if self.evidence and self.rule != "bayes":
            raise ValueError("evidence is read by rule bayes; votes know occupied and free only")
        if not 0 <= self.window <= 500:
            raise ValueError(f"window is {self.window}, must be 0 to 500 key-frames")
        if self.movers not in MOVERS:
            raise ValueError(f"movers {self.movers!r} is not one of {', '.join(MOVERS)}")

    @property
    def view(self) -> bool:
        """Whether it matters what cameras saw."""
        return self.rule == "bayes" or self.votes.sensor == "camera" or self.movers == "parked"


@dataclass
class Refined:
    """What a call did.

    Attributes:
        manifest: with the refined labels; None while other parts are missing.
        frames, changed, bytes: made by this call; ``changed`` is the number of voxels with another class.
        seconds, reading, voting, writing: of time; CPU seconds of the three kinds of work.
        skipped: tars that were there.
        view_from: how it was known what cameras saw.
    """

    manifest: Manifest | None = None
    frames: int = 0
    changed: int = 0
    bytes: int = 0
    seconds: float = 0.0
    reading: float = 0.0
    voting: float = 0.0
    writing: float = 0.0
    skipped: int = 0
    view_from: str = ""


def make_rule(config: RefineConfig, manifest: Manifest, table: Confusions | None = None) -> Rule:
    """The rule for a set's labels. Raises ValueError: bayes without a table, or a table of other classes."""
    taxonomy = get_taxonomy(manifest.taxonomy)
    if config.rule == "votes":
        rule = voting(config.votes, manifest.label_grid, taxonomy)
    elif table is None:
        raise ValueError("rule bayes needs a table of confusions: measure it with --holdout, or give it with --table")
    elif table.evidence != config.evidence:
        raise ValueError(
            f"the table of confusions was measured {'with' if table.evidence else 'without'} evidence; measure it again"
        )
    else:
        rule = naive_bayes(table, manifest.label_grid, taxonomy)
    return dataclasses.replace(rule, parked=config.movers == "parked")


@dataclass
class SceneRefiner:
    """Refines the frames of scenes.

    Attributes:
        reader: of the labels.
        rule: how to count.
        config: settings.
        threads: of the kernel on the CPU; ``device``: as ``propagate.pull`` has it.
        done: time that was spent.
    """

    reader: DriveReader
    rule: Rule
    config: RefineConfig
    threads: int = 1
    device: Device = "auto"
    done: Refined = field(default_factory=Refined)
    _buffers: list[np.ndarray] = field(default_factory=list)

    def frames(self, scene: int) -> Iterator[tuple[Source, np.ndarray]]:
        """(source, refined (X, Y, Z) uint8) of each frame of a scene, in order."""
        count = self.reader.manifest.scenes[scene].frames
        reach = self.config.window
        volumes = Volumes.of(self.reader, scene, min(count, 2 * reach + 1), self._buffers)
        for index in range(count):
            began = time.process_time()
            window = range(max(0, index - reach), min(count, index + reach + 1))
            for other in window:
                volumes.slot(other)
            read = time.process_time()
            out = self._refine(volumes, index, window)
            self.done.reading += read - began
            self.done.voting += time.process_time() - read
            yield volumes.sources[index], out

    def _refine(self, volumes: Volumes, index: int, window: range) -> np.ndarray:
        own, grid = volumes.sources[index], self.reader.grid
        maps = pull_maps(grid, own.pose, grid, np.stack([volumes.sources[i].pose for i in window]))
        near = overlapping(maps, (0, 0, 0), grid.shape, grid.shape)
        chosen = [i for i, wanted in zip(window, near) if wanted]
        boxes = own.boxes if own.boxes is not None and own.boxes.owner.any() else None
        out = pull(
            self.rule,
            maps[near],
            volumes.packed if volumes.standing is None else volumes.standing,
            [volumes.slot(i) for i in chosen],
            before=own.semantic,
            itself=chosen.index(index),
            doubts=volumes.doubts,
            wanted=None if boxes is None else boxes.owner == 0,
            threads=self.threads,
            device=self.device,
        ).semantic
        return out if boxes is None else self._boxes(volumes, index, window, boxes=boxes, out=out)

    def _boxes(self, volumes: Volumes, index: int, window: range, *, boxes: BoxMotion, out: np.ndarray) -> np.ndarray:
        """Decides what lies in the boxes of a frame by the same places of the same boxes in other frames."""
        grid = self.reader.grid
        for number in np.unique(boxes.owner)[1:]:
            track = boxes.tracks[number - 1]
            sharing = {i: b for i in window if (b := volumes.sources[i].boxes) is not None and track in b.tracks}
            # Through the box: the source's grid takes the place of the world.
            from_box = [b.to_grid[b.tracks.index(track)] for b in sharing.values()]
            to_box = inverse(boxes.to_grid[number - 1])
            maps = pull_maps(grid, to_box, grid, inverse(np.stack(from_box)))
            where = np.argwhere(boxes.owner == number)
            out = pull(
                self.rule,
                maps,
                volumes.packed,
                [volumes.slot(i) for i in sharing],
                before=out,
                itself=list(sharing).index(index),
                doubts=volumes.doubts,
                wanted=boxes.owner == number,
                begin=where.min(0).tolist(),
                end=(where.max(0) + 1).tolist(),
                device="cpu",  # too few voxels to move volumes for
            ).semantic
        return out


def refine(
    url: str,
    group: str,
    name: str,
    config: RefineConfig,
    *,
    table: Confusions | None = None,
    part: tuple[int, int] = (1, 1),
    threads: int = 1,
    device: Device = "auto",
    kept: Sequence[int] = (),
    progress: Callable[[int, int], None] | None = None,
) -> Refined:
    """Refines a label group of a data set, shard by shard; a rerun continues where it stopped.

    Args:
        url: the data set.
        group: what votes: "labels" or a sidecar such as ``pseudo-a``.
        name: of the new group, ``pseudo-…``.
        config: settings.
        table: for rule bayes.
        part: (i, n): only every n-th shard. The call that finds all parts done publishes the manifest.
        threads: of this process on the CPU.
        device: cuda, cpu, or the GPU where there is one (auto); the bytes are the same.
        kept: numbers of scenes that keep the set's own labels: training on truth and refined labels is then training on this
            group.
        progress: gets shards done and shards in all.

    Raises:
        ValueError: data set, group, table and name do not fit each other.
    """
    if not 1 <= part[0] <= part[1]:
        raise ValueError(f"part {part[0]}/{part[1]}: needs i/n with 1 <= i <= n")
    if name == group:
        raise ValueError(f"{name} would take the place of what it is made from; choose another name")
    base, began = Manifest.load(url), time.perf_counter()
    reader = DriveReader(base, group, config.voxels, config.view, tracks=config.movers == "tracks", soft=config.soft,
                         evidence=config.evidence)  # fmt: skip
    rule = make_rule(config, reader.manifest, table)
    refiner = SceneRefiner(reader, rule, config, threads, device)
    names = sorted(base.scenes[number].name for number in kept)
    own = ShardReader(label_manifest(base, "labels"), ("labels",)) if names else None
    sidecar = _sidecar(base, reader.manifest, name, group, config=config, table=table, kept=names)
    numbers = {scene.name: number for number, scene in enumerate(base.scenes)}

    def fill(writer: ShardWriter, scenes: list[SceneEntry]) -> None:
        for scene in scenes:
            if own is not None and scene.name in names:
                _copy(writer, own, numbers[scene.name], scene.frames)
            else:
                _write(writer, refiner, numbers[scene.name])

    try:
        mine = sorted(sidecar.scenes)[part[0] - 1 :: part[1]]
        for count, number in enumerate(mine, 1):
            refiner.done.skipped += sidecar.published(number) is not None
            sidecar.write(number, fill)
            if progress:
                progress(count, len(mine))
    finally:
        reader.close()
        if own is not None:
            own.close()
    refiner.done.manifest, refiner.done.view_from = sidecar.publish(), reader.view_from
    refiner.done.seconds = time.perf_counter() - began
    return refiner.done


def _sidecar(
    base: Manifest,
    labels: Manifest,
    name: str,
    group: str,
    *,
    config: RefineConfig,
    table: Confusions | None,
    kept: list[str],
) -> Sidecar:
    """The group that is written; what it is made from and by is its origin."""
    rule, digest = dataclasses.asdict(config), None
    if not config.soft:
        del rule["soft"]  # as labels of earlier versions have it
    if not config.evidence:
        del rule["evidence"]  # likewise
    if config.rule == "bayes":
        assert table is not None, "rule bayes has a table, or make_rule has refused it"
        rule["votes"], digest = None, table.digest
    origin = {
        "refine": VERSION,
        "input": labels.fingerprint,
        "rule": rule,
        "table": digest,
    }
    if kept:
        origin["truth"] = kept
    said = f"votes of {config.votes.sensor}" if config.rule == "votes" else f"bayes {digest}"
    about = f"{said} over {config.window} key-frames to each side, movers {config.movers}, of {group} {labels.fingerprint[:16]}"
    about += ", shared by the two best classes" if config.soft else ""
    about += f", truth for {len(kept)} scenes" if kept else ""
    author = base.author(group) if group != "labels" else None
    if author is not None and author.trained_on is not None:
        author = dataclasses.replace(author, trained_on=author.trained_on | set(kept))
    return Sidecar(
        base,
        name,
        grid=labels.label_grid,
        taxonomy=labels.taxonomy,
        classes=labels.classes,
        labels=about,
        origin=origin,
        convention=labels.convention,
        author=author,
    )


def _copy(writer: ShardWriter, own: ShardReader, scene: int, frames: int) -> None:
    """Writes a scene's own labels."""
    for index in range(frames):
        frame = own.frame(scene, index)
        writer.add(frame.key, encode(frame, "labels", Coding(level=LEVEL)))


def _write(writer: ShardWriter, refiner: SceneRefiner, scene: int) -> None:
    """Writes a scene's refined labels."""
    for source, semantic in refiner.frames(scene):
        _write_frame(writer, source, semantic, refiner)


def _write_frame(writer: ShardWriter, source: Source, semantic: np.ndarray, refiner: SceneRefiner) -> None:
    began, done = time.process_time(), refiner.done
    free = refiner.rule.num_classes
    known = source.mask("mask_lidar")
    if known is not None:  # what other frames tell of a voxel that this one did not see is known
        known |= (source.semantic == IGNORE) & (semantic != IGNORE)
    labels = Labels(semantic < free, semantic, known, source.mask("mask_camera"), ego_to_global=source.placed)
    frame = dataclasses.replace(source.frame, labels=labels)
    members = encode(frame, "labels", Coding(level=LEVEL))
    writer.add(frame.key, members)
    done.frames += 1
    done.changed += int(np.count_nonzero(semantic != source.semantic))
    done.bytes += sum(len(data) for _, data in members)
    done.writing += time.process_time() - began


def measure(
    url: str, group: str, scenes: list[int], config: RefineConfig, *, truth: str = "labels"
) -> tuple[Confusions, np.ndarray]:
    """Confusions of a label group against the truth, and λ, on scenes that the network was not trained on.

    λ is fitted on every second scene by a table of the others, by IoU + mIoU in a sample of voxels; the table that is returned
    counts all. (The likelihood of the truth asks for a smaller λ, at which the prior, mostly free, outweighs what is said.)

    Args:
        url: the data set.
        group: predictions.
        scenes: numbers, two at least.
        config: as for ``refine``; ``window`` and ``movers`` matter for λ.
        truth: group of labels to compare with; what their mask does not know is not counted.

    Returns:
        The table, and (L, 2) IoU and mIoU at each of ``bayes.LAMBDAS``.

    Raises:
        ValueError: fewer than two scenes, or truth on another grid or of other classes.
    """
    if len(scenes) < 2:
        raise ValueError("rule bayes measures its table and λ on different scenes: hold out two scenes or more")
    base = Manifest.load(url)
    reader = DriveReader(base, group, config.voxels, view=True, evidence=config.evidence)
    manifest, true_manifest = reader.manifest, label_manifest(base, truth)
    known = ShardReader(true_manifest, (truth,))
    grid = manifest.label_grid
    if not grid.same_voxels(true_manifest.label_grid) or manifest.classes != true_manifest.classes:
        raise ValueError(f"{url}: {truth} and {group} have other grids or classes, so they cannot be compared")
    classes = len(manifest.classes) + 1
    words = classes + EXTRA[config.evidence]
    counts = [np.zeros((BINS, 2, classes, words), np.int64) for _ in range(2)]
    for turn, scene in enumerate(scenes):
        for index in range(base.scenes[scene].frames):
            source, view = reader.read(scene, index)
            true = _truth(known, scene, index)
            counts[turn % 2] += confusions_of(source.packed(view, classes - 1), true, grid, classes, words=words)
    if not min(c.sum() for c in counts):
        raise ValueError(f"{url}: {truth} knows nothing about the held-out scenes; choose others")
    rule = naive_bayes(Confusions(counts[0]), grid, get_taxonomy(manifest.taxonomy))
    fitted = [_fit(reader, known, rule, scene, config=config) for scene in scenes[1::2]]
    for each in (reader, known):
        each.close()
    scores = scores_by_exponent(np.sum(fitted, axis=0))
    return Confusions(counts[0] + counts[1], best_exponent(scores)), scores


def _truth(reader: ShardReader, scene: int, index: int) -> np.ndarray:
    """(X, Y, Z) uint8, IGNORE where unknown."""
    labels = reader.frame(scene, index).labels
    if labels is None or labels.semantic is None:
        raise ValueError(f"{reader.manifest.url}: the labels of held-out scenes have no classes to measure by")
    return np.where(labels.known(), labels.semantic, IGNORE)


def _fit(reader: DriveReader, known: ShardReader, rule: Rule, scene: int, *, config: RefineConfig) -> np.ndarray:
    """``bayes.confusions_by_exponent`` of some voxels of some frames of a scene."""
    count, reach, grid = reader.manifest.scenes[scene].frames, config.window, reader.grid
    volumes = Volumes.of(reader, scene, min(count, 2 * reach + 1), [])
    found, stride = [], max(1, grid.size // SAMPLED) | 1
    for index in range(0, count, EVERY):
        true = _truth(known, scene, index).reshape(-1)
        chosen = np.arange(index % stride, grid.size, stride)
        chosen = chosen[true[chosen] <= rule.num_classes]
        window = range(max(0, index - reach), min(count, index + reach + 1))
        for other in window:
            volumes.slot(other)
        poses = np.stack([volumes.sources[i].pose for i in window])
        maps = pull_maps(grid, volumes.sources[index].pose, grid, poses)
        where = np.stack(np.unravel_index(chosen, grid.shape), 1)
        scores = evidence(rule, maps, volumes.packed, [volumes.slot(i) for i in window], index=where)
        found.append(confusions_by_exponent(scores, true[chosen], rule.prior))
    return np.sum(found, axis=0)
