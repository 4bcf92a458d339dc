"""Occ3D-Waymo: voxel labels ``{training,validation}/NNN/FFF[_04].npz`` with masks and ego poses.

The vehicle frame has its origin on the road below the rear axle, as ours. The camera mask is what the cameras' rays reach
(``final_voxel_state``) in their field of view (``infov``): the rig does not look back.
Labels alone: the images and sweeps are Waymo's own records, which need its protocol buffers to read.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from occstream.sharding.grid import VoxelGrid, get_grid
from occstream.sharding.rawfiles import Wanted, choose, entries, existing_folder, read_npy, rigid
from occstream.sharding.rawtree import Place, ahead
from occstream.sharding.schema import WAYMO, Findings, Frame, Labels, Scene, Taxonomy

# Free is 15 in the data set's documentation and 23 in the released files.
RAW_FREE = (15, 23)
STEP_US = 100_000


def open_source(
    *,
    root: str,
    voxel: Literal["0.4", "0.1"] = "0.4",
    splits: tuple[str, ...] = ("training", "validation"),
    scenes: Wanted = None,
    stride: int = 1,
) -> WaymoOcc3d:
    """A folder in the layout of Occ3D-Waymo.

    Args:
        root: holds ``training/`` and/or ``validation/``.
        voxel: meters: ``FFF_04.npz`` (0.4) or ``FFF.npz`` (0.1 x 0.1 x 0.2).
        splits: which of the two, where they are there.
        scenes: names ``training-000``, …; None for all.
        stride: one frame in this many (10 per second) is a key-frame.

    Raises:
        ValueError: no such folder or scene.
    """
    folder = existing_folder(root, "training/ or validation/")
    if stride < 1:
        raise ValueError(f"stride ({stride}) must be at least 1")
    there = [f"{split}-{p.name}" for split in splits for p in entries(folder / split) if p.is_dir()]
    if not there:
        raise ValueError(f"{folder}: has no scenes in {' or '.join(splits)}; unpack the voxel archives of Occ3D-Waymo")
    chosen = tuple(choose(scenes, there, folder))
    found = Findings(f"{'FFF_04' if voxel == '0.4' else 'FFF'}.npz, {voxel} m", left_out=_left_out(stride))
    return WaymoOcc3d(folder, chosen, voxel, stride, found)


def _left_out(stride: int) -> tuple[str, ...]:
    return (f"{stride - 1} of {stride} frames (stride={stride})",) if stride > 1 else ()


@dataclass(frozen=True)
class WaymoOcc3d:
    """See ``open_source``."""

    root: Place
    scenes: tuple[str, ...]
    voxel: str
    stride: int
    findings: Findings

    name = "waymo_occ3d"
    convention = "occ3d"
    taxonomy: Taxonomy = WAYMO

    @property
    def grid(self) -> VoxelGrid:
        return get_grid("occ3d" if self.voxel == "0.4" else "waymo-fine")

    def __repr__(self) -> str:
        return f"WaymoOcc3d(voxel={self.voxel}, stride={self.stride}, infov)"

    def scene_names(self) -> list[str]:
        return list(self.scenes)

    def load(self, name: str) -> Scene:
        """One scene. Raises ValueError if a file is missing or damaged."""
        split, number = name.split("-", 1)
        folder = self.root / split / number
        ending = "_04" if self.voxel == "0.4" else ""
        paths = [p for p in entries(folder, "*.npz") if p.stem.endswith("_04") == bool(ending)]
        for path in paths:
            if not path.stem.removesuffix("_04").isdecimal():
                raise ValueError(f"{path}: its name is not a frame's number; move it elsewhere")
        files = {int(p.stem.removesuffix("_04")): p for p in paths}
        if not files:
            raise ValueError(f"{folder}: has no {'*' + ending}.npz; choose the other voxel size or unpack the archive")
        ahead(files[n] for n in sorted(files)[:: self.stride])
        frames = [self._frame(name, i, n, files[n]) for i, n in enumerate(sorted(files)[:: self.stride])]
        return Scene(name, frames, {"split": split})

    def _frame(self, scene: str, index: int, number: int, path: Place) -> Frame:
        arrays = read_npy(path)
        if not isinstance(arrays, dict):
            raise ValueError(f"{path}: is not an archive of arrays (.npz)")
        missing = [k for k in ("voxel_label", "origin_voxel_state", "final_voxel_state") if k not in arrays]
        if missing:
            raise ValueError(f"{path}: has no array {missing[0]!r}, only {', '.join(arrays)}")
        raw = arrays["voxel_label"]
        for name in ("voxel_label", "origin_voxel_state", "final_voxel_state"):
            if arrays[name].shape != self.grid.shape or arrays[name].dtype.kind not in "iub":
                have = f"shape {arrays[name].shape} and type {arrays[name].dtype}"
                raise ValueError(f"{path}: {name} has {have}, expected whole numbers of shape {self.grid.shape}")
        if (raw < 0).any():
            raise ValueError(f"{path}: class {raw.min()} is out of range 0..{WAYMO.free_id}")
        in_view = (arrays["final_voxel_state"] == 1) & (arrays["origin_voxel_state"] == 1)
        if "infov" in arrays:
            if arrays["infov"].shape != self.grid.shape:
                raise ValueError(f"{path}: infov has shape {arrays['infov'].shape}, expected {self.grid.shape}")
            in_view &= arrays["infov"] != 0
        free = np.isin(raw, RAW_FREE)
        if (bad := raw[~free & (raw >= WAYMO.num_classes)]).size:
            raise ValueError(f"{path}: class {bad[0]} is out of range 0..{WAYMO.free_id}")
        return Frame(
            scene=scene,
            index=index,
            token=f"{scene}/{number:03d}",
            timestamp=number * STEP_US,
            ego_to_global=rigid(arrays["ego2global"], f"{path}: ego2global") if "ego2global" in arrays else None,
            labels=Labels(
                ~free,
                np.where(free, WAYMO.free_id, raw).astype(np.uint8),
                arrays["origin_voxel_state"] == 1,
                in_view,
            ),
        )
