"""What goes into a network and what comes out: ``Batch``, its parts, and ``OccOutputs``.

Shape legend, here and in every model file: ``B`` frames, ``S`` labeled frames, ``T`` frames of a window, ``V`` cameras,
``H W`` image rows and columns, ``X Y Z`` voxels, ``N`` points of all frames, ``C`` channels, ``K`` classes, ``Q`` queries,
``M`` selected voxels.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Self, TypeVar

import torch
from torch import Tensor

Axis = Literal["frame", "labeled", "row", "labeled row"]
Mirror = Literal["", "voxels", "vector", "boxes", "poses"]


def along(axis: Axis, mirror: Mirror = "", **default: Any) -> Any:
    """A tensor field of a part.

    Args:
        axis: what its first dimension counts: frames (B), labeled frames (S), or rows, as many of each frame (each labeled
            frame) as the part's ``counts`` say, frame after frame.
        mirror: what mirroring the scene does to it: nothing; reverses x and y of the last three dimensions, which are x, y
            and z (voxels); changes the signs of the last dimension's x and y (vector); does that to centers x, y and turns the
            yaw in the last place (boxes); or conjugates poses (..., 4, 4) between two mirrored frames (poses).
        default: ``default=None`` for what may be absent.
    """
    return field(metadata={"axis": axis, "mirror": mirror}, **default)


@dataclass
class Part:
    """One modality of a batch: tensors whose first axes are declared by ``along``."""

    def present(self) -> Iterator[tuple[dataclasses.Field, Tensor]]:
        """Fields that are there, and their tensors."""
        for f in dataclasses.fields(self):
            if (value := getattr(self, f.name)) is not None:
                yield f, value

    def each(self, work: Callable[[dataclasses.Field, Tensor], Tensor]) -> Self:
        """The same part of other tensors."""
        return dataclasses.replace(self, **{f.name: work(f, value) for f, value in self.present()})

    def select(self, frames: slice, labeled: slice) -> Self:
        """Some frames of it.

        Args:
            frames, labeled: without steps and negative numbers; among all frames, and among the labeled ones.
        """

        def cut(f: dataclasses.Field, value: Tensor) -> Tensor:
            axis: Axis = f.metadata["axis"]
            wanted = frames if axis in ("frame", "row") else labeled
            return value[self._rows(wanted) if axis.endswith("row") else wanted]

        return self.each(cut)

    def owners(self) -> Tensor:
        """(rows,) int64: of a ragged part, the place of each row's frame among all (or the labeled) ones. Frames without rows
        own none."""
        [rows] = {len(value) for f, value in self.present() if f.metadata["axis"].endswith("row")}
        counts: Tensor = vars(self)["counts"]  # every part with rows has them
        frames = torch.arange(len(counts), device=counts.device)
        return frames.repeat_interleave(counts.long(), output_size=rows)

    def _rows(self, frames: slice) -> slice:
        """Rows of frames; the host waits for their numbers."""
        counts: Tensor = vars(self)["counts"]  # every part with rows has them
        ends = [0, *counts.cumsum(0).tolist()]
        first, last, _ = frames.indices(len(ends) - 1)
        return slice(ends[first], ends[max(first, last)])


@dataclass
class Cameras(Part):
    """Images and how they map to the scene.

    Attributes:
        images: (B, V, 3, H, W) uint8 RGB, augmented; the model normalizes.
        intrinsics: (B, V, 3, 3) float32 of the un-augmented image.
        camera_to_ego: (B, V, 4, 4) float32, camera -> ego at the key-frame, corrected for time; -> LiDAR at
            the key-frame where the labels' grid is in that frame (OpenOccupancy, SemanticKITTI).
        post_rot, post_tran: (B, V, 3, 3), (B, V, 3) float32: image augmentation, pixel' = post_rot pixel + post_tran
            on (u, v, depth).
        depth: (B, V, h, w) float32: distance of the nearest LiDAR point in each cell of the image features, meters, 0
            where there is none; None unless a depth loss wants it.
    """

    images: Tensor = along("frame")
    intrinsics: Tensor = along("frame")
    camera_to_ego: Tensor = along("frame")
    post_rot: Tensor = along("frame")
    post_tran: Tensor = along("frame")
    depth: Tensor | None = along("frame", default=None)


@dataclass
class History(Part):
    """Key-frames that the images are of, the current one first, then the one before it, and so on: ``Cameras`` has F V views, all
    cameras of the first, then all of the second, ... Each view's ``camera_to_ego`` leads to the frame of the grid at *its own*
    key-frame, and ``scene_aug`` mirrors the scene about that.

    Attributes:
        past_to_current: (B, F, 4, 4) float32 rigid: frame of the grid at that key-frame -> now, augmented, meters; the identity
            for the first.
        exists: (B, F) bool; False: the scene has no such key-frame, and nothing of it is to be read. The first always is there.
    """

    past_to_current: Tensor = along("frame", "poses")
    exists: Tensor = along("frame")


@dataclass
class Occupancy(Part):
    """Voxel labels, augmented.

    Attributes:
        binary: (B, X, Y, Z) bool, True = occupied.
        binary_valid: (B, X, Y, Z) bool; False voxels enter neither loss nor metric.
        semantic: (S, X, Y, Z) uint8: class id, ``free_id`` = K, or 255 = ignore; None where nobody asked for classes.
        second, confidence: (S, X, Y, Z) uint8 and float32: second class of a soft label and the probability of the first,
            which ``semantic`` holds (B2S, App. D); None: labels are hard.
        taught: (B, X, Y, Z) uint8 class id, ``free_id``, or 255: what a teacher says of frames without labels, where it is sure
            (SPOT); None without a teacher.
    """

    binary: Tensor = along("frame", "voxels")
    binary_valid: Tensor = along("frame", "voxels")
    semantic: Tensor | None = along("labeled", "voxels", default=None)
    second: Tensor | None = along("labeled", "voxels", default=None)
    confidence: Tensor | None = along("labeled", "voxels", default=None)
    taught: Tensor | None = along("frame", "voxels", default=None)

    def classes(self) -> Tensor:
        """``semantic`` of a batch that must have it. Raises ValueError."""
        if self.semantic is None:
            raise ValueError("the batch has no semantic labels")
        return self.semantic

    def soft(self) -> tuple[Tensor, Tensor] | None:
        """``second`` and ``confidence``; None where labels are hard."""
        return None if self.second is None or self.confidence is None else (self.second, self.confidence)


@dataclass
class Points(Part):
    """LiDAR points of all frames, augmented, frame after frame.

    Attributes:
        xyz: (N, 3) float32 meters, ego frame at the key-frame.
        features: (N, C) float32 such as intensity and time lag; None: without.
        counts: (B,) int64 points of each frame.
        kept: (N,) bool, those that a network in training gets, where a teacher gets all; None: all.
    """

    xyz: Tensor = along("row", "vector")
    counts: Tensor = along("frame")
    features: Tensor | None = along("row", default=None)
    kept: Tensor | None = along("row", default=None)


@dataclass
class PointLabels(Part):
    """Classes of the points of labeled frames.

    Attributes:
        classes: (n,) uint8 class id or 255 = ignore, in the order of ``Points``.
        instances: (n,) int32 ids of countable objects within the frame, 0 for none, -1 where the sweep does not say; or None.
        counts: (S,) int64 points of each labeled frame.
    """

    classes: Tensor = along("labeled row")
    counts: Tensor = along("labeled")
    instances: Tensor | None = along("labeled row", default=None)


AnyPart = TypeVar("AnyPart", bound=Part)


@dataclass
class Boxes(Part):
    """True boxes of labeled frames, augmented, frame after frame; frames may have none.

    Attributes:
        boxes: (n, 7) float32: center x, y, z; length, width, height; yaw, counter-clockwise from x. Meters and radians, in the
            frame of the labels.
        classes: (n,) uint8 ids in the classes of ``evaluation.detection.rules_of``, 255 = not scored.
        velocity: (n, 2) float32 m/s along x and y of that frame; NaN where unknown.
        points: (n,) int32 number of LiDAR points inside.
        counts: (S,) int64 boxes of each labeled frame.
    """

    boxes: Tensor = along("labeled row", "boxes")
    classes: Tensor = along("labeled row")
    velocity: Tensor = along("labeled row", "vector")
    points: Tensor = along("labeled row")
    counts: Tensor = along("labeled")


@dataclass
class Volumes(Part):
    """What a network predicted for a window of key-frames. The first of its T frames is the pivot, which is refined.

    Attributes:
        classes: (B, T, X, Y, Z) uint8: class id, ``free_id`` = K, or 255 = nothing is said; 255 throughout in absent frames.
        to_pivot: (B, T, 4, 4) float32 rigid: frame of the grid at that time -> at the pivot, in meters from the *middle of the
            grid's box*. About the middle, mirrored arrays and conjugated poses fit each other on any grid.
        exists: (B, T) bool; False: the scene has no such frame. The pivot always is there.
        second, confidence: (B, T, X, Y, Z) uint8: second class, 255 where there is none, and the probability of the first beside
            it, 255 for 1; None: predictions are hard.
    """

    classes: Tensor = along("frame", "voxels")
    to_pivot: Tensor = along("frame", "poses")
    exists: Tensor = along("frame")
    second: Tensor | None = along("frame", "voxels", default=None)
    confidence: Tensor | None = along("frame", "voxels", default=None)


@dataclass
class Batch:
    """One training or evaluation batch. The first ``labeled`` frames carry semantic labels (S), the rest are replayed or
    pre-training frames without (B).

    Attributes:
        keys: B frame keys; empty where nobody needs them.
        labeled: S.
        scene_aug: (B, 3, 3) float32: scene augmentation, x' = scene_aug x in the ego frame. Labels and points are already
            augmented.
        cameras, history, occupancy, points, point_labels, boxes, volumes: parts; None: the task does not read it.
    """

    scene_aug: Tensor
    labeled: int = 0
    keys: list[str] = field(default_factory=list)
    cameras: Cameras | None = None
    occupancy: Occupancy | None = None
    points: Points | None = None
    point_labels: PointLabels | None = None
    boxes: Boxes | None = None
    volumes: Volumes | None = None
    history: History | None = None

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], keys: Sequence[str] = ()) -> Batch:
        """A batch of tensors by ``part.field``, and ``scene_aug``; all its frames are labeled if there is any label."""
        found: dict[str, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            part, _, name = name.rpartition(".")
            found.setdefault(part, {})[name] = tensor
        scene_aug = found.pop("")["scene_aug"]
        for part, fields in found.items():
            known = [f.name for f in dataclasses.fields(PARTS[part])] if part in PARTS else []
            if wrong := [name for name in fields if name not in known]:
                there = f"{part} has {', '.join(known)}" if known else f"parts are {', '.join(PARTS)}"
                raise ValueError(f"a batch has no field {part}.{wrong[0]}; {there}")
        parts = {name: PARTS[name](**fields) for name, fields in found.items()}
        labeled = any(f.metadata["axis"] == "labeled" for part in parts.values() for f, _ in part.present())
        return dataclasses.replace(cls(scene_aug, len(scene_aug) if labeled else 0, list(keys)), **parts)

    @property
    def size(self) -> int:
        """B."""
        return self.scene_aug.shape[0]

    @property
    def device(self) -> torch.device:
        """Where its tensors are."""
        return self.scene_aug.device

    @property
    def nbytes(self) -> int:
        """Of all tensors."""
        return self.scene_aug.nbytes + sum(value.nbytes for _, part in self.parts() for _, value in part.present())

    def parts(self) -> Iterator[tuple[str, Part]]:
        """Parts that are there, by name."""
        for name in PARTS:
            if (part := getattr(self, name)) is not None:
                yield name, part

    def part(self, kind: type[AnyPart]) -> AnyPart:
        """The part of a batch that must have it. Raises ValueError."""
        name = next(name for name, known in PARTS.items() if known is kind)
        part: AnyPart | None = getattr(self, name)
        if part is None:
            raise ValueError(f"the batch has no {name}")
        return part

    def to(self, device: torch.device | str, non_blocking: bool = True) -> Batch:
        """The same batch on a device."""
        return self._moved(lambda t: t.to(device, non_blocking=non_blocking))

    def clone(self) -> Batch:
        """The same batch in memory of its own."""
        return self._moved(torch.clone)

    def record(self, stream: torch.cuda.Stream) -> None:
        """Tells the allocator that a CUDA stream uses these tensors."""
        self.scene_aug.record_stream(stream)
        for _, part in self.parts():
            for _, value in part.present():
                value.record_stream(stream)

    def select(self, frames: slice) -> Batch:
        """Some frames, as views; labeled ones stay first.

        Args:
            frames: without step and negative numbers.
        """
        first, last, _ = frames.indices(self.size)
        labeled = slice(min(first, self.labeled), min(last, self.labeled))
        return dataclasses.replace(
            self,
            scene_aug=self.scene_aug[frames],
            keys=self.keys[frames],
            labeled=labeled.stop - labeled.start,
            **{name: part.select(frames, labeled) for name, part in self.parts()},
        )

    def unlabeled(self) -> Batch:
        """The same frames without their semantic labels."""
        nothing = {name: part.select(slice(None), slice(0, 0)) for name, part in self.parts()} if self.labeled else {}
        return dataclasses.replace(self, labeled=0, **nothing)

    def mirrored(self, x: bool, y: bool) -> Batch:
        """The same frames in the scene mirrored along x (front to back) and y (left to right)."""
        if not (x or y):
            return self
        scale = self.scene_aug.new_tensor([-1.0 if x else 1.0, -1.0 if y else 1.0, 1.0])
        dims = [axis for axis, wanted in ((-3, x), (-2, y)) if wanted]
        signs = torch.cat([scale, scale.new_ones(1)])

        def turn(f: dataclasses.Field, value: Tensor) -> Tensor:
            mirror: Mirror = f.metadata["mirror"]
            if mirror == "voxels":
                return value.flip(dims)
            if mirror == "boxes":
                yaw = _mirrored_yaw(value[:, -1:], x, y)
                return torch.cat([value[:, :3] * scale, value[:, 3:-1], yaw], 1)
            if mirror == "poses":
                return value * signs[:, None] * signs
            return value * scale[: value.shape[-1]] if mirror == "vector" else value

        turned = {name: part.each(turn) for name, part in self.parts()}
        return dataclasses.replace(self, scene_aug=scale.diag() @ self.scene_aug, **turned)

    def _moved(self, move: Callable[[Tensor], Tensor]) -> Batch:
        moved = {name: part.each(lambda _, value: move(value)) for name, part in self.parts()}
        return dataclasses.replace(self, scene_aug=move(self.scene_aug), **moved)


def _mirrored_yaw(yaw: Tensor, x: bool, y: bool) -> Tensor:
    """Headings in the mirrored scene. Those within -pi..pi stay there."""
    if x:
        yaw = math.pi * torch.ones_like(yaw).copysign(yaw) - yaw
    return -yaw if y else yaw


PARTS: dict[str, type[Part]] = {
    "cameras": Cameras, "occupancy": Occupancy, "points": Points, "point_labels": PointLabels, "boxes": Boxes,
    "volumes": Volumes, "history": History,
}  # fmt: skip
"""Parts of a batch by name."""


@dataclass
class OccOutputs:
    """What a network says about an ``Batch``.

    Attributes:
        binary_logits: (B, Xb, Yb, Zb) float32 on the grid of the model's binary head, > 0 = occupied. None without one
            (replacing head after pre-training, offboard).
        semantic_logits: (max(S, 1), K, X, Y, Z) float32 on the full grid; None if the semantic part does not exist
            (pre-training). With S = 0 the part ran on one detached frame so that every parameter took part: the
            loss must weigh it with 0.
        selected: (S,) int64 number of voxels the sparse transformer worked on, for logging; or None.
        depth, depth_bins: (B, V, D, h, w) float32 depth distribution of the lift and its (D,) bins, meters; None for
            models without one.
    """

    binary_logits: Tensor | None
    semantic_logits: Tensor | None = None
    selected: Tensor | None = None
    depth: Tensor | None = None
    depth_bins: Tensor | None = None


def concat(labeled: Batch, other: Batch | None) -> Batch:
    """A labeled batch and a replayed one as one batch, labeled frames first, for one forward and one backward. Labels of the
    second are left out.

    Raises:
        ValueError: both differ in parts, or in the shapes of a frame, such as cameras, image size or grid.
    """
    if other is None:
        return labeled
    other, joined = other.unlabeled(), {}
    for name in PARTS:
        a, b = getattr(labeled, name), getattr(other, name)
        if a is not None and b is None and all(f.metadata["axis"].startswith("labeled") for f, _ in a.present()):
            joined[name] = a
        elif (a is None) != (b is None):
            raise ValueError(f"cannot replay: only one of both streams has {name}; both recipes need the same parts")
        elif a is not None:
            joined[name] = a.each(lambda f, value: _cat(f, value, getattr(b, f.name)))  # noqa: B023 (called at once)
    return Batch(
        scene_aug=torch.cat([labeled.scene_aug, other.scene_aug]),
        labeled=labeled.labeled,
        keys=labeled.keys + other.keys,
        **joined,
    )


def _cat(f: dataclasses.Field, a: Tensor, b: Tensor | None) -> Tensor:
    if f.metadata["axis"].startswith("labeled"):
        return a
    if b is None or a.shape[1:] != b.shape[1:]:
        other = None if b is None else tuple(b.shape[1:])
        raise ValueError(
            f"cannot replay: {f.name} of the semantic stream are {tuple(a.shape[1:])}, of the binary stream {other}; "
            "both recipes need the same cameras, image size and grid"
        )
    return torch.cat([a, b])


def pool_binary(binary: Tensor, valid: Tensor, shape: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Binary labels on a coarser grid over the same box (our default; B2S does not say).

    A coarse voxel is occupied if any valid child is occupied, ignored if it has no valid child, else free.

    Args:
        binary, valid: (B, X, Y, Z) bool.
        shape: (Xc, Yc, Zc), each a divisor of X, Y, Z.

    Returns:
        occupied, valid: (B, Xc, Yc, Zc) bool.

    Raises:
        ValueError: ``shape`` does not divide the grid.
    """
    full = binary.shape[1:]
    if any(f % c for f, c in zip(full, shape)):
        raise ValueError(f"cannot pool binary labels of shape {tuple(full)} to {tuple(shape)}: not a whole factor")
    blocks = [n for f, c in zip(full, shape) for n in (c, f // c)]
    pool = lambda x: x.reshape(-1, *blocks).any(6).any(4).any(2)  # noqa: E731
    return pool(binary & valid), pool(valid)
