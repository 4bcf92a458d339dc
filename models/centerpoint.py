"""CenterPoint (Yin et al., CVPR 2021): detection by centers on the bird's-eye view of a LiDAR encoder.

Classes are grouped into tasks. Each task has a heat map of centers for each of its classes, and maps of what a box at a center
is: offset of the center in its cell, height, size, heading, velocity (Sec. 4.1 and 4.2). Names of parameters are those of
OpenPCDet's ``CenterHead``. Maps are (B, C, Y', X') with cells of 8 voxels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from occstream.models.batch import Boxes
from occstream.models.layers import SyncBatchNorm, full_precision, row
from occstream.models.rotated import rotated_nms
from occstream.models.voxelbackbones import STRIDE
from occstream.sharding.grid import VoxelGrid

NUSCENES_TASKS = (
    ("car",), ("truck", "construction_vehicle"), ("bus", "trailer"), ("barrier",), ("motorcycle", "bicycle"),
    ("pedestrian", "traffic_cone"),
)  # fmt: skip
_CODE = {"center": 2, "center_z": 1, "dim": 3, "rot": 2, "vel": 2}  # branches and their channels
_LARGEST = 5.0  # logarithm of a size, meters


@dataclass
class CenterPointConfig:
    """Detection head. Defaults are those published for nuScenes."""

    tasks: tuple[tuple[str, ...], ...] = ()
    """Classes that share a branch. Empty: nuScenes' six tasks as far as their classes are there, and a task of its own for
    each other class."""
    channels: int = 64
    """Channels of the head."""
    overlap: float = 0.1
    """Overlap that a box shifted by the radius of its Gaussian still has with itself."""
    min_radius: int = 2
    """Least radius of a Gaussian, cells."""
    min_points: int = 1
    """Boxes with fewer LiDAR points inside are not learned; the metric does not count boxes without points either."""
    heatmap_weight: float = 1.0
    """Weight of the focal loss of the heat maps."""
    box_weight: float = 0.25
    """Weight of the L1 loss of the boxes; 0.25 for nuScenes, 2 for Waymo."""
    code_weights: tuple[float, float, float, float, float, float, float, float, float, float] = (
        1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.2, 0.2, 1.0, 1.0,
    )  # fmt: skip
    """Weights within the L1 loss: center x, y in its cell, z, length, width, height, then four by ``code_order``."""
    code_order: Literal["centerpoint", "openpcdet"] = "centerpoint"
    """What the last four weights belong to: velocity x, y and heading (the paper's code), so that 0.2 falls on the velocity; or
    heading and velocity (OpenPCDet with the same numbers), so that it falls on the heading."""
    velocity: bool = True
    """Whether velocities are learned and predicted."""
    score_threshold: float = 0.1
    """Centers below it are not boxes."""
    most: int = 500
    """Boxes that a frame may have, and centers that a task may have before suppression."""
    nms_iou: float = 0.2
    """Boxes of a task that overlap a surer one by more, seen from above, are suppressed; 0.2 for nuScenes, 0.7 for Waymo."""
    pre_nms: int = 1000
    """Boxes of a task that suppression looks at, the surest."""
    post_nms: int = 83
    """Boxes of a task that remain after it."""

    def __post_init__(self) -> None:
        for name in ("channels", "most", "pre_nms", "post_nms"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, must be at least 1")
        for name in ("overlap", "score_threshold", "nms_iou"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, must be within 0..1, without 1")
        for f in fields(self):
            value = getattr(self, f.name)
            if any(v < 0 for v in (value if isinstance(value, tuple) else (value,)) if isinstance(v, (int, float))):
                raise ValueError(f"{f.name} is {value}, must not be negative")

    def groups(self, classes: Sequence[str]) -> tuple[tuple[str, ...], ...]:
        """Tasks of these classes. Raises ValueError if ``tasks`` are not those, each once."""
        if self.tasks:
            named = [name for task in self.tasks for name in task]
            if sorted(named) != sorted(classes) or not all(self.tasks):
                raise ValueError(
                    f"tasks name the classes {', '.join(named)}, must name each of {', '.join(classes)} once"
                )
            return self.tasks
        known = [tuple(name for name in task if name in classes) for task in NUSCENES_TASKS]
        named = {name for task in known for name in task}
        return (*(task for task in known if task), *((name,) for name in classes if name not in named))

    def weights(self) -> dict[str, float]:
        """Of the terms of ``CenterPointHead.sums``."""
        return {"heatmap": self.heatmap_weight, "box": self.box_weight, "velocity": self.box_weight}


class Targets(NamedTuple):
    """What the head should say.

    heat: (S, K, Y', X') float32, 1 at centers; classes in the order of the tasks.
    frame, channel, y, x: (m,) int64: of each box its frame, the place of its class among the channels of ``heat``, its cell.
    code: (m, 10) float32: center x, y within the cell (0..1), z in meters, logarithms of length, width and height in meters,
        cosine and sine of the yaw, velocity x, y in m/s, NaN where unknown.
    """

    heat: Tensor
    frame: Tensor
    channel: Tensor
    y: Tensor
    x: Tensor
    code: Tensor


class Detections(NamedTuple):
    """Boxes found in a frame, the surest first, as ``evaluation.detection.BoxSet`` takes them.

    boxes: (n, 7) float32 center x, y, z, length, width, height, yaw; meters and radians, frame of the labels. velocity: (n, 2)
    float32 m/s, None without. classes: (n,) int64 ids. scores: (n,) float32.
    """

    boxes: np.ndarray
    velocity: np.ndarray | None
    classes: np.ndarray
    scores: np.ndarray


class _Task(nn.Module):
    """Branches of one task: two convolutions each."""

    def __init__(self, channels: int, classes: int, velocity: bool) -> None:
        super().__init__()
        self.widths = {"hm": classes} | {name: n for name, n in _CODE.items() if name != "vel" or velocity}
        for name, outputs in self.widths.items():
            inner, last = (nn.Conv2d(channels, n, 3, padding=1) for n in (channels, outputs))
            for layer in (inner, last) if name != "hm" else ():
                nn.init.kaiming_normal_(layer.weight)
                _fill_bias(layer, 0.0)
            if name == "hm":
                _fill_bias(last, -2.19)  # a probability of 0.1 everywhere (Lin et al., focal loss)
            setattr(self, name, nn.Sequential(nn.Sequential(inner, SyncBatchNorm(channels), nn.ReLU()), last))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {name: getattr(self, name)(x) for name in self.widths}


def _fill_bias(layer: nn.Conv2d, value: float) -> None:
    if layer.bias is not None:
        nn.init.constant_(layer.bias, value)


class CenterPointHead(nn.Module):
    """Map of cells -> maps of each task, their losses, and boxes.

    Losses are those of the paper: for each task the penalty-reduced focal loss of its heat maps divided by its number of centers,
    and the L1 loss of the code divided by its number of boxes. So each task is a role of its own (``heatmap@0``, ``box@0``, …)
    whose count is of the labels alone. Velocities that the truth does not know are left out by themselves: they are a third
    term, ``velocity@0``, …, counted by the boxes that have one. Where all are known, ``box`` and ``velocity`` together are the
    published loss.

    Args:
        inputs: channels of the map.
        points: grid of the points; the map has cells of 8 of its voxels.
        classes: names of the classes to detect, ids are their places.
        config: of the head.

    Raises:
        ValueError: ``config.tasks`` does not fit the classes.
    """

    def __init__(self, inputs: int, points: VoxelGrid, classes: Sequence[str], config: CenterPointConfig) -> None:
        super().__init__()
        if not classes:
            raise ValueError("there is no class to detect: the taxonomy has no things")
        self.config, self.classes = config, tuple(classes)
        self.tasks = config.groups(classes)
        self.shape = (points.shape[1] // STRIDE, points.shape[0] // STRIDE)  # Y', X'
        self.lower = points.lower[:2]
        self.cell = tuple(STRIDE * size for size in points.voxel[:2])
        # Channels of all heat maps, one after the other.
        self.order = [self.classes.index(name) for task in self.tasks for name in task]
        self.task_of = [t for t, task in enumerate(self.tasks) for _ in task]
        width = config.channels
        self.shared_conv = nn.Sequential(nn.Conv2d(inputs, width, 3, padding=1), SyncBatchNorm(width), nn.ReLU())
        self.heads_list = nn.ModuleList(_Task(width, len(task), config.velocity) for task in self.tasks)
        weights = config.code_weights
        self.code_weights = weights if config.code_order == "openpcdet" else (*weights[:6], *weights[8:], *weights[6:8])

    def forward(self, x: Tensor) -> list[dict[str, Tensor]]:
        """(B, inputs, Y', X') -> for each task its maps (B, channels, Y', X'): ``hm`` (logits), ``center``, ``center_z``,
        ``dim``, ``rot``, ``vel``."""
        x = self.shared_conv(x)
        return [head(x) for head in self.heads_list]

    # Learning

    def _cells(self, boxes: Boxes) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(kept,) int64 of boxes that are learned: their places, channels, and centers x and y in cells (float32)."""
        found = boxes.boxes.float()
        at = (found[:, :2] - row(found, self.lower)) / row(found, self.cell)
        limits = row(found, self.shape[::-1])
        table = torch.cat([row(boxes.counts, self._channels()), boxes.counts.new_full((256 - len(self.order),), -1)])
        channel = table[boxes.classes.long()]
        keep = (channel >= 0) & (boxes.points >= self.config.min_points) & found.isfinite().all(1)
        keep = (keep & (found[:, 3:6] > 0).all(1) & ((at >= 0) & (at < limits)).all(1)).nonzero().squeeze(1)
        return keep, channel[keep], at[keep, 0], at[keep, 1]

    def _channels(self) -> list[int]:
        return [self.order.index(c) for c in range(len(self.order))]

    def targets(self, boxes: Boxes) -> Targets:
        """Of S labeled frames. Boxes whose class is not scored, whose center is outside of the grid, or that have too few points
        are left out; there is no limit to their number."""
        keep, channel, x, y = self._cells(boxes)
        frame, found = boxes.owners()[keep], boxes.boxes[keep].float()
        column, line = x.floor().long(), y.floor().long()
        code = torch.cat(
            [
                torch.stack([x - column, y - line], 1),
                found[:, 2:3],
                found[:, 3:6].log(),
                torch.stack([found[:, 6].cos(), found[:, 6].sin()], 1),
                boxes.velocity[keep].float(),
            ],
            1,
        )
        heat = code.new_zeros(len(boxes.counts), len(self.order), *self.shape)
        size = found[:, 3:5] / row(found, self.cell)
        radius = gaussian_radius(size[:, 0], size[:, 1], self.config.overlap).floor().clamp_min(self.config.min_radius)
        draw_gaussians(heat, (frame, channel, line, column), radius)
        return Targets(heat, frame, channel, line, column, code)

    def counts(self, boxes: Boxes) -> dict[str, Tensor]:
        """What ``sums`` are divided by, of the labels alone."""
        keep, channel, x, y = self._cells(boxes)
        place = (boxes.owners()[keep] * len(self.order) + channel) * self.shape[0] + y.floor().long()
        centers = torch.unique(place * self.shape[1] + x.floor().long())
        task_of = row(channel, self.task_of)
        tasks = {
            "heatmap": task_of[centers // (self.shape[0] * self.shape[1]) % len(self.order)],
            "box": task_of[channel],
        }
        if self.config.velocity:
            tasks["velocity"] = tasks["box"][boxes.velocity[keep].isfinite().all(1)]
        return {f"{term}@{t}": (of == t).sum() for term, of in tasks.items() for t in range(len(self.tasks))}

    def sums(self, outputs: Sequence[dict[str, Tensor]], boxes: Boxes) -> dict[str, Tensor]:
        """Sums of losses by the names of ``counts``. Without labeled frames, or boxes, they are in the graph all the same.

        Args:
            outputs: of at least as many frames as are labeled, which come first.
            boxes: of S labeled frames.
        """
        goal, size = self.targets(boxes), len(boxes.counts)
        task_of = row(goal.channel, self.task_of)[goal.channel]
        sums, first = {}, 0
        with full_precision(goal.heat.device):
            weights = row(goal.code, self.code_weights)
            for t, (maps, task) in enumerate(zip(outputs, self.tasks, strict=True)):
                mine = (task_of == t).nonzero().squeeze(1)
                heat = goal.heat[:, first : first + len(task)]
                sums[f"heatmap@{t}"] = center_focal_sum(maps["hm"][:size].float(), heat)
                names = [name for name in _CODE if name in maps]
                found = torch.cat([maps[name][:size] for name in names], 1).float()
                found = found[goal.frame[mine], :, goal.y[mine], goal.x[mine]]
                code = goal.code[mine, : found.shape[1]]
                known = code.isfinite()
                known[:, 8:] = known[:, 8:].all(1, keepdim=True)
                errors = (found - torch.where(known, code, found.detach())).abs() * weights[: found.shape[1]]
                sums[f"box@{t}"] = errors[:, :8].sum()
                if self.config.velocity:
                    sums[f"velocity@{t}"] = errors[:, 8:].sum()
                first += len(task)
        return sums

    # Prediction

    @torch.no_grad()
    def decode(self, outputs: Sequence[dict[str, Tensor]]) -> list[Detections]:
        """Boxes of each frame. Equal scores are in the order of tasks, classes and cells."""
        frames = outputs[0]["hm"].shape[0]
        return [self._decode_frame([{n: m[b] for n, m in maps.items()} for maps in outputs]) for b in range(frames)]

    def _decode_frame(self, outputs: Sequence[dict[str, Tensor]]) -> Detections:
        found, c = [], self.config
        first = 0
        for maps, task in zip(outputs, self.tasks, strict=True):
            scores, channel, code = self._centers(maps)
            boxes = self._boxes(code)
            kept = rotated_nms(boxes[: c.pre_nms, :7], scores[: c.pre_nms], c.nms_iou, c.post_nms)
            classes = np.array(self.order[first : first + len(task)], np.int64)[channel[kept]]
            found.append((boxes[kept, :7], boxes[kept, 7:], classes, scores[kept]))
            first += len(task)
        boxes, velocity, classes, scores = (np.concatenate(parts) for parts in zip(*found))
        best = np.argsort(-scores, kind="stable")[: c.most]
        return Detections(
            boxes[best].astype(np.float32),
            velocity[best].astype(np.float32) if c.velocity else None,
            classes[best],
            scores[best],
        )

    def _centers(self, maps: dict[str, Tensor]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of a task: scores (n,) float32 that fall, channels (n,), and cell x, y and code (n, 12 or 10) float64."""
        heat = maps["hm"].float().sigmoid().flatten()
        code = torch.cat([maps[name] for name in _CODE if name in maps]).float()
        place = (heat > self.config.score_threshold).nonzero().squeeze(1)
        order = heat[place].sort(descending=True, stable=True).indices[: self.config.most]
        place = place[order]
        cell = place % (self.shape[0] * self.shape[1])
        at = torch.stack([cell % self.shape[1], cell // self.shape[1]], 1)
        rows = torch.cat([at.double(), code.flatten(1)[:, cell].t().double()], 1).cpu().numpy()
        whole = np.isfinite(rows).all(1)
        channel = (place // (self.shape[0] * self.shape[1])).cpu().numpy()
        return heat[place].cpu().numpy()[whole], channel[whole], rows[whole]

    def _boxes(self, rows: np.ndarray) -> np.ndarray:
        """(n, 7 or 9) float64: boxes and velocities of cells and codes."""
        center = (rows[:, :2] + rows[:, 2:4]) * self.cell + self.lower
        size = np.exp(np.clip(rows[:, 5:8], -_LARGEST, _LARGEST))
        yaw = np.arctan2(rows[:, 9], rows[:, 8])
        return np.concatenate([center, rows[:, 4:5], size, yaw[:, None], rows[:, 10:]], 1)


def gaussian_radius(length: Tensor, width: Tensor, overlap: float) -> Tensor:
    """How far a box's corners may move so that it still overlaps itself by ``overlap``: the least of the three cases of
    CornerNet (Law and Deng, ECCV 2018) with both corners moved in one direction, inwards, or outwards. Detectors all
    use its first code's formula, which does not divide by the leading coefficient, and so do we.

    Args:
        length, width: (n,) in cells.
        overlap: above 0 and below 1.

    Returns:
        (n,) cells.
    """
    around, area = length + width, length * width
    shifted = (around + (around**2 - 4 * area * (1 - overlap) / (1 + overlap)).sqrt()) / 2
    inwards = 2 * around
    inwards = (inwards + (inwards**2 - 16 * (1 - overlap) * area).sqrt()) / 2
    outwards = 2 * overlap * around
    outwards = (-outwards + (outwards**2 + 16 * overlap * (1 - overlap) * area).sqrt()) / 2
    return torch.minimum(torch.minimum(shifted, inwards), outwards)


def draw_gaussians(heat: Tensor, at: tuple[Tensor, Tensor, Tensor, Tensor], radius: Tensor) -> None:
    """Raises heat maps to Gaussians with a peak of 1, where they are lower; order does not matter.

    Args:
        heat: (S, K, Y', X') float32, changed in place.
        at: frame, channel, y, x (n,) int64 of the peaks.
        radius: (n,) whole numbers, cells; the standard deviation is a sixth of the diameter 2 r + 1.
    """
    if not len(radius):
        return
    frame, channel, y, x = at
    reach = int(radius.max())
    step = torch.arange(-reach, reach + 1, device=heat.device)
    rows, columns = y[:, None, None] + step[:, None], x[:, None, None] + step  # (n, k, 1) and (n, 1, k)
    sigma = (2 * radius + 1)[:, None, None] / 6
    values = torch.exp(-(step[:, None] ** 2 + step**2) / (2 * sigma**2))
    limit = radius[:, None, None]
    inside = (step.abs()[:, None] <= limit) & (step.abs() <= limit)
    inside = inside & (rows >= 0) & (rows < heat.shape[2]) & (columns >= 0) & (columns < heat.shape[3])
    place = ((frame * heat.shape[1] + channel)[:, None, None] * heat.shape[2] + rows) * heat.shape[3] + columns
    heat.view(-1).scatter_reduce_(0, torch.where(inside, place, 0).flatten(), (values * inside).flatten(), "amax")


def center_focal_sum(logits: Tensor, heat: Tensor) -> Tensor:
    """Sum of the penalty-reduced focal loss (Law and Deng, ECCV 2018, eq. 1, alpha 2, beta 4) over all cells, of logits, so that
    nothing is clamped.

    Args:
        logits, heat: (S, K, Y', X') float32; where ``heat`` is 1 there is a center.
    """
    p = logits.sigmoid()
    hit = -F.logsigmoid(logits) * (1 - p) ** 2
    miss = F.softplus(logits) * p**2 * (1 - heat) ** 4
    return torch.where(heat == 1, hit, miss).sum()
