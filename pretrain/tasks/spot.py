"""SPOT: a LiDAR encoder pre-trained by occupancy, then detection and segmentation from few labels (Yan et al.)."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from occstream.evaluation.detection import BoxSet, rules_of
from occstream.evaluation.evaluate import JointMetric, Metric
from occstream.evaluation.instances import RefineConfig, Segments
from occstream.evaluation.lidar import DetectionScores, PointScores
from occstream.evaluation.lidarpictures import detection_picture, segmentation_picture
from occstream.evaluation.panopticscores import PointPanopticScores
from occstream.evaluation.pointseg import convention_of
from occstream.evaluation.predictions import Keep, predict
from occstream.evaluation.report import prediction_picture
from occstream.models import handoff
from occstream.models.batch import Batch, Boxes, Occupancy, PointLabels, Points
from occstream.models.centerpoint import CenterPointConfig, CenterPointHead, Detections
from occstream.models.lidarnet import LidarNet, LidarOutputs, from_encoder
from occstream.models.segmentor import PointSegmentor, SegmentorConfig
from occstream.models.spot import SpotConfig
from occstream.models.voxelbackbones import LidarEncoder
from occstream.pretrain.config import Config
from occstream.pretrain.lidar import LidarConfig, LidarFiller, Targets, check_intensity
from occstream.pretrain.lovasz import lovasz_counts, lovasz_softmax, weighted_count, weighted_cross_entropy
from occstream.pretrain.tasks.base import Facts, Role, Scoring, Task, Transfer
from occstream.pretrain.tasks.occupancy import MaskedData, MaskedEval, eval_boxes, mask_facts, occupancy_scoring
from occstream.pretrain.tasks.registry import register
from occstream.sharding.grid import VoxelGrid
from occstream.sharding.manifest import Manifest
from occstream.sharding.schema import IGNORE, Labels, Taxonomy

# Classes of any taxonomy that the paper calls foreground and weighs more (Sec. 3.3.1).
FOREGROUND = (
    "car", "vehicle", "pedestrian", "person", "cyclist", "bicyclist", "motorcyclist", "bicycle", "motorcycle",
)  # fmt: skip

BINARY = Taxonomy("binary", ("occupied",), frozenset(), ((0, 120, 230),))


@dataclass
class SpotData(MaskedData):
    """The stream this stage trains on."""

    balance: bool = False
    """Show frames with rare things more often: up to sqrt(m / n) times a pass, n being a class's share and m the mean share
    (SPOT, Sec. 3.3.2)."""


@dataclass
class SpotLoss:
    """Weights of the losses (SPOT, Sec. 3.3.1)."""

    ce_weight: float = 1.0
    """Weight of the weighted cross-entropy, of voxels in pre-training and of points in segmentation. It is divided by the
    sum of the class weights of all elements."""
    lovasz_weight: float = 1.0
    """Weight of the Lovász loss, the mean of frames' own: over classes that the frame has, without empty."""
    lovasz_sample: int = 50_000
    """Voxels or points of a frame that the Lovász loss looks at; 0: all. The draw is a function of the frame's key."""
    foreground: tuple[str, ...] | None = None
    """Classes that weigh ``foreground_weight``. None: cars, pedestrians and cycles, by the names that the taxonomy has."""
    foreground_weight: float = 2.0
    """Of voxels of the foreground."""
    other_weight: float = 1.0
    """Of voxels of other classes."""
    empty_weight: float = 0.01
    """Of free voxels."""

    def __post_init__(self) -> None:
        if not self.ce_weight and not self.lovasz_weight:
            raise ValueError("ce_weight and lovasz_weight are both 0: there is nothing to learn")


@dataclass
class TeacherConfig:
    """Mean teacher of pre-training: the average of the weights (``train.ema``) labels frames of ``replay``, which need no labels
    of their own, from all their points; the network learns them from thinned sweeps. The paper's semi-supervised experiment
    gives no numbers: all are ours."""

    weight: float = 0.0
    """Weight of the losses on frames of ``replay``, once it has risen. 0: no teacher."""
    occupied: float = 0.7
    """Least probability of a class that counts."""
    empty: float = 0.9
    """Least probability of free that counts."""
    ramp: float = 0.3
    """Share of the run in which the weight rises, as exp(-5 (1 - t) ** 2)."""

    def __post_init__(self) -> None:
        for name in ("occupied", "empty", "ramp"):
            if getattr(self, name) > 1:
                raise ValueError(f"{name} is {getattr(self, name)}, must be at most 1")

    def factor(self, progress: float) -> float:
        """Of the weight, when this share of the run is done."""
        rest = 1 - min(1.0, progress / self.ramp) if self.ramp else 0.0
        return math.exp(-5 * rest**2)


