"""What a packed data set holds. ``manifest.json`` is written last: a reader sees a complete data set or none."""

from __future__ import annotations

import difflib
import functools
import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from occstream.sharding import storage
from occstream.sharding.codec import FORMAT_VERSION, canonical_json
from occstream.sharding.grid import GRIDS, VoxelGrid
from occstream.sharding.received import check_manifest, check_sidecar, load_json
from occstream.sharding.schema import get_taxonomy

NAME = "manifest.json"


@dataclass(frozen=True, slots=True)
class SceneEntry:
    """One scene: its name, number of frames, the number of the shard (of every group) that holds it, attributes."""

    name: str
    frames: int
    shard: int
    attributes: dict = field(default_factory=dict, hash=False)


@dataclass(frozen=True, slots=True)
class ShardEntry:
    """One tar: its group, number, size in bytes and SHA-256."""

    group: str
    number: int
    size: int
    sha256: str

    @property
    def path(self) -> str:
        """Below the root of the data set."""
        return shard_path(self.group, self.number)


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


def shard_path(group: str, number: int) -> str:
    return f"{group}/{group}-{number:06d}.tar"


def is_labels(group: str) -> bool:
    """Whether a group of shards holds labels: the set's own, or a sidecar."""
    return group == "labels" or group.startswith(("labels-", "pseudo-"))


@dataclass(frozen=True)
class Manifest:
    """A data set.

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
    """

    url: str
    source: str
    grid: VoxelGrid | None
    taxonomy: str
    classes: tuple[str, ...]
    labels: str
    groups: tuple[str, ...]
    scenes: tuple[SceneEntry, ...]
    shards: tuple[ShardEntry, ...]
    left_out: tuple[str, ...] = ()
    label_group: str = "labels"
    convention: str = ""
    base: str = field(default="", compare=False)

    def content(self) -> dict:
        """The JSON content of ``manifest.json`` without the fingerprint."""
        return {
            "format": FORMAT_VERSION,
            "source": self.source,
            "grid": self.grid.to_dict() if self.grid else None,
            "taxonomy": self.taxonomy,
            "classes": list(self.classes),
            "labels": self.labels,
            "groups": list(self.groups),
            "scenes": [asdict(s) for s in self.scenes],
            "shards": [asdict(s) for s in self.shards],
            **({"left_out": list(self.left_out)} if self.left_out else {}),
            **({"convention": self.convention} if self.convention else {}),
            **({"label_group": self.label_group} if self.label_group != "labels" else {}),
        }

    @property
    def label_grid(self) -> VoxelGrid:
        """``grid``, where there are labels. Raises ValueError if there are none."""
        if self.grid is None:
            raise ValueError(f"{self.url}: has no labels, and so no grid; make labels with occstream label")
        return self.grid

    @functools.cached_property
    def fingerprint(self) -> str:
        """Names the data everywhere (checkpoints, MLflow): 32 hex digits, a function of the content alone."""
        return _digest(self.content())

    def publish(self) -> None:
        """Writes ``manifest.json`` below ``url``."""
        data = {**self.content(), "fingerprint": self.fingerprint}
        storage.publish(json.dumps(data, indent=1, sort_keys=True).encode(), storage.join(self.url, NAME))

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
        if data.get("format") != FORMAT_VERSION:
            raise ValueError(f"{where}: format version {data.get('format')}, this version reads {FORMAT_VERSION}")
        check_manifest(data, where)
        manifest = cls.from_content(url, data)
        # Of what was read, not of what was made of it: a million scenes need not be taken apart again.
        try:
            digest = _digest({k: v for k, v in data.items() if k != "fingerprint"})
        except ValueError:  # NaN
            digest = ""
        if digest != data["fingerprint"]:
            raise ValueError(f"{where}: its content does not match its fingerprint; it was edited or damaged")
        manifest.__dict__["fingerprint"] = data["fingerprint"]
        if data["labels"] and tuple(get_taxonomy(manifest.taxonomy).classes) != manifest.classes:
            raise ValueError(f"{where}: classes of taxonomy {manifest.taxonomy!r} differ from this version's")
        return manifest

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
            shards=(
                *(s for s in self.shards if s.group not in ("labels", group)),
                *(ShardEntry(**s) for s in data["shards"]),
            ),
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
            more = tuple(s for s in other.shards if s.group == group)
            found = replace(found, base=other.base, groups=(*found.groups, group), shards=(*found.shards, *more))
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
        content = self.content()
        data = {k: content[k] for k in ("format", "grid", "taxonomy", "classes", "labels")}
        data |= {"convention": self.convention} if self.convention else {}
        data |= {"base": base, "group": self.label_group}
        if author and author.network:
            data["network"] = author.network
        if author and author.trained_on is not None:
            data["trained_on"] = sorted(author.trained_on)
        data["shards"] = [asdict(s) for s in self.shards if s.group == self.label_group]
        where = storage.join(self.url, sidecar_name(self.label_group))
        storage.publish(json.dumps(data, indent=1, sort_keys=True).encode(), where)

    @classmethod
    def from_content(cls, url: str, content: Mapping[str, Any]) -> Manifest:
        """The inverse of ``content``."""
        return cls(
            url=url,
            source=content["source"],
            grid=VoxelGrid.from_dict(content["grid"]) if content["grid"] else None,
            taxonomy=content["taxonomy"],
            classes=tuple(content["classes"]),
            labels=content["labels"],
            groups=tuple(content["groups"]),
            scenes=tuple(SceneEntry(**s) for s in content["scenes"]),
            shards=tuple(ShardEntry(**s) for s in content["shards"]),
            left_out=tuple(content.get("left_out", ())),
            convention=content.get("convention", ""),
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
        numbers = {s.name: i for i, s in enumerate(self.scenes)}
        found = []
        for name in names:
            if name not in numbers:
                near = difflib.get_close_matches(name, numbers, 1, 0.3)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                raise ValueError(f"{self.url}: has no scene {name!r}{hint or ';'} `occstream inspect` lists them")
            found.append(numbers[name])
        return found

    def _permutation(self, seed: int) -> list[int]:
        # By name, not by number: the subset of a scene list does not depend on how it was sharded.
        names = sorted(range(len(self.scenes)), key=lambda i: self.scenes[i].name)
        return [names[i] for i in np.random.Generator(np.random.PCG64(seed)).permutation(len(names))]

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
        try:
            return self._by_place[group, number]
        except KeyError:
            raise ValueError(f"{self.url}: manifest names no shard {shard_path(group, number)}") from None

    @functools.cached_property
    def _by_place(self) -> dict[tuple[str, int], ShardEntry]:
        return {(s.group, s.number): s for s in self.shards}

    @property
    def num_frames(self) -> int:
        return sum(s.frames for s in self.scenes)
