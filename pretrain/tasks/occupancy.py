"""What tasks on camera frames with voxel labels share: their part of the recipe, samples, masks and scores."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn

from occstream.evaluation.detection import rules_of
from occstream.evaluation.evaluate import JointMetric, Metric
from occstream.evaluation.instances import RefineConfig
from occstream.evaluation.occupancy import Head, OccupancyMetric, classify
from occstream.evaluation.panopticscores import VoxelPanopticScores, VoxelSegments
from occstream.evaluation.rayiou import ray_origins
from occstream.evaluation.rayscores import RayScores
from occstream.models.batch import Batch, Cameras, OccOutputs, Occupancy
from occstream.models.centerpoint import Detections
from occstream.pretrain.annotations import Annotations
from occstream.pretrain.augment import AugmentConfig
from occstream.pretrain.config import Config, DataConfig, EvalConfig, Mask
from occstream.pretrain.losses import LossConfig
from occstream.pretrain.reading import cache
from occstream.pretrain.samples import FrameFiller
from occstream.pretrain.tasks.base import Facts, Scoring, Task
from occstream.sharding.grid import VoxelGrid
from occstream.sharding.labels import grid_to_global
from occstream.sharding.manifest import Manifest
from occstream.sharding.poses import compose
from occstream.sharding.schema import IGNORE, Frame, frame_key, swept
from occstream.sharding.stream import ShardReader

FindBoxes = Callable[[Any, Batch], Sequence[Detections]]
"""Boxes of each frame, from a network's outputs."""


@dataclass
class MaskedData(DataConfig):
    """A stream with voxel labels, of which a mask chooses those that count."""

    mask: Mask = "auto"
    """Which voxels enter loss and metric: those that the labels know (auto: all where they have no mask), those of the
    LiDAR's or the cameras' visibility mask, or all (none). How many unknown voxels a setting makes count is printed and
    stored."""


@dataclass
class MaskedEval(EvalConfig):
    """Evaluation at the end of training (and every ``every`` steps)."""

    convention: Literal["auto", "occ3d", "openscene", "openoccupancy", "semantickitti", "lidarseg"] = "auto"
    """How classes of voxels are averaged: the way the labels' benchmark does (auto), or a named convention."""
    mask: Mask = "auto"
    """Same as ``data.mask``, for the metric; declared with the result."""
    rays: bool = False
    """Also score RayIoU: by what rays of a LiDAR meet that stands where the scene's did. Takes about 0.1 s a frame of 200 x
    200 x 16 voxels, and needs the lidar group. Rays pass unknown voxels; published scores are of ``mask: none``."""
    panoptic: bool = False
    """Also score panoptic quality of voxels, and of rays with ``rays``: true instances follow from the boxes of the labels. A
    network that finds no boxes is scored by connected voxels of a class."""


@dataclass
class OccupancyData(MaskedData):
    """The stream this stage trains on: binary labels for pre-training, semantic labels for fine-tuning."""

    cameras: tuple[str, ...] | None = None
    """Camera names in order. None: all that the first, middle and last frame of the first scene have."""
    history: int = 0
    """Previous key-frames whose images are used as additional views of static objects, moved by the ego motion; in all
    stages, and for replay too. A model with camera embeddings needs ``model.cameras`` for all views."""
    binary_from: Literal["labels", "semantic"] = "labels"
    """Binary target: the packed binary labels, or B* made from the semantic labels (B2S, Sec. 4.1)."""
    soft: bool = False
    """Learn from both classes of labels that have two (pseudo-labels of ``occstream predict --keep top2``; B2S, App. D);
    False: only from the first."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.history <= 8:
            raise ValueError(f"history is {self.history}, must be 0 to 8")


@dataclass
class OccupancyEval(MaskedEval):
    """Evaluation at the end of training (and every ``every`` steps)."""

    threshold: float = 0.25
    """Minimum probability of the best class, below which a voxel counts as free: in evaluations, predictions and pictures (with
    ``loss.kind`` softmax_focal free is a class of its own)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.threshold < 1:
            raise ValueError(f"threshold is {self.threshold}, must be between 0 and 1")


@dataclass
class OccupancyConfig(Config):
    """A recipe of a task on camera frames with voxel labels."""

    data: OccupancyData = field(default_factory=OccupancyData)
    eval: OccupancyEval = field(default_factory=OccupancyEval)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    loss: LossConfig = field(default_factory=LossConfig)