@dataclass
class SpotRecipe(Config):
    """A recipe of SPOT."""

    data: SpotData = field(default_factory=SpotData)
    eval: MaskedEval = field(default_factory=MaskedEval)
    lidar: LidarConfig = field(default_factory=LidarConfig)
    model: SpotConfig = field(default_factory=SpotConfig)
    detect: CenterPointConfig = field(default_factory=CenterPointConfig)
    segment: SegmentorConfig = field(default_factory=SegmentorConfig)
    loss: SpotLoss = field(default_factory=SpotLoss)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    occupancy: Literal["semantic", "binary"] = "semantic"
    """What is pre-trained: classes of voxels, or only whether they are occupied."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if unknown := [name for name in self.loss.foreground or () if name not in self.classes.classes]:
            raise ValueError(
                f"loss.foreground has {unknown[0]!r}, which taxonomy {self.taxonomy!r} has not: {', '.join(self.classes.classes)}"
            )


@register
class SpotTask(Task):
    """Stage pretrain learns occupancy from single sweeps; the others start from its encoder and have heads of their own."""

    name = "spot"
    stages: ClassVar[Mapping[str, str]] = {
        "pretrain": "Pre-trains the encoder by occupancy.",
        "detect": "Trains a detector of boxes.",
        "segment": "Trains a segmentor of points.",
        "finetune": "Trains both at once, two heads of one network.",
    }
    Config = SpotRecipe
    terms = ("ce", "lovasz", "heatmap", "box")
    headline: ClassVar[Mapping[str, str]] = {
        "eval/mAP": "mAP",
        "eval/NDS": "NDS",
        "eval/point_miou": "point mIoU",
        "eval/miou": "mIoU",
        "eval/iou": "IoU",
        "eval/binary_iou": "binary IoU",
    }
    inputs = ("lidar",)
    config: SpotRecipe

    def __init__(self, config: SpotRecipe) -> None:
        super().__init__(config)
        self.labeled = True
        self.detects, self.segments = (config.stage in (stage, "finetune") for stage in ("detect", "segment"))
        self.pretrains = config.stage == "pretrain"
        self.semantic = config.occupancy == "semantic"
        self.rules = rules_of(config.classes)
        self.teaches = self.replays = bool(self.pretrains and config.teacher.weight and config.replay.url)

    @property
    def title(self) -> str:
        kind = f"{self.config.occupancy} occupancy" if self.pretrains else self.config.stage
        return f"spot {self.config.model.variant} {kind}"

    # Network

    def model(self) -> nn.Module:
        config = self.config
        classes = config.classes.num_classes if self.semantic else 1
        return LidarNet(
            config.model,
            config.voxel_grid.frame,
            occupancy=(config.voxel_grid, classes) if self.pretrains else None,
            detector=self._detector if self.detects else None,
            segmentor=self._segmentor if self.segments else None,
        )

    def _detector(self, encoder: LidarEncoder, points: VoxelGrid) -> CenterPointHead:
        return CenterPointHead(encoder.outputs, points, self.rules.classes, self.config.detect)

    def _segmentor(self, encoder: LidarEncoder, points: VoxelGrid) -> PointSegmentor:
        return PointSegmentor(
            self.config.model.width,
            encoder.outputs,
            points,
            self.config.classes.num_classes,
            config=self.config.segment,
        )

    @functools.cached_property
    def boxes(self) -> CenterPointHead:
        """A head without weights, for what it knows of boxes: targets, losses, and boxes of maps."""
        with torch.device("meta"):
            points = self.config.model.points_grid(self.config.voxel_grid.frame)
            return CenterPointHead(1, points, self.rules.classes, self.config.detect)

    def adopt(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """Also detectors of OpenPCDet and mmdet3d, whole."""
        model = self.config.model
        if any(name.startswith("backbone_3d.") for name in weights):
            return from_encoder(handoff.from_openpcdet(weights, model.variant, len(model.in_features)))
        for prefix in ("pts_", ""):
            if any(name.startswith(f"{prefix}middle_encoder.") for name in weights):
                found = handoff.from_mmdet3d(weights, model.variant, len(model.in_features), prefix=prefix)
                return from_encoder(found)
        return weights

    def check(self, model: nn.Module) -> None:
        config = self.config
        if self.pretrains and config.teacher.weight and not config.replay.url:
            raise ValueError(
                "teacher.weight is set, but there are no frames to label: set replay.url, or teacher.weight=0"
            )
        if self.teaches and not config.train.ema:
            raise ValueError("the teacher is the average of the weights: set train.ema=true, or teacher.weight=0")

    def transfer(self, model: nn.Module) -> Transfer:
        encoder = [key for key in model.state_dict() if key.startswith("encoder.")]
        return Transfer(encoder, ("occupancy.", "detector.", "segmentor."))

    def timed(self, model: nn.Module) -> Mapping[str, nn.Module]:
        found = {
            "sparse backbone": model.get_submodule("encoder.backbone_3d"),
            "2-D backbone": model.get_submodule("encoder.backbone_2d"),
        }
        return found | {name: module for name, module in model.named_children() if name != "encoder"}

    # Data

    @property
    def label_grid(self) -> VoxelGrid:
        """Of voxel labels, or of columns."""
        grid = self.config.voxel_grid
        return grid if self.config.model.target == "volume" else grid.coarsen((1, 1, grid.shape[2]))

    def sample(self, role: Role, source: Any, sensors: Sequence[str], labeled: bool = True) -> LidarFiller:
        config = self.config
        targets = Targets()
        if role != "predict":
            targets = Targets(
                config.occupancy if self.pretrains else "",
                columns=self._priority() if config.model.target == "bev" else None,
                boxes=self.rules.classes
                if self.detects or eval_boxes(config, role, classes=self._has_voxels)
                else None,
                points=self.segments,
                known=role != "replay",
                all_points=self.teaches and role in ("main", "replay"),
            )
        return LidarFiller(
            config.lidar,
            config.model.in_features,
            grid=config.voxel_grid,
            taxonomy=config.classes,
            targets=targets,
            seed=config.train.seed if role in ("main", "replay") else None,
            mask=getattr(source, "mask", "auto"),
        )

    @property
    def _has_voxels(self) -> bool:
        """Whether the network predicts classes of voxels."""
        return self.pretrains and self.semantic and self.config.model.target == "volume"

    def _priority(self) -> tuple[int, ...]:
        """Of classes in a column, free last."""
        names = foreground(self.config.classes, self.config.loss) if self.semantic else ()
        classes = self.config.classes.classes if self.semantic else ("occupied",)
        return (*(2 if name in names else 1 for name in classes), 0)

    def facts(self, key: str, source: Any, manifest: Manifest, scenes: Sequence[int]) -> Facts:
        if "intensity" in self.config.model.in_features:
            check_intensity(manifest, scenes[0], self.config.lidar.intensity)
        return mask_facts(key, source.mask, manifest, scenes) if self.pretrains else Facts()

    def balance(self, source: Any) -> tuple[str, ...] | None:
        return self.rules.classes if getattr(source, "balance", False) else None

    # Learning

    def counts(self, outputs: LidarOutputs, batch: Batch) -> dict[str, Tensor]:
        found = {}
        if self.pretrains:
            found |= self._class_counts(list(self._voxel_labels(batch)), batch.device)
        if self.teaches:
            taught = self._class_counts(list(_taught(batch)[batch.labeled :]), batch.device)
            found |= {f"{name}@teacher": value for name, value in taught.items()}
        if self.segments:
            found |= self._class_counts(self._point_labels(batch), batch.device)
        if self.detects:
            found |= self.boxes.counts(batch.part(Boxes))
        return found

    def _class_counts(self, frames: Sequence[Tensor], device: torch.device) -> dict[str, Tensor]:
        weights, nothing = self._class_weights(), torch.zeros((), device=device)
        found = {"ce": sum((weighted_count(frame, len(weights), weights) for frame in frames), nothing)}
        if self.config.loss.lovasz_weight:
            classes = range(self.named_classes)
            found["lovasz"] = sum((lovasz_counts(frame, classes) for frame in frames), nothing)
        return found

    def sums(self, outputs: LidarOutputs, batch: Batch) -> dict[str, Tensor]:
        found = {}
        if self.pretrains:
            found |= self._class_sums(self._voxels(outputs, self._voxel_labels(batch), 0), batch.keys)
        if self.teaches:
            sums = self._class_sums(
                self._voxels(outputs, _taught(batch)[batch.labeled :], batch.labeled), batch.keys[batch.labeled :]
            )
            factor = self.config.teacher.weight * self.config.teacher.factor(self.progress)
            found |= {f"{name}@teacher": factor * value for name, value in sums.items()}
        if self.segments:
            found |= self._class_sums(self._points(outputs, batch), batch.keys)
        if self.detects:
            found |= self.boxes.sums(outputs.detection, batch.part(Boxes))
        return found

    def _voxels(self, outputs: LidarOutputs, labels: Tensor, first: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Logits (N, K + 1) and labels (N,) of the known voxels of each frame from number ``first``; most are unknown. Without
        labels, of a frame without known voxels."""
        logits = self._logits(outputs)
        logits = logits[first : first + len(labels)] if len(labels) else logits[:1]
        if not len(labels):
            labels = logits.new_full((1, *logits.shape[2:]), IGNORE, dtype=torch.uint8)
        for frame, truth in zip(logits, labels):
            known = (truth != IGNORE).flatten().nonzero().squeeze(1)
            wide = frame.flatten(1)[:, known].t()
            yield torch.cat([wide, wide.new_zeros(len(wide), 1)], 1), truth.flatten()[known]

    def _logits(self, outputs: LidarOutputs) -> Tensor:
        """(B, K, X, Y, Z) of classes against free, of all frames."""
        if outputs.all_logits is None:
            raise ValueError("the network has no occupancy head")
        return outputs.all_logits

    def taught(self, batch: Batch, outputs: LidarOutputs) -> Batch:
        """Classes of which the teacher is sure, of frames without labels."""
        logits, teacher = self._logits(outputs), self.config.teacher
        labels = torch.full((batch.size, *logits.shape[2:]), IGNORE, dtype=torch.uint8, device=logits.device)
        for index in range(batch.labeled, batch.size):
            wide = torch.cat([logits[index], torch.zeros_like(logits[index, :1])])
            sure, best = wide.softmax(0).max(0)
            least = torch.where(best == len(wide) - 1, teacher.empty, teacher.occupied)
            labels[index] = torch.where(sure >= least, best, IGNORE).to(torch.uint8)
        known = batch.occupancy
        if known is None:
            raise ValueError("the batch has no voxel labels")
        return dataclasses.replace(batch, occupancy=dataclasses.replace(known, taught=labels))

    def _points(self, outputs: LidarOutputs, batch: Batch) -> Iterator[tuple[Tensor, Tensor]]:
        """Logits (N, K) and labels (N,) of the points of each frame."""
        if outputs.point_logits is None or batch.points is None:
            raise ValueError("the network has no segmentor")
        logits = outputs.point_logits.float().split(batch.points.counts.tolist())
        labels = self._point_labels(batch) or [torch.full((len(logits[0]),), IGNORE, device=batch.device)]
        yield from zip(logits, labels)

    def _class_sums(self, frames: Iterable[tuple[Tensor, Tensor]], keys: Sequence[str]) -> dict[str, Tensor]:
        loss, weights, found = self.config.loss, self._class_weights(), {}
        for index, (logits, truth) in enumerate(frames):
            values = {"ce": weighted_cross_entropy(logits, truth, weights)}
            if loss.lovasz_weight:
                values["lovasz"] = lovasz_softmax(
                    logits.softmax(1),
                    truth,
                    classes=range(self.named_classes),
                    sample=loss.lovasz_sample,
                    generator=_generator(keys[index] if keys else ""),
                )
            found = {name: found.get(name, 0.0) + value for name, value in values.items()}
        return found

    @property
    def weights(self) -> Mapping[str, float | None]:
        loss = self.config.loss
        return {"ce": loss.ce_weight, "lovasz": loss.lovasz_weight, **self.config.detect.weights()}

    @property
    def named_classes(self) -> int:
        """Number of the classes that are learned, without free."""
        return self.config.classes.num_classes if self.semantic or not self.pretrains else 1

    def _point_labels(self, batch: Batch) -> list[Tensor]:
        """Of each labeled frame (N,) uint8; noise is not learned."""
        if batch.point_labels is None:
            raise ValueError("the batch has no classes of points")
        classes = batch.point_labels.classes
        classes = torch.where(classes < convention_of(self.config.classes).first, IGNORE, classes)
        return list(classes.split(batch.point_labels.counts.tolist()))

    def _voxel_labels(self, batch: Batch) -> Tensor:
        """(S, X, Y, Z) uint8 ids of the classes that are trained, free last, or 255."""
        if batch.occupancy is None:
            raise ValueError("the batch has no voxel labels")
        return batch.occupancy.classes() if batch.labeled else batch.occupancy.binary[:0].to(torch.uint8)

    def _class_weights(self) -> tuple[float, ...]:
        """Of the classes; of voxels with free, the last."""
        loss, config = self.config.loss, self.config
        if self.pretrains and not self.semantic:
            return (loss.other_weight, loss.empty_weight)
        heavy = foreground(config.classes, loss)
        named = [loss.foreground_weight if name in heavy else loss.other_weight for name in config.classes.classes]
        return (*named, loss.empty_weight) if self.pretrains else tuple(named)

    # Evaluation and prediction

    def scoring(self, manifest: Manifest, unknown: float | None) -> Scoring:
        if self.pretrains:
            return occupancy_scoring(
                self.config,
                manifest,
                unknown,
                kind="softmax_focal",
                grid=self.label_grid,
                classes=self._has_voxels,
            )
        makers: dict[str, Callable[[], Metric]] = {}
        if self.detects:
            makers["AP"] = lambda: DetectionScores(self.config.classes, self._found_boxes)
        if self.segments:
            makers["IoU"] = lambda: PointScores(self.config.classes, self._found_classes)
        if len(makers) == 1:
            return Scoring(next(iter(makers.values())))
        return Scoring(lambda: JointMetric({kind: make() for kind, make in makers.items()}))

    def _found_boxes(self, outputs: LidarOutputs, batch: Batch) -> list[Detections]:
        return self.boxes.decode(outputs.detection)

    def _found_classes(self, outputs: LidarOutputs, batch: Batch) -> Tensor:
        """Of the points of labeled frames; never class 0 where that is noise, which nothing may be called."""
        return self._all_classes(outputs, batch)[: int(batch.part(PointLabels).counts.sum())]

    def _all_classes(self, outputs: LidarOutputs, batch: Batch) -> Tensor:
        """Of the points of all frames."""
        if outputs.point_logits is None:
            raise ValueError("the network has no segmentor")
        first = convention_of(self.config.classes).first
        return outputs.point_logits[:, first:].argmax(1) + first

    def draw(
        self, path: Path, batch: Batch, outputs: LidarOutputs, *, index: int, sensors: Sequence[str], title: str
    ) -> bool:
        if self.detects or self.segments:
            reach, taxonomy = max(self.config.model.point_range), self.config.classes
            if self.detects:
                found = self._found_boxes(outputs, batch)[index]
                # Boxes in the LiDAR's frame are not drawn into images, which are placed in the ego's.
                cameras = self.cameras_of(batch.keys[index]) if self.config.voxel_grid.frame == "ego" else None
                detection_picture(
                    path, batch, found, index, taxonomy=taxonomy, reach=reach, title=title, cameras=cameras
                )
            if self.segments:
                classes = self._found_classes(outputs, batch).split(batch.part(Points).counts.tolist())[index]
                path = path.with_stem(f"{path.stem}-points") if self.detects else path
                segmentation_picture(
                    path, batch, classes.cpu().numpy(), index, taxonomy=taxonomy, reach=reach, title=title
                )
            return True
        if self.config.model.target == "bev":
            return False
        prediction_picture(
            path,
            batch,
            outputs,
            index=index,
            grid=self.config.voxel_grid,
            taxonomy=self.config.classes if self.semantic else BINARY,
            cameras=(),
            kind="softmax_focal",
            title=title,
        )
        return True

    def check_prediction(self) -> None:
        if not self._has_voxels:
            raise ValueError(
                "predicts no classes of voxels; give one of stage pretrain with occupancy=semantic and model.target=volume"
            )

    def predict(
        self, model: nn.Module, batches: Iterable[Batch], keep: Keep, flips: bool
    ) -> Iterator[tuple[str, Labels]]:
        return predict(model, batches, keep=keep, kind="softmax_focal", flips=flips)

    def detections(self, outputs: LidarOutputs, batch: Batch) -> list[BoxSet]:
        found = self._found_boxes(outputs, batch)
        return [BoxSet(f.boxes, f.classes, f.velocity, scores=f.scores) for f in found]

    def point_segments(self, outputs: LidarOutputs, batch: Batch) -> list[Segments]:
        if self.config.lidar.sweeps > 1:
            raise ValueError("a sample has the points of several sweeps; set lidar.sweeps=1")
        boxes = self._found_boxes if self.detects else None
        return PointPanopticScores(self.config.classes, RefineConfig(), self._all_classes, boxes).segments(
            outputs, batch
        )

    def synthetic_batch(self, labeled: int, other: int) -> Batch:
        batch = lidar_frames(self.config, labeled + other)
        batch.labeled = labeled
        if self.pretrains:
            batch.occupancy = self._patches(labeled, other)
        g, cloud = torch.Generator().manual_seed(1), batch.points
        if self.segments and cloud is not None:
            counts = cloud.counts[:labeled]
            classes = torch.randint(0, self.named_classes, (int(counts.sum()),), generator=g, dtype=torch.uint8)
            batch.point_labels = PointLabels(classes, counts)
        if self.detects and cloud is not None:
            batch.boxes = self._cars(cloud, labeled)
        return batch

    def _patches(self, labeled: int, other: int) -> Occupancy:
        """A twentieth of the voxels occupied, in patches of 4 x 4."""
        g, shape = torch.Generator().manual_seed(0), self.label_grid.shape
        free = len(self._class_weights()) - 1
        patches = (labeled + other, -(-shape[0] // 4), -(-shape[1] // 4), shape[2])
        labels = torch.randint(0, free * 20, patches, generator=g).clamp_max(free)
        labels = labels.repeat_interleave(4, 1).repeat_interleave(4, 2)[:, : shape[0], : shape[1]].to(torch.uint8)
        known = torch.ones(labels.shape, dtype=torch.bool)
        return Occupancy(labels != free, known, semantic=labels[:labeled])

    def _cars(self, cloud: Points, labeled: int, count: int = 5) -> Boxes:
        """Boxes around some points."""
        firsts = (cloud.counts.cumsum(0) - cloud.counts)[:labeled]
        centers = cloud.xyz[(firsts[:, None] + torch.arange(count)).flatten()]
        size = torch.tensor([4.5, 1.9, 1.6, 0.3]).repeat(len(centers), 1)
        return Boxes(
            boxes=torch.cat([centers, size], 1),
            classes=torch.arange(len(centers)).remainder(len(self.rules.classes)).to(torch.uint8),
            velocity=torch.ones(len(centers), 2),
            points=torch.full((len(centers),), 9, dtype=torch.int32),
            counts=torch.full((labeled,), count),
        )


def foreground(taxonomy: Taxonomy, loss: SpotLoss) -> tuple[str, ...]:
    """Classes of the foreground."""
    wanted = FOREGROUND if loss.foreground is None else loss.foreground
    return tuple(name for name in taxonomy.classes if name in wanted)


def _generator(key: str) -> torch.Generator:
    digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def lidar_frames(config: SpotRecipe, frames: int, count: int = 4000) -> Batch:
    """Frames of plausible points: many near, most on the ground."""
    g, size = torch.Generator().manual_seed(0), frames * count
    lower, upper = torch.tensor(config.model.point_range[:3]), torch.tensor(config.model.point_range[3:])
    reach, middle = (upper - lower)[:2].min() / 2, (upper + lower) / 2
    distance, angle, height = torch.rand(3, size, generator=g)
    xyz = torch.stack(
        [
            middle[0] + distance**2 * reach * torch.cos(2 * math.pi * angle),
            middle[1] + distance**2 * reach * torch.sin(2 * math.pi * angle),
            (3 * height**4).clamp(lower[2] + 0.1, upper[2] - 0.1),
        ],
        1,
    )
    extra = torch.rand(size, len(config.model.in_features) - 3, generator=g)
    return Batch(
        scene_aug=torch.eye(3).repeat(frames, 1, 1),
        keys=[f"synthetic-{i}" for i in range(frames)],
        points=Points(xyz, torch.full((frames,), count), extra if extra.shape[1] else None),
    )


def _taught(batch: Batch) -> Tensor:
    if batch.occupancy is None or batch.occupancy.taught is None:
        raise ValueError("the batch has not been through its teacher")
    return batch.occupancy.taught
