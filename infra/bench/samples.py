"""The samples that every loader of ``occstream bench stream`` reads, and what each does with a sample's bytes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import simplejpeg

from occstream.sharding.codec import decode
from occstream.sharding.grid import VoxelGrid, get_grid
from occstream.sharding.schema import OCC3D, Frame, Scene, Taxonomy, labeled, swept
from occstream.sharding.stream import Field

GROUPS = ("cameras", "lidar", "labels")
IMAGE = (256, 704)
POINTS = 32_768
BATCH = 2
FIELDS = {
    "images": Field((6, *IMAGE, 3), "uint8"),
    "points": Field((POINTS, 4), "float32"),
    "semantic": Field((200, 200, 16), "uint8"),
    "mask": Field((200, 200, 16), "bool"),
}


@dataclass(frozen=True)
class Repeated:
    """A few rendered frames, again and again: enough to measure reading, without hours of rendering."""

    frames: tuple[Frame, ...]
    scenes: int
    name = "repeated"
    taxonomy: Taxonomy = OCC3D

    @property
    def grid(self) -> VoxelGrid:
        return get_grid("occ3d")

    def scene_names(self) -> list[str]:
        return [f"repeated-{i:03d}" for i in range(self.scenes)]

    def load(self, name: str) -> Scene:
        return Scene(name, [dataclasses.replace(f, scene=name, index=i) for i, f in enumerate(self.frames)])

    def __repr__(self) -> str:
        return f"Repeated({len(self.frames)}, {self.scenes})"


def simplejpeg_into(jpeg: bytes, out: np.ndarray) -> None:
    simplejpeg.decode_jpeg(jpeg, "RGB", buffer=out)


def fill(frame: Frame, views: dict[str, np.ndarray], decode_into: Callable = simplejpeg_into) -> None:
    """Decodes a frame into one sample's arrays: what every loader here does with its bytes."""
    for i, name in enumerate(sorted(frame.cameras)):
        decode_into(frame.cameras[name].jpeg, views["images"][i])
    sweep, labels = swept(frame), labeled(frame)
    count = min(len(sweep.xyz), POINTS)
    views["points"][:count, :3] = sweep.xyz[:count]
    views["points"][:count, 3] = 0 if sweep.intensity is None else sweep.intensity[:count]
    views["points"][count:] = 0
    views["semantic"][...] = labels.semantic
    views["mask"][...] = labels.known()


def sample_of(members: dict[str, bytes], decode_into: Callable = simplejpeg_into) -> dict[str, np.ndarray]:
    """A peer's sample: members of all groups by ``<group>.<rest>`` -> fresh arrays."""
    parts = [{k[len(g) + 1 :]: v for k, v in members.items() if k.startswith(f"{g}.")} for g in GROUPS]
    arrays = {name: np.empty(f.shape, f.dtype) for name, f in FIELDS.items()}
    fill(decode(parts), arrays, decode_into)
    return arrays


def collate(samples: list[dict[str, np.ndarray]]) -> dict:
    """Stacks samples as tensors, as a training script would."""
    import torch

    return {name: torch.from_numpy(np.stack([s[name] for s in samples])) for name in FIELDS}
