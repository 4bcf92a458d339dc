"""Label volumes of a drive as sources of votes: read frame by frame, packed, and kept as long as somebody may need them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from occstream.evaluation.propagate import packed
from occstream.evaluation.rules import ABSTAIN, IN_VIEW
from occstream.evaluation.votes import in_frustum
from occstream.sharding.doubts import doubts
from occstream.sharding.grid import VoxelGrid
from occstream.sharding.labels import box_poses, grid_to_global, labels_to_global
from occstream.sharding.manifest import Manifest
from occstream.sharding.poses import apply, compose, inverse
from occstream.sharding.schema import IGNORE, Boxes, Frame, posed
from occstream.sharding.stream import ShardReader

Votes = Literal["all", "known"]
BOX_MARGIN = 0.1  # meters: what is this close to a box is part of it


def label_manifest(base: Manifest, group: str) -> Manifest:
    """The data set with a label group in place of its own labels; with these for "labels".

    Raises:
        ValueError: there is no such group, or its labels have no grid.
    """
    if group != "labels":
        return base.with_sidecar(group)
    if "labels" not in base.groups or base.grid is None:
        there = ", ".join(base.sidecars()) or "none"
        raise ValueError(f"{base.url}: has no labels of its own; name one of its label groups: {there}")
    return base


@dataclass
class BoxMotion:
    """Tracked boxes of a frame.

    Attributes:
        tracks: names, the same object has the same in every frame.
        to_grid: (B, 4, 4) float64 box -> meters of the frame's grid.
        owner: (X, Y, Z) uint8, 0 outside of all boxes, otherwise the box's number from 1 on.
    """

    tracks: list[str]
    to_grid: np.ndarray
    owner: np.ndarray


@dataclass
class Source:
    """One frame of a drive, without what its volume's slot holds.

    Attributes:
        frame: key, place and time; no labels.
        pose: (4, 4) float64, frame of the grid -> global.
        semantic: (X, Y, Z) uint8, as read.
        masks: packed bits of mask_lidar and mask_camera, None where the labels have none.
        boxes: None unless asked for, or if the frame has none.
        doubts: second classes and how sure the first are beside them, (X, Y, Z) uint8 each, until a slot holds them.
        placed: pose of the labels, if they have one of their own.
        evidence: (X, Y, Z) uint8 of the labels, until a slot holds it; None unless asked for.
    """

    frame: Frame
    pose: np.ndarray
    semantic: np.ndarray
    masks: dict[str, np.ndarray | None]
    boxes: BoxMotion | None = None
    doubts: tuple[np.ndarray, np.ndarray] | None = None
    placed: np.ndarray | None = None
    evidence: np.ndarray | None = None

    def packed(self, view: np.ndarray | None, free: int, out: np.ndarray | None = None) -> np.ndarray:
        """``propagate.packed`` of what the frame says."""
        return packed(self.semantic, view, out, evidence=self.evidence, free=free)

    def mask(self, name: str) -> np.ndarray | None:
        """(X, Y, Z) bool mask of the labels, or None."""
        bits = self.masks[name]
        if bits is None:
            return None
        return np.unpackbits(bits, count=self.semantic.size).view(bool).reshape(self.semantic.shape)


class DriveReader:
    """Reads what frames say, of one label group of a data set.

    Args:
        base: the data set.
        group: of the labels that vote, "labels" or a sidecar.
        votes: all voxels vote, or only those that the labels' own mask knows.
        view: whether votes ask what cameras saw.
        tracks: whether boxes are needed.
        silent: class ids that do not vote, as if they were unknown.
        soft: whether second classes are needed.
        evidence: whether free voxels say how much they are in doubt.

    Attributes:
        manifest: with those labels.
        grid: theirs.
        view_from: how it is known what cameras saw, for the terminal; of the last scene.

    Raises:
        ValueError: the group cannot vote.
    """

    def __init__(
        self,
        base: Manifest,
        group: str,
        votes: Votes = "all",
        view: bool = True,
        *,
        tracks: bool = False,
        silent: Sequence[int] = (),
        soft: bool = False,
        evidence: bool = False,
    ) -> None:
        self.soft, self.evidence = soft, evidence
        self._spoken = np.arange(256, dtype=np.uint8)
        self._spoken[list(silent)] = IGNORE
        self.base, self.group, self.votes, self.view, self.tracks = base, group, votes, view, tracks
        self.manifest = label_manifest(base, group)
        self.grid = self.manifest.label_grid
        groups = (group, "lidar") if self.grid.frame == "lidar" else (group,)
        if self.grid.frame == "lidar" and "lidar" not in base.groups:
            raise ValueError(
                f"{base.url}: grid {self.grid.name} is in the LiDAR's frame, and the set has no group 'lidar'"
            )
        self._labels = ShardReader(self.manifest, groups)
        self._cameras = ShardReader(base, ("cameras",)) if view and "cameras" in base.groups else None
        if tracks and "labels" not in base.groups:
            raise ValueError(
                f"{base.url}: movers by tracks need boxes, and the set has no group 'labels' that holds them"
            )
        self._boxes = ShardReader(base, ("labels",)) if tracks else None
        self._frustum: tuple[int, np.ndarray | None] = -1, None
        self.view_from = "nothing is asked about views"
        self.bytes_read = 0

    def close(self) -> None:
        for reader in (self._labels, self._cameras, self._boxes):
            if reader:
                self.bytes_read += reader.bytes_read
                reader.close()

    def read(self, scene: int, index: int) -> tuple[Source, np.ndarray | None]:
        """One frame, and what cameras saw in it, (X, Y, Z) bool; None: everything.

        Raises:
            ValueError: it has no pose, no classes or another grid.
        """
        frame = self._labels.frame(scene, index)
        labels, where = frame.labels, f"{self.base.url}: frame {frame.key} of {self.group}"
        if frame.ego_to_global is None:
            raise ValueError(f"{where} has no ego pose, so it cannot be laid over others; pack the set with poses")
        if labels is None or labels.semantic is None:
            raise ValueError(f"{where} has no classes to vote with; predict with a fine-tuned network")
        if labels.semantic.shape != self.grid.shape:
            raise ValueError(
                f"{where} has {labels.semantic.shape} voxels, the manifest says {self.grid.shape}; verify it"
            )
        wrong = (labels.semantic > len(self.manifest.classes)) & (labels.semantic != IGNORE)
        if wrong.any():
            raise ValueError(
                f"{where} names class {labels.semantic[wrong][0]}, its taxonomy ends with {len(self.manifest.classes)}"
            )
        own = grid_to_global(frame, self.grid)
        view = self._view(scene, labels.mask_camera, own, frame)
        masks = {
            name: None if mask is None else np.packbits(mask.reshape(-1))
            for name, mask in (("mask_lidar", labels.mask_lidar), ("mask_camera", labels.mask_camera))
        }
        boxes = self._box_motion(self._boxes.frame(scene, index), own) if self._boxes else None
        bare = Frame(frame.scene, frame.index, frame.token, frame.timestamp, frame.ego_to_global)
        try:
            unsure = doubts(labels) if self.soft else None
        except ValueError as error:
            raise ValueError(f"{where} {error}, or refine without --soft") from None
        if self.evidence and labels.evidence is None:
            raise ValueError(f"{where} holds no evidence; predict with --keep evidence, or refine without --evidence")
        pose, said = labels_to_global(frame, labels, self.grid), self._spoken[labels.semantic]
        evidence = labels.evidence if self.evidence else None
        return Source(bare, pose, said, masks, boxes, unsure, labels.ego_to_global, evidence), view

    def _view(self, scene: int, mask: np.ndarray | None, pose: np.ndarray, frame: Frame) -> np.ndarray | None:
        """What counts as in view; None: everything."""
        if not self.view:
            return None
        if mask is not None:
            self.view_from = "mask_camera of the labels"
            return mask
        if self._cameras is None:
            self.view_from = "everything counts as in view (there is neither mask_camera nor calibration)"
            return None
        if self._frustum[0] != scene:
            cameras = self._cameras.frame(scene, 0).cameras.values()
            to_ego = compose(inverse(posed(frame)), pose)
            self._frustum = scene, in_frustum(self.grid, to_ego, cameras)
        self.view_from = "the cameras' calibration, as of each scene's first frame"
        return self._frustum[1]

    def _box_motion(self, frame: Frame, pose: np.ndarray) -> BoxMotion:
        if frame.boxes is None:
            raise ValueError(f"{self.base.url}: frame {frame.key} has no boxes, which movers by tracks need")
        return box_motion(frame.boxes, compose(inverse(pose), posed(frame)), frame.key, self.grid)


def box_motion(boxes: Boxes, ego_to_grid: np.ndarray, key: str, grid: VoxelGrid) -> BoxMotion:
    """Which voxels lie in which box, of overlapping ones in the first.

    Args:
        boxes: in the ego frame.
        ego_to_grid: (4, 4) ego -> frame of the grid.
        key: of the frame; boxes without track get names of their own from it.
        grid: of the voxels.
    """
    _, tracks, poses, half = box_poses(boxes, ego_to_grid, key)
    owner = np.zeros(grid.shape, np.uint8)
    for number in range(min(len(tracks), 255))[::-1]:
        reach = half[number] + BOX_MARGIN
        corners = apply(poses[number], np.array(list(itertools.product(*((-r, r) for r in reach)))))
        low = np.floor((corners.min(0) - grid.lower) / grid.voxel).astype(int).clip(0, grid.shape)
        high = np.ceil((corners.max(0) - grid.lower) / grid.voxel).astype(int).clip(0, grid.shape)
        if (high <= low).any():
            continue
        index = np.stack(np.meshgrid(*map(np.arange, low, high), indexing="ij"), -1)
        inside = (np.abs(apply(inverse(poses[number]), grid.centers(index))) <= reach).all(-1)
        owner[tuple(map(slice, low, high))][inside] = number + 1
    return BoxMotion(list(tracks)[:255], poses[:255], owner)


@dataclass
class Volumes:
    """Packed volumes of the frames of one scene in a fixed number of slots; what was not used for longest goes.

    Attributes:
        packed: (slots, X, Y, Z) uint8 of ``propagate.packed``.
        standing: the same, silent within boxes; None without boxes.
        doubts: as ``propagate.pull`` has them, by slot; None unless asked for.
        sources: by frame index, those that have a slot.
    """

    reader: DriveReader
    scene: int
    packed: np.ndarray
    standing: np.ndarray | None = None
    doubts: tuple[np.ndarray, np.ndarray] | None = None
    sources: dict[int, Source] = field(default_factory=dict)
    _slots: dict[int, int] = field(default_factory=dict)

    @classmethod
    def of(cls, reader: DriveReader, scene: int, slots: int, buffers: list[np.ndarray]) -> Volumes:
        """Of a scene; ``buffers`` holds the arrays from scene to scene."""
        while len(buffers) < 1 + reader.tracks + 2 * reader.soft:
            buffers.append(np.empty((0, *reader.grid.shape), np.uint8))
        for n, buffer in enumerate(buffers):
            if len(buffer) < slots:
                buffers[n] = np.empty((slots, *reader.grid.shape), np.uint8)
        cut = [buffer[:slots] for buffer in buffers]
        doubts = (cut[-2], cut[-1]) if reader.soft else None
        return cls(reader, scene, cut[0], cut[1] if reader.tracks else None, doubts)

    def slot(self, index: int) -> int:
        """Where a frame's volume is; reads it if need be."""
        if index in self._slots:
            self._slots[index] = self._slots.pop(index)  # the last in use
        else:
            if len(self._slots) == len(self.packed):
                oldest = next(iter(self._slots))
                place = self._slots.pop(oldest)
                del self.sources[oldest]
            else:
                place = len(self._slots)
            source, view = self.reader.read(self.scene, index)
            volume = source.packed(view, len(self.reader.manifest.classes), self.packed[place])
            source.evidence = None
            if self.reader.votes == "known" and (known := source.mask("mask_lidar")) is not None:
                volume[~known] |= ABSTAIN
            if self.standing is not None:
                self.standing[place] = volume
                if source.boxes is not None:
                    self.standing[place][source.boxes.owner > 0] = IN_VIEW | ABSTAIN
            if self.doubts is not None and source.doubts is not None:
                for held, value in zip(self.doubts, source.doubts):
                    held[place] = value
                source.doubts = None
            self.sources[index], self._slots[index] = source, place
        return self._slots[index]
