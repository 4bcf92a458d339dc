"""Evaluating a model that is handed in on a stream that is handed in."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from occstream.evaluation.metrics import CONVENTIONS, RangedCounts, ranges_of, sum_over_ranks
from occstream.models import Batch, OccOutputs
from occstream.models.batch import pool_binary
from occstream.sharding.grid import VoxelGrid
from occstream.sharding.schema import IGNORE, Taxonomy

Head = Literal["sigmoid_focal", "softmax_focal"]


@dataclass
class EvalResult:
    """Scores in percent. ``miou``, ``iou`` and ``per_class`` are None when the network has no semantic part, ``binary_iou``
    when it has no binary head.

    Attributes:
        frames: evaluated over all ranks. left_out: those that could not be read, named when that was found.
        binary_iou: on the binary head's own grid, labels pooled.
        iou: geometric, of the semantic output. miou: by the convention.
        per_class: IoU by class name; for classes that do not occur NaN, or 0 by the convention.
        ranges: ``binary_iou``, ``iou`` and ``miou`` by range (``metrics.ranges_of``).
        seconds: wall time. mask, convention: as declared.
        unknown: share (0..1) of the voxels counted that the labels do not know; None for a mask that counts none of them.
    """

    frames: int
    binary_iou: float | None
    iou: float | None = None
    miou: float | None = None
    per_class: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    mask: str = "auto"
    convention: str = "occ3d"
    unknown: float | None = None
    ranges: dict[str, dict[str, float]] = field(default_factory=dict)
    left_out: int = 0

    def metrics(self) -> dict[str, float]:
        """MLflow metrics."""
        out = {"eval/frames": float(self.frames)}
        if self.left_out:
            out["eval/frames_left_out"] = float(self.left_out)
        if self.unknown is not None:
            out["eval/unknown_share"] = 100 * self.unknown
        if self.binary_iou is not None:
            out["eval/binary_iou"] = self.binary_iou
        if self.miou is not None:
            out |= {"eval/iou": self.iou, "eval/miou": self.miou}
            out |= {f"eval/class/{name}": value for name, value in self.per_class.items()}
        for name, scores in self.ranges.items():
            out |= {f"eval/range/{name}/{key}": value for key, value in scores.items()}
        return out

    def summary(self) -> str:
        """One line."""
        scores = (("binary IoU", self.binary_iou), ("IoU", self.iou), ("mIoU", self.miou))
        said = ", ".join(f"{name} {value:.2f}" for name, value in scores if value is not None)
        unknown = f", {100 * self.unknown:.1f} % unknown voxels counted" if self.unknown else ""
        left = f"; without {self.left_out} more that cannot be read" if self.left_out else ""
        return f"{said} (convention {self.convention}, mask {self.mask}{unknown}){left}"

    def table(self) -> str:
        """For the terminal."""
        lines = [f"{self.frames} frames: {self.summary()}"]
        lines += [f"  {name:<22} {value:6.2f}" for name, value in self.per_class.items()]
        words = {"binary_iou": "binary IoU", "iou": "IoU", "miou": "mIoU"}
        for name, scores in self.ranges.items():
            lines.append(f"  {name:<22} " + ", ".join(f"{words[key]} {value:.2f}" for key, value in scores.items()))
        return "\n".join(lines)


def classify(logits: Tensor, kind: Head = "sigmoid_focal", threshold: float = 0.25) -> Tensor:
    """Class of each voxel.

    Args:
        logits: (S, K, X, Y, Z).
        kind: sigmoid_focal: the best class if its probability is above ``threshold``, else free;
            softmax_focal: free is a class with logit 0.

    Returns:
        (S, X, Y, Z) uint8, K = free.
    """
    best, index = logits.max(1)
    return torch.where(best > free_logit(kind, threshold), index, logits.shape[1]).to(torch.uint8)


def free_logit(kind: Head, threshold: float = 0.25) -> float:
    """The logit that a class must beat not to be free."""
    return 0.0 if kind == "softmax_focal" else float(torch.logit(torch.tensor(threshold)))


@torch.no_grad()
def evaluate(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    taxonomy: Taxonomy,
    grid: VoxelGrid | None = None,
    convention: str = "occ3d",
    mask: str = "auto",
    unknown: float | None = None,
    kind: Head = "sigmoid_focal",
    threshold: float = 0.25,
    expected: int | None = None,
    watch: Callable[[Batch, OccOutputs], None] | None = None,
) -> EvalResult:
    """Runs the model over a finite stream and counts (collective).

    Args:
        model: returns ``OccOutputs``; its mode is restored afterwards.
        batches: this rank's share, at least one; masks are already in the labels. Frames with an empty key only fill a place:
            none of their voxels is valid.
        taxonomy: of the labels.
        grid: of the labels, for scores by range; None: without.
        convention: how the benchmark of these labels averages, one of ``metrics.CONVENTIONS``.
        mask, unknown: which mask the labels were made with, and what share of unknown voxels it counts; only reported.
        kind, threshold: how logits become classes.
        expected: frames that all ranks have together, where that is known.
        watch: gets each batch and its outputs (for pictures).

    Returns:
        The same result on every rank.

    Raises:
        ValueError: on every rank: other frames came than were expected, a rank had none, or no voxel was valid.
    """
    began = time.perf_counter()
    training = model.training
    model.eval()
    rule = CONVENTIONS[convention]
    confusion = RangedCounts(taxonomy.num_classes, rule, ranges_of(grid) if grid else None)
    binary, frames = None, torch.zeros(3, dtype=torch.int64)
    device = torch.device("cpu")
    semantic = False
    try:
        for batch, counted in _in_step(batches):
            outputs = model(batch)
            if not counted:
                continue
            device = batch.device
            unread = sum(not key for key in batch.keys)
            frames += torch.tensor([batch.size, int(batch.occupancy.binary_valid.sum()), unread])
            logits = outputs.binary_logits
            if logits is not None:
                truth, valid = pool_binary(
                    batch.occupancy.binary, batch.occupancy.binary_valid, tuple(logits.shape[1:])
                )
                shape = tuple(logits.shape[1:])
                binary = binary or RangedCounts(1, rule, ranges_of(grid, shape) if grid else None)
                binary.update((logits <= 0).byte(), torch.where(valid, (~truth).byte(), IGNORE))
            if outputs.semantic_logits is not None and batch.labeled:
                semantic = True
                confusion.update(classify(outputs.semantic_logits, kind, threshold), batch.occupancy.semantic)
            if watch:
                watch(batch, outputs)
    finally:
        model.train(training)
    seen, voxels, unread = sum_over_ranks(frames, device).tolist()
    _check_seen(seen, voxels, expected, mask)
    confusion.all_reduce(device)
    if binary:
        binary.all_reduce(device)
    semantic = bool(sum_over_ranks(torch.tensor([int(semantic)]), device).item())
    result = EvalResult(
        frames=seen - unread,
        left_out=unread,
        binary_iou=100 * binary.matrix().iou() if binary else None,
        seconds=time.perf_counter() - began,
        mask=mask,
        unknown=unknown,
        convention=convention,
    )
    _add_scores(result, taxonomy, confusion if semantic else None, binary)
    return result


def _check_seen(seen: int, voxels: int, expected: int | None, mask: str) -> None:
    if not seen or (expected is not None and seen != expected):
        planned = "some" if expected is None else expected
        raise ValueError(
            f"evaluated {seen} frames where {planned} were to be: its data ended early, so there is no score"
        )
    if not voxels:
        raise ValueError(
            f"evaluated {seen} frames without a single valid voxel (mask {mask}): there is no score; choose other scenes or "
            "another eval.mask"
        )


def _add_scores(
    result: EvalResult, taxonomy: Taxonomy, confusion: RangedCounts | None, binary: RangedCounts | None
) -> None:
    if confusion:
        matrix = confusion.matrix()
        result.iou, result.miou = 100 * matrix.iou(), 100 * matrix.miou()
        named = list(zip(taxonomy.classes, matrix.class_iou().tolist()))
        result.per_class = {name: 100 * v for name, v in named[matrix.convention.first :]}
    counts = confusion or binary
    for part in counts.ranges.parts if counts and counts.ranges else ():
        coarse = binary and binary.ranges and part in binary.ranges.parts  # its voxels may be too large for a range
        scores = result.ranges[part] = {"binary_iou": 100 * binary.matrix(part).iou()} if coarse else {}
        if confusion:
            scores |= {"iou": 100 * confusion.matrix(part).iou(), "miou": 100 * confusion.matrix(part).miou()}


def _in_step(batches: Iterable[Batch]) -> Iterator[tuple[Batch, bool]]:
    """This rank's batches, then the last one again, not to be counted, while another rank still has some: under ZeRO-3
    every forward gathers parameters from all ranks. A rank that cannot read, or has no frames, ends all of them."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        yield from ((batch, True) for batch in batches)
        return
    source, last = iter(batches), None
    while True:
        batch = error = None
        try:
            batch = next(source, None)
        except Exception as problem:
            error = problem
        if error is None and batch is None and last is None:
            error = ValueError(f"rank {dist.get_rank()} had no frames to evaluate, so there is no score")
        most = _most(_FAILED if error else int(batch is not None))
        if most == _FAILED:
            raise error or ValueError("another rank could not read its frames to evaluate; see its message")
        if not most:
            return
        yield (batch, True) if batch is not None else (last, False)
        last = batch if batch is not None else last


_FAILED = 2


def _most(mine: int) -> int:
    """The largest number of all ranks (collective)."""
    device = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")
    flag = torch.tensor([mine], device=device)
    dist.all_reduce(flag, op=dist.ReduceOp.MAX)
    return int(flag.item())
