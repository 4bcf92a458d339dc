"""What a packed data set holds. ``manifest.json`` is written last: a reader sees a complete data set or none."""

from __future__ import annotations

import difflib
import functools
import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from occstream.sharding import storage
from occstream.sharding.arrays import pack_arrays, read_arrays
from occstream.sharding.codec import FORMAT_VERSION, canonical_json
from occstream.sharding.entries import SceneTable, ShardEntry, ShardTable, shard_path
from occstream.sharding.grid import GRIDS, VoxelGrid
from occstream.sharding.received import Received, check_head, check_manifest, check_sidecar, load_json
from occstream.sharding.schema import get_taxonomy

NAME = "manifest.json"
ARRAYS_VERSION = 2  # of a manifest whose scenes and shards are in a file of arrays
MOST_COMPARED = 20_000  # names among which a similar one is looked for
_ARRAYS = re.compile(r"manifest-[0-9a-f]{32}\.tar")


@dataclass(frozen=True)
class Author:
    """What network a sidecar's labels are predictions of.

    Attributes:
        network: digest of its weights, several joined by "+"; "": these are no predictions, or nobody said of what.
        trained_on: names of scenes of the data set that it was trained on, or that keep true labels; None: not known.
    """

    network: str = ""
    trained_on: frozenset[str] | None = None


def _digest(content: dict) -> str:
    return hashlib.blake2b(canonical_json(content), digest_size=16).hexdigest()


def sidecar_name(group: str) -> str:
    return f"manifest.{group}.json"


def arrays_name(fingerprint: str) -> str:
    """File of a large set's scenes and shards; never overwritten, so that a reader cannot meet a half of each of two."""
    return f"manifest-{fingerprint}.tar"


def is_labels(group: str) -> bool:
    """Whether a group of shards holds labels: the set's own, or a sidecar."""
    return group == "labels" or group.startswith(("labels-", "pseudo-"))


