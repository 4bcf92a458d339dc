"""From a ``Frame`` to the sample of a refiner: a window of predicted volumes with their poses, and the truth of its pivot
(OccFiner, Sec. III-B). No camera is read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from occstream.pretrain.annotations import Annotations
from occstream.pretrain.augment import flip_matrix, flip_voxels
from occstream.sharding.doubts import doubts
from occstream.sharding.grid import VoxelGrid
from occstream.sharding.labels import labels_to_global
from occstream.sharding.order import generator
from occstream.sharding.poses import compose, inverse
from occstream.sharding.schema import IGNORE, Frame, Labels, Taxonomy, posed
from occstream.sharding.stream import Field, Window


@dataclass
class WindowConfig:
    """Key-frames of a sample beside its pivot, and how samples vary in training. The paper gives neither the clip's place nor the
    references' distance: these are ours."""

    before: int = 1
    """Key-frames right before the pivot. With the pivot and those after it they are the clip (OccFiner, Sec. III-B: 4)."""
    after: int = 2
    """Key-frames right after the pivot."""
    references: int = 2
    """Distant key-frames (OccFiner: 2). In training they are drawn anew for each sample; in evaluation they alternate before and
    after the pivot, the first two ``radius`` away or as far as the scene reaches."""
    radius: int = 10
    """Key-frames within which references are, outside of the clip."""
    soft: bool = False
    """Read the second class of predictions too, and how sure they were (``occstream predict --keep top2`` or ``logits``)."""
    flip_x: bool = True
    """Mirror the scene front to back with probability 1/2. Arrays are mirrored and poses with them, so any grid will do."""
    flip_y: bool = True
    """Mirror the scene left to right with probability 1/2."""
    enabled: bool = True
    """False: train on the frames of an evaluation, not mirrored (for overfitting checks)."""

    def __post_init__(self) -> None:
        if self.references and self.radius <= max(self.before, self.after):
            raise ValueError(
                f"radius is {self.radius}, must reach beyond the clip ({self.before} before, {self.after} after) where there "
                "are references"
            )

    @property
    def clip(self) -> tuple[int, ...]:
        """Offsets of the clip, the pivot first."""
        return (0, *range(-1, -1 - self.before, -1), *range(1, 1 + self.after))

    @property
    def frames(self) -> int:
        """T: frames of a window."""
        return len(self.clip) + self.references


