"""PanoOcc: semantic voxels from the images of several key-frames (Wang et al.), after binary pre-training of the same network."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from occstream.evaluation.occupancy import HEADLINE
from occstream.evaluation.predictions import Keep, predict
from occstream.evaluation.report import prediction_picture
from occstream.models.batch import Batch, Cameras, History
from occstream.models.panoocc import PanoOcc, PanoOccConfig, PanoOutputs
from occstream.pretrain import panolosses
from occstream.pretrain.augment import AugmentConfig
from occstream.pretrain.config import Config
from occstream.pretrain.keyframes import KeyFrameFiller
from occstream.pretrain.panolosses import PanoLoss
from occstream.pretrain.tasks.base import Facts, Role, Scoring, Task, Transfer
from occstream.pretrain.tasks.occupancy import (
    MaskedData,
    MaskedEval,
    camera_frames,
    camera_names,
    mask_facts,
    occupancy_scoring,
)
from occstream.pretrain.tasks.registry import register
from occstream.sharding.manifest import Manifest
from occstream.sharding.schema import Labels

PARTS = {
    "image encoder": "images",
    "view encoder": "views",
    "temporal encoder": "temporal",
    "decoder": "decoder",
    "voxel head": "voxel_head",
}  # part of a step -> module of the network


@dataclass
class PanoData(MaskedData):
    """The stream this stage trains on: binary labels for pre-training, semantic labels for fine-tuning."""

    cameras: tuple[str, ...] | None = None
    """Camera names in order. None: all that the first, middle and last frame of the first scene have."""
    interval: int = 1
    """Key-frames from one of ``model.frames`` to the next (PanoOcc, Table 8: 0.5 s, the distance of nuScenes' key-frames)."""
    binary_from: Literal["labels", "semantic"] = "labels"
    """Binary target: the packed binary labels, or made from the semantic labels."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.interval <= 50:
            raise ValueError(f"interval is {self.interval}, must be 1 to 50 key-frames")


@dataclass
class PanoOccRecipe(Config):
    """A recipe of PanoOcc."""

    data: PanoData = field(default_factory=PanoData)
    eval: MaskedEval = field(default_factory=MaskedEval)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    model: PanoOccConfig = field(default_factory=PanoOccConfig)
    loss: PanoLoss = field(default_factory=PanoLoss)

    def __post_init__(self) -> None:
        super().__post_init__()
        known = (*self.classes.classes, "free")
        if unknown := [name for name in self.loss.class_weights if name not in known]:
            raise ValueError(
                f"loss.class_weights has {unknown[0]!r}, which taxonomy {self.taxonomy!r} has not: {', '.join(known)}"
            )


@register
class PanoOccTask(Task):
    """Stage pretrain learns occupancy of the fine grid; finetune has the whole network, and binary frames of the replay stop at
    the binary head."""

    name = "panoocc"
    stages: ClassVar[Mapping[str, str]] = {
        "pretrain": "Pre-trains on binary occupancy.",
        "finetune": "Fine-tunes semantic occupancy.",
    }
    Config = PanoOccRecipe
    terms = ("binary", "voxel", "lovasz", "thing")
    headline: ClassVar[Mapping[str, str]] = {f"eval/{name}": HEADLINE[name] for name in ("miou", "iou", "binary_iou")}
    knobs = (
        "train.accumulate (more micro-steps)",
        "model.checkpointing=true",
        "model.head_rows=16",
        "train.zero_stage",
        "more processes",
    )
    config: PanoOccRecipe

    def __init__(self, config: PanoOccRecipe) -> None:
        super().__init__(config)
        self.semantic = self.labeled = self.replays = config.stage == "finetune"
        names = config.classes.classes
        self._labels: dict[str, Any] = {
            "classes": names,
            "things": [i for i, name in enumerate(names) if name in config.classes.things],
        }

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
        )

    def check(self, model: nn.Module) -> None:
        if not self.semantic and not self.config.loss.binary_weight:
            raise ValueError(
                "loss.binary_weight is 0, and stage pretrain learns nothing else; set it, or stage=finetune"
            )

    def transfer(self, model: nn.Module) -> Transfer:
        """All but what only semantic frames teach."""
        return Transfer([key for key in model.state_dict() if not key.startswith(PanoOcc.SEMANTIC)])

    def compile(self, model: nn.Module, backend: str) -> None:
        images: Any = model.get_submodule("images")
        images.levels = torch.compile(images.levels, dynamic=False, backend=backend)

    def timed(self, model: nn.Module) -> Mapping[str, nn.Module]:
        found = {part: getattr(model, name, None) for part, name in PARTS.items()}
        return {part: module for part, module in found.items() if isinstance(module, nn.Module)}

    # Data

    def sensors(self, manifest: Manifest, scene: int, wanted: Sequence[str] = ()) -> tuple[str, ...]:
        return camera_names(manifest, scene, tuple(wanted or self.config.data.cameras or ()))

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
            semantic=self.semantic and role in ("main", "eval"),
            mask=source.mask,
            binary_from=config.data.binary_from if role != "replay" else "labels",
            labels=labeled,
            decode=config.train.decoder == "cpu",
        )

    def facts(self, key: str, source: Any, manifest: Manifest, scenes: Sequence[int]) -> Facts:
        binary_from = "labels" if key.startswith("replay") else self.config.data.binary_from
        return mask_facts(key, source.mask, manifest, scenes, binary_from=binary_from)

    # Learning

    def counts(self, outputs: PanoOutputs, batch: Batch) -> dict[str, Tensor]:
        return panolosses.counts(outputs, batch, self.config.loss, **self._labels)

    def sums(self, outputs: PanoOutputs, batch: Batch) -> dict[str, Tensor]:
        return panolosses.sums(outputs, batch, self.config.loss, **self._labels)

    @property
    def weights(self) -> Mapping[str, float | None]:
        return {term: getattr(self.config.loss, f"{term}_weight") for term in self.terms}

    # Evaluation and prediction

    def scoring(self, manifest: Manifest, unknown: float | None) -> Scoring:
        return occupancy_scoring(self.config, manifest, unknown, grid=self.config.voxel_grid, kind="softmax_focal")

    def draw(
        self, path: Path, batch: Batch, outputs: PanoOutputs, *, index: int, sensors: Sequence[str], title: str
    ) -> bool:
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
        return True

    def check_prediction(self) -> None:
        if not self.semantic:
            raise ValueError("is of a pre-training run, which predicts no classes; give a fine-tuned one")

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
        return batch
