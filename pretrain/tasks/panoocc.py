"""PanoOcc: semantic voxels, boxes and panoptic voxels from the images of several key-frames (Wang et al.), after binary
pre-training of the same network."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn

from occstream.evaluation.detection import BoxSet, rules_of
from occstream.evaluation.evaluate import Metric
from occstream.evaluation.instances import FoundBoxes, RefineConfig, Segments, taxonomy_ids
from occstream.evaluation.lidar import DetectionScores, PointScores
from occstream.evaluation.lidarpictures import detection_picture
from occstream.evaluation.occupancy import HEADLINE, classify
from occstream.evaluation.panopticpictures import panoptic_picture
from occstream.evaluation.panopticscores import PointPanopticScores, ThingBoxes, VoxelSegments
from occstream.evaluation.pointseg import convention_of
from occstream.evaluation.predictions import Keep, predict
from occstream.evaluation.report import prediction_picture
from occstream.models.batch import Batch, Boxes, Cameras, History, Points
from occstream.models.centerpoint import Detections
from occstream.models.detr import DetrConfig, DetrHead, Queried, found_boxes
from occstream.models.layers import row
from occstream.models.panoocc import PanoOcc, PanoOccConfig, PanoOutputs
from occstream.pretrain import panolosses
from occstream.pretrain.annotations import Annotations
from occstream.pretrain.augment import AugmentConfig
from occstream.pretrain.boxlosses import BoxLossConfig, BoxLosses
from occstream.pretrain.config import Config
from occstream.pretrain.keyframes import KeyFrameFiller
from occstream.pretrain.levels import keep_notes, occupied_shares
from occstream.pretrain.panolosses import PanoLoss
from occstream.pretrain.tasks.base import Facts, Role, Scoring, Transfer
from occstream.pretrain.tasks.occupancy import (
    CameraTask,
    MaskedData,
    MaskedEval,
    camera_frames,
    check_class_weights,
    mask_facts,
    occupancy_scoring,
)
from occstream.pretrain.tasks.registry import register
from occstream.sharding.manifest import Manifest
from occstream.sharding.schema import Frame, Labels


@dataclass
class PanoData(MaskedData):
    """The stream this stage trains on: binary labels for pre-training, semantic labels for fine-tuning."""

    cameras: tuple[str, ...] | None = None
    """Camera names in order. None: all that the first, middle and last frame of the first scene have."""
    interval: int = 1
    """Key-frames from one of ``model.frames`` to the next (PanoOcc, Table 8: 0.5 s, the distance of nuScenes' key-frames)."""
    binary_from: Literal["labels", "semantic"] = "labels"
    """Binary target: the packed binary labels, or made from the semantic labels."""
    voxels_from: Literal["labels", "points"] = "labels"
    """Voxel labels of ``data`` and ``eval``: as they are packed, or of the points of each frame's own sweep: the class of most
    of a voxel's points, free where a ray passed, the rest unknown (PanoOcc, Sec. 4.2)."""
    seen_boxes: bool = True
    """Learn and score only boxes that LiDAR points lie in; needs the lidar group. False: all boxes."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.interval <= 50:
            raise ValueError(f"interval is {self.interval}, must be 1 to 50 key-frames")


@dataclass
class PanoEval(MaskedEval):
    """Evaluation at the end of training (and every ``every`` steps)."""

    panoptic: bool = True
    """Also score panoptic quality of voxels where the network has both heads, and of rays with ``rays``: boxes above
    ``refine.threshold`` claim voxels. True instances follow from the boxes of the labels."""
    points: bool = False
    """Also score the classes of LiDAR points, and with both heads panoptic quality of points. Needs sweeps whose points have
    classes."""
    point_classes: Literal["place", "voxel"] = "place"
    """What class a point has: that of the network of classes at its own place, or that of the voxel of the labels' grid that it
    lies in. After a decoder that prunes it always is that of the voxel."""


@dataclass
class PanoOccRecipe(Config):
    """A recipe of PanoOcc."""

    heads: Literal["voxels", "boxes", "joint"] = "voxels"
    """What stage finetune learns and predicts: classes of voxels, boxes (PanoOcc, Sec. 3.6), or both."""

    data: PanoData = field(default_factory=PanoData)
    eval: PanoEval = field(default_factory=PanoEval)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    model: PanoOccConfig = field(default_factory=PanoOccConfig)
    loss: PanoLoss = field(default_factory=PanoLoss)
    detect: DetrConfig = field(default_factory=DetrConfig)
    box_loss: BoxLossConfig = field(default_factory=BoxLossConfig)
    refine: RefineConfig = field(default_factory=RefineConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_class_weights(self.loss.class_weights, self)


@register
class PanoOccTask(CameraTask):
    """Stage pretrain learns occupancy of the fine grid; finetune has the whole network, and binary frames of the replay stop at
    the binary head."""

    name = "panoocc"
    stages: ClassVar[Mapping[str, str]] = {
        "pretrain": "Pre-trains on binary occupancy.",
        "finetune": "Fine-tunes semantic occupancy and detection.",
    }
    Config = PanoOccRecipe
    parts: ClassVar[Mapping[str, str]] = {
        "image encoder": "images",
        "view encoder": "views",
        "temporal encoder": "temporal",
        "decoder": "decoder",
        "voxel head": "voxel_head",
        "detector": "detector",
    }
    terms = (*panolosses.TERMS, "box_class", "box")
    headline: ClassVar[Mapping[str, str]] = {
        "eval/miou": HEADLINE["miou"],
        "eval/mAP": "mAP",
        "eval/NDS": "NDS",
        "eval/voxel_pq": "PQ-voxel",
        "eval/iou": HEADLINE["iou"],
        "eval/binary_iou": HEADLINE["binary_iou"],
    }
    knobs = (
        "train.accumulate (more micro-steps)",
        "model.checkpointing=true",
        "model.head_rows=16",
        "train.zero_stage",
        "more processes",
    )
    inputs = ("camera",)
    config: PanoOccRecipe

    def __init__(self, config: PanoOccRecipe) -> None:
        super().__init__(config)
        self.semantic = self.labeled = self.replays = config.stage == "finetune"
        self.voxels, self.detects = (self.semantic and config.heads in (head, "joint") for head in ("voxels", "boxes"))
        self.segments, self.rules = self.voxels, rules_of(config.classes)
        self.movie = "" if not self.detects else "-panoptic" if self.voxels else "-boxes"
        names, boxed = config.classes.classes, self.rules.classes if self.detects else ()
        self._labels: dict[str, Any] = {
            "classes": names,
            "things": [i for i, name in enumerate(names) if name in config.classes.things or name in boxed],
        }
        self._boxes = BoxLosses(config.voxel_grid, len(self.rules.classes), config.detect.queries, config.box_loss)

    @property
    def title(self) -> str:
        frames = self.config.model.frames
        return f"panoocc of {frames} key-frame{'s' if frames > 1 else ''}"

    # Network

    def model(self) -> nn.Module:
        config = self.config
        return PanoOcc(
            config.model,
            config.voxel_grid,
            config.classes.num_classes,
            config.augment.image_size,
            semantic=self.semantic,
            voxels=self.voxels,
            detector=self._detector if self.detects else None,
        )

    def _detector(self, channels: int) -> DetrHead:
        return DetrHead(channels, self.config.voxel_grid, self.rules.classes, self.config.detect)

    def check(self, model: nn.Module) -> None:
        if not self.semantic and not self.config.loss.binary_weight:
            raise ValueError(
                "loss.binary_weight is 0, and stage pretrain learns nothing else; set it, or stage=finetune"
            )

    def transfer(self, model: nn.Module) -> Transfer:
        """All but what only semantic frames teach."""
        return Transfer([key for key in model.state_dict() if not key.startswith(PanoOcc.SEMANTIC)])

    # Data

    def sample(self, role: Role, source: Any, sensors: Sequence[str], labeled: bool = True) -> KeyFrameFiller:
        config, train = self.config, role in ("main", "replay")
        return KeyFrameFiller(
            config.augment,
            tuple(sensors),
            config.voxel_grid,
            config.classes,
            frames=config.model.frames,
            interval=config.data.interval,
            seed=config.train.seed if train else 0,
            train=train,
            semantic=self.voxels and role in ("main", "eval"),
            voxels_from=config.data.voxels_from if role in ("main", "eval") else "labels",
            annotations=self._annotations(role),
            mask=source.mask,
            binary_from=config.data.binary_from if role != "replay" else "labels",
            labels=labeled,
            decode=config.train.decoder == "cpu",
        )

    def _annotations(self, role: Role) -> Annotations:
        """Boxes and points of a sample."""
        ev = self.config.eval
        boxes = self.detects and role in ("main", "eval")
        points = self.voxels and ev.points and role in ("eval", "predict")
        classes = self.rules.classes if boxes else None
        return Annotations(classes, seen=self.config.data.seen_boxes, points=points, labels=role == "eval")

    def facts(self, key: str, source: Any, manifest: Manifest, scenes: Sequence[int]) -> Facts:
        binary_from = "labels" if key.startswith("replay") else self.config.data.binary_from
        found, model = mask_facts(key, source.mask, manifest, scenes, binary_from=binary_from), self.config.model
        if model.decoder == "sparse" and model.keep_by == "share":
            shares = occupied_shares(manifest, scenes, model.grids, mask=source.mask)
            found.notes += keep_notes(key, shares, model.grids, model.keep)
        return found

    # Learning

    def counts(self, outputs: PanoOutputs, batch: Batch) -> dict[str, Tensor]:
        found = panolosses.counts(outputs, batch, self.config.loss, **self._labels)
        return found | self._boxes.counts(_boxes(batch)) if self.detects else found

    def sums(self, outputs: PanoOutputs, batch: Batch) -> dict[str, Tensor]:
        found = panolosses.sums(outputs, batch, self.config.loss, **self._labels)
        return found | self._boxes.sums(_queried(outputs), _boxes(batch)) if self.detects else found

    @property
    def weights(self) -> Mapping[str, float | None]:
        return {term: getattr(self.config.loss, f"{term}_weight") for term in panolosses.TERMS} | self._boxes.weights

    # Evaluation and prediction

    def scoring(self, manifest: Manifest, unknown: float | None) -> Scoring:
        config, more = self.config, dict[str, Callable[[], Metric]]()
        if self.detects:
            more["AP"] = lambda: DetectionScores(config.classes, self._found_boxes, reach=self._reach)
        if self.voxels and config.eval.points:
            more["point IoU"] = lambda: PointScores(config.classes, self._point_classes)
            if self.detects:
                more["PQ"] = self._point_panoptic
        if not (self.detects and self.voxels):  # only then samples have the boxes that true instances follow from
            config = dataclasses.replace(config, eval=dataclasses.replace(config.eval, panoptic=False))
        return occupancy_scoring(
            config,
            manifest,
            unknown,
            grid=config.voxel_grid,
            kind="softmax_focal",
            classes=self.voxels,
            boxes=self._found_boxes if self.detects else None,
            more=more,
        )

    @property
    def _reach(self) -> float | None:
        """Meters around the origin within which the head looks for boxes to all sides; None for a grid that begins at it."""
        lower, upper = self.config.voxel_grid.lower[:2], self.config.voxel_grid.upper[:2]
        reach = min(*upper, *(-value for value in lower))
        return reach if reach > 0 else None

    def _found_boxes(self, outputs: PanoOutputs, batch: Batch) -> list[Detections]:
        return found_boxes(_queried(outputs), self.config.detect)

    def _point_classes(self, outputs: PanoOutputs, batch: Batch) -> Tensor:
        """(n,) of the points of labeled frames, by ``eval.point_classes``; beyond the grid that of its border. Never free, nor a
        class that nothing may be called."""
        points, logits = batch.part(Points), outputs.semantic_logits
        if logits is None:
            raise ValueError("the network has no classes")
        if outputs.point_logits is not None and self.config.eval.point_classes == "place":
            first = convention_of(self.config.classes).first
            return outputs.point_logits[:, first:].argmax(1) + first
        count = int(points.counts[: batch.labeled].sum())
        grid, first = self.config.voxel_grid, convention_of(self.config.classes).first
        xyz, owners = points.xyz[:count], points.owners()[:count]
        at = (xyz - row(xyz, grid.lower)) / row(xyz, grid.voxel)
        last = row(at, [n - 1 for n in grid.shape])
        x, y, z = torch.minimum(at.floor().clamp_min(0), last).long().unbind(1)
        return logits[owners, first:, x, y, z].argmax(1) + first

    def point_settings(self) -> tuple[str, ...]:
        return ("eval.points=true",)

    def point_segments(self, outputs: PanoOutputs, batch: Batch) -> list[Segments]:
        return self._point_panoptic().segments(outputs, batch)

    def _point_panoptic(self) -> PointPanopticScores:
        boxes = self._found_boxes if self.detects else None
        return PointPanopticScores(self.config.classes, self.config.refine, self._point_classes, boxes)

    def detections(self, outputs: PanoOutputs, batch: Batch) -> list[BoxSet]:
        return [BoxSet(f.boxes, f.classes, f.velocity, scores=f.scores) for f in self._found_boxes(outputs, batch)]

    def draw(
        self, path: Path, batch: Batch, outputs: PanoOutputs, *, index: int, sensors: Sequence[str], title: str
    ) -> bool:
        if self.voxels or not self.detects:
            prediction_picture(
                path,
                batch,
                outputs,
                index=index,
                grid=self.config.voxel_grid,
                taxonomy=self.config.classes,
                cameras=tuple(sensors),
                kind="softmax_focal",
                title=title,
            )
        if self.detects:
            # Boxes in the LiDAR's frame are not drawn into images, which are placed in the ego's.
            frame = self.cameras_of(batch.keys[index]) if self.config.voxel_grid.frame == "ego" else None
            draw = self._draw_panoptic if self.voxels else self._draw_boxes
            draw(path.with_stem(f"{path.stem}{self.movie}"), batch, outputs, index=index, frame=frame, title=title)
        return True

    def _draw_boxes(
        self, path: Path, batch: Batch, outputs: PanoOutputs, *, index: int, frame: Frame | None, title: str
    ) -> None:
        config, found = self.config, self._found_boxes(outputs, batch)[index]
        sure = found.scores > config.refine.threshold
        velocity = None if found.velocity is None else found.velocity[sure]
        shown = Detections(found.boxes[sure], velocity, found.classes[sure], found.scores[sure])
        reach = max(config.voxel_grid.upper[:2])
        detection_picture(path, batch, shown, index, taxonomy=config.classes, reach=reach, title=title, cameras=frame)

    def _draw_panoptic(
        self, path: Path, batch: Batch, outputs: PanoOutputs, *, index: int, frame: Frame | None, title: str
    ) -> None:
        config, segments = self.config, self._segments()
        labeled = index < batch.labeled and batch.boxes is not None
        rows = segments.rows.true(batch)[index] if labeled else (np.zeros((0, 7)), np.zeros(0, np.int64))
        panoptic_picture(
            path,
            truth=segments.truth(batch)[index] if labeled else None,
            found=segments(outputs, batch)[index],
            true_boxes=FoundBoxes(*rows, np.ones(len(rows[0]))),
            boxes=segments.rows.found(self._found_boxes(outputs, batch)[index]),
            least=config.refine.threshold,
            taxonomy=config.classes,
            reach=max(config.voxel_grid.upper[:2]),
            tracks=self._tracks(frame, segments.rows, len(rows[0])),
            frame=frame,
            undo=np.linalg.inv(batch.scene_aug[index].double().cpu().numpy()),
            title=title,
        )

    def _segments(self) -> VoxelSegments:
        def classes(outputs: PanoOutputs, batch: Batch) -> Tensor:
            if outputs.semantic_logits is None:
                raise ValueError("the network has no classes")
            return classify(outputs.semantic_logits, "softmax_focal")

        config = self.config
        return VoxelSegments(config.classes, config.voxel_grid, config.refine, classes, boxes=self._found_boxes)

    def _tracks(self, frame: Frame | None, rows: ThingBoxes, count: int) -> list[str]:
        """Identities of the true boxes of things, where the frame has them."""
        if frame is None or frame.boxes is None:
            return []
        kinds = taxonomy_ids(frame.boxes.names, self.config.classes)
        tracks = [track for track, kind in zip(frame.boxes.track_ids, kinds) if kind in rows.things]
        return tracks if len(tracks) == count else []

    def check_prediction(self) -> None:
        if not self.semantic:
            raise ValueError("is of a pre-training run, which predicts no classes; give a fine-tuned one")
        if not self.voxels:
            raise ValueError(
                "has heads=boxes, which predict no classes of voxels; give a run with heads=voxels or joint"
            )

    def predict(
        self, model: nn.Module, batches: Iterable[Batch], keep: Keep, flips: bool
    ) -> Iterator[tuple[str, Labels]]:
        return predict(model, batches, keep=keep, kind="softmax_focal", flips=flips)

    def synthetic_batch(self, labeled: int, other: int) -> Batch:
        """A vehicle that drives forward by 2 m a key-frame."""
        config, frames = self.config, self.config.model.frames
        batch = camera_frames(config, labeled, other)
        poses = torch.eye(4).repeat(batch.size, frames, 1, 1)
        poses[..., 0, 3] = -2.0 * torch.arange(frames)
        batch.cameras = batch.part(Cameras).each(lambda _, value: value.repeat(1, frames, *[1] * (value.dim() - 2)))
        batch.history = History(poses, torch.ones(batch.size, frames, dtype=torch.bool))
        if self.detects:
            batch.boxes = self._cars(labeled)
        return batch

    def _cars(self, labeled: int, count: int = 5) -> Boxes:
        """Boxes in a row, of all classes in turn."""
        lower, upper = (torch.tensor(corner) for corner in (self.config.voxel_grid.lower, self.config.voxel_grid.upper))
        share = (torch.arange(count) + 0.5) / count
        centers = (lower + (upper - lower) * share[:, None]).repeat(labeled, 1)
        rows = torch.cat([centers, torch.tensor([4.5, 1.9, 1.6, 0.3]).repeat(len(centers), 1)], 1)
        return Boxes(
            boxes=rows,
            classes=torch.arange(len(rows)).remainder(len(self.rules.classes)).to(torch.uint8),
            velocity=torch.ones(len(rows), 2),
            points=torch.full((len(rows),), 9, dtype=torch.int32),
            counts=torch.full((labeled,), count),
        )


def _queried(outputs: PanoOutputs) -> Queried:
    if outputs.detection is None:
        raise ValueError("the network has no detector")
    return outputs.detection


def _boxes(batch: Batch) -> Boxes:
    """True boxes of the labeled frames of a batch, which may have none."""
    if batch.boxes is not None:
        return batch.boxes
    if batch.labeled:
        raise ValueError("the batch has no boxes")
    of = dict.fromkeys(("classes", "points", "counts"), torch.zeros(0, dtype=torch.int64, device=batch.device))
    nothing = torch.zeros(0, 7, device=batch.device)
    return Boxes(boxes=nothing, velocity=nothing[:, :2], **of)