class VolumeFiller:
    """Writes one frame as one sample of a ``Batch``; stateless, so threads may share it.

    Args:
        config: window and augmentation.
        group: label group of the predictions, a sidecar.
        grid, taxonomy: of predictions and truth.
        seed: of the run; None: no augmentation, and references at fixed places.
        mask: voxels of the truth that count, as ``data.mask`` says.
        truth: False: samples have no labels.
        annotations: boxes.
    """

    def __init__(
        self,
        config: WindowConfig,
        group: str,
        *,
        grid: VoxelGrid,
        taxonomy: Taxonomy,
        seed: int | None = None,
        mask: Literal["auto", "none", "lidar", "camera"] = "auto",
        truth: bool = True,
        annotations: Annotations | None = None,
    ) -> None:
        self.config, self.group, self.grid, self.taxonomy = config, group, grid, taxonomy
        self.seed, self.mask, self.truth = seed if config.enabled else None, mask, truth
        posed = ("lidar",) if grid.frame == "lidar" else ()  # the sweep says where such a grid is
        self.annotations = annotations or Annotations()
        read = (*(("labels",) if truth else ()), group, *posed, *self.annotations.groups)
        self.groups: tuple[str, ...] = tuple(dict.fromkeys(read))
        self.window = Window(self.offsets, (group, *posed))
        middle = (np.asarray(grid.lower) + grid.upper) / 2
        self._to_middle, self._from_middle = np.eye(4), np.eye(4)
        self._to_middle[:3, 3], self._from_middle[:3, 3] = -middle, middle

    def offsets(self, key: str, index: int, frames: int, epoch: int) -> tuple[int, ...]:
        """Of the key-frames that are read beside a frame: those of the clip and of its references that its scene has.

        Args:
            key, index: of the frame; ``frames`` are in its scene.
        """
        config = self.config
        near = [o for o in config.clip[1:] if 0 <= index + o < frames]
        reach = range(max(-config.radius, -index), min(config.radius, frames - 1 - index) + 1)
        distant = [o for o in reach if not -config.before <= o <= config.after]
        if self.seed is None:
            chosen = self._spread(distant)
        else:
            rng = generator(self.seed, epoch, f"{key} references")
            chosen = rng.choice(distant, min(config.references, len(distant)), replace=False).tolist()
        return (*near, *sorted(chosen))

    def _spread(self, distant: list[int]) -> list[int]:
        """References before and after in turn: the farthest, then in even steps toward the pivot."""
        chosen: list[int] = []
        pairs = -(-self.config.references // 2)
        for number in range(self.config.references):
            side = [o for o in distant if (o < 0) == (number % 2 == 0)]
            wanted = self.config.radius * (pairs - number // 2) / pairs
            best = min(side, key=lambda o: abs(abs(o) - wanted), default=None)
            if best is not None and best not in chosen:
                chosen.append(best)
        return chosen

    def finish(self, device: object, threads: int) -> None:
        """Nothing is left to be made of a batch."""

    def invalidate(self, arrays: dict[str, np.ndarray], index: int) -> None:
        """Makes no voxel of a sample valid."""
        if self.truth:
            arrays["occupancy.binary_valid"][index] = False
            arrays["occupancy.semantic"][index] = IGNORE

    def fields(self) -> Mapping[str, Field]:
        """Arrays of one sample."""
        shape, frames = self.grid.shape, self.config.frames
        found = {
            "scene_aug": Field((3, 3), "float32"),
            "volumes.classes": Field((frames, *shape), "uint8"),
            "volumes.to_pivot": Field((frames, 4, 4), "float32"),
            "volumes.exists": Field((frames,), "bool"),
        }
        if self.config.soft:
            found |= {f"volumes.{name}": Field((frames, *shape), "uint8") for name in ("second", "confidence")}
        if self.truth:
            names = {"binary": "bool", "binary_valid": "bool", "semantic": "uint8"}
            found |= {f"occupancy.{name}": Field(shape, dtype) for name, dtype in names.items()}
        return found | self.annotations.fields()

    def __call__(self, frame: Frame, epoch: int, views: dict[str, np.ndarray]) -> None:
        """Fills a sample.

        Raises:
            ValueError: a frame has no pose, or not the predictions or labels that are asked for.
        """
        flips = (False, False)
        if self.seed is not None:
            x, y = generator(self.seed, epoch, frame.key).random(2) < 0.5
            flips = bool(x and self.config.flip_x), bool(y and self.config.flip_y)
        mirror = flip_matrix(flips)
        views["scene_aug"][...] = mirror
        signs = np.append(mirror.diagonal(), np.float32(1))
        views["volumes.exists"][...] = False
        clip = self.config.clip
        distant = [o for o in frame.window if o not in clip]
        places = dict(enumerate(clip)) | dict(enumerate(distant, len(clip)))
        to_pivot = inverse(labels_to_global(frame, self._said(frame), self.grid))
        for place in range(self.config.frames):
            offset = places.get(place)
            near = None if offset is None else frame.window.get(offset) if offset else frame
            if near is None:
                self._absent(place, views)
                continue
            place_of = labels_to_global(near, self._said(near), self.grid)
            pose = compose(self._to_middle, to_pivot, place_of, self._from_middle)
            views["volumes.to_pivot"][place] = pose.astype(np.float32) * signs[:, None] * signs
            views["volumes.exists"][place] = True
            self._predicted(near, flips, place, views)
        if self.truth:
            self._truth(frame, flips, views)
        to_scene = np.eye(4)
        to_scene[:3, :3] = mirror
        to_scene = compose(to_scene, to_pivot, posed(frame)) if self.annotations.groups else to_scene
        self.annotations.write(frame, to_scene, views, train=self.seed is not None)

    def _absent(self, place: int, views: dict[str, np.ndarray]) -> None:
        views["volumes.to_pivot"][place] = np.eye(4)
        views["volumes.classes"][place] = IGNORE
        if self.config.soft:
            views["volumes.second"][place], views["volumes.confidence"][place] = IGNORE, 0

    def _said(self, frame: Frame) -> Labels:
        labels = frame.label_sets.get(self.group)
        if labels is None or labels.semantic is None:
            raise ValueError(
                f"frame {frame.key}: {self.group} has no classes of it to refine; predict with a network that gives classes"
            )
        return labels

    def _predicted(self, frame: Frame, flips: tuple[bool, bool], place: int, views: dict[str, np.ndarray]) -> None:
        labels = self._said(frame)
        self._check_shape(frame, labels, self.group)
        views["volumes.classes"][place] = flip_voxels(labels.classes(), flips)
        if self.config.soft:
            try:
                second, confidence = doubts(labels)
            except ValueError as error:
                raise ValueError(f"frame {frame.key}: {self.group} {error}, or set window.soft=false") from None
            views["volumes.second"][place] = flip_voxels(second, flips)
            views["volumes.confidence"][place] = flip_voxels(confidence, flips)

    def _check_shape(self, frame: Frame, labels: Labels, group: str) -> None:
        if labels.binary.shape != self.grid.shape:
            raise ValueError(
                f"frame {frame.key}: {group} are {labels.binary.shape}, grid {self.grid.name!r} is {self.grid.shape}"
            )

    def _truth(self, frame: Frame, flips: tuple[bool, bool], views: dict[str, np.ndarray]) -> None:
        labels = frame.labels
        if labels is None or labels.semantic is None:
            raise ValueError(f"frame {frame.key} has no semantic labels; a refiner learns from labels with classes")
        self._check_shape(frame, labels, "labels")
        known = None
        if self.mask != "none":
            known = labels.mask_camera if self.mask == "camera" else labels.mask_lidar
            if known is None and self.mask != "auto":
                raise ValueError(
                    f"frame {frame.key} has no {self.mask} mask; set mask=auto or pack labels that have it"
                )
        classes = labels.semantic if known is None else np.where(known, labels.semantic, np.uint8(IGNORE))
        views["occupancy.semantic"][...] = classes = flip_voxels(classes, flips)
        views["occupancy.binary_valid"][...] = classes != IGNORE
        views["occupancy.binary"][...] = (classes != IGNORE) & (classes != self.taxonomy.free_id)