@dataclass(frozen=True)
class Manifest:
    """A data set.

    Scenes and shards may be given as entries; they are kept as columns.

    Attributes:
        url: its root (not part of the content).
        source: name of the raw data set.
        grid: of all labels, or None if there are none.
        taxonomy: name; ``classes`` its class names at the time of packing.
        labels: what made the labels ("native", or the version string of a labeler), or "".
        groups: groups that every shard number has a tar in.
        scenes, shards: in packing order.
        left_out: names of scenes that could not be packed and were allowed to fail.
        label_group: the group whose labels grid, taxonomy, classes, ``labels`` and ``convention`` describe: "labels" or a
            sidecar.
        convention: how the benchmark of the labels averages (``schema.CONVENTIONS``); "": they do not say, see
            ``metric_convention``.
        base: fingerprint of the data set as packed, where sidecars were put in place of its labels or beside them (not part of
            the content); "": this is the data set as packed.
        arrays: whether ``manifest.json`` leaves scenes and shards to a file of arrays, as in large sets. The fingerprint is then
            made of their columns.
    """

    url: str
    source: str
    grid: VoxelGrid | None
    taxonomy: str
    classes: tuple[str, ...]
    labels: str
    groups: tuple[str, ...]
    scenes: SceneTable
    shards: ShardTable
    left_out: tuple[str, ...] = ()
    label_group: str = "labels"
    convention: str = ""
    base: str = field(default="", compare=False)
    arrays: bool = field(default=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "scenes", SceneTable.of(self.scenes))
        object.__setattr__(self, "shards", ShardTable.of(self.shards))

    def about(self) -> dict:
        """JSON of everything but scenes and shards."""
        return {
            "source": self.source,
            "grid": self.grid.to_dict() if self.grid else None,
            "taxonomy": self.taxonomy,
            "classes": list(self.classes),
            "labels": self.labels,
            "groups": list(self.groups),
            **({"left_out": list(self.left_out)} if self.left_out else {}),
            **({"convention": self.convention} if self.convention else {}),
            **({"label_group": self.label_group} if self.label_group != "labels" else {}),
        }

    def content(self) -> dict:
        """The JSON content of ``manifest.json`` without the fingerprint, where all of it is JSON."""
        scenes, shards = [s.to_dict() for s in self.scenes], [s.to_dict() for s in self.shards]
        return {"format": FORMAT_VERSION, **self.about(), "scenes": scenes, "shards": shards}

    @property
    def label_grid(self) -> VoxelGrid:
        """``grid``, where there are labels. Raises ValueError if there are none."""
        if self.grid is None:
            raise ValueError(f"{self.url}: has no labels, and so no grid; make labels with occstream label")
        return self.grid

    @functools.cached_property
    def fingerprint(self) -> str:
        """Names the data everywhere (checkpoints, MLflow): 32 hex digits, a function of the content alone."""
        if not self.arrays:
            return _digest(self.content())
        about = {"format": ARRAYS_VERSION, **self.about()}
        return _digest({**about, "scenes": self.scenes.digest, "shards": self.shards.digest})

    def publish(self) -> None:
        """Writes ``manifest.json`` below ``url``; where it is large, a file of arrays before it, in place of any earlier."""
        if not self.arrays:
            data = {**self.content(), "fingerprint": self.fingerprint}
        else:
            data = {"format": ARRAYS_VERSION, **self.about(), "fingerprint": self.fingerprint}
            file = storage.join(self.url, arrays_name(self.fingerprint))
            storage.publish(pack_arrays(self.scenes, self.shards), file)
        storage.publish(json.dumps(data, indent=1, sort_keys=True).encode(), storage.join(self.url, NAME))
        for name in storage.listing(self.url):
            if _ARRAYS.fullmatch(name) and not (self.arrays and name == arrays_name(self.fingerprint)):
                storage.remove(storage.join(self.url, name))

    @classmethod
    def load(cls, url: str) -> Manifest:
        """Reads and checks the manifest of a data set.

        Raises:
            ValueError: there is none, it is damaged, or another format version.
        """
        if not url:
            raise ValueError("no data set given: set data.url to the folder or s3:// URL that `occstream shard` wrote")
        where = storage.join(url, NAME)
        try:
            found = storage.read_bytes(where)
        except FileNotFoundError:
            raise ValueError(
                f"{where}: no manifest there; pack the data with `occstream shard` or correct the URL"
            ) from None
        data = load_json(found, where, "pack the data again, shards that are intact are kept")
        if data.get("format") == ARRAYS_VERSION:
            manifest, digest = cls._with_arrays(url, data, where)
        elif data.get("format") == FORMAT_VERSION:
            check_manifest(data, where)
            manifest = cls.from_content(url, data)
            # Of what was read, not of what was made of it: that need not be taken apart again.
            try:
                digest = _digest({k: v for k, v in data.items() if k != "fingerprint"})
            except ValueError:  # NaN
                digest = ""
        else:
            raise ValueError(
                f"{where}: format version {str(data.get('format'))[:40]}, this version reads {FORMAT_VERSION} and "
                f"{ARRAYS_VERSION}"
            )
        if digest != data["fingerprint"]:
            raise ValueError(f"{where}: its content does not match its fingerprint; it was edited or damaged")
        manifest.__dict__["fingerprint"] = data["fingerprint"]
        if data["labels"] and tuple(get_taxonomy(manifest.taxonomy).classes) != manifest.classes:
            raise ValueError(f"{where}: classes of taxonomy {manifest.taxonomy!r} differ from this version's")
        return manifest

    @classmethod
    def _with_arrays(cls, url: str, data: dict, where: str) -> tuple[Manifest, str]:
        """A manifest whose scenes and shards are in a file of arrays, and the fingerprint that its content has."""
        groups = check_head(data, where)
        file = storage.join(url, arrays_name(Received(data, where).fingerprint()))
        try:
            found = storage.read_bytes(file)
        except FileNotFoundError:
            raise ValueError(
                f"{file}: is missing, though {NAME} refers to it; copy it too, or pack the data again"
            ) from None
        scenes, shards = read_arrays(found, file, groups)
        manifest = cls.from_content(url, {**data, "scenes": scenes, "shards": shards}, arrays=True)
        about = {k: v for k, v in data.items() if k != "fingerprint"}
        return manifest, _digest({**about, "scenes": scenes.digest, "shards": shards.digest})

    def sidecars(self) -> list[str]:
        """Names of the label groups that were attached later."""
        names = storage.listing(self.url)
        return sorted(n[len("manifest.") : -len(".json")] for n in names if n.startswith("manifest.") and n != NAME)

    def with_sidecar(self, group: str) -> Manifest:
        """The same scenes with the labels of a sidecar group in place of the set's own; its fingerprint differs.

        Raises:
            ValueError: there is no such sidecar, or it was attached to another version of this data set.
        """
        data = self._sidecar(group)
        return replace(
            self,
            base=self.base or self.fingerprint,
            grid=VoxelGrid.from_dict(data["grid"]),
            taxonomy=data["taxonomy"],
            classes=tuple(data["classes"]),
            labels=data["labels"],
            groups=(*(g for g in self.groups if g not in ("labels", group)), group),
            shards=self.shards.without("labels", group) + ShardTable.of(data["shards"]),
            label_group=group,
            convention=data.get("convention", ""),
        )

    def _sidecar(self, group: str) -> dict:
        """The manifest of a sidecar that belongs to this data set."""
        where = storage.join(self.url, sidecar_name(group))
        try:
            found = storage.read_bytes(where)
        except FileNotFoundError:
            there = ", ".join(self.sidecars()) or "none"
            raise ValueError(f"{self.url}: has no sidecar group {group!r}; there are: {there}") from None
        data = load_json(found, where, "attach the labels again")
        check_sidecar(data, where, group)
        base = self.base or self.fingerprint
        if data["base"] != base:
            raise ValueError(
                f"{where}: was attached to a data set with fingerprint {data['base']}, this one has {base}; "
                "attach the labels again"
            )
        return data

    def with_label_sets(self, groups: Iterable[str]) -> Manifest:
        """The same data set, whose sidecar groups can be read beside the labels in use: ``Frame.label_sets`` has them.

        Raises:
            ValueError: as ``with_sidecar``; or a sidecar's labels are on another grid or have another taxonomy.
        """
        found = self
        for group in groups:
            if group in found.groups:
                continue
            other = self.with_sidecar(group)
            grid = other.grid
            fits = self.grid is None or (grid is not None and self.grid.same_voxels(grid))
            if not fits or self.taxonomy != other.taxonomy:
                raise ValueError(
                    f"{self.url}: labels {group} are on grid {grid.name if grid else None} with taxonomy {other.taxonomy!r}, "
                    f"{self.label_group} are not; they cannot be read together"
                )
            shards = found.shards + other.shards.only(group)
            found = replace(found, base=other.base, groups=(*found.groups, group), shards=shards)
        return found

    def author(self, group: str) -> Author:
        """Of the labels of a sidecar. Raises ValueError as ``with_sidecar``."""
        data = self._sidecar(group)
        known = "trained_on" in data
        return Author(data.get("network", ""), frozenset(data["trained_on"]) if known else None)

    def metric_convention(self) -> tuple[str, str]:
        """How scores against these labels are averaged, and how that is known."""
        if self.convention:
            return self.convention, "declared by the labels"
        known = {"openscene": "openscene", "semantickitti": "semantickitti", "kitti360": "semantickitti"}
        if self.taxonomy in known:
            return known[self.taxonomy], f"inferred from taxonomy {self.taxonomy}"
        if self.grid and any(self.grid.same_voxels(GRIDS[name]) for name in ("openoccupancy", "surroundocc")):
            return "openoccupancy", f"inferred from grid {self.grid.name}"
        return "occ3d", f"inferred from taxonomy {self.taxonomy}"

    def publish_sidecar(self, base: str, author: Author | None = None) -> None:
        """Writes the sidecar manifest of a manifest that ``with_sidecar`` will read back.

        Args:
            base: fingerprint of the set that it belongs to.
            author: of labels that are predictions.
        """
        about = self.about()
        data = {"format": FORMAT_VERSION, **{k: about[k] for k in ("grid", "taxonomy", "classes", "labels")}}
        data |= {"convention": self.convention} if self.convention else {}
        data |= {"base": base, "group": self.label_group}
        if author and author.network:
            data["network"] = author.network
        if author and author.trained_on is not None:
            data["trained_on"] = sorted(author.trained_on)
        data["shards"] = [s.to_dict() for s in self.shards.only(self.label_group)]
        where = storage.join(self.url, sidecar_name(self.label_group))
        storage.publish(json.dumps(data, indent=1, sort_keys=True).encode(), where)

    @classmethod
    def from_content(cls, url: str, content: Mapping[str, Any], arrays: bool = False) -> Manifest:
        """The inverse of ``content``."""
        return cls(
            url=url,
            source=content["source"],
            grid=VoxelGrid.from_dict(content["grid"]) if content["grid"] else None,
            taxonomy=content["taxonomy"],
            classes=tuple(content["classes"]),
            labels=content["labels"],
            groups=tuple(content["groups"]),
            scenes=SceneTable.of(content["scenes"]),
            shards=ShardTable.of(content["shards"]),
            left_out=tuple(content.get("left_out", ())),
            convention=content.get("convention", ""),
            arrays=arrays,
        )

    def subset(self, scenes: int | None = None, seed: int = 0, holdout: int = 0) -> list[int]:
        """Scene numbers of a nested subset: the first ``scenes`` of one seeded permutation, so 2000 is in 4000 is in 8000.

        Args:
            scenes: None for all that are not held out.
            seed: of the permutation.
            holdout: number of scenes at its end that belong to ``held_out`` and never to a subset.

        Raises:
            ValueError: more scenes are asked for than there are.
        """
        free = len(self.scenes) - holdout
        wanted = free if scenes is None else scenes
        if free < 1 or wanted > free:
            raise ValueError(
                f"{self.url}: {wanted} scenes requested, but it has {len(self.scenes)}, {holdout} of them held out; "
                "ask for fewer or pack more"
            )
        return self._permutation(seed)[:wanted]

    def held_out(self, holdout: int, seed: int = 0) -> list[int]:
        """Scene numbers that ``subset`` with the same arguments never returns."""
        return self._permutation(seed)[len(self.scenes) - holdout :] if holdout else []

    def named(self, names: Iterable[str]) -> list[int]:
        """Scene numbers by name. Raises ValueError that names the nearest."""
        found = []
        for name in names:
            number = self.scenes.find(name)
            if number is None:
                # Among a million names, the search for a similar one would take minutes.
                near = difflib.get_close_matches(name, self.scenes.names()[:MOST_COMPARED], 1, 0.3)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                raise ValueError(f"{self.url}: has no scene {name!r}{hint or ';'} `occstream inspect` lists them")
            found.append(number)
        return found

    def _permutation(self, seed: int) -> list[int]:
        # By name, not by number: the subset of a scene list does not depend on how it was sharded.
        drawn = np.random.Generator(np.random.PCG64(seed)).permutation(len(self.scenes))
        return self.scenes.by_name[drawn].tolist()

    def check(self, grid: VoxelGrid | None, taxonomy: str, groups: tuple[str, ...]) -> None:
        """Raises ValueError if this is not the data that a recipe expects.

        Args:
            grid: of the labels; None: they are not read.
        """
        missing = [g for g in groups if g not in self.groups]
        if missing:
            raise ValueError(f"{self.url}: has no group {missing[0]!r}, only {', '.join(self.groups)}; pack it as well")
        if grid is not None and (self.grid is None or not self.grid.same_voxels(grid)):
            have = f"{self.grid.name!r} {self.grid.shape} from {self.grid.lower}" if self.grid else "none"
            raise ValueError(
                f"{self.url}: its labels are on grid {have}, the recipe expects {grid.name!r} {grid.shape} from "
                f"{grid.lower}; set grid= to that of the data or pack it with --grid {grid.name}"
            )
        if self.taxonomy != taxonomy:
            raise ValueError(f"{self.url}: labels use taxonomy {self.taxonomy!r}, the recipe expects {taxonomy!r}")

    def shard(self, group: str, number: int) -> ShardEntry:
        """Entry of a shard. Raises ValueError if there is none."""
        entry = self.shards.find(group, number)
        if entry is None:
            raise ValueError(f"{self.url}: manifest names no shard {shard_path(group, number)}")
        return entry

    @property
    def num_frames(self) -> int:
        return int(self.scenes.frames.sum(dtype=np.int64))

    def spread(self, frames: int) -> list[tuple[int, int]]:
        """Scene and frame numbers of at most this many frames, evenly spread over all."""
        total = self.num_frames
        return self.places(np.unique(np.linspace(0, total - 1, min(frames, total)).astype(np.int64)))

    def places(self, numbers: np.ndarray) -> list[tuple[int, int]]:
        """Scene and frame numbers of frames that are counted through all scenes."""
        ends = np.cumsum(self.scenes.frames, dtype=np.int64)
        scenes = np.searchsorted(ends, numbers, "right")
        inside = numbers - (ends[scenes] - self.scenes.frames[scenes])
        return list(zip(scenes.tolist(), inside.tolist()))
