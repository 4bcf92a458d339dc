"""``occstream predict``: predictions of a checkpoint over a packed data set, as a label group alongside its images."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
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
from occstream.sharding.entries import SceneEntry
from occstream.sharding.manifest import Author, Manifest, is_labels
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
    folds: Sequence[str | Path] = (),
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
        folds: further runs of the same kind: each scene is predicted by the first of all that was not trained on it.
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
    trained = [load_trained(path, overrides, part[0] - 1) for path in (checkpoint, *folds)]
    base = Manifest.load(url)
    networks = [_Network(each, base) for each in trained]
    if truth and not networks[0].labeled:
        raise ValueError(f"{base.url}: has no labels, and --truth needs them")
    job = _Job(networks, base, keep=keep, flips=flips, truth=truth, holdout=holdout)
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


class _Network:
    """One network that predicts frames of a data set.

    Attributes:
        sample: how frames become what it reads.
        read: the data set with what samples read beside its labels.
    """

    def __init__(self, trained: Trained, base: Manifest) -> None:
        self.trained = trained
        self.config, self.labeled = self.trained.config, "labels" in base.groups
        self.task = task_of(self.config)
        try:
            self.task.check_prediction()
        except ValueError as error:
            raise ValueError(f"{self.trained.path}: {error}") from None
        self.config.data.url = base.url
        if not self.labeled and self.task.needs_labels:
            raise ValueError(f"{base.url}: has no labels, and {self.task.title} needs them")
        if self.task.needs_labels:
            for note in self.task.facts("data", self.config.data, base, range(len(base.scenes))).notes:
                print(note)
        sensors = self.task.sensors(base, 0, self.trained.sensors)
        self.sample = self.task.sample("predict", self.config.data, sensors, self.labeled)
        self.read = check_manifest(base, self.sample, self.config)
        for note in self.task.remarks(self.read, self.config.data):
            print(note)

    def predict(self, scenes: list[int], keep: Keep, flips: bool) -> dict[str, Labels]:
        """Labels of all frames of scenes by frame key; frames that cannot be read are not among them."""
        config, world = self.config, self.trained.world
        frames = [self.read.scenes[number].frames for number in scenes]
        plan = evaluation_batches(scenes, frames, config.eval.batch, rank=0, world=1)
        capacity = config.eval.batch
        with open_stream(self.read, plan, self.sample, capacity=capacity, config=config, world=world) as stream:
            return dict(self.task.predict(self.trained.model, device_batches(stream, world.device), keep, flips))


class _Job:
    """Frames of one data set, predicted by one network, or crosswise by several, and written as labels.

    Attributes:
        done: counts so far.
        kept: scenes that keep the set's own labels.
        by: number of the network that predicts a scene, by its name.
    """

    def __init__(
        self, networks: list[_Network], base: Manifest, *, keep: Keep, flips: bool, truth: int, holdout: int
    ) -> None:
        self.networks, self.base, self.flips = networks, base, flips
        self.keep: Keep = keep
        config, self.labeled = networks[0].config, networks[0].labeled
        chosen = base.subset(truth, config.data.subset_seed, holdout) if truth else []
        self.kept = {base.scenes[i].name for i in chosen}
        self.numbers = {scene.name: number for number, scene in enumerate(base.scenes)}
        self.by = dict.fromkeys(self.numbers, 0) if len(networks) == 1 else self._crosswise()
        # Poses and tokens come from the labels' group where there is one: it is the smallest.
        self.reader = ShardReader(networks[0].read, ("labels",) if self.labeled else networks[0].sample.groups[:1])
        self.done, self.began = Predicted(None), time.perf_counter()

    def _crosswise(self) -> dict[str, int]:
        """For each scene the first network that was not trained on it.

        Raises:
            ValueError: networks do not fit each other, one does not know its scenes, or all were trained on one.
        """
        first = self.networks[0].config
        seen: list[frozenset[str]] = []
        for network in self.networks:
            config, path = network.config, network.trained.path
            if config.taxonomy != first.taxonomy or not config.voxel_grid.same_voxels(first.voxel_grid):
                raise ValueError(f"{path}: has another grid or taxonomy than {self.networks[0].trained.path}")
            if network.trained.scenes is None:
                raise ValueError(
                    f"{path}: does not say which scenes it was trained on (it, or what it started from, is of an earlier "
                    "version or a file of weights); train it again"
                )
            seen.append(network.trained.scenes)
        found = {
            scene: next((number for number, known in enumerate(seen) if scene not in known), -1)
            for scene in self.numbers
            if scene not in self.kept
        }
        if everywhere := [scene for scene, number in found.items() if number < 0]:
            raise ValueError(
                f"all {len(seen)} runs, with those that they started from, were trained on {len(everywhere)} scenes, such as "
                f"{', '.join(everywhere[:3])}: add a run that holds them out"
            )
        return found

    @property
    def author(self) -> Author:
        """Whose predictions they are."""
        network = "+".join(n.trained.digest for n in self.networks)
        seen = [n.trained.scenes for n in self.networks]
        # A refiner's labels come from those of its input.
        inputs = [
            self.base.author(group) for n in self.networks for group in n.sample.groups if group in self._sidecars
        ]
        if any(names is None for names in (*seen, *(a.trained_on for a in inputs))):
            return Author(network)
        known = frozenset().union(*(a.trained_on or () for a in inputs))
        own = {scene for scene, number in self.by.items() if scene in (seen[number] or ())}
        return Author(network, (known | own | self.kept) & self.numbers.keys())

    @property
    def _sidecars(self) -> list[str]:
        """Groups that are read beside the set's labels."""
        return [group for n in self.networks for group in n.sample.groups if is_labels(group) and group != "labels"]

    def sidecar(self, name: str, overrides: tuple[str, ...]) -> Sidecar:
        """The group that is written; what it is made by is its origin."""
        config, base, task = self.networks[0].config, self.base, self.networks[0].task
        digest = "+".join(n.trained.digest for n in self.networks)
        origin = {
            "checkpoint": digest,
            "keep": self.keep,
            "flips": self.flips,
            "truth": sorted(self.kept),
            "overrides": list(overrides),
        }
        if self._sidecars:
            origin["input"] = [n.read.fingerprint for n in self.networks]
        about = f"{self.keep} of {task.title} {digest[:100]}"
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
            author=self.author,
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
        found: dict[str, Labels] = {}
        for number, network in enumerate(self.networks):
            mine = [self.numbers[s.name] for s in scenes if self.by[s.name] == number]
            if mine:
                found |= network.predict(mine, self.keep, self.flips)
        return found

    def _labeled(self, frame: Frame, made: dict[str, Labels]) -> Frame:
        """A frame with its prediction, which knows the voxels that the set's own labels know, and lies where they do."""
        labels = made.get(frame.key)
        if labels is None:
            raise ValueError(
                f"{self.base.url}: frame {frame.key} cannot be predicted: its input is missing or damaged (named above); pack "
                "its scene again, or predict on a set without it"
            )
        own = frame.labels if self.labeled else None
        labels.mask_lidar = own.mask_lidar if own else None
        labels.mask_camera = own.mask_camera if own else None
        labels.ego_to_global = own.ego_to_global if own else None
        self.done.voxels += int(np.count_nonzero(labels.binary))
        return Frame(frame.scene, frame.index, frame.token, frame.timestamp, frame.ego_to_global, labels=labels)