def camera_sample(
    config: OccupancyConfig, cameras: Sequence[str], *, train: bool, semantic: bool, depth_cell: int = 0, **choices: Any
) -> FrameFiller:
    """How frames become samples by a recipe.

    Args:
        train: augment.
        semantic: with classes.
        depth_cell: pixels per cell of the depth maps that the loss needs; 0: none.
        choices: mask, binary_from, soft, labels of ``FrameFiller``.
    """
    return FrameFiller(
        config.augment,
        tuple(cameras),
        config.voxel_grid,
        config.classes,
        seed=config.train.seed if train else 0,
        train=train,
        semantic=semantic,
        depth_cell=depth_cell,
        history=config.data.history,
        decode=config.train.decoder == "cpu",
        **choices,
    )


def mask_facts(
    key: str, mask: Mask, manifest: Manifest, scenes: Sequence[int], *, binary_from: str = "labels"
) -> Facts:
    """The share of unknown voxels that a mask makes count, by the mask's setting."""
    share = unknown_share(manifest, scenes, mask, binary_from=binary_from)
    numbers = {} if share is None else {f"{key}.mask": share}
    return Facts(numbers, [unknown_line(f"{key}.mask", mask, share)] if share else [])


def occupancy_scoring(
    config: Any,
    manifest: Manifest,
    unknown: float | None,
    *,
    grid: VoxelGrid,
    kind: Head,
    threshold: float = 0.25,
    classes: bool = True,
    boxes: FindBoxes | None = None,
    more: Mapping[str, Callable[[], Metric]] | None = None,
) -> Scoring:
    """Scores by the labels' own convention, or the recipe's.

    Args:
        config: a recipe whose section ``eval`` has ``convention`` and ``mask``.
        grid: of the labels.
        kind, threshold: how logits become classes.
        classes: whether the network of the stage predicts classes of voxels: without, there are neither rays nor instances.
        boxes: gives the boxes of each frame that claim voxels for ``eval.panoptic``, as ``refine`` of the recipe says; None: a
            network without.
        more: further scores, by kind.
    """
    wanted, (own, how) = config.eval.convention, manifest.metric_convention()
    convention, notes = own if wanted == "auto" else wanted, []
    if convention != own:
        notes.append(f"eval.convention={wanted}: the labels' own is {own} ({how})")
    elif wanted == "auto" and how.startswith("inferred"):
        notes.append(f"eval.convention=auto: {own}, {how}")

    def voxels() -> OccupancyMetric:
        return OccupancyMetric(
            config.classes,
            grid,
            convention=convention,
            mask=config.eval.mask,
            unknown=unknown,
            kind=kind,
            threshold=threshold,
        )

    makers: dict[str, Callable[[], Metric]] = {"IoU": voxels}
    for name in ("rays", "panoptic"):
        if getattr(config.eval, name) and not classes:
            notes.append(f"eval.{name}=true is without effect: this stage predicts no classes of voxels")
    if classes and (config.eval.rays or config.eval.panoptic):
        makers |= _instance_scoring(config, manifest, notes, grid=grid, kind=kind, threshold=threshold, boxes=boxes)
    makers |= more or {}
    if len(makers) == 1:
        return Scoring(voxels, notes)
    return Scoring(lambda: JointMetric({name: make() for name, make in makers.items()}), notes)


def _instance_scoring(
    config: Any,
    manifest: Manifest,
    notes: list[str],
    *,
    grid: VoxelGrid,
    kind: Head,
    threshold: float,
    boxes: FindBoxes | None,
) -> dict[str, Callable[[], Metric]]:
    """Scores of rays and of panoptic voxels; arguments as of ``occupancy_scoring``."""

    def found(outputs: OccOutputs, batch: Batch) -> Tensor:
        if outputs.semantic_logits is None:
            raise ValueError("the network has no classes")
        return classify(outputs.semantic_logits[: batch.labeled], kind, threshold)

    makers: dict[str, Callable[[], Metric]] = {}
    refine = getattr(config, "refine", None) or RefineConfig()
    segments = VoxelSegments(config.classes, grid, refine, found, boxes=boxes) if config.eval.panoptic else None
    if config.eval.rays:
        places, instances = LidarPlaces(manifest, grid), segments.of_rays if segments else None
        makers["RayIoU"] = lambda: RayScores(config.classes, grid, places, found, instances=instances)
        if config.eval.mask != "none":
            left = f"eval.mask={config.eval.mask}"
            notes.append(f"eval.rays=true: rays pass voxels that {left} leaves out; eval.mask=none has all")
    if segments:
        makers["PQ-voxel"] = lambda: VoxelPanopticScores(segments)
    return makers


