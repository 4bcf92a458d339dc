"""``occstream predict``: predictions of a checkpoint over a packed data set, as a label group alongside its images."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from occstream.evaluation.predictions import Keep
from occstream.pretrain.reading import device_batches, open_stream
from occstream.pretrain.streams import check_manifest
from occstream.pretrain.tasks.registry import task_of
from occstream.pretrain.trained import Trained, load_trained
from occstream.sharding.attach import Sidecar
from occstream.sharding.codec import Coding, encode
from occstream.sharding.manifest import Manifest, SceneEntry
from occstream.sharding.order import evaluation_batches
from occstream.sharding.schema import Frame, Labels
from occstream.sharding.shardfile import ShardWriter
from occstream.sharding.stream import ShardReader


@dataclass
class Predicted:
    """What a call did.

    Attributes:
        manifest: with the predictions as labels; None while other parts are missing.
        frames, voxels, bytes, seconds: made by this call; ``voxels`` have a class.
        skipped: tars that were there.
    """

    manifest: Manifest | None
    frames: int = 0
    voxels: int = 0
    bytes: int = 0
    seconds: float = 0.0
    skipped: int = 0


def predict_checkpoint(
    checkpoint: str | Path,
    url: str,
    name: str,
    *,
    keep: Keep = "top1",
    flips: bool = False,
    truth: int = 0,
    holdout: int = 0,
    part: tuple[int, int] = (1, 1),
    overrides: tuple[str, ...] = (),
    progress: Callable[[int, int], None] | None = None,
) -> Predicted:
    """Predicts all frames of a data set in this process, shard by shard; a rerun continues where it stopped.

    Models of the offboard strategy label the voxels that the set's labels call occupied, others those that they predict to be.

    Args:
        checkpoint: a run's folder or one of its checkpoints.
        url: the data set.
        name: of the new group, ``pseudo-…``.
        keep, flips: of ``evaluation.predictions``.
        truth: number of scenes of the nested subset (seed ``data.subset_seed``, ``holdout``) that keep the set's own
            labels: training on ground truth and pseudo-labels is then training on this group.
        part: (i, n): only every n-th shard, on the machine's GPU number i - 1 (counted round). The call that finds all parts
            done publishes the manifest.
        overrides: of the recipe, such as ``model.cap=60000``.
        progress: gets shards done and shards in all.

    Raises:
        ValueError: checkpoint, data set and name do not fit each other.
    """
    if not 1 <= part[0] <= part[1]:
        raise ValueError(f"part {part[0]}/{part[1]}: needs i/n with 1 <= i <= n")
    trained, base = load_trained(checkpoint, overrides, part[0] - 1), Manifest.load(url)
    config = trained.config
    try:
        task_of(config).check_prediction()
    except ValueError as error:
        raise ValueError(f"{trained.path}: {error}") from None
    config.data.url = url
    job = _Job(trained, base, keep=keep, flips=flips, truth=truth, holdout=holdout)
    sidecar = job.sidecar(name, overrides)
    try:
        mine = sorted(sidecar.scenes)[part[0] - 1 :: part[1]]
        for count, number in enumerate(mine, 1):
            job.done.skipped += sidecar.published(number) is not None
            sidecar.write(number, job.write)
            if progress:
                progress(count, len(mine))
    finally:
        job.reader.close()
    job.done.seconds, job.done.manifest = time.perf_counter() - job.began, sidecar.publish()
    return job.done


class _Job:
    """Frames of one data set, predicted by one network and written as labels.

    Attributes:
        done: counts so far.
        read: the data set with what samples read beside its labels.
        kept: scenes that keep the set's own labels.
    """

    def __init__(self, trained: Trained, base: Manifest, *, keep: Keep, flips: bool, truth: int, holdout: int) -> None:
        self.trained, self.base, self.flips = trained, base, flips
        self.keep: Keep = keep
        config = trained.config
        self.task, self.labeled = task_of(config), "labels" in base.groups
        if not self.labeled and (self.task.needs_labels or truth):
            raise ValueError(f"{base.url}: has no labels; {self.task.title} and --truth need them")
        chosen = base.subset(truth, config.data.subset_seed, holdout) if truth else []
        self.kept = {base.scenes[i].name for i in chosen}
        self.numbers = {scene.name: number for number, scene in enumerate(base.scenes)}
        if self.task.needs_labels:
            for note in self.task.facts("data", config.data, base, range(len(base.scenes))).notes:
                print(note)
        sensors = self.task.sensors(base, 0, trained.sensors)
        self.sample = self.task.sample("predict", config.data, sensors, self.labeled)
        self.read = check_manifest(base, self.sample, config)
        # Poses and tokens come from the labels' group where there is one: it is the smallest.
        self.reader = ShardReader(self.read, ("labels",) if self.labeled else self.sample.groups[:1])
        self.done, self.began = Predicted(None), time.perf_counter()

    def sidecar(self, name: str, overrides: tuple[str, ...]) -> Sidecar:
        """The group that is written; what it is made by is its origin."""
        config, base, trained = self.trained.config, self.base, self.trained
        origin = {
            "checkpoint": trained.digest,
            "keep": self.keep,
            "flips": self.flips,
            "truth": sorted(self.kept),
            "overrides": list(overrides),
        }
        about = f"{self.keep} of {self.task.title} {trained.digest}"
        about += f", truth for {len(self.kept)} scenes" if self.kept else ""
        classes = config.classes.classes
        return Sidecar(
            base,
            name,
            grid=config.voxel_grid,
            taxonomy=config.taxonomy,
            classes=classes,
            labels=about,
            origin=origin,
            convention=base.convention,
        )

    def write(self, writer: ShardWriter, scenes: list[SceneEntry]) -> None:
        """Writes the labels of a shard's scenes."""
        made = self._predict([s for s in scenes if s.name not in self.kept])
        for scene in scenes:
            for index in range(scene.frames):
                frame = self.reader.frame(self.numbers[scene.name], index)
                if scene.name not in self.kept:
                    frame = self._labeled(frame, made)
                members = encode(frame, "labels", Coding())
                writer.add(frame.key, members)
                self.done.frames += 1
                self.done.bytes += sum(len(data) for _, data in members)

    def _predict(self, scenes: list[SceneEntry]) -> dict[str, Labels]:
        """Predictions of all frames of scenes by frame key; frames that cannot be read are not among them."""
        if not scenes:
            return {}
        config, trained = self.trained.config, self.trained
        numbers, frames = [self.numbers[s.name] for s in scenes], [s.frames for s in scenes]
        plan = evaluation_batches(numbers, frames, config.eval.batch, rank=0, world=1)
        with open_stream(
            self.read, plan, self.sample, capacity=config.eval.batch, config=config, world=trained.world
        ) as stream:
            batches = device_batches(stream, trained.world.device)
            return dict(self.task.predict(trained.model, batches, self.keep, self.flips))

    def _labeled(self, frame: Frame, made: dict[str, Labels]) -> Frame:
        """A frame with its prediction, which knows the voxels that the set's own labels know."""
        labels = made.get(frame.key)
        if labels is None:
            raise ValueError(
                f"{self.base.url}: frame {frame.key} cannot be predicted: an image is missing or damaged (named above); pack "
                "its scene again, or predict on a set without it"
            )
        own = frame.labels if self.labeled else None
        labels.mask_lidar = own.mask_lidar if own else None
        labels.mask_camera = own.mask_camera if own else None
        self.done.voxels += int(np.count_nonzero(labels.binary))
        return Frame(frame.scene, frame.index, frame.token, frame.timestamp, frame.ego_to_global, labels=labels)
