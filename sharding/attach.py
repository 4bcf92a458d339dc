"""Labels and pseudo-labels beside a packed data set, as a sidecar group, without touching its images."""

from __future__ import annotations

import dataclasses
import hashlib
import re
import tempfile
from pathlib import Path

from occstream.sharding import storage
from occstream.sharding.codec import FORMAT_VERSION, canonical_json
from occstream.sharding.manifest import Manifest, SceneEntry, ShardEntry, shard_path
from occstream.sharding.schema import frame_key
from occstream.sharding.shardfile import ShardWriter, publish_shard, read_record
from occstream.sharding.stream import ShardReader


def attach(url: str, labels_url: str, group: str) -> Manifest:
    """Adds the labels of another packed data set to this one as a sidecar group, scene by scene and frame by frame.

    Images and everything else stay untouched; the group gets a manifest of its own (``manifest.<group>.json``), last.

    Args:
        url: the data set that gets the labels.
        labels_url: a set with the same scenes, for example of ``occstream label``, or of predictions.
        group: name, like ``labels-lidar`` or ``pseudo-r1``.

    Returns:
        The manifest with the sidecar's labels in place of the set's own.

    Raises:
        ValueError: the name cannot be used or is taken, or the labels lack a scene or frames.
    """
    base, other = Manifest.load(url), Manifest.load(labels_url)
    if not re.fullmatch(r"(labels|pseudo)-[a-z0-9-]{1,40}", group):
        raise ValueError(f"group {group!r}: call it labels-… or pseudo-… with lower-case letters, digits and '-'")
    if "labels" not in other.groups:
        raise ValueError(f"{labels_url}: has no group 'labels', only {', '.join(other.groups)}")
    numbers = {scene.name: number for number, scene in enumerate(other.scenes)}
    for scene in base.scenes:
        if scene.name not in numbers:
            raise ValueError(f"{labels_url}: has no labels of scene {scene.name}; label it, or attach to a smaller set")
        have = other.scenes[numbers[scene.name]].frames
        if have != scene.frames:
            raise ValueError(f"{labels_url}: has {have} frames of scene {scene.name}, {url} has {scene.frames}")
    by_number: dict[int, list[SceneEntry]] = {}
    for scene in base.scenes:
        by_number.setdefault(scene.shard, []).append(scene)
    header = {
        "format": FORMAT_VERSION,
        "group": group,
        "source": base.source,
        "grid": other.grid.to_dict(),
        "taxonomy": other.taxonomy,
        "classes": list(other.classes),
        "labels": other.labels,
    }
    reader = ShardReader(other, ("labels",))
    entries = []
    for number, scenes in sorted(by_number.items()):
        target = storage.join(url, shard_path(group, number))
        digest = hashlib.blake2b(
            canonical_json([base.fingerprint, other.fingerprint, group]), digest_size=16
        ).hexdigest()
        record = read_record(target)
        if not (record and record["digest"] == digest and storage.size(target) == record["size"]):
            with tempfile.TemporaryDirectory(prefix="occstream-") as folder:
                writer = ShardWriter(Path(folder) / "labels.tar", header)
                for scene in scenes:
                    for index in range(scene.frames):
                        data = reader.raw("labels", numbers[scene.name], index)
                        writer.add_raw(frame_key(scene.name, index), data)
                path, frames = writer.close()
                found = [{"name": s.name, "frames": s.frames, "attributes": s.attributes} for s in scenes]
                record = publish_shard(target, path, group, digest, found, {}, frames, replace=record is not None)
        entries.append(ShardEntry(group, number, record["size"], record["sha256"]))
    reader.close()
    joined = dataclasses.replace(
        base,
        grid=other.grid,
        taxonomy=other.taxonomy,
        classes=other.classes,
        labels=other.labels,
        shards=tuple(entries),
        label_group=group,
    )
    joined.publish_sidecar(base.fingerprint)
    return base.with_sidecar(group)
