"""From a ``Frame`` to the arrays of a sample: cameras and voxel labels, augmented."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Literal

import numpy as np
import torch

from occstream.pretrain.annotations import Annotations
from occstream.pretrain.augment import (
    AugmentConfig,
    depth_map,
    flip_matrix,
    flip_voxels,
    image_affine,
    needed_sweep,
    scene_flips,
    two_best,
    warp_jpeg,
)
from occstream.pretrain.deviceimages import DeviceImages
from occstream.sharding.codec import CorruptSample, IncompleteSample, check_jpeg
from occstream.sharding.grid import VoxelGrid
from occstream.sharding.order import generator
from occstream.sharding.pointlabels import point_labels
from occstream.sharding.poses import compose, inverse
from occstream.sharding.schema import IGNORE, Camera, Frame, Labels, Taxonomy, camera_to_key_ego
from occstream.sharding.stream import Field, Window


class FrameFiller:
    """Writes one frame as one sample of an ``Batch``; stateless, so threads may share it.

    Args:
        config: augmentation and image size.
        cameras: names in order; all must be there.
        grid: of the labels.
        taxonomy: of the labels.
        seed: of the run.
        train: False: no augmentation.
        mask: voxels that the labels do not know (auto), or outside this visibility mask, become invalid; none: no voxel.
        semantic: also write semantic labels.
        binary_from: binary target from the binary labels, or from the semantic ones (B*; B2S, Sec. 4.1).
        soft: also write the two best classes of labels that have them.
        depth_cell: pixels per cell of the depth map made from the LiDAR sweep; 0: none.
        labels: False: frames need none, and everything counts as free.
        history: previous key-frames whose images are further views, after those of the frame itself, moved to where
            they were taken from by the ego's motion: what stands still falls into place.
        decode: write images; False: return them as they are stored, for ``deviceimages``.
        voxels_from: voxel labels as they are packed, or made of the points of the frame's own sweep (``pointlabels``).
        annotations: boxes and points.

    Raises:
        ValueError: flips are asked for on a grid that is not symmetric.
    """

    def __init__(
        self,
        config: AugmentConfig,
        cameras: tuple[str, ...],
        grid: VoxelGrid,
        taxonomy: Taxonomy,
        *,
        seed: int,
        train: bool,
        mask: Literal["auto", "none", "lidar", "camera"] = "auto",
        semantic: bool = True,
        binary_from: Literal["labels", "semantic"] = "labels",
        soft: bool = False,
        depth_cell: int = 0,
        labels: bool = True,
        history: int = 0,
        decode: bool = True,
        voxels_from: Literal["labels", "points"] = "labels",
        annotations: Annotations | None = None,
    ) -> None:
        self.config, self.cameras, self.grid, self.taxonomy = config, cameras, grid, taxonomy
        self.seed, self.train, self.mask, self.semantic, self.binary_from = seed, train, mask, semantic, binary_from
        self.soft, self.depth_cell, self.labels, self.history = soft and semantic, depth_cell, labels, history
        self.decode, self.voxels_from, self.annotations = decode, voxels_from, annotations or Annotations()
        for axis, wanted in enumerate((config.flip_x, config.flip_y)):
            if (
                train
                and config.enabled
                and wanted
                and not math.isclose(grid.lower[axis], -grid.upper[axis], abs_tol=1e-6)
            ):
                name = "xy"[axis]
                raise ValueError(
                    f"grid {grid.name!r} is not symmetric in {name} ({grid.lower[axis]}..{grid.upper[axis]} m), so the "
                    f"scene cannot be mirrored exactly; set augment.flip_{name}=false"
                )

    @property
    def needs_lidar(self) -> bool:
        """Whether the LiDAR group has to be read: for depth, or for the pose of a grid in the LiDAR's frame."""
        return bool(self.depth_cell) or self.grid.frame == "lidar"

    @property
    def _reads(self) -> Iterator[str]:
        """Groups, some more than once."""
        yield "cameras"
        if self.labels:
            yield "labels" if self.voxels_from == "labels" else "lidar"
        if self.needs_lidar:
            yield "lidar"
        yield from self.annotations.groups

    @property
    def window(self) -> tuple[int, ...] | Window:
        """Offsets of the key-frames that it reads beside each one."""
        return tuple(range(-1, -1 - self.history, -1))

    @property
    def groups(self) -> tuple[str, ...]:
        """What is read of a shard."""
        return tuple(dict.fromkeys(self._reads))

    def finish(self, device: torch.device, threads: int) -> DeviceImages | None:
        """What decodes the images of a batch where this does not."""
        return None if self.decode else DeviceImages(self.config.image_size, device, threads)

    def invalidate(self, arrays: dict[str, np.ndarray], index: int) -> None:
        """Makes no voxel of a sample valid."""
        arrays["occupancy.binary_valid"][index] = False
        if "occupancy.semantic" in arrays:
            arrays["occupancy.semantic"][index] = IGNORE
        self.annotations.invalidate(arrays, index)

    def fields(self) -> dict[str, Field]:
        """Arrays of one sample."""
        v, (h, w) = len(self.cameras) * (1 + self.history), self.config.image_size
        shapes: dict[str, tuple[tuple[int, ...], str]] = {}
        if self.decode:
            shapes["cameras.images"] = ((v, 3, h, w), "uint8")
        shapes |= {
            "cameras.intrinsics": ((v, 3, 3), "float32"),
            "cameras.camera_to_ego": ((v, 4, 4), "float32"),
            "cameras.post_rot": ((v, 3, 3), "float32"),
            "cameras.post_tran": ((v, 3), "float32"),
            "scene_aug": ((3, 3), "float32"),
            "occupancy.binary": (self.grid.shape, "bool"),
            "occupancy.binary_valid": (self.grid.shape, "bool"),
        }
        if self.semantic:
            shapes["occupancy.semantic"] = (self.grid.shape, "uint8")
        if self.soft:
            shapes |= {
                "occupancy.second": (self.grid.shape, "uint8"),
                "occupancy.confidence": (self.grid.shape, "float32"),
            }
        if self.depth_cell:
            shapes["cameras.depth"] = ((v, -(-h // self.depth_cell), -(-w // self.depth_cell)), "float32")
        return {name: Field(shape, dtype) for name, (shape, dtype) in shapes.items()} | self.annotations.fields()

    def __call__(self, frame: Frame, epoch: int, views: dict[str, np.ndarray]) -> list[tuple[str, Camera]]:
        """Fills the views of one sample; returns what is yet to be decoded, by "frame …, camera" for messages.

        Raises:
            CorruptSample: an image cannot be decoded, or one of the cameras is missing.
            ValueError: the frame lacks all cameras, labels or a mask, or has another grid.
        """
        vary = self.train and self.config.enabled
        rng = generator(self.seed, epoch, frame.key) if vary else None
        shown = [(taken, name) for taken in self._times(frame) for name in self.cameras]
        affines: dict[tuple[str, int, int], np.ndarray] = {}  # frames before are augmented as their camera is now
        for i, (taken, name) in enumerate(shown):
            camera = _camera(taken or frame, name)
            view = (name, camera.width, camera.height)
            if view not in affines:
                affines[view] = image_affine(rng, view[1:], self.config)
            affine = affines[view]
            if taken is not None:
                self._image(taken, name, affine, views=views, i=i)
            elif self.decode:
                views["cameras.images"][i] = 0
            views["cameras.intrinsics"][i] = camera.intrinsics
            views["cameras.camera_to_ego"][i] = self._to_grid(frame, taken or frame, camera)
            views["cameras.post_rot"][i] = np.eye(3)
            views["cameras.post_rot"][i, :2, :2] = affine[:, :2]
            views["cameras.post_tran"][i] = (*affine[:, 2], 0)
            if self.depth_cell:
                out = views["cameras.depth"][i]
                depth_map(taken or frame, camera, affine, self.config.image_size, cell=self.depth_cell, out=out)
        flips = scene_flips(rng, self.config)
        views["scene_aug"][...] = flip_matrix(flips)
        if self.labels:
            self._labels(frame, flips, views)
        else:
            views["occupancy.binary"][...], views["occupancy.binary_valid"][...] = False, True
        to_scene = np.eye(4)
        to_scene[:3, :3] = flip_matrix(flips)
        if self.grid.frame == "lidar":
            to_scene = compose(to_scene, inverse(needed_sweep(frame).sensor_to_ego))
        self.annotations.write(frame, to_scene, views, train=self.train)
        if self.decode:
            return []
        return [(f"frame {(taken or frame).key}, {name}", (taken or frame).cameras[name]) for taken, name in shown]

    def _times(self, frame: Frame) -> list[Frame | None]:
        """Key-frames whose images are views, the sample's own first. None: there is none, and its images are black (or, where
        they are decoded later, those of the sample's own)."""
        times = [frame]
        for offset in range(-1, -1 - self.history, -1):
            times.append(frame.window.get(offset, times[-1]))  # before a scene's beginning its first frame stands still
        return [*times]

    def _to_grid(self, frame: Frame, taken: Frame, camera: Camera) -> np.ndarray:
        """(4, 4): camera of a key-frame -> frame of the grid at the sample's own, of what stands still."""
        to_ego = camera_to_key_ego(frame, camera)
        if not self.needs_lidar:
            return to_ego
        sweep = needed_sweep(frame)
        return compose(inverse(sweep.sensor_to_ego), to_ego) if self.grid.frame == "lidar" else to_ego

    def _image(self, taken: Frame, name: str, affine: np.ndarray, *, views: dict[str, np.ndarray], i: int) -> None:
        """Writes the i-th image of a sample, or checks that it can be decoded later. Raises CorruptSample: it is damaged."""
        camera = taken.cameras[name]
        try:
            if self.decode:
                warp_jpeg(camera.jpeg, (camera.width, camera.height), affine, views["cameras.images"][i])
            else:
                check_jpeg(camera)
        except ValueError as error:
            raise CorruptSample(f"frame {taken.key}, {name}: broken JPEG ({error}); pack its scene again") from None

    def _labels(self, frame: Frame, flips: tuple[bool, bool], views: dict[str, np.ndarray]) -> None:
        labels = frame.labels
        if self.voxels_from == "points":
            labels = point_labels(frame, self.grid, self.taxonomy)
        if labels is None:
            raise ValueError(f"frame {frame.key} has no labels; pack the labels group")
        if labels.binary.shape != self.grid.shape:
            raise ValueError(
                f"frame {frame.key}: labels are {labels.binary.shape}, grid {self.grid.name!r} is {self.grid.shape}"
            )
        valid = self._valid(frame, labels)
        if valid is None:
            views["occupancy.binary_valid"][...] = True
        else:
            views["occupancy.binary_valid"][...] = flip_voxels(valid, flips)
        if self.binary_from == "semantic":
            known = flip_voxels(_classes(frame, labels), flips)
            views["occupancy.binary"][...] = (known != self.taxonomy.free_id) & (known != IGNORE)
            views["occupancy.binary_valid"][...] &= known != IGNORE
        else:
            views["occupancy.binary"][...] = flip_voxels(labels.binary, flips)
        if self.semantic:
            views["occupancy.semantic"][...] = flip_voxels(_classes(frame, labels), flips)
            if valid is not None:
                views["occupancy.semantic"][~views["occupancy.binary_valid"]] = IGNORE
        if self.soft:
            second, confidence = two_best(labels)
            views["occupancy.second"][...] = flip_voxels(second, flips)
            views["occupancy.confidence"][...] = flip_voxels(confidence, flips)

    def _valid(self, frame: Frame, labels: Labels) -> np.ndarray | None:
        if self.mask == "none":
            return None
        valid = labels.mask_camera if self.mask == "camera" else labels.mask_lidar
        if valid is None and self.mask != "auto":
            raise ValueError(
                f"frame {frame.key} has no {self.mask} mask; set mask=auto (what the labels know) or pack labels that have it"
            )
        return valid


def _camera(frame: Frame, name: str) -> Camera:
    camera = frame.cameras.get(name)
    if camera is not None:
        return camera
    if not frame.cameras:
        raise ValueError(
            f"frame {frame.key}: has no cameras; train on other scenes (data.scene_names), and pack those with "
            "cameras into a set of their own (scenes=[…]) to predict"
        )
    have = ", ".join(frame.cameras)
    raise IncompleteSample(f"frame {frame.key}: camera {name} is missing (has {have}); data.cameras chooses others")


def _classes(frame: Frame, labels: Labels) -> np.ndarray:
    if labels.semantic is None:
        raise ValueError(f"frame {frame.key} has no semantic labels; fine-tune on data that has them")
    return labels.semantic
