"""Which classes each frame of a packed data set holds: a table beside its manifest, for streams that balance classes.

``classes.<group>.json`` follows from what the label group holds, so it is no part of a fingerprint. Jobs that pack labels
write it, and ``collect`` makes it for sets and sidecars that have none.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from occstream.sharding import storage
from occstream.sharding.codec import canonical_json
from occstream.sharding.manifest import Manifest
from occstream.sharding.received import Received, load_json
from occstream.sharding.schema import IGNORE, Frame, Taxonomy, get_taxonomy
from occstream.sharding.stream import ShardReader

READERS = 4  # threads of ``collect``
_ROW = re.compile(r"[0-9a-f]{1,64}( [0-9a-f]{1,64})*")


def table_name(group: str) -> str:
    """File name of a label group's table, below the root of its data set."""
    return f"classes.{group}.json"


def classes_of(frame: Frame, taxonomy: Taxonomy) -> list[str]:
    """Sorted names of the classes that a frame holds: of its boxes, and of the voxels that its labels know to be occupied."""
    names = set(frame.boxes.names) if frame.boxes is not None else set()
    labels = frame.labels
    if labels is not None and labels.semantic is not None:
        counts = np.bincount(labels.semantic[labels.known()], minlength=IGNORE + 1)
        names |= {taxonomy.classes[i] for i in np.flatnonzero(counts[: taxonomy.num_classes])}
    return sorted(names)


@dataclass(frozen=True)
class FrameClasses:
    """The table of one label group, or of some scenes of it. Small in memory: there may be a million scenes.

    Attributes:
        classes: names, sorted.
        scenes: for each scene, in the manifest's order, a hexadecimal number for each frame, separated by spaces: bit i is
            set where the frame holds ``classes[i]``.
    """

    classes: tuple[str, ...]
    scenes: list[str]

    @classmethod
    def of_names(cls, scenes: Iterable[Iterable[Iterable[str]]]) -> FrameClasses:
        """The table of frames whose classes are given by name."""
        listed = [[frozenset(frame) for frame in scene] for scene in scenes]
        classes = sorted({name for scene in listed for frame in scene for name in frame})
        bit = {name: 1 << i for i, name in enumerate(classes)}
        return cls(tuple(classes), [_row(sum(bit[name] for name in frame) for frame in scene) for scene in listed])

    @classmethod
    def of_record(cls, data: Mapping[str, Any]) -> FrameClasses:
        """The inverse of ``to_record``."""
        return cls(tuple(data["classes"]), list(data["scenes"]))

    def to_record(self) -> dict[str, list[str]]:
        """JSON values."""
        return {"classes": list(self.classes), "scenes": self.scenes}

    @classmethod
    def joined(cls, tables: Sequence[FrameClasses]) -> FrameClasses:
        """The scenes of several tables, in order."""
        classes = sorted({name for table in tables for name in table.classes})
        scenes: list[str] = []
        for table in tables:
            bits = [1 << classes.index(name) for name in table.classes]
            moved = lru_cache(4096)(lambda mask, bits=bits: sum(b for i, b in enumerate(bits) if mask >> i & 1))
            scenes += [_row(map(moved, _masks(row))) for row in table.scenes]
        return cls(tuple(classes), scenes)

    def names(self, scene: int, frame: int) -> list[str]:
        """Sorted names of the classes of one frame, by the scene's number in the manifest."""
        mask = _masks(self.scenes[scene])[frame]
        return [name for i, name in enumerate(self.classes) if mask >> i & 1]

    def holds(self, scenes: Sequence[int], wanted: Sequence[str]) -> np.ndarray:
        """(F, len(wanted)) bool: which of the wanted classes the frames of these scenes hold, scene after scene."""
        masks = [mask for scene in scenes for mask in _masks(self.scenes[scene])]
        found = np.zeros((len(masks), len(wanted)), bool)
        for column, name in enumerate(wanted):
            if name in self.classes:
                bit = 1 << self.classes.index(name)
                found[:, column] = [bool(mask & bit) for mask in masks]
        return found

    def counts(self) -> dict[str, int]:
        """Number of frames that hold each class."""
        held = self.holds(range(len(self.scenes)), self.classes).sum(0)
        return dict(zip(self.classes, held.tolist()))

    def publish(self, manifest: Manifest) -> None:
        """Writes the table beside the manifest that it belongs to."""
        data = {"base": manifest.fingerprint, "group": manifest.label_group, **self.to_record()}
        storage.publish(canonical_json(data), storage.join(manifest.url, table_name(manifest.label_group)))

    @classmethod
    def load(cls, manifest: Manifest) -> FrameClasses:
        """Reads and checks the table of a manifest's label group.

        Raises:
            ValueError: there is none, it is damaged, or it belongs to other labels; names the command that makes it.
        """
        where = storage.join(manifest.url, table_name(manifest.label_group))
        group = "" if manifest.label_group == "labels" else f" --group {manifest.label_group}"
        remedy = f"run `occstream classes {manifest.url}{group}`"
        try:
            found = storage.read_bytes(where)
        except FileNotFoundError:
            raise ValueError(f"{where}: no table of the classes of each frame there; {remedy}") from None
        return cls.parse(found, manifest, where, remedy)

    @classmethod
    def parse(cls, found: bytes, manifest: Manifest, where: str, remedy: str) -> FrameClasses:
        """The table of a manifest from the content of its file. Raises ValueError that names file and remedy."""
        data = load_json(found, where, remedy)
        received = Received(data, where)
        classes = received.texts("classes")
        if received.text("group") != manifest.label_group or list(classes) != sorted(set(classes)):
            raise received.fail("it is of another group, or its classes are not sorted")
        if received.text("base") != manifest.fingerprint:
            raise ValueError(f"{where}: is of other labels than those that are there now; {remedy}")
        scenes = data.get("scenes")
        if not isinstance(scenes, list) or len(scenes) != len(manifest.scenes):
            raise received.fail(f"scenes are not a list of {len(manifest.scenes)}")
        received.matches("scenes", scenes, _ROW)
        for entry, row in zip(manifest.scenes, scenes):
            masks = _masks(row)
            if len(masks) != entry.frames or max(masks) >> len(classes):
                raise received.fail(f"scene {entry.name} does not have {entry.frames} numbers of {len(classes)} bits")
        return cls(classes, scenes)


def collect(url: str, group: str | None = None) -> FrameClasses:
    """Makes and publishes the table of a data set's labels, or of a sidecar group, by reading them once.

    Raises:
        ValueError: the data set has no labels, no such group, or a frame cannot be decoded.
    """
    manifest = Manifest.load(url)
    if group and group != "labels":
        manifest = manifest.with_sidecar(group)
    if manifest.label_group not in manifest.groups:
        raise ValueError(f"{url}: has no labels to take classes from, only {', '.join(manifest.groups)}")
    taxonomy = get_taxonomy(manifest.taxonomy)
    reader = ShardReader(manifest, (manifest.label_group,))

    def scene(number: int) -> list[list[str]]:
        frames = range(manifest.scenes[number].frames)
        return [classes_of(reader.frame(number, i), taxonomy) for i in frames]

    try:
        with ThreadPoolExecutor(READERS) as pool:
            table = FrameClasses.of_names(list(pool.map(scene, range(len(manifest.scenes)))))
    finally:
        reader.close()
    table.publish(manifest)
    return table


def _row(masks: Iterable[int]) -> str:
    return " ".join(f"{mask:x}" for mask in masks)


def _masks(row: str) -> list[int]:
    return [int(word, 16) for word in row.split(" ")]