def eval_boxes(config: Any, role: str, *, classes: bool) -> Annotations | None:
    """What samples of an evaluation need for ``eval.panoptic``; None: nothing."""
    wanted = role == "eval" and classes and config.eval.panoptic
    return Annotations(rules_of(config.classes).classes, seen=False) if wanted else None


class LidarPlaces:
    """Where rays of a frame begin: places of its scene's LiDAR. Raises ValueError if the set does not have them."""

    def __init__(self, manifest: Manifest, grid: VoxelGrid) -> None:
        if "lidar" not in manifest.groups:
            raise ValueError(
                f"{manifest.url}: has no group lidar, and eval.rays=true needs the places of the LiDAR; pack it, or set "
                "eval.rays=false"
            )
        self.manifest, self.grid = manifest, grid
        self._places = {frame_key(e.name, i): (n, i) for n, e in enumerate(manifest.scenes) for i in range(e.frames)}
        self._known: tuple[int, list[tuple[np.ndarray, np.ndarray]]] = (-1, [])

    def __call__(self, key: str) -> np.ndarray:
        """(1..8, 3) meters in the frame of the grid."""
        scene, index = self._places[key]
        if self._known[0] != scene:
            reader = ShardReader(self.manifest, ("lidar",), cache(self.manifest.url))
            try:
                frames = (reader.frame(scene, i) for i in range(self.manifest.scenes[scene].frames))
                self._known = scene, [(self._lidar(frame), grid_to_global(frame, self.grid)) for frame in frames]
            finally:
                reader.close()
        lidars, grids = zip(*self._known[1])
        return ray_origins(lidars, grids[index], self.grid)

    def _lidar(self, frame: Frame) -> np.ndarray:
        return compose(swept(frame).ego_to_global, swept(frame).sensor_to_ego)


def unknown_share(
    manifest: Manifest, scenes: Sequence[int], mask: Mask, *, binary_from: str = "labels", frames: int = 8
) -> float | None:
    """Share (0..1) of the voxels that count under a mask although the labels do not know them, over evenly spaced frames;
    None for the masks that never count one."""
    if mask not in ("none", "camera"):
        return None
    places = [(i, k) for i in scenes for k in range(manifest.scenes[i].frames)]
    reader = ShardReader(manifest, (manifest.label_group,), cache(manifest.url))
    counted = unknown = 0
    try:
        for n in np.unique(np.linspace(0, len(places) - 1, min(frames, len(places))).astype(int)):
            labels = reader.frame(*places[n]).labels
            if labels is None:
                continue  # the streams say which frame lacks what
            counts = labels.mask_camera if mask == "camera" else np.ones(labels.binary.shape, bool)
            if counts is None:
                continue
            if binary_from == "semantic" and labels.semantic is not None:
                counts = counts & (labels.semantic != IGNORE)
            counted += int(counts.sum())
            unknown += int((counts & ~labels.known()).sum())
    finally:
        reader.close()
    return unknown / max(1, counted)


def unknown_line(key: str, mask: Mask, share: float) -> str:
    """What to print of a setting that makes unknown voxels count."""
    return f"{key}={mask}: {100 * share:.1f} % of the voxels that count are unknown to the labels; {key}=auto leaves them out"


