"""What goes into a network and what comes out: ``OccBatch`` and ``OccOutputs``.

Shape legend, here and in every model file: ``B`` batch, ``V`` cameras, ``H W`` image rows and columns,
``X Y Z`` voxels, ``C`` channels, ``K`` classes, ``Q`` queries, ``M`` selected voxels.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class OccBatch:
    """One training or evaluation batch. The first ``num_semantic`` frames carry semantic labels (S), the rest are
    replayed or pre-training frames with binary labels only (B).

    Attributes:
        images: (B, V, 3, H, W) uint8 RGB, augmented; the model normalizes.
        intrinsics: (B, V, 3, 3) float32 of the un-augmented image.
        camera_to_ego: (B, V, 4, 4) float32, camera -> ego at the key-frame, corrected for time; -> LiDAR at
            the key-frame where the labels' grid is in that frame (OpenOccupancy, SemanticKITTI).
        post_rot, post_tran: (B, V, 3, 3), (B, V, 3) float32: image augmentation, pixel' = post_rot pixel + post_tran
            on (u, v, depth).
        bda: (B, 3, 3) float32: scene augmentation, x' = bda x in the ego frame. Labels are already augmented.
        binary: (B, X, Y, Z) bool, True = occupied.
        binary_valid: (B, X, Y, Z) bool; False voxels enter neither loss nor metric.
        semantic: (S, X, Y, Z) uint8: class id, ``free_id`` = K, or 255 = ignore; S = ``num_semantic``, may be 0.
        num_semantic: S.
        keys: B frame keys.
        second, confidence: (S, X, Y, Z) uint8 and float32: second class of a soft label and the probability of the first,
            which ``semantic`` holds (B2S, App. D); None: labels are hard.
        depth: (B, V, h, w) float32: distance of the nearest LiDAR point in each cell of the image features, meters, 0
            where there is none; None unless a depth loss wants it.
    """

    images: Tensor
    intrinsics: Tensor
    camera_to_ego: Tensor
    post_rot: Tensor
    post_tran: Tensor
    bda: Tensor
    binary: Tensor
    binary_valid: Tensor
    semantic: Tensor
    num_semantic: int
    keys: list[str] = field(default_factory=list)
    second: Tensor | None = None
    confidence: Tensor | None = None
    depth: Tensor | None = None

    @property
    def size(self) -> int:
        return self.images.shape[0]

    def to(self, device: torch.device | str, non_blocking: bool = True) -> OccBatch:
        """The same batch on a device."""
        return self._each(lambda t: t.to(device, non_blocking=non_blocking))

    def clone(self) -> OccBatch:
        """The same batch in memory of its own."""
        return self._each(torch.clone)

    def record(self, stream: torch.cuda.Stream) -> None:
        """Tells the allocator that a CUDA stream uses these tensors."""
        for f in dataclasses.fields(self):
            if isinstance(v := getattr(self, f.name), Tensor):
                v.record_stream(stream)

    def _each(self, work: Callable[[Tensor], Tensor]) -> OccBatch:
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return dataclasses.replace(self, **{name: work(v) for name, v in values.items() if isinstance(v, Tensor)})


@dataclass
class OccOutputs:
    """What a network says about an ``OccBatch``.

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


def concat(semantic: OccBatch, binary: OccBatch | None) -> OccBatch:
    """An S batch and a replayed B batch as one batch, S first, for one forward and one backward.

    Raises:
        ValueError: both differ in cameras, image size or grid.
    """
    if binary is None:
        return semantic
    for name in ("images", "binary"):
        a, b = getattr(semantic, name).shape[1:], getattr(binary, name).shape[1:]
        if a != b:
            raise ValueError(
                f"cannot replay: {name} of the semantic stream are {tuple(a)}, of the binary stream {tuple(b)}; "
                "both recipes need the same cameras, image size and grid"
            )
    if binary.num_semantic:
        binary = dataclasses.replace(binary, num_semantic=0, semantic=binary.semantic[:0])
    # Only S frames have these.
    alone = ("semantic", "num_semantic", "second", "confidence")
    joined = {
        f.name: torch.cat([getattr(semantic, f.name), getattr(binary, f.name)])
        for f in dataclasses.fields(OccBatch)
        if f.name not in (*alone, "keys") and getattr(semantic, f.name) is not None
    }
    return OccBatch(**joined, **{name: getattr(semantic, name) for name in alone}, keys=semantic.keys + binary.keys)


def pool_binary(binary: Tensor, valid: Tensor, shape: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
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
