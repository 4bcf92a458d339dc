"""Occ3D-nuScenes labels alone: ``gts/<scene>/<token>/labels.npz``. With the images and poses of nuScenes they
are read by ``nuscenes`` with ``labels=occ3d``; alone they have neither poses nor times, and frames are in order of token.
"""

from __future__ import annotations

from dataclasses import dataclass

from occstream.sharding.grid import VoxelGrid, get_grid
from occstream.sharding.rawfiles import Wanted, choose, entries, existing_folder, listed
from occstream.sharding.rawtree import Place, ahead
from occstream.sharding.schema import OCC3D, Findings, Frame, Scene, Taxonomy
from occstream.sharding.sources.nuscenes_labels import read_occ3d


def open_source(*, root: str, scenes: Wanted = None) -> Occ3d:
    """A folder in the layout of Occ3D-nuScenes.

    Args:
        root: holds ``gts/``.
        scenes: names of the scenes to read, or how many of the first; None for all.

    Raises:
        ValueError: no such folder or scene.
    """
    folder = existing_folder(existing_folder(root, "gts/") / "gts", "scene-0001/, …")
    there = [p.name for p in entries(folder) if any(p.glob("*/labels.npz"))]
    if not there:
        raise ValueError(f"{folder}: has no <scene>/<token>/labels.npz; unpack gts.tar.gz")
    chosen = tuple(choose(scenes, there, folder))
    bare = [
        f"{name}/{p.name}"
        for name in chosen
        for p in entries(folder / name)
        if p.is_dir() and not (p / "labels.npz").is_file()
    ]
    left = [f"{listed('frame', bare)} without a labels.npz"] if bare else []
    empty = [p.name for p in entries(folder) if p.is_dir() and p.name not in there]
    left += [f"{listed('scene', empty)} without any labels.npz"] if empty and scenes is None else []
    return Occ3d(folder, chosen, Findings("gts/<scene>/<token>/labels.npz", left_out=tuple(left)))


@dataclass(frozen=True)
class Occ3d:
    """See ``open_source``."""

    root: Place
    scenes: tuple[str, ...]
    findings: Findings

    name = "occ3d"
    convention = "occ3d"
    taxonomy: Taxonomy = OCC3D

    @property
    def grid(self) -> VoxelGrid:
        return get_grid("occ3d")

    def __repr__(self) -> str:
        return "Occ3d()"

    def scene_names(self) -> list[str]:
        return list(self.scenes)

    def load(self, name: str) -> Scene:
        """One scene. Raises ValueError if a file is missing or damaged."""
        tokens = [p.parent.name for p in entries(self.root / name, "*/labels.npz")]
        ahead(self.root / name / token / "labels.npz" for token in tokens)
        frames = [
            Frame(name, i, token, None, None, labels=read_occ3d(self.root / name / token / "labels.npz", self.grid))
            for i, token in enumerate(tokens)
        ]
        return Scene(name, frames)
