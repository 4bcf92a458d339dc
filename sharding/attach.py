"""Labels and pseudo-labels alongside a packed data set, as a sidecar group, without changing its images."""

from __future__ import annotations

import dataclasses
import hashlib
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from occstream.sharding import storage
from occstream.sharding.codec import FORMAT_VERSION, canonical_json
from occstream.sharding.entries import SceneEntry, ShardEntry, shard_path
from occstream.sharding.grid import VoxelGrid
from occstream.sharding.manifest import Author, Manifest
from occstream.sharding.schema import frame_key
from occstream.sharding.shardfile import ShardWriter, publish_shard, read_record
from occstream.sharding.stream import ShardReader


class Sidecar:
    """Writes a label group of a data set that exists: one tar for each of its shard numbers, then a manifest
    (``manifest.<group>.json``). What is published is skipped on a rerun; several machines may each write some numbers.

    Args:
        base: the data set.
        group: name, like ``labels-lidar`` or ``pseudo-r1``.
        grid, taxonomy, classes, labels: of the new labels; ``labels`` says what made them.
        origin: JSON value that tells these labels from any others; a published tar of another origin is replaced.
        author: of labels that are predictions.

    Raises:
        ValueError: the name cannot be used.
    """

    def __init__(
        self,
        base: Manifest,
        group: str,
        *,
        grid: VoxelGrid,
        taxonomy: str,
        classes: tuple[str, ...],
        labels: str,
        origin: Any,
        convention: str = "",
        author: Author | None = None,
    ) -> None:
        if not re.fullmatch(r"(labels|pseudo)-[a-z0-9-]{1,40}", group):
            raise ValueError(f"group {group!r}: call it labels-… or pseudo-… with lower-case letters, digits and '-'")
        self.base, self.author = base, author
        self.digest = hashlib.blake2b(canonical_json([base.fingerprint, origin, group]), digest_size=16).hexdigest()
        self.joined = dataclasses.replace(
            base,
            grid=grid,
            taxonomy=taxonomy,
            classes=classes,
            labels=labels,
            label_group=group,
            convention=convention,
        )
        self.scenes: dict[int, list[SceneEntry]] = {}
        for scene in base.scenes:
            self.scenes.setdefault(scene.shard, []).append(scene)

    def published(self, number: int) -> dict | None:
        """Record of a tar that is there and of this origin."""
        target = self._target(number)
        record = read_record(target)
        there = record and record["digest"] == self.digest and storage.size(target) == record["size"]
        return record if there else None

    def write(self, number: int, fill: Callable[[ShardWriter, list[SceneEntry]], None]) -> dict:
        """Publishes one tar, filled by ``fill``, unless it is there. Returns its record."""
        record = self.published(number)
        if record:
            return record
        scenes, joined = self.scenes[number], self.joined
        header = {
            "format": FORMAT_VERSION,
            "group": joined.label_group,
            "source": joined.source,
            "grid": joined.label_grid.to_dict(),
            "taxonomy": joined.taxonomy,
            "classes": list(joined.classes),
            "labels": joined.labels,
        }
        with tempfile.TemporaryDirectory(prefix="occstream-") as folder:
            writer = ShardWriter(Path(folder) / "labels.tar", header)
            fill(writer, scenes)
            path, frames = writer.close()
            found = [{"name": s.name, "frames": s.frames, "attributes": dict(s.attributes)} for s in scenes]
            return publish_shard(
                self._target(number),
                path,
                group=joined.label_group,
                digest=self.digest,
                scenes=found,
                failed={},
                frames=frames,
                replace=True,
            )

    def publish(self) -> Manifest | None:
        """Writes the manifest once all tars are there; None (and nothing written) before."""
        group, entries = self.joined.label_group, []
        for number in sorted(self.scenes):
            record = self.published(number)
            if record is None:
                return None
            entries.append(ShardEntry(group, number, record["size"], record["sha256"]))
        dataclasses.replace(self.joined, shards=tuple(entries)).publish_sidecar(self.base.fingerprint, self.author)
        return self.base.with_sidecar(group)

    def _target(self, number: int) -> str:
        return storage.join(self.base.url, shard_path(self.joined.label_group, number))


def attach(url: str, labels_url: str, group: str) -> Manifest:
    """Adds the labels of another packed data set to this one as a sidecar group, scene by scene and frame by frame.

    Args:
        url: the data set that gets the labels.
        labels_url: a set with the same scenes, for example of ``occstream label``.
        group: name, like ``labels-lidar``.

    Returns:
        The manifest with the sidecar's labels in place of the set's own.

    Raises:
        ValueError: the name cannot be used, or the labels lack a scene or frames.
    """
    base, other = Manifest.load(url), Manifest.load(labels_url)
    if "labels" not in other.groups:
        raise ValueError(f"{labels_url}: has no group 'labels', only {', '.join(other.groups)}")
    sidecar = Sidecar(
        base,
        group,
        grid=other.label_grid,
        taxonomy=other.taxonomy,
        classes=other.classes,
        labels=other.labels,
        origin=other.fingerprint,
        convention=other.convention,
    )
    numbers = {name: number for number, name in enumerate(other.scenes.names())}
    for scene in base.scenes:
        if scene.name not in numbers:
            raise ValueError(f"{labels_url}: has no labels of scene {scene.name}; label it, or attach to a smaller set")
        have = other.scenes[numbers[scene.name]].frames
        if have != scene.frames:
            raise ValueError(f"{labels_url}: has {have} frames of scene {scene.name}, {url} has {scene.frames}")
    reader = ShardReader(other, ("labels",))

    def copy(writer: ShardWriter, scenes: list[SceneEntry]) -> None:
        for scene in scenes:
            for index in range(scene.frames):
                data = reader.raw("labels", numbers[scene.name], index)
                writer.add_raw(frame_key(scene.name, index), data)

    for number in sorted(sidecar.scenes):
        sidecar.write(number, copy)
    reader.close()
    joined = sidecar.publish()
    if joined is None:
        raise ValueError(f"{url}: labels of {group} disappeared while they were attached; attach them again")
    return joined