def camera_names(manifest: Manifest, scene: int, wanted: tuple[str, ...] | None = ()) -> tuple[str, ...]:
    """Names of the cameras to train on, in order: the wanted ones, else all that a scene's first, middle and last frame have.

    Raises:
        ValueError: these frames have no cameras, or none by a wanted name.
    """
    reader = ShardReader(manifest, ("cameras",), cache(manifest.url))
    frames = manifest.scenes[scene].frames
    try:
        found = [list(reader.frame(scene, index).cameras) for index in sorted({0, frames // 2, frames - 1})]
    finally:
        reader.close()
    names = tuple(dict.fromkeys(name for cameras in found for name in cameras))
    if unknown := [name for name in wanted or () if names and name not in names]:
        raise ValueError(
            f"{manifest.url}: scene {manifest.scenes[scene].name} has no camera {unknown[0]!r}, only {', '.join(names)}; set "
            "data.cameras"
        )
    if not names:
        raise ValueError(
            f"{manifest.url}: scene {manifest.scenes[scene].name} has no cameras; this model trains on images"
        )
    return wanted or names


class CameraTask(Task):
    """A task whose network has an image encoder, ``images``.

    Class attributes:
        parts: parts of a step whose time is told apart, by the module that does them. What a network lacks is skipped.
    """

    parts: ClassVar[Mapping[str, str]] = {}

    def compile(self, model: nn.Module, backend: str) -> None:
        """Compiles the image backbone alone: it is most of the FLOPs, and its shapes do not change. Activation checkpointing
        stays outside: it runs the compiled function again."""
        images: Any = model.get_submodule("images")
        images.levels = torch.compile(images.levels, dynamic=False, backend=backend)

    def timed(self, model: nn.Module) -> Mapping[str, nn.Module]:
        """Modules of ``parts`` that the network has."""
        found = {part: getattr(model, name, None) for part, name in self.parts.items()}
        return {part: module for part, module in found.items() if isinstance(module, nn.Module)}

    def sensors(self, manifest: Manifest, scene: int, wanted: Sequence[str] = ()) -> tuple[str, ...]:
        """The wanted cameras, else those of the recipe, else all. Raises ValueError as ``camera_names``."""
        return camera_names(manifest, scene, tuple(wanted or self.config.data.cameras or ()))


def check_class_weights(weights: Mapping[str, float], config: Config) -> None:
    """Raises ValueError if ``loss.class_weights`` has a name that the recipe's taxonomy has not."""
    known = (*config.classes.classes, "free")
    if unknown := [name for name in weights if name not in known]:
        raise ValueError(
            f"loss.class_weights has {unknown[0]!r}, which taxonomy {config.taxonomy!r} has not: {', '.join(known)}"
        )


def camera_frames(config: Any, semantic: int, binary: int, *, depth_cell: int = 0, history: int = 0) -> Batch:
    """Frames of plausible content: six cameras around, a twentieth of the voxels occupied, in patches of 4 x 4.

    Args:
        config: a recipe with cameras (``data``) and ``augment``.
        semantic, binary: frames with and without classes.
        depth_cell: as of ``camera_sample``.
        history: key-frames before, whose images are views too.
    """
    g = torch.Generator().manual_seed(0)
    size, (height, width), shape = semantic + binary, config.augment.image_size, config.voxel_grid.shape
    cameras = len(config.data.cameras or range(6)) * (1 + history)
    to_ego = torch.eye(4).repeat(size, cameras, 1, 1)
    for v in range(cameras):
        a = 2 * math.pi * v / cameras
        turn = torch.tensor([[math.cos(a), -math.sin(a), 0], [math.sin(a), math.cos(a), 0], [0, 0, 1.0]])
        to_ego[:, v, :3, :3] = turn @ torch.tensor([[0.0, 0, 1], [-1, 0, 0], [0, -1, 0]])
        to_ego[:, v, 2, 3] = 1.5
    focal = torch.tensor([[width * 0.6, 0, width / 2], [0, width * 0.6, height / 2], [0, 0, 1]])
    patches = (size, -(-shape[0] // 4), -(-shape[1] // 4), shape[2])
    labels = torch.randint(0, config.classes.num_classes * 20, patches, generator=g).clamp_max(config.classes.free_id)
    labels = labels.repeat_interleave(4, 1).repeat_interleave(4, 2)[:, : shape[0], : shape[1]].to(torch.uint8)
    cell = depth_cell
    depth = torch.rand(size, cameras, -(-height // cell), -(-width // cell)) * 20 if cell else None
    return Batch(
        scene_aug=torch.eye(3).repeat(size, 1, 1),
        labeled=semantic,
        cameras=Cameras(
            images=torch.randint(0, 255, (size, cameras, 3, height, width), generator=g, dtype=torch.uint8),
            intrinsics=focal.expand(size, cameras, 3, 3).contiguous(),
            camera_to_ego=to_ego,
            post_rot=torch.eye(3).repeat(size, cameras, 1, 1),
            post_tran=torch.zeros(size, cameras, 3),
            depth=depth,
        ),
        occupancy=Occupancy(
            binary=labels != config.classes.free_id,
            binary_valid=torch.ones(labels.shape, dtype=torch.bool),
            semantic=labels[:semantic],
        ),
    )
